"""The calling thread's team as a receipt tells of it: what it is granted, where its threads are, and what can't be seen."""

from __future__ import annotations

from numa_lab.machine.topology import Topology
from numa_lab.placement import memory, openmp
from numa_lab.placement.binding import effective
from numa_lab.placement.receipt import TeamSeen
from numa_lab.placement.thread_watch import threads_now


def look(topology: Topology) -> TeamSeen:
    """Return the binding in effect, the team's threads as they are now, and what could not be placed or seen."""
    team = openmp.team() if openmp.runtime() else []
    return TeamSeen(effective(topology), threads_now((thread.tid, thread.cpus) for thread in team), limitations())


def limitations() -> tuple[str, ...]:
    """Return what could not be placed or seen in this process, as notes for a receipt."""
    if openmp.runtime():
        return memory.stand_ins()
    return (*memory.stand_ins(), "torch's OpenMP library was not found: its threads were not pinned one by one")
