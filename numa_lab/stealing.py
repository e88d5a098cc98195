"""Whether the CPUs of one node should read what waits for another: only where memory then is read faster.

What waits for a node, and what it is about, are bytes of its own memory or of memory that is near to it. It is read by the
node's own CPUs, and by those of nodes that help it already. ``numa_lab.limits`` says how long that takes, without and with one
more node that helps:

    without = seconds(each byte read by one of those that read now)
    with = seconds(the same with one more, which reads the last input that waits, and its share of what else there is)

where nodes share in proportion to the bandwidths of their paths. Help pays where ``with`` is less than ``without`` by more than
``ratios.LARGEST_TIE``. A share, since of a hundred inputs that wait a single one is too small to be seen; the last input
at least, since inputs are not divided: a slow helper would be done with it after all others.

So the CPUs of a node that read their memory as fast as any do are never helped: two of them would read no faster.

Limits: only reading takes time, as in ``numa_lab.roofline``: help that would pay since computing takes long, as that of prompts does,
is not seen. What runs counts as if it had just begun. A thread of a node counts as all CPUs of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from numa_lab.limits import Limits
from numa_lab.ratios import LARGEST_TIE


class Reads(NamedTuple):
    """What a task reads: so many bytes of the memory of one node."""

    home: int
    nbytes: int


def seconds_saved(
    limits: Limits,
    load: Mapping[int, float],
    readers: Collection[int],
    thief: int,
    last: Reads,
    own: Mapping[int, float] | None = None,
) -> float:
    """The time that the help of a node saves; 0 where it does not pay.

    Parameters
    ----------
    limits
        Of the machine.
    load
        Bytes to read, by the node where they lie: of all that waits for a node, and of what it is about.
    readers
        Nodes whose CPUs read that now: the node itself, and those that help it.
    thief
        The node that may help.
    last
        The input that it would take, which is part of `load`.
    own
        What else the CPUs of `thief` are to read, by the node where it lies.
    """
    if thief in readers:
        return 0.0  # all its CPUs count already

    def seconds(taken: Mapping[int, float]) -> float:
        traffic: dict[tuple[int, int], float] = defaultdict(float)
        for home, count in load.items():
            rates = {reader: limits.rate(reader, home) for reader in readers}
            for reader, rate in rates.items():
                traffic[reader, home] += (count - taken.get(home, 0.0)) * rate / sum(rates.values())
        for part in (taken, own or {}):
            for home, count in part.items():
                traffic[thief, home] += count
        return limits.seconds({path: count for path, count in traffic.items() if count > 0})

    taken = {}
    for home, count in load.items():
        rate = limits.rate(thief, home)
        taken[home] = count * rate / (rate + sum(limits.rate(reader, home) for reader in readers))
    taken[last.home] = max(taken[last.home], last.nbytes)
    without, helped = seconds({}), seconds(taken)
    return without - helped if helped * (1 + LARGEST_TIE) < without else 0.0
