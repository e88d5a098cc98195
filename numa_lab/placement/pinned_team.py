"""A pinned team: the OpenMP threads of the calling thread on CPUs of their own, each with a memory policy, and the way back.

Affinity and memory policy belong to a thread, and torch's OpenMP workers keep what they were born with: binding the
Python thread alone leaves the computing threads where they were. So the whole team moves (see ``numa_lab.placement.thread_state``).
Whatever a signal's handler raises, and at whatever moment, the old placement is given back (see
``numa_lab.placement.interrupt_safe``).

Limits: a team belongs to one Python thread. OpenMP may give fewer threads than were asked for (OMP_THREAD_LIMIT, OMP_DYNAMIC): those
are placed on the first CPUs, and ``TeamEntry.granted`` says how many they are. Where the size of a team changes, libgomp ends
threads and starts new ones, which takes some 20 us each: where a pinned team is entered often, set ``torch.set_num_threads`` to its
size before. Where torch's OpenMP library can't be found, the calling thread alone is moved, and a warning says so.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Generic, TypeVar, cast

import numpy as np

from numa_lab.errors import InvalidInput, NodeUnavailable, NumaLabError
from numa_lab.machine import affinity, libnuma
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import openmp, thread_state
from numa_lab.placement.calling_thread import CallerAlone
from numa_lab.placement.interrupt_safe import Entered, Exit, Ticket, end, entered, ticket_for
from numa_lab.placement.thread_state import Exchange

Policy = tuple[int, Collection[int]]  # a mode of numa_lab.machine.libnuma, and its nodes


class TeamEntry(Entered):
    """One entry of a thread into a pinned team: it holds what was replaced, and gives that back when it ends."""

    pinned: PinnedTeam | None = None  # None where nothing was pinned
    exchange: Exchange | CallerAlone | None = None
    refusal = ""  # why the memory policy was not set; empty where it was, or where none was asked for

    @property
    def granted(self) -> int:
        """How many threads OpenMP gave, which are those that were placed."""
        return self.exchange.granted if self.exchange else 0

    def move(self, pinned: PinnedTeam) -> None:
        """Move the calling thread's team; raises as ``PinnedTeam.enter``."""
        self.pinned = pinned
        try:
            self.refusal = pinned.why_refused(self.take(pinned.exchange()))
        except BaseException:
            self.end()
            raise

    def take(self, exchange: Exchange | CallerAlone) -> int:
        """Take the new state of an exchange, and owe the old one; return which calls failed."""
        self.exchange = exchange
        self.begin()
        return exchange.there()

    def undo(self) -> None:
        """Give back the masks and policies of all threads of the team, and the thread count."""
        if self.exchange:
            self.exchange.back()
        spare, self.exchange = self.exchange, None
        if self.pinned and isinstance(spare, Exchange):
            self.pinned.spare.append(spare)

    def look(self) -> int:
        """Return what has become of the team's threads, as ``Exchange.look``; it takes some tenths of a microsecond for each.

        It is 0, for no change, while the calling thread is inside of another pinned team.
        """
        return self.exchange.look() if self.exchange and entered_teams()[:1] == [self] else 0

    def masks_now(self) -> dict[int, frozenset[int]]:
        """Return the mask that each thread has now, by its place in the team, without the threads that have ended."""
        masks = {}
        for place, tid in enumerate(self.exchange.thread_ids() if self.exchange else ()):
            with suppress(ProcessLookupError):
                if os.path.exists(f"/proc/self/task/{tid}"):  # the id may be that of another process by now
                    masks[place] = frozenset(os.sched_getaffinity(tid))
        return masks

    def mask_given(self, place: int) -> frozenset[int]:
        """Return the mask that the thread at a place of the team was given."""
        assert isinstance(self.exchange, Exchange)
        return frozenset(thread_state.bits(self.exchange.given[place, : thread_state.CPU_WORDS]))

    def move_on(self, pinned: PinnedTeam) -> None:
        """Move the team to another pinned team's CPUs; leaving then leads to where it was before this entry began."""
        following = pinned.enter()
        assert isinstance(self.exchange, Exchange)
        assert isinstance(following.exchange, Exchange)
        # Until this has its exchange the other one is left first, if an exception comes.
        following.exchange.continue_from(self.exchange)
        self.pinned, self.exchange, self.refusal = pinned, following.exchange, following.refusal
        following.exchange = None
        following.end()


def entered_teams() -> list[TeamEntry]:
    """Return the entries into pinned teams that the calling thread is inside of, the innermost first."""
    return [member for member in entered() if isinstance(member, TeamEntry) and member.exchange]


def cpus_outside() -> frozenset[int]:
    """Return the CPUs that the calling thread may use outside of all pinned teams."""
    exchanges = [entry.exchange for entry in entered_teams() if entry.exchange]
    return exchanges[-1].cpus_before() if exchanges else frozenset(os.sched_getaffinity(0))


def topology_outside() -> Topology:
    """Return the machine as the calling thread may use it outside of all pinned teams."""
    topology = read_topology()
    return replace(topology, allowed_cpus=tuple(sorted(cpus_outside()))) if entered_teams() else topology


T_co = TypeVar("T_co", covariant=True)


class TeamContext(ABC, Generic[T_co]):
    """The base of context managers that move the calling thread's team.

    A subclass says in ``_enter`` where the team goes, and returns what ``with ... as`` names.
    """

    @abstractmethod
    def _enter(self, entry: TeamEntry) -> T_co:
        """Let `entry` ``move`` to a pinned team, or only ``begin`` where the team is to stay where it is."""

    def __enter__(self) -> T_co:
        entry = TeamEntry(self, ticket_for(self))
        try:
            return self._enter(entry)
        except BaseException:  # Ctrl-C: no block was begun that would be left
            entry.end()
            raise

    @Exit
    def __exit__(self, ticket: Ticket, *_exception: object) -> None:
        end(self, ticket)


class PinnedTeam(TeamContext[TeamEntry]):
    """CPUs and memory policies for the calling thread's team, which any thread may enter and leave as often as it wants.

    A thread enters by a ``with`` block, which no interrupt leaves half entered or half left; or by ``enter`` and ``leave``.

    Parameters
    ----------
    cpus
        One thread is pinned to each, in this order: the calling thread to the first.
    policy
        The memory policy of every thread, or one for each of `cpus`; or None to leave policies alone.
    leader_cpus
        What the calling thread may use once it is on its CPU: threads that it starts inherit that. It is its CPU alone where
        None is given.

    Raises
    ------
    InvalidInput
        There are no CPUs, or not as many policies as CPUs.
    """

    def __init__(
        self,
        cpus: Sequence[int],
        policy: Policy | Sequence[Policy] | None = None,
        leader_cpus: Collection[int] | None = None,
    ) -> None:
        if not cpus:
            raise InvalidInput("cpus=(): expected at least one CPU to place a team on")
        self.cpus = tuple(cpus)
        self._policy = policy
        self._policies = _each(policy, len(cpus)) if policy else []
        self._without_libnuma = policy is not None and not libnuma.available()
        self.leader_cpus = frozenset(leader_cpus or ())
        self.spare: list[Exchange] = []  # those that no thread is using: to prepare one takes longer than to enter
        self.rows = np.zeros((len(self.cpus), thread_state.ROW), np.int64)
        self.rows[:, thread_state.MODE] = thread_state.KEEP
        for row, cpu in zip(self.rows, self.cpus, strict=True):
            thread_state.set_bits(row[: thread_state.CPU_WORDS], [cpu])
        if not self._without_libnuma:
            for row, (mode, nodes) in zip(self.rows, self._policies, strict=False):
                row[thread_state.MODE] = mode
                thread_state.set_bits(row[thread_state.NODES : thread_state.TID], nodes)

    def on(self, cpus: Sequence[int], leader_cpus: Collection[int]) -> PinnedTeam:
        """Return a team with the same memory policy on other CPUs."""
        return PinnedTeam(cpus, self._policy, leader_cpus)

    def enter(self) -> TeamEntry:
        """Move the calling thread and its team here.

        Returns
        -------
        TeamEntry
            What ``leave`` needs to give the old placement back.

        Raises
        ------
        NodeUnavailable
            A CPU may not be used; nothing is left changed.
        NotPermitted
            ``sched_setaffinity`` is refused; nothing is left changed.
        """
        entry = TeamEntry(self)
        entry.move(self)
        return entry

    def leave(self, entry: TeamEntry) -> None:
        """Give back what ``enter`` replaced: masks and policies of all threads of the team, and the thread count.

        What the thread has entered since, and has not left, is left too.
        """
        entry.end()

    def _enter(self, entry: TeamEntry) -> TeamEntry:
        entry.move(self)
        return entry

    def exchange(self) -> Exchange | CallerAlone:
        """Return an exchange to this team's state that no thread is using."""
        if openmp.runtime() is None:
            warnings.warn(
                "torch's OpenMP library was not found: only the calling thread is bound, and threads that torch starts "
                "from now on; those that exist keep their CPUs",
                stacklevel=5,
            )
            policy = self._policies[0] if self._policies else None
            return CallerAlone({*self.cpus, *self.leader_cpus}, policy, len(self.cpus))
        try:
            return self.spare.pop()
        except IndexError:
            return Exchange(self.rows, self.leader_cpus)

    def why_refused(self, failed: int) -> str:
        """Return why the memory policy was not set, empty if it was; a mask that was not set raises as in ``enter``."""
        if failed & thread_state.MASK_FAILED:
            self._raise_refused_cpu()
        return self._why_no_policy() if failed & thread_state.POLICY_FAILED or self._without_libnuma else ""

    def _raise_refused_cpu(self) -> None:
        for cpu in self.cpus:
            affinity.set_cpus({cpu})
        if self.leader_cpus:
            affinity.set_cpus(self.leader_cpus)
        raise NodeUnavailable(
            f"a thread of the team could not be pinned to its CPU, one of {format_cpulist(self.cpus)}, and its leader now can be: "
            "the cpuset was rewritten at this moment, or a filter is in force for that thread alone"
        )

    def _why_no_policy(self) -> str:
        """Set the policies again where an error can be read; the calling thread's own policy comes last, and stays."""
        try:
            libnuma.get_mempolicy()
            for policy in reversed(self._policies):
                libnuma.set_mempolicy(*policy)
        except (OSError, NumaLabError) as error:
            return str(error)
        return "a thread of the team was refused its memory policy"


def _each(policy: Policy | Sequence[Policy], count: int) -> list[Policy]:
    if isinstance(policy[0], int):
        return [cast(Policy, policy)] * count
    policies = list(cast(Sequence[Policy], policy))
    if len(policies) != count:
        raise InvalidInput(f"policy={policy!r}: expected one policy for all CPUs, or one for each of the {count}")
    return policies


class pinned_team(TeamContext[list[openmp.TeamThread]]):  # noqa: N801 (it reads like a verb: with pinned_team(cpus))
    """Compute with one thread on each of `cpus`, in that order; masks, policies and the thread count come back on exit.

    ``with pinned_team(cpus) as threads`` names the threads as they are pinned; there are none where torch's OpenMP library was not
    found. It is a ``PinnedTeam`` that is used once. Only the calling thread's team moves, and torch's other threads stay.
    """

    def __init__(self, cpus: Sequence[int], policy: Policy | None = None) -> None:
        self._pinned = PinnedTeam(cpus, policy)

    def _enter(self, entry: TeamEntry) -> list[openmp.TeamThread]:
        entry.move(self._pinned)
        return openmp.team(len(self._pinned.cpus)) if openmp.runtime() else []
