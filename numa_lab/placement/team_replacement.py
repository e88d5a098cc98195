"""A team whose CPUs were taken away: how that is noticed, and how the team is placed again.

A cpuset can be rewritten while a process runs (by kubelet's static CPU manager, systemd, or an administrator). The kernel then gives
each thread another mask. Older kernels let all threads run anywhere in the new cpuset; newer ones (6.2) change only the threads whose
CPUs are gone. So the masks of all threads are compared with what they were given, each time that a team is used.

Limits: a mask that another program gives to single threads is taken for the same, and is replaced within the cpuset.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from numa_lab.errors import NodeUnavailable
from numa_lab.machine import affinity
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import openmp
from numa_lab.placement.calling_thread import CallerAlone
from numa_lab.placement.pinned_team import PinnedTeam, TeamContext, TeamEntry, cpus_outside
from numa_lab.placement.thread_state import ENDED


def hold(entry: TeamEntry, node: int, *, replace_ended: bool = True, elsewhere: bool = True) -> str:
    """Place the calling thread's team again if it is not where it was placed.

    Parameters
    ----------
    entry
        Of the pinned team that the thread entered last.
    node
        The node whose CPUs the team shall have.
    replace_ended
        Whether to replace threads that have ended, as where ``torch.set_num_threads`` made the team smaller meanwhile.
    elsewhere
        Whether the team may have CPUs of the nearest other node where none of its own are left.

    Returns
    -------
    str
        What happened, as a sentence. It is empty where nothing did, and where only threads that had ended were replaced.

    Raises
    ------
    NodeUnavailable
        No CPU of the node may be used any more, and the team may have no others.
    """
    changes = entry.look()
    if not changes or (changes == ENDED and not replace_ended):
        return ""
    masks = entry.masks_now()
    ran_on = {cpu for place, mask in masks.items() if mask != entry.mask_given(place) for cpu in mask}
    assert entry.pinned
    old_cpus = entry.pinned.cpus
    pinned = placed_again(entry.pinned, node, elsewhere=elsewhere)
    entry.move_on(pinned)
    return _sentence(node, old_cpus, ran_on, pinned.cpus) if ran_on else ""


def placed_again(pinned: PinnedTeam, node: int, *, elsewhere: bool = False) -> PinnedTeam:
    """Return a team like this one, on those CPUs of the node that the calling thread may use now.

    With `elsewhere` it has CPUs of the nearest node where the node has none left.

    Raises
    ------
    NodeUnavailable
        No CPU is left.
    """
    outside = cpus_outside()
    with Widened() as reachable:
        topology = read_topology()
    if elsewhere and not topology.cpus_of([node]):
        node = topology.nearest_cpu_node(node)
    cpus = cpus_now(topology, node, pinned.cpus, outside)
    usable = set(topology.cpus_of([node]))
    leader_cpus = usable & set(outside) or usable if pinned.leader_cpus else ()
    if not cpus:
        raise NodeUnavailable(
            f"node {node} has no CPU left that this process may use: its team was placed on CPUs "
            f"{format_cpulist(pinned.cpus)}, and the cpuset now allows CPUs {format_cpulist(reachable)}"
        )
    return pinned.on(cpus, leader_cpus)


class Widened(TeamContext[frozenset[int]]):
    """Let the calling thread run wherever its cpuset allows; ``with Widened() as cpus`` names the CPUs."""

    def _enter(self, entry: TeamEntry) -> frozenset[int]:
        cpus = range(affinity.MAX_CPUS)
        if entry.take(CallerAlone(cpus, None, openmp.threads())):
            affinity.set_cpus(cpus)  # which says why it is refused
        return frozenset(os.sched_getaffinity(0))


def cpus_now(topology: Topology, node: int, old: Sequence[int], outside: Collection[int]) -> tuple[int, ...]:
    """Return the CPUs of a team that is placed again, in the order of the old ones.

    Each CPU stays where it may still be used. In place of another one comes the next free core of the node, as long as there are any.

    Parameters
    ----------
    topology
        With what the cpuset allows now.
    node
        The node whose CPUs are taken.
    old
        The CPUs that the team was placed on.
    outside
        The mask that the process had before. It is respected, unless the cpuset has left none of it on this node.
    """
    of_node = set(topology.cpus_of([node]))
    usable = of_node & set(outside) or of_node
    core_of = {cpu.id: cpu.core for cpu in topology.cpus}
    kept_cores = {core_of[cpu] for cpu in old if cpu in usable}
    free = [cpu for cpu in topology.physical_cores(usable) if core_of[cpu] not in kept_cores]
    new = []
    for cpu in old:
        if cpu in usable:
            new.append(cpu)
        elif free:
            # The next above: teams that share a node's cores then don't all take the same.
            following = next((other for other in free if other > cpu), free[0])
            free.remove(following)
            new.append(following)
    return tuple(new)


def _sentence(node: int, old: Sequence[int], ran_on: Collection[int], new: Sequence[int]) -> str:
    return (
        f"the kernel has moved threads of node {node}'s team, as where a cpuset is rewritten: it was placed on CPUs "
        f"{format_cpulist(old)}, ran on CPUs {format_cpulist(ran_on)}, and is placed again on CPUs {format_cpulist(new)}"
    )
