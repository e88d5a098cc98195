"""A team whose CPUs were taken away: notice it, and place the team again.

A cpuset can be rewritten while a process runs (kubelet's static CPU manager, systemd, an administrator). The kernel then gives the
threads other masks, each for itself: older ones let all threads run anywhere in the new cpuset, newer ones (6.2) those alone
whose CPUs are gone. So the masks of all threads are compared with what they were given, each time that a team is used.

Limits: a mask that another program gives to single threads is taken for the same, and is replaced within the cpuset.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from numa_lab.errors import NodeUnavailable
from numa_lab.machine import affinity
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology, read_topology
from numa_lab.placement import openmp
from numa_lab.placement.calling_thread import CallerAlone
from numa_lab.placement.pinned_team import Before, Block, Placement, cpus_outside
from numa_lab.placement.thread_state import ENDED


def hold(before: Before, node: int, *, count: bool = True, elsewhere: bool = True) -> tuple[Before, str]:
    """Place the calling thread's team again if it is not where it was placed.

    Parameters
    ----------
    before
        Of the placement that the thread entered last.
    node
        Whose CPUs it shall have.
    count
        Whether to replace threads that have ended, as where ``torch.set_num_threads`` made the team smaller meanwhile.
    elsewhere
        Whether it may have CPUs of the nearest other node where none of its own are left.

    Returns
    -------
    before : Before
        The one that was given.
    told : str
        What happened, as a sentence; empty where nothing did, and where threads alone were replaced that had ended.

    Raises
    ------
    NodeUnavailable
        No CPU of the node may be used any more, and it may have no others.
    """
    seen = before.look()
    if not seen or (seen == ENDED and not count):
        return before, ""
    masks = before.where()
    found = {cpu for place, mask in masks.items() if mask != before.given(place) for cpu in mask}
    assert before.placement
    old = before.placement.cpus
    placement = anew(before.placement, node, elsewhere=elsewhere)
    before.go_on(placement)
    return before, _sentence(node, old, found, placement.cpus) if found else ""


def anew(placement: Placement, node: int, *, elsewhere: bool = False) -> Placement:
    """A placement like this one, on what the calling thread may use of the node now; or `elsewhere`, on the nearest node.

    Raises
    ------
    NodeUnavailable
        That is nothing.
    """
    outside = cpus_outside()
    with Widened() as reachable:
        topology = read_topology()
    if elsewhere and not topology.cpus_of([node]):
        node = topology.nearest_cpu_node(node)
    cpus = cpus_now(topology, node, placement.cpus, outside)
    may = set(topology.cpus_of([node]))
    leader = may & set(outside) or may if placement.leader_cpus else ()
    if not cpus:
        raise NodeUnavailable(
            f"node {node} has no CPU left that this process may use: its team was placed on CPUs "
            f"{format_cpulist(placement.cpus)}, and the cpuset now allows CPUs {format_cpulist(reachable)}"
        )
    return placement.on(cpus, leader)


class Widened(Block[frozenset[int]]):
    """Let the calling thread run wherever its cpuset allows; ``as`` names the CPUs."""

    def _enter(self, before: Before) -> frozenset[int]:
        cpus = range(affinity.MAX_CPUS)
        if before.take(CallerAlone(cpus, None, openmp.threads())):
            affinity.set_cpus(cpus)  # which says why it is refused
        return frozenset(os.sched_getaffinity(0))


def cpus_now(topology: Topology, node: int, old: Sequence[int], outside: Collection[int]) -> tuple[int, ...]:
    """For each CPU of a team itself where it still may be used, else the next core of the node that is free, as far as there are.

    Parameters
    ----------
    topology
        With what the cpuset allows now.
    node
        Whose CPUs are taken.
    old
        The CPUs that the team was placed on.
    outside
        The mask that the process had before. It is kept to, unless the cpuset has left none of it on this node.
    """
    of_node = set(topology.cpus_of([node]))
    usable = of_node & set(outside) or of_node
    core_of = {cpu.id: cpu.core for cpu in topology.cpus}
    taken = {core_of[cpu] for cpu in old if cpu in usable}
    free = [cpu for cpu in topology.physical_cores(usable) if core_of[cpu] not in taken]
    found = []
    for cpu in old:
        if cpu in usable:
            found.append(cpu)
        elif free:
            # The next above: teams that share a node's cores then don't all take the same.
            following = next((other for other in free if other > cpu), free[0])
            free.remove(following)
            found.append(following)
    return tuple(found)


def _sentence(node: int, old: Sequence[int], found: Collection[int], new: Sequence[int]) -> str:
    return (
        f"the kernel has moved threads of node {node}'s team, as where a cpuset is rewritten: it was placed on CPUs "
        f"{format_cpulist(old)}, ran on CPUs {format_cpulist(found)}, and is placed again on CPUs {format_cpulist(new)}"
    )
