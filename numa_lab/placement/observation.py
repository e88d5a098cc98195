"""What a receipt says of the calling thread's team: what it is granted, and where its threads are."""

from __future__ import annotations

from numa_lab.machine.topology import Topology
from numa_lab.placement import memory, openmp
from numa_lab.placement.binding import Binding, effective
from numa_lab.placement.receipt import ThreadSeen, threads_now


def look(topology: Topology) -> tuple[Binding, tuple[ThreadSeen, ...], tuple[str, ...]]:
    """The binding in effect, the team's threads as they are now, and what could not be placed or seen."""
    team = openmp.team() if openmp.runtime() else []
    return effective(topology), threads_now((thread.tid, thread.cpus) for thread in team), lost()


def lost() -> tuple[str, ...]:
    """What could not be placed or seen, in this process."""
    if openmp.runtime():
        return memory.lost()
    return (*memory.lost(), "torch's OpenMP library was not found: its threads were not pinned one by one")
