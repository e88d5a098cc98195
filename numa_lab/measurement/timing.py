"""Time one call honestly: first touch apart, warm-up until it settles, samples long enough for the clock.

Samples of one process are nested in it: they describe that process, and say nothing about the next one
(see ``numa_lab.measurement.comparison``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from numa_lab.errors import InvalidInput

SHORTEST_SAMPLE_SECONDS = 1e-3  # thousands of clock ticks; shorter calls are repeated within a sample
MIN_SAMPLES = 5
SETTLED_WITHIN = 0.05  # relative difference of the medians of the two halves of the warm-up


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the first call, and the steady samples after warm-up."""

    cold_seconds: float
    samples: tuple[float, ...]
    calls_per_sample: int
    settled: bool  # whether the warm-up settled within its share of the time

    @property
    def median_seconds(self) -> float:
        """Median of the steady samples."""
        return statistics.median(self.samples)


def require_seconds(seconds: float) -> None:
    """Refuse a time for all visits together that is not positive.

    Raises
    ------
    InvalidInput
        `seconds` is zero, negative or NaN.
    """
    if not seconds > 0:
        raise InvalidInput(f"seconds={seconds}: expected a positive time, for all visits together")


def measure(
    call: Callable[[int], object],
    *,
    seconds: float,
    min_samples: int = MIN_SAMPLES,
    max_samples: int = 50,
    after_sample: Callable[[], object] | None = None,
) -> Timing:
    """Time a call: the first one apart, then samples after a warm-up.

    Parameters
    ----------
    call
        What is timed; it is given the number of the call, from 0.
    seconds
        For all of it, as far as the fewest samples allow. A third at most goes to the warm-up, which ends when the medians
        of its two halves differ by less than 5 %.
    min_samples, max_samples
        How many samples are taken: at least so many, however slow the call is, and at most.
    after_sample
        Called between samples, outside the timed regions.

    Returns
    -------
    Seconds per call of the first call, and of each sample. A sample lasts a millisecond at least: short calls are repeated
    within it.
    """
    begin = time.perf_counter()
    call(0)
    cold_seconds = time.perf_counter() - begin
    next_number = 1

    def sample(calls: int) -> float:
        nonlocal next_number
        start = time.perf_counter()
        for number in range(next_number, next_number + calls):
            call(number)
        elapsed = time.perf_counter() - start
        next_number += calls
        return elapsed / calls

    warm_up = [sample(1), sample(1)]
    calls = max(1, round(SHORTEST_SAMPLE_SECONDS / max(min(warm_up), 1e-9)))
    while not (settled := _halves_agree(warm_up)) and time.perf_counter() - begin < seconds / 3:
        warm_up.append(sample(calls))
    samples: list[float] = []
    while len(samples) < min_samples or (len(samples) < max_samples and time.perf_counter() - begin < seconds):
        samples.append(sample(calls))
        if after_sample:
            after_sample()
    return Timing(cold_seconds, tuple(samples), calls, settled)


def _halves_agree(values: list[float]) -> bool:
    """Return whether the older and the newer half of the last values have nearly the same median."""
    half = len(values) // 2
    if half < 2:  # two single values agree by chance
        return False
    older, newer = statistics.median(values[:half]), statistics.median(values[half:])
    return abs(newer - older) <= SETTLED_WITHIN * max(older, newer)
