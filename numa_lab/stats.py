"""Honest comparison of executions: intervals, the noise floor, and verdicts that may be "same" or "unclear".

The unit is the execution, one process under one binding. Samples inside one are nested: they are reduced to their
median first, and never pooled. Memory alone seldom makes one local node slower than another, so a difference must clear
three hurdles: its interval, Holm's correction over all comparisons of the run, and the noise floor of the A/A pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

AA_SUFFIX = "~aa"  # ends the label of the second half of the A/A pair
CONFIDENCE = 0.95
EQUIVALENCE_MARGIN = 0.02  # effects below 2 % are of no practical interest
MIN_EXECUTIONS = 3  # per binding: with two, no spread can be told from chance
RESAMPLES = 2000
PAIRS_AT_ONCE = 200  # resampled together, which bounds the memory that it takes

CASE = (  # what tells one measured case from another
    "attention", "phase", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "dtype", "backend", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """Median of a over median of b, with its interval; low and high are NaN where there are too few executions."""

    ratio: float
    low: float
    high: float
    p_value: float  # of no difference


def ratio_of_medians(a: ArrayLike, b: ArrayLike, *, confidence: float = CONFIDENCE) -> Ratio:
    """Compare the execution medians of two bindings.

    The interval is the percentile bootstrap over executions, at a confidence level raised for small samples ("expanded
    percentile": Hesterberg, What Teachers Should Know About the Bootstrap, 2015): resampling few values understates
    their spread. Over 500 simulated pairs of 2 % log-normal noise with an outlier in ten it covered the truth in 98 to
    99 % for 5 to 10 executions (the plain one: 96 to 97 %), and in 88 % for 3, where no resampling can do better. The
    p-value, a second hurdle, is that of Welch's t-test on logarithms: 2 to 3 % of those pairs fell below 5 %.

    Parameters
    ----------
    a, b
        Seconds, one value per execution.
    confidence
        Of the interval.
    """
    left, right = np.asarray(a, float), np.asarray(b, float)
    (ratio,) = _ratios(left[np.newaxis], right[np.newaxis], confidence)
    return ratio


def _ratios(a: NDArray[np.float64], b: NDArray[np.float64], confidence: float = CONFIDENCE) -> list[Ratio]:
    """``ratio_of_medians`` of each row of a to the same row of b, resampled together: one by one takes ten times as long."""
    centre = _ratio(a, b)
    fewest = min(a.shape[-1], b.shape[-1])
    if fewest < MIN_EXECUTIONS:
        return [Ratio(float(ratio), math.nan, math.nan, 1.0) for ratio in centre]
    interval = scipy_stats.bootstrap(
        (a, b), _ratio, n_resamples=RESAMPLES, confidence_level=_expanded(confidence, fewest), method="percentile",
        axis=-1, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    lows, highs = np.asarray(interval.low), np.asarray(interval.high)
    return [Ratio(float(centre[i]), float(lows[i]), float(highs[i]), _p_value(a[i], b[i])) for i in range(len(centre))]


def _ratio(a: NDArray[np.float64], b: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return np.asarray(np.median(a, axis=axis) / np.median(b, axis=axis))


def _p_value(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Welch's t-test on logarithms, from moments: ttest_ind warns where a sample hardly varies."""
    if np.ptp(a) == 0 == np.ptp(b):
        return float(a[0] == b[0])
    a, b = np.log(a), np.log(b)
    return float(
        scipy_stats.ttest_ind_from_stats(
            a.mean(), a.std(ddof=1), len(a), b.mean(), b.std(ddof=1), len(b), equal_var=False
        ).pvalue
    )


def _expanded(confidence: float, executions: int) -> float:
    """The confidence level at which a percentile interval of so few values has about the wanted coverage."""
    quantile = scipy_stats.t.ppf((1 + confidence) / 2, executions - 1) * math.sqrt(executions / (executions - 1))
    return float(2 * scipy_stats.norm.cdf(quantile) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for testing them all (Holm 1979): a family's chance of one false claim stays as asked for."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, float)[order] * (len(order) - np.arange(len(order)))
    adjusted = np.minimum(1.0, np.maximum.accumulate(scaled))
    return [float(value) for value in adjusted[np.argsort(order)]]


def execution_medians(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per execution and case: the median `seconds` of its steady samples."""
    keys = ["execution_id", "block", "order", "label", *CASE]
    return rows[~rows["cold"]].groupby(keys, as_index=False, sort=False)["seconds"].median()


def noise_floor(medians: pd.DataFrame) -> float:
    """By how much one binding differs from itself: the largest difference of the A/A pair over all cases.

    0.013 stands for 1.3 %. The largest and not a typical one, since a report makes a claim for each case. NaN where
    there is no A/A pair.
    """
    floors = []
    for _, case in medians.groupby(list(CASE), sort=False):
        for twin in {label for label in case["label"] if label.endswith(AA_SUFFIX)}:
            halves = [case.loc[case["label"] == label, "seconds"] for label in (twin, twin.removesuffix(AA_SUFFIX))]
            if all(map(len, halves)):
                floors.append(abs(math.log(halves[0].median() / halves[1].median())))
    return math.expm1(max(floors)) if floors else math.nan


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
        return max(self.noise_floor, EQUIVALENCE_MARGIN)


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
        labels = sorted(label for label in samples if not label.endswith(AA_SUFFIX))
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
        for (case, a, b, left, right), ratio in zip(pairs, _all_ratios([pair[3:] for pair in pairs]), strict=True)
    ]
    adjusted = holm([ratio.p_value for _, _, _, ratio, _ in found])
    return Comparisons(
        floor,
        tuple(
            Comparison(case, a, b, r.ratio, r.low, r.high, p, few, _verdict(r, p, floor), floor)
            for (case, a, b, r, few), p in zip(found, adjusted, strict=True)
        ),
    )


def _all_ratios(pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> list[Ratio]:
    """The ratio of each pair of samples; pairs of the same sizes are resampled together, some hundreds at a time."""
    found: dict[int, Ratio] = {}
    sizes: dict[tuple[int, int], list[int]] = {}
    for place, (a, b) in enumerate(pairs):
        sizes.setdefault((len(a), len(b)), []).append(place)
    for places in sizes.values():
        for some in (places[i : i + PAIRS_AT_ONCE] for i in range(0, len(places), PAIRS_AT_ONCE)):
            a, b = (np.array([pairs[place][side] for place in some]) for side in (0, 1))
            found |= dict(zip(some, _ratios(a, b), strict=True))
    return [found[place] for place in range(len(pairs))]


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
    margin = 1 + max(floor, EQUIVALENCE_MARGIN)
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
    """Interval of the spread by resampling executions within each binding, and the spread that shuffled labels give."""
    fewest = min(map(len, samples))
    if fewest < MIN_EXECUTIONS:
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(s, (RESAMPLES, len(s))), axis=1) for s in samples]
    spreads = np.max(drawn, axis=0) / np.min(drawn, axis=0) - 1
    tail = (1 - _expanded(CONFIDENCE, fewest)) / 2
    pooled = rng.permuted(np.tile(np.concatenate(samples), (RESAMPLES, 1)), axis=1)
    shuffled = [np.median(part, axis=1) for part in np.split(pooled, np.cumsum([len(s) for s in samples])[:-1], axis=1)]
    chance = np.max(shuffled, axis=0) / np.min(shuffled, axis=0) - 1
    return float(np.quantile(spreads, tail)), float(np.quantile(spreads, 1 - tail)), float(np.median(chance))


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
