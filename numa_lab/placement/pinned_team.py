"""A team on its place: its OpenMP threads pinned to cores, each with a memory policy; and all of it given back.

Affinity and memory policy belong to a thread, and torch's OpenMP workers keep what they were born with: binding the
Python thread alone leaves the computing threads where they were. So the whole team moves (see ``numa_lab.placement.thread_state``).
Whatever a signal's handler raises at whatever moment, it is given back (see ``numa_lab.placement.interrupt_safe``).

Limits: a team is that of one Python thread. OpenMP may give fewer threads than were asked for (OMP_THREAD_LIMIT, OMP_DYNAMIC):
those are placed, on the first CPUs, and ``Before.granted`` says how many they are. Where a team's size changes, libgomp ends
threads and starts new ones, some 20 us each: where a placement is entered often, set ``torch.set_num_threads`` to its size
before. Where torch's OpenMP library can't be found the calling thread alone is moved, and a warning says so.
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
from numa_lab.machine.topology import Topology, read_topology
from numa_lab.placement import openmp, thread_state
from numa_lab.placement.calling_thread import CallerAlone
from numa_lab.placement.interrupt_safe import Entered, Exit, Ticket, end, entered, ticket_for
from numa_lab.placement.thread_state import Exchange

Policy = tuple[int, Collection[int]]  # a mode of numa_lab.machine.libnuma, and its nodes


class Before(Entered):
    """What a placement replaced, to be given back by ``Placement.leave``."""

    placement: Placement | None = None  # None where nothing was placed: anew or at all
    exchange: Exchange | CallerAlone | None = None
    refusal = ""  # why the memory policy was not set; empty where it was, or where none was asked for

    @property
    def granted(self) -> int:
        """Threads that OpenMP gave, and that were placed."""
        return self.exchange.granted if self.exchange else 0

    def go(self, placement: Placement) -> None:
        """Move the calling thread's team; raises as ``Placement.enter``."""
        self.placement = placement
        try:
            self.refusal = placement.why_refused(self.take(placement.exchange()))
        except BaseException:
            self.end()
            raise

    def take(self, exchange: Exchange | CallerAlone) -> int:
        """Take what is new by this exchange, and owe what is old; which calls failed."""
        self.exchange = exchange
        self.begin()
        return exchange.there()

    def undo(self) -> None:
        """Give back masks and policies of all threads of the team, and the thread count."""
        if self.exchange:
            self.exchange.back()
        spare, self.exchange = self.exchange, None
        if self.placement and isinstance(spare, Exchange):
            self.placement.spare.append(spare)

    def look(self) -> int:
        """``Exchange.look``: whether threads of the team have other masks now than they were given here, or have ended.

        0 while the calling thread is in another placement. It takes some tenths of a microsecond for each thread.
        """
        return self.exchange.look() if self.exchange and placed()[:1] == [self] else 0

    def where(self) -> dict[int, frozenset[int]]:
        """The mask that each thread has now, by its place in the team; threads that have ended left out."""
        found = {}
        for place, tid in enumerate(self.exchange.thread_ids() if self.exchange else ()):
            with suppress(ProcessLookupError):
                if os.path.exists(f"/proc/self/task/{tid}"):  # the id may be that of another process by now
                    found[place] = frozenset(os.sched_getaffinity(tid))
        return found

    def given(self, place: int) -> frozenset[int]:
        """The mask that a thread was given."""
        assert isinstance(self.exchange, Exchange)
        return frozenset(thread_state.bits(self.exchange.given[place, : thread_state.CPU_WORDS]))

    def go_on(self, placement: Placement) -> None:
        """Move the team to another placement; it then leaves to where it was before this one."""
        again = placement.enter()
        assert isinstance(self.exchange, Exchange)
        assert isinstance(again.exchange, Exchange)
        # Until this has its exchange the other one is left first, if an exception comes.
        again.exchange.continue_from(self.exchange)
        self.placement, self.exchange, self.refusal, again.exchange = placement, again.exchange, again.refusal, None
        again.end()


def placed() -> list[Before]:
    """The placements that the calling thread is inside of, the innermost first."""
    return [one for one in entered() if isinstance(one, Before) and one.exchange]


def cpus_outside() -> frozenset[int]:
    """What the calling thread may use outside of all placements."""
    exchanges = [one.exchange for one in placed() if one.exchange]
    return exchanges[-1].cpus_before() if exchanges else frozenset(os.sched_getaffinity(0))


def topology_outside() -> Topology:
    """The machine as the calling thread may use it outside of all placements."""
    topology = read_topology()
    return replace(topology, allowed_cpus=tuple(sorted(cpus_outside()))) if placed() else topology


T_co = TypeVar("T_co", covariant=True)


class Block(ABC, Generic[T_co]):
    """What a ``with`` block can be made of: a class says in ``_enter`` where the calling thread goes, and what ``as`` names."""

    @abstractmethod
    def _enter(self, before: Before) -> T_co:
        """Let ``before`` go to a placement, or ``begin`` alone where the thread is to stay where it is."""

    def __enter__(self) -> T_co:
        before = Before(self, ticket_for(self))
        try:
            return self._enter(before)
        except BaseException:  # Ctrl-C: no block was begun that would be left
            before.end()
            raise

    @Exit
    def __exit__(self, ticket: Ticket, *_exception: object) -> None:
        end(self, ticket)


class Placement(Block[Before]):
    """CPUs and memory policies for the calling thread's team; entered and left as often as wanted, from any thread.

    By a ``with`` block, which no interrupt leaves half entered, or half left; or by ``enter`` and ``leave``.

    Parameters
    ----------
    cpus
        One thread is pinned to each, in this order: the calling thread to the first.
    policy
        Memory policy of every thread, or one for each of `cpus`; or None to leave policies alone.
    leader_cpus
        What the calling thread may use once it is on its CPU: threads that it starts inherit that. Its CPU alone where
        None is given.
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

    def on(self, cpus: Sequence[int], leader_cpus: Collection[int]) -> Placement:
        """The same memory policy on other CPUs."""
        return Placement(cpus, self._policy, leader_cpus)

    def enter(self) -> Before:
        """Move the calling thread and its team here.

        Raises
        ------
        NodeUnavailable
            A CPU may not be used; nothing is left changed.
        NotPermitted
            ``sched_setaffinity`` is refused; nothing is left changed.
        """
        before = Before(self)
        before.go(self)
        return before

    def leave(self, before: Before) -> None:
        """Give back what ``enter`` replaced: masks and policies of all threads of the team, and the thread count.

        What was entered since, and not left, is left too.
        """
        before.end()

    def _enter(self, before: Before) -> Before:
        before.go(self)
        return before

    def exchange(self) -> Exchange | CallerAlone:
        """One that no thread is using."""
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
        """Why the memory policy was not set, empty if it was; a mask that was not set raises as ``enter``."""
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
        """Ask again where an error can be read; the calling thread's own policy comes last, and stays."""
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


class pinned_team(Block[list[openmp.TeamThread]]):  # noqa: N801 (it reads like a verb: with pinned_team(cpus))
    """Compute with one thread on each of `cpus`, in that order; masks, policies and thread count come back on exit.

    ``as`` names the team as it is pinned, nothing where torch's OpenMP library was not found. It is the calling thread's team
    alone; torch's other threads are not touched.
    """

    def __init__(self, cpus: Sequence[int], policy: Policy | None = None) -> None:
        self._placement = Placement(cpus, policy)

    def _enter(self, before: Before) -> list[openmp.TeamThread]:
        before.go(self._placement)
        return openmp.team(len(self._placement.cpus)) if openmp.runtime() else []
