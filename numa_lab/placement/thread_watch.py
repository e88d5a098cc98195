"""Threads of this process as the kernel tells of them: how long each has run, and the CPU that it was last on.

Limits: a CPU is read when somebody looks, and is not traced in between.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ThreadSeen:
    """A thread that computed: its id, the CPUs that its mask allows, and those on which it was seen."""

    tid: int
    allowed: tuple[int, ...]
    seen: tuple[int, ...]


class ThreadWatch:
    """A watch on the threads of this process while something is timed: which of them run, and on which CPUs.

    A thread that runs is told by the time that it spends on a CPU, so that a thread of any OpenMP runtime, pinned or not, is found
    without asking the runtime. Call ``look`` between samples.
    """

    def __init__(self) -> None:
        self._at_start = {tid: _run_nanoseconds(tid) for tid in _thread_ids()}
        self._seen: dict[int, set[int]] = {}

    def look(self) -> None:
        """Note the CPU that each thread was last on."""
        for tid in _thread_ids():
            cpu = last_cpu(tid)
            if cpu is not None:
                self._seen.setdefault(tid, set()).add(cpu)

    def threads(self, share: float = 0.2) -> tuple[ThreadSeen, ...]:
        """Return the threads that ran at least `share` (0 to 1) as long as the busiest one since the watch began."""
        ran = {tid: _run_nanoseconds(tid) - self._at_start.get(tid, 0) for tid in self._seen}
        enough = share * max(ran.values(), default=0)
        computing = []
        for tid in sorted(tid for tid, time in ran.items() if time >= enough and time > 0):
            try:
                allowed = tuple(sorted(os.sched_getaffinity(tid)))
            except ProcessLookupError:  # it has ended: where it ran is known, what it was allowed is not
                allowed = ()
            computing.append(ThreadSeen(tid, allowed, tuple(sorted(self._seen[tid]))))
        return tuple(computing)


def _thread_ids() -> list[int]:
    return [int(tid) for tid in os.listdir("/proc/self/task")]


def schedstat(tid: int) -> tuple[int, int]:
    """Return the nanoseconds that a thread of this process has run, and those that it has waited for a CPU that others had.

    Both are 0 for a thread that has ended. They are the first two numbers of ``/proc/self/task/TID/schedstat``.
    """
    try:
        ran, waited, _ = Path(f"/proc/self/task/{tid}/schedstat").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return int(ran), int(waited)


def _run_nanoseconds(tid: int) -> int:
    return schedstat(tid)[0]


def last_cpu(tid: int) -> int | None:
    """Return the CPU that the thread was last on (field 39 of proc(5)'s stat); None for a thread that has ended."""
    try:
        stat = Path(f"/proc/self/task/{tid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[36])  # the name in parentheses may hold blanks; field 3 comes after it


def threads_now(team: Iterable[tuple[int, Iterable[int]]]) -> tuple[ThreadSeen, ...]:
    """Return threads that are given by thread id and mask, each with the CPU that it was last on."""
    return tuple(
        ThreadSeen(tid, tuple(sorted(cpus)), (cpu,) if (cpu := last_cpu(tid)) is not None else ()) for tid, cpus in team
    )
