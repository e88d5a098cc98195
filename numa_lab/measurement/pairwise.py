"""Honest comparison of bindings, two at a time: intervals, the noise floor, and verdicts that may be "same" or "unclear".

The unit is the execution, one process under one binding. Memory alone seldom makes one local node slower than another,
so a difference must clear three hurdles: its interval, Holm's correction over all comparisons of the run, and the noise
floor of the A/A pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numa_lab.measurement.labels import AA_SUFFIX, by_number, is_local
from numa_lab.measurement.significance import CONFIDENCE, LARGEST_TIE, MIN_EXECUTIONS, Ratio, all_ratios, holm

EQUIVALENCE_MARGIN = 0.02  # effects below 2 % are of no practical interest

Samples = Mapping[str, NDArray[np.float64]]  # label -> seconds of each of its executions, in one case


@dataclass(frozen=True)
class Comparison:
    """Binding a against binding b in one case: `ratio` is the time of a over the time of b, with its interval."""

    case: Mapping[str, Any]  # what was computed, by the names of the tidy schema
    a: str
    b: str
    ratio: float
    low: float
    high: float
    p_value: float  # after Holm's correction
    executions: int  # of the binding that has fewer
    verdict: str  # a is faster, slower or the same as b, or unclear
    noise_floor: float

    def sentence(self) -> str:
        """Say the verdict in words, with the interval and what it rests on."""
        case = f"{str(self.case['attention']).upper()} {self.case['phase']} in {self.case['dtype']}"
        sizes = f"batch {self.case['batch']}, {self.case['kv_len']} tokens, {self.case['threads']} threads"
        if math.isnan(self.low):
            return (
                f"{case} ({sizes}): {self.a} against {self.b} is unclear with {self.executions} execution(s) of each; "
                f"at least {MIN_EXECUTIONS} are needed."
            )
        interval = f"{self.ratio:.3f} times its time [{self.low:.3f}, {self.high:.3f}]"
        verdicts = {
            "slower": f"{self.a} is slower than {self.b}: {interval}.",
            "faster": f"{self.a} is faster than {self.b}: {interval}.",
            "same": f"no difference between {self.a} and {self.b} above {_percent(self._margin)}: {interval}.",
            "unclear": f"{self.a} against {self.b} is unclear: {interval}, noise floor {_percent(self.noise_floor)}.",
        }
        return f"{case} ({sizes}): {verdicts[self.verdict]}"

    def slower_first(self) -> tuple[str, str, float, float, float]:
        """Give the binding with the longer time, the other one, and their ratio, which is 1 or more, with its interval."""
        if self.ratio >= 1:
            return self.a, self.b, self.ratio, self.low, self.high
        return self.b, self.a, 1 / self.ratio, 1 / self.high, 1 / self.low

    @property
    def _margin(self) -> float:
        return _tie(self.noise_floor)


def _tie(floor: float) -> float:
    """Return the largest difference that two bindings may have and be called the same."""
    return min(max(floor, EQUIVALENCE_MARGIN), LARGEST_TIE)


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{share:.1%}"


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of a run, and the noise floor that each claim had to clear (a share: 0.013 stands for 1.3 %)."""

    noise_floor: float
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """Give plain JSON values; what is not a number becomes null."""
        return {
            "noise_floor": _or_null(self.noise_floor),
            "comparisons": [
                {
                    **c.case,
                    "a": c.a,
                    "b": c.b,
                    "ratio": c.ratio,
                    "low": _or_null(c.low),
                    "high": _or_null(c.high),
                    "p_value": c.p_value,
                    "executions": c.executions,
                    "verdict": c.verdict,
                }
                for c in self.comparisons
            ],
        }


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def noise_floor(cases: Iterable[Samples]) -> float:
    """By how much one binding differs from itself: the difference of the A/A pair that a tenth of the cases exceeds.

    It is not a typical difference, since a report makes a claim for each case; and not the largest, since one odd case
    would then forbid every claim.

    Returns
    -------
    A share: 0.013 stands for 1.3 %. NaN where there is no A/A pair.
    """
    differences = []
    for samples in cases:
        for label in samples:
            twin = label + AA_SUFFIX
            if twin in samples:
                differences.append(abs(math.log(np.median(samples[twin]) / np.median(samples[label]))))
    return math.expm1(float(np.quantile(differences, 0.9))) if differences else math.nan


def compare(cases: Iterable[tuple[Mapping[str, Any], Samples]]) -> Comparisons:
    """Compare the bindings in every case.

    Every two labels of a case are compared where one of them is local (a node with its own memory), since those are the
    choices that a user has; the A/A twin serves the noise floor alone. All p-values are one family.

    Parameters
    ----------
    cases
        For each case what was computed, which its ``Comparison`` then holds, and the samples of each label.

    Returns
    -------
    The noise floor, and the comparisons: by case, and in it by label.
    """
    cases = list(cases)
    floor = noise_floor(samples for _, samples in cases)
    pairs = []
    for case, samples in cases:
        labels = sorted((label for label in samples if not label.endswith(AA_SUFFIX)), key=by_number)
        local = [label for label in labels if is_local(label)] or labels
        pairs += [
            (case, a, b, samples[a], samples[b])
            for i, a in enumerate(labels)
            for b in labels[i + 1 :]
            if a in local or b in local
        ]
    ratios = all_ratios([(of_a, of_b) for _, _, _, of_a, of_b in pairs])
    p_values = holm([ratio.p_value for ratio in ratios])
    return Comparisons(
        floor,
        tuple(
            Comparison(
                case, a, b, ratio.ratio, ratio.low, ratio.high, p_value, min(len(of_a), len(of_b)),
                _verdict(ratio, p_value, floor), floor,
            )
            for (case, a, b, of_a, of_b), ratio, p_value in zip(pairs, ratios, p_values, strict=True)
        ),
    )  # fmt: skip


def _verdict(ratio: Ratio, p_value: float, floor: float) -> str:
    if math.isnan(ratio.low) or math.isnan(floor):
        return "unclear"
    if p_value < 1 - CONFIDENCE:
        if ratio.low > 1 + floor:
            return "slower"
        if ratio.high < 1 / (1 + floor):
            return "faster"
    margin = 1 + _tie(floor)
    return "same" if 1 / margin < ratio.low and ratio.high < margin else "unclear"
