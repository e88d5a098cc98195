"""Medians of samples compared: ratio, interval and p-value of two, the spread of several, and Holm's correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numa_lab.measurement import student_t

CONFIDENCE = 0.95
MIN_EXECUTIONS = 3  # per binding: with two, no spread can be told from chance
LARGEST_TIE = 0.05  # however noisy the run, what may differ by more is not called the same
LEAST_NOISE = 1e-3  # relative spread of executions that is assumed where less was seen
RESAMPLES = 2000
PAIRS_AT_ONCE = 200  # resampled together, which bounds the memory that it takes


@dataclass(frozen=True)
class Ratio:
    """Median of a over median of b, with its interval: `low` and `high` are NaN where there are too few executions."""

    ratio: float
    low: float
    high: float
    p_value: float  # of no difference

    def describe(self, unit: str) -> str:
        """Give the interval in words, such as "1.90 to 2.10 times as fast" for the unit "as fast".

        An interval that holds 1 is called a tie where it is narrow, and unclear where it is wide.
        """
        if math.isnan(self.low):
            return f"unclear, too few runs for an interval ({self.ratio:.2f} times {unit})"
        interval = f"{self.low:.2f} to {self.high:.2f} times {unit}"
        if not self.low <= 1 <= self.high:
            return interval
        tie = self.low > 1 / (1 + LARGEST_TIE) and self.high < 1 + LARGEST_TIE
        return f"a tie ({interval})" if tie else f"unclear ({interval})"


def ratio_of_medians(a: ArrayLike, b: ArrayLike, *, confidence: float = CONFIDENCE) -> Ratio:
    """Compare the execution medians of two bindings.

    Limits: the executions of a block are not paired, so drift between blocks widens the interval and hides effects; it makes
    no false ones.

    Parameters
    ----------
    a, b
        Seconds, one value per execution.
    confidence
        The probability with which the interval holds the true ratio, between 0 and 1.

    Returns
    -------
    The ratio of the medians, its interval, and the p-value of no difference.
    """
    (ratio,) = _ratios(np.array([a], float), np.array([b], float), confidence)
    return ratio


def _ratios(a: NDArray[np.float64], b: NDArray[np.float64], confidence: float = CONFIDENCE) -> list[Ratio]:
    """Compare each row of a with the same row of b as ``ratio_of_medians`` does.

    Rows are resampled together, since one by one takes ten times as long.
    """
    centre = np.median(a, axis=-1) / np.median(b, axis=-1)
    if min(a.shape[-1], b.shape[-1]) < MIN_EXECUTIONS:
        return [Ratio(float(ratio), math.nan, math.nan, 1.0) for ratio in centre]
    low, high, p_value = _intervals(np.log(a), np.log(b), confidence)
    low, high = np.minimum(np.exp(low), centre), np.maximum(np.exp(high), centre)
    return [Ratio(*map(float, values)) for values in zip(centre, low, high, p_value, strict=True)]


def _intervals(
    a: NDArray[np.float64], b: NDArray[np.float64], confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Lower end, upper end and p-value of the difference of log medians, for each row of a and b.

    The interval is the wider of the percentile bootstrap and Welch's t: resampling n values can't reach past their
    extremes, and t takes the noise for normal. Equal bindings were missed, of 2,000 simulated pairs in percent, under
    log-normal noise of 2 %, the same with an outlier in ten, and with 40 % of the executions 8 % slower:

    =============  =============  =============  =============
    at 95 %        n = 3          n = 5          n = 8
    =============  =============  =============  =============
    bootstrap      9.6 10.3 11.3  2.8 3.4 3.8    4.3 4.1 4.0
    basic          27 21 40       15 8 32        13 9 22
    Welch's t      2.9 2.3 4.3    4.4 2.1 5.0    5.2 2.0 4.8
    wider of both  2.9 2.3 4.3    2.6 1.5 3.3    3.5 1.4 2.9
    =============  =============  =============  =============
    """
    rng = np.random.default_rng(0)
    resampled = _resampled_medians(a, rng) - _resampled_medians(b, rng)
    lower, upper = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=-1)
    n_a, n_b = a.shape[-1], b.shape[-1]
    # Executions that agree to the last digit don't prove a noiseless machine.
    error_a, error_b = (np.maximum(x.var(axis=-1, ddof=1), LEAST_NOISE**2) / x.shape[-1] for x in (a, b))
    error = np.sqrt(error_a + error_b)
    degrees = (error_a + error_b) ** 2 / (error_a**2 / (n_a - 1) + error_b**2 / (n_b - 1))
    centre = a.mean(axis=-1) - b.mean(axis=-1)
    reach = student_t.critical_value((1 - confidence) / 2, degrees) * error
    p_value = 2 * student_t.upper_tail(np.abs(centre) / error, degrees)
    return np.minimum(lower, centre - reach), np.maximum(upper, centre + reach), p_value


def _resampled_medians(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Medians of ``RESAMPLES`` samples that are drawn with replacement from each row; all rows are drawn from alike."""
    n = values.shape[-1]
    return np.asarray(np.median(values[..., rng.integers(0, n, (RESAMPLES, n))], axis=-1))


def all_ratios(
    pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], confidence: float = CONFIDENCE
) -> list[Ratio]:
    """Compare each pair of samples as ``ratio_of_medians`` does; the ratios are in the order of the pairs.

    Pairs of the same sizes are resampled together, ``PAIRS_AT_ONCE`` at a time.
    """
    ratios: dict[int, Ratio] = {}
    places_by_size: dict[tuple[int, int], list[int]] = {}
    for place, (a, b) in enumerate(pairs):
        places_by_size.setdefault((len(a), len(b)), []).append(place)
    for places in places_by_size.values():
        for batch in (places[i : i + PAIRS_AT_ONCE] for i in range(0, len(places), PAIRS_AT_ONCE)):
            a, b = (np.array([pairs[place][side] for place in batch]) for side in (0, 1))
            ratios |= dict(zip(batch, _ratios(a, b, confidence), strict=True))
    return [ratios[place] for place in range(len(pairs))]


def spread_of_medians(samples: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    """Return how far the largest median of several samples may lie above the smallest: an interval, and what chance alone gives.

    The interval is that of the largest of all pairwise differences, at a confidence level that holds for all pairs
    together. Resampling the spread itself can't do: the largest over the smallest of several medians is never 1, so in
    100 simulated runs of four equal nodes such an interval never held the truth, and this one did in 93 to 98.

    Parameters
    ----------
    samples
        Two or more, each with one value per execution.

    Returns
    -------
    Lower end and upper end of the interval, and the median spread over shuffled samples. They are shares: 0.17 stands for
    17 %. All are NaN where a sample has too few executions.
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


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for testing them all (Holm 1979), so that the chance of one false claim among all stays as asked for.

    The adjusted values are in the order of the given ones.
    """
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, float)[order] * (len(order) - np.arange(len(order)))
    adjusted = np.minimum(1.0, np.maximum.accumulate(scaled))
    return [float(value) for value in adjusted[np.argsort(order)]]
