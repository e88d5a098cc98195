"""A context manager that places the calling thread's team on one node, and that may be entered again inside itself.

A thread may enter one object inside itself, inside of other objects, and together with other threads. Where it is on the node already,
entering again changes nothing.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from numa_lab.attention.graphs import between_graphs
from numa_lab.errors import NodeUnavailable
from numa_lab.machine import libnuma
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.placement import recycled_memory, team_replacement
from numa_lab.placement.interrupt_safe import Exit, Ticket, end, entered
from numa_lab.placement.pinned_team import PinnedTeam, TeamContext, TeamEntry, entered_teams

T_co = TypeVar("T_co", covariant=True)


class NodeContext(TeamContext[T_co]):
    """A base of context managers that place the calling thread's team on a node, with *preferred* as its memory policy.

    Parameters
    ----------
    node
        An effective node of the topology.
    threads
        Computing threads; one for each physical core of the node where None is given.
    topology
        The machine as the calling thread may use it outside of all contexts.
    """

    def __init__(self, node: int, threads: int | None, topology: Topology) -> None:
        self.node = node
        self.cpus = topology.cpus_for([node], threads)
        self._topology = topology
        self._pinned = PinnedTeam(self.cpus, (libnuma.MPOL_PREFERRED, [node]), topology.cpus_of([node]))

    @property
    def threads(self) -> int:
        """How many threads compute inside, the calling one included."""
        return len(self.cpus)

    __enter__ = between_graphs(TeamContext.__enter__)

    @Exit
    @between_graphs
    def __exit__(self, ticket: Ticket, *_exception: object) -> None:
        end(self, ticket)
        if around := entered_contexts():
            recycled_memory.give_back(around[0].node)

    def _on_node(self) -> _OnNode:
        """Return a context on the node without what is done for new tensors of the caller, who makes none in it."""
        return _OnNode(self)

    def _current_entry(self) -> TeamEntry | None:
        """Return the entry by which the calling thread is in this context.

        It is None where the thread is not in it, or has entered another context since.
        """
        for member in entered():
            if isinstance(member, TeamEntry) and isinstance(member.owner, NodeContext):
                if member.owner is not self:
                    return None
                if member.exchange:
                    return member
        return None

    def _go_to_node(self, entry: TeamEntry, *, keep_inner: bool = True) -> bool:
        """Move the calling thread's team to the node, and return whether it was elsewhere.

        A thread that has entered another pinned team inside of this context stays there with `keep_inner`, and is moved without.
        """
        current = self._current_entry()
        if current and (keep_inner or entered_teams()[0] is current):
            self._hold_team(current)
            entry.begin()
            return False
        try:
            entry.move(self._pinned)
        except NodeUnavailable:  # the cpuset was rewritten since
            old_cpus = self._pinned.cpus
            self._pin_to(team_replacement.placed_again(self._pinned, self.node))
            entry.move(self._pinned)
            warnings.warn(
                f"CPUs {format_cpulist(old_cpus)} of node {self.node} may no longer be used by this process, as where a cpuset is "
                f"rewritten: threads are placed on CPUs {format_cpulist(self.cpus)}",
                RuntimeWarning,
                stacklevel=5,
            )
        return True

    def _hold_team(self, current: TeamEntry) -> None:
        """Place the team again where the kernel has moved it since it was placed."""
        pinned = current.pinned
        # How many threads compute inside is for the caller to say, and on which node they compute was promised.
        moved = team_replacement.hold(current, self.node, replace_ended=False, elsewhere=False)
        if current.pinned and current.pinned is not pinned:
            self._pin_to(current.pinned)
        if moved:
            warnings.warn(moved, RuntimeWarning, stacklevel=6)

    def _pin_to(self, pinned: PinnedTeam) -> None:
        self._pinned, self.cpus = pinned, pinned.cpus


class _OnNode(TeamContext[None]):
    """A stay on a context's node in which the caller makes no tensors, so that malloc's memory is left alone."""

    def __init__(self, context: NodeContext[Any]) -> None:
        self._context = context

    def _enter(self, entry: TeamEntry) -> None:
        entry.owner = self._context
        self._context._go_to_node(entry)


def entered_contexts() -> list[NodeContext[Any]]:
    """Return the contexts that the calling thread is inside of, the innermost first."""
    return [member.owner for member in entered() if isinstance(member.owner, NodeContext)]
