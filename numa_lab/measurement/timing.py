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
    """Refuse what is no time to measure for.

    Raises
    ------
    InvalidInput
        It is not positive.
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
    """Time ``call(turn)``, where `turn` counts the calls, within about `seconds`.

    The first call is the cold one. A third of the time at most goes to warming up: until the medians of the two
    halves of the warm-up differ by less than 5 %. `after_sample` runs between samples, outside the timed regions.
    A call so slow that the time does not suffice is still sampled `min_samples` times.
    """
    begin = time.perf_counter()
    call(0)
    cold_seconds = time.perf_counter() - begin
    turn = 1

    def sample(calls: int) -> float:
        nonlocal turn
        start = time.perf_counter()
        for i in range(turn, turn + calls):
            call(i)
        taken = time.perf_counter() - start
        turn += calls
        return taken / calls

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
    """Whether the older and the newer half of the last values have nearly the same median."""
    half = len(values) // 2
    if half < 2:  # two single values agree by chance
        return False
    older, newer = statistics.median(values[:half]), statistics.median(values[half:])
    return abs(newer - older) <= SETTLED_WITHIN * max(older, newer)
