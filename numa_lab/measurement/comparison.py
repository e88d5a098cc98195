"""Honest comparison of executions: intervals, the noise floor, and verdicts that may be "same" or "unclear".

The unit is the execution, one process under one binding. Samples inside one are nested: they are reduced to their
median first, and never pooled. Memory alone seldom makes one local node slower than another, so a difference must clear
three hurdles: its interval, Holm's correction over all comparisons of the run, and the noise floor of the A/A pair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from numa_lab.measurement.significance import (
    CONFIDENCE,
    LARGEST_TIE,
    MIN_EXECUTIONS,
    RESAMPLES,
    Ratio,
    all_ratios,
    holm,
)

AA_SUFFIX = "~aa"  # ends the label of the second half of the A/A pair
EQUIVALENCE_MARGIN = 0.02  # effects below 2 % are of no practical interest

CASE = (  # what tells one measured case from another
    "attention", "phase", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "dtype", "backend", "threads",
)  # fmt: skip


def execution_medians(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per execution and case: the median `seconds` of its steady samples."""
    keys = ["execution_id", "block", "order", "label", *CASE]
    return rows[~rows["cold"]].groupby(keys, as_index=False, sort=False)["seconds"].median()


def noise_floor(medians: pd.DataFrame) -> float:
    """By how much one binding differs from itself: the difference of the A/A pair that a tenth of the cases exceeds.

    0.013 stands for 1.3 %. Not a typical difference, since a report makes a claim for each case; and not the largest,
    since one odd case would then forbid every claim. NaN where there is no A/A pair.
    """
    floors = []
    for _, case in medians.groupby(list(CASE), sort=False):
        for twin in {label for label in case["label"] if label.endswith(AA_SUFFIX)}:
            halves = [case.loc[case["label"] == label, "seconds"] for label in (twin, twin.removesuffix(AA_SUFFIX))]
            if all(map(len, halves)):
                floors.append(abs(math.log(halves[0].median() / halves[1].median())))
    return math.expm1(float(np.quantile(floors, 0.9))) if floors else math.nan


@dataclass(frozen=True)
class Comparison:
    """Binding a against binding b in one case: `ratio` is the time of a over the time of b."""

    case: Mapping[str, Any]
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
        """The verdict in words, with the interval and what it rests on."""
        what = f"{str(self.case['attention']).upper()} {self.case['phase']} in {self.case['dtype']}"
        sizes = f"batch {self.case['batch']}, {self.case['kv_len']} tokens, {self.case['threads']} threads"
        if math.isnan(self.low):
            return (
                f"{what} ({sizes}): {self.a} against {self.b} is unclear with {self.executions} execution(s) of each; "
                f"at least {MIN_EXECUTIONS} are needed."
            )
        interval = f"{self.ratio:.3f} times its time [{self.low:.3f}, {self.high:.3f}]"
        said = {
            "slower": f"{self.a} is slower than {self.b}: {interval}.",
            "faster": f"{self.a} is faster than {self.b}: {interval}.",
            "same": f"no difference between {self.a} and {self.b} above {_percent(self._margin)}: {interval}.",
            "unclear": f"{self.a} against {self.b} is unclear: {interval}, noise floor {_percent(self.noise_floor)}.",
        }
        return f"{what} ({sizes}): {said[self.verdict]}"

    def slower_first(self) -> tuple[str, str, float, float, float]:
        """The binding with the longer time, the other one, and their ratio above 1 with its interval."""
        if self.ratio >= 1:
            return self.a, self.b, self.ratio, self.low, self.high
        return self.b, self.a, 1 / self.ratio, 1 / self.high, 1 / self.low

    @property
    def _margin(self) -> float:
        return _tie(self.noise_floor)


def _tie(floor: float) -> float:
    """The largest difference that two bindings may have and be called the same."""
    return min(max(floor, EQUIVALENCE_MARGIN), LARGEST_TIE)


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{share:.1%}"


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of a run, and the noise floor that each claim had to clear."""

    noise_floor: float
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: what is not a number becomes null."""
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


def compare(rows: pd.DataFrame) -> Comparisons:
    """Compare the bindings of a run in every case.

    Every two labels of a case are compared where one of them is local (a node with its own memory), since those are the
    choices that a user has; the A/A twin serves the noise floor alone. All p-values of the run are one family.
    """
    medians = execution_medians(rows)
    floor = noise_floor(medians)
    pairs: list[tuple[dict[str, Any], str, str, NDArray[np.float64], NDArray[np.float64]]] = []
    for values, case in medians.groupby(list(CASE), sort=False):
        samples = {str(label): group["seconds"].to_numpy() for label, group in case.groupby("label")}
        labels = sorted((label for label in samples if not label.endswith(AA_SUFFIX)), key=by_number)
        local = [label for label in labels if is_local(label)] or labels
        described = {name: _plain(value) for name, value in zip(CASE, values, strict=True)}
        pairs += [
            (described, a, b, samples[a], samples[b])
            for i, a in enumerate(labels)
            for b in labels[i + 1 :]
            if a in local or b in local
        ]
    found = [
        (case, a, b, ratio, min(len(left), len(right)))
        for (case, a, b, left, right), ratio in zip(pairs, all_ratios([pair[3:] for pair in pairs]), strict=True)
    ]
    adjusted = holm([ratio.p_value for _, _, _, ratio, _ in found])
    return Comparisons(
        floor,
        tuple(
            Comparison(case, a, b, r.ratio, r.low, r.high, p, few, _verdict(r, p, floor), floor)
            for (case, a, b, r, few), p in zip(found, adjusted, strict=True)
        ),
    )


def by_number(label: str) -> list[str | int]:
    """Sort key that puts c2m2 before c10m10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", label)]


def is_local(label: str) -> bool:
    """Whether a label binds one node's CPUs to that node's memory: c3m3."""
    cpus, _, memory = label.removesuffix(AA_SUFFIX).removeprefix("c").partition("m")
    return cpus == memory and cpus.isdecimal()


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


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


def spread(rows: pd.DataFrame) -> pd.DataFrame:
    """How much slower the slowest local binding is than the fastest, for each case.

    The largest of several medians over the smallest is above 1 by chance alone, so `by_chance` gives what is to be
    expected where all bindings are equal: the median over shuffled labels.

    Returns
    -------
    DataFrame with the columns of ``CASE``, `best` and `worst` (labels), `spread`, `low`, `high` and `by_chance` (0.17:
    17 %; NaN where there is a single local binding or too few executions).
    """
    medians = execution_medians(rows)
    medians = medians[~medians["label"].str.endswith(AA_SUFFIX) & medians["label"].map(is_local).astype(bool)]
    found = []
    for values, case in medians.groupby(list(CASE), sort=False):
        samples = {str(label): group["seconds"].to_numpy() for label, group in case.groupby("label")}
        centre = {label: float(np.median(seconds)) for label, seconds in samples.items()}
        best, worst = min(centre, key=centre.__getitem__), max(centre, key=centre.__getitem__)
        measured = centre[worst] / centre[best] - 1 if len(samples) > 1 else math.nan
        low, high, chance = _spread_interval(list(samples.values())) if len(samples) > 1 else (math.nan,) * 3
        found.append((*values, best, worst, measured, low, high, chance))
    return pd.DataFrame(found, columns=[*CASE, "best", "worst", "spread", "low", "high", "by_chance"])


def _spread_interval(samples: list[NDArray[np.float64]]) -> tuple[float, float, float]:
    """Interval of the spread, and the spread that shuffled labels give.

    The interval is that of the largest of all pairwise differences, at a confidence level that holds for all pairs
    together. Resampling the spread itself can't do: the largest over the smallest of several medians is never 1, so in
    100 simulated runs of four equal nodes such an interval never held the truth, and this one did in 93 to 98.
    """
    if min(map(len, samples)) < MIN_EXECUTIONS:
        return math.nan, math.nan, math.nan
    pairs = list(combinations(samples, 2))
    ratios = all_ratios(pairs, 1 - (1 - CONFIDENCE) / len(pairs))
    low = max(1.0, *(max(r.low, 1 / r.high) for r in ratios)) - 1
    high = max(max(r.high, 1 / r.low) for r in ratios) - 1
    pooled = np.random.default_rng(0).permuted(np.tile(np.concatenate(samples), (RESAMPLES, 1)), axis=1)
    shuffled = [np.median(part, axis=1) for part in np.split(pooled, np.cumsum([len(s) for s in samples])[:-1], axis=1)]
    chance = np.max(shuffled, axis=0) / np.min(shuffled, axis=0) - 1
    return low, high, float(np.median(chance))


def run_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Each execution in run order, with its time relative to its label's: the median over its cases (1: as usual)."""
    medians = execution_medians(rows)
    usual = medians.groupby([*CASE, "label"], sort=False)["seconds"].transform("median")
    relative = medians.assign(relative=medians["seconds"] / usual)
    return (
        relative.groupby(["order", "execution_id", "label"], as_index=False)["relative"].median().sort_values("order")
    )


def lag1_autocorrelation(values: Sequence[float]) -> float:
    """Correlation of each value with the one before it; far from 0 where the machine drifts. NaN below 3 values."""
    series = np.asarray(values, float)
    if len(series) < 3 or np.ptp(series[:-1]) == 0 or np.ptp(series[1:]) == 0:
        return math.nan
    return float(np.corrcoef(series[:-1], series[1:])[0, 1])
