"""Whether the cores were ours while something was timed: samples of which that is not so count for nothing where there are others.

Two signs are looked at on both sides of a timed region. The time that a thread of this process waited for a CPU which another
thread had is exact to the nanosecond. Steal, which is the time that the host of a virtual machine gave to others, comes in ticks of
10 ms, so that a tick means half of a sample and no tick means little. Limits: what slows a core without taking it, like another
thread on the same physical core or a lower clock, shows in neither; in turns of random order it meets all that is compared. A block of
multiply-adds of 65 us, timed before and after each sample, was tried for it: on a core of which other processes had half, it took
its usual time, since it fits between two turns of the scheduler.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from numa_lab.placement.thread_watch import schedstat

MOST_WAITED = 0.02  # share of a sample: so much later does a team end at most, which waits for its last thread

_disturbed = 0  # how many timed regions of this process were


class Samples(list[float]):
    """What was measured in each turn; `disturbed` says for each whether the cores were others' at times meanwhile."""

    def __init__(self) -> None:
        self.disturbed: list[bool] = []

    @property
    def kept(self) -> list[float]:
        """Those that count: all where there is no undisturbed one."""
        return [value for value, disturbed in zip(self, self.disturbed, strict=True) if not disturbed] or list(self)

    @property
    def median(self) -> float:
        """The median of those that count."""
        return statistics.median(self.kept)


@contextmanager
def watched() -> Iterator[None]:
    """Count the timed region within among the disturbed ones if the cores were not ours throughout."""
    global _disturbed
    stolen, waited, begin = _stolen_ticks(), _waited(), time.perf_counter_ns()
    yield
    allowed = MOST_WAITED * (time.perf_counter_ns() - begin)
    longest = max((now - waited.get(tid, 0) for tid, now in _waited().items()), default=0)
    _disturbed += longest > allowed or _stolen_ticks() > stolen


def disturbed_regions() -> int:
    """How many timed regions of this process were disturbed until now."""
    return _disturbed


def _waited() -> dict[int, int]:
    """The nanoseconds that each thread of this process has waited for a CPU, by its id: pools of all libraries are among them."""
    return {int(tid): schedstat(int(tid))[1] for tid in os.listdir("/proc/self/task")}


def _stolen_ticks() -> int:
    """The ticks since boot in which the host ran something else than the CPUs of this process; 0 where the kernel does not show them."""
    names = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    return sum(int(fields[8]) for fields in lines if fields[0] in names and len(fields) > 8)
