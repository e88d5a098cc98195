"""A team on its place: its OpenMP threads pinned to cores, with one memory policy; and all of it given back.

Affinity and memory policy belong to a thread, and torch's OpenMP workers keep what they were born with: binding the
Python thread alone leaves the computing threads where they were. So the whole team moves (see ``numa_lab.thread_state``).

Limits: a team is that of one Python thread. OpenMP may give fewer threads than were asked for (OMP_THREAD_LIMIT, OMP_DYNAMIC):
those are placed, on the first CPUs, and ``Before.granted`` says how many they are. Where a team's size changes, libgomp ends
threads and starts new ones, some 20 us each: where a placement is entered often, set ``torch.set_num_threads`` to its size
before. Where torch's OpenMP library can't be found the calling thread alone is moved, and a warning says so.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from numa_lab import affinity, libnuma, openmp, thread_state
from numa_lab.errors import InvalidInput, NodeUnavailable, NumaLabError
from numa_lab.sysfs import format_cpulist
from numa_lab.thread_state import Exchange, Rows

Policy = tuple[int, Collection[int]]  # a mode of numa_lab.libnuma, and its nodes


@dataclass(frozen=True, eq=False)
class Before:
    """What a placement replaced, to be given back by ``Placement.leave``."""

    placement: Placement
    outer: Before | None  # of the placement that the thread was in
    threads: int
    exchange: Exchange | None  # None where the calling thread alone was moved
    alone: Rows | None
    refusal: str  # why the memory policy was not set; empty where it was, or where none was asked for
    granted: int  # threads that OpenMP gave, and that were placed

    def look(self) -> int:
        """``Exchange.look``: whether threads of the team have other masks now than they were given here, or have ended.

        0 while the calling thread is in another placement. It takes some tenths of a microsecond for each thread.
        """
        return self.exchange.look() if self.exchange and self is _of_thread.innermost else 0

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
        assert self.exchange is not None
        return frozenset(thread_state.bits(self.exchange.given[place, : thread_state.CPU_WORDS]))

    def go_on(self, placement: Placement) -> Before:
        """Move the team to another placement, by which it then leaves to where it was before this one."""
        again = placement.enter()
        old = self.exchange.old if self.exchange else None
        if old is not None and again.exchange is not None:
            masks_and_policies = slice(thread_state.TID)
            again.exchange.old[:, masks_and_policies] = old[0, masks_and_policies]
            shared = min(len(old), len(again.exchange.old))
            again.exchange.old[:shared, masks_and_policies] = old[:shared, masks_and_policies]
        _of_thread.innermost = final = replace(again, outer=self.outer, threads=self.threads)
        return final


class _OfThread(threading.local):
    """Which placement a thread entered last."""

    innermost: Before | None = None


_of_thread = _OfThread()


def cpus_outside() -> frozenset[int]:
    """What the calling thread may use outside of all placements."""
    before = _of_thread.innermost
    while before and before.outer:
        before = before.outer
    rows = None if before is None else before.alone if before.exchange is None else before.exchange.old
    return frozenset(os.sched_getaffinity(0) if rows is None else thread_state.bits(rows[0, : thread_state.CPU_WORDS]))


class Placement:
    """CPUs and a memory policy for the calling thread's team; entered and left as often as wanted, from any thread.

    Parameters
    ----------
    cpus
        One thread is pinned to each, in this order: the calling thread to the first.
    policy
        Memory policy of every thread, or None to leave it alone.
    leader_cpus
        What the calling thread may use once it is on its CPU: threads that it starts inherit that. Its CPU alone where
        None is given.
    """

    def __init__(
        self, cpus: Sequence[int], policy: Policy | None = None, leader_cpus: Collection[int] | None = None
    ) -> None:
        if not cpus:
            raise InvalidInput("cpus=(): expected at least one CPU to place a team on")
        self.cpus = tuple(cpus)
        self._policy = policy
        self._without_libnuma = policy is not None and not libnuma.available()
        self.leader_cpus = frozenset(leader_cpus or ())
        self._spare: list[Exchange] = []  # those that no thread is using
        self._rows = np.zeros((len(self.cpus), thread_state.ROW), np.int64)
        self._rows[:, thread_state.MODE] = thread_state.KEEP
        for row, cpu in zip(self._rows, self.cpus, strict=True):
            thread_state.set_bits(row[: thread_state.CPU_WORDS], [cpu])
            if policy and not self._without_libnuma:
                row[thread_state.MODE] = policy[0]
                thread_state.set_bits(row[thread_state.NODES : thread_state.ROW], policy[1])

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
        threads = openmp.set_threads(len(self.cpus))
        if openmp.runtime() is None:
            try:
                return self._entered(threads, None, *self._enter_alone(), 1)
            except NumaLabError:
                openmp.set_threads(threads)
                raise
        try:
            exchange = self._spare.pop()
        except IndexError:
            exchange = Exchange(self._rows, self.leader_cpus)
        failed = exchange.there()
        if failed & thread_state.MASK_FAILED:
            try:
                self._raise_refused_cpu()
            finally:
                exchange.back()
                openmp.set_threads(threads)
        refused = failed & thread_state.POLICY_FAILED or self._without_libnuma
        return self._entered(threads, exchange, None, self._why_no_policy() if refused else "", exchange.granted)

    def _entered(self, *replaced: Any) -> Before:
        _of_thread.innermost = before = Before(self, _of_thread.innermost, *replaced)
        return before

    def leave(self, before: Before) -> None:
        """Give back what ``enter`` replaced: masks and policies of all threads of the team, and the thread count.

        Where the team was placed again meanwhile, what it was given then.
        """
        if before.placement is not self:
            before.placement.leave(before)
            return
        _of_thread.innermost = before.outer
        if before.alone is not None:
            self._leave_alone(before.alone)
        elif before.exchange is not None:
            before.exchange.back()
            if (grown := openmp.threads()) > len(self.cpus):
                # The team holds threads that were born here: they get what the calling thread has got back.
                rows = np.repeat(before.exchange.old[:1], grown, axis=0)
                rows[: len(self.cpus)] = before.exchange.old
                Exchange(rows).there()
            self._spare.append(before.exchange)
        openmp.set_threads(before.threads)

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
        """Ask again where an error can be read."""
        assert self._policy is not None
        try:
            libnuma.get_mempolicy()
            libnuma.set_mempolicy(*self._policy)
        except (OSError, NumaLabError) as error:
            return str(error)
        return "a thread of the team was refused its memory policy"

    def _enter_alone(self) -> tuple[Rows, str]:
        warnings.warn(
            "torch's OpenMP library was not found: only the calling thread is bound, and threads that torch starts "
            "from now on; those that exist keep their CPUs",
            stacklevel=5,
        )
        row, refusal = np.zeros((1, thread_state.ROW), np.int64), ""
        thread_state.set_bits(row[0, : thread_state.CPU_WORDS], os.sched_getaffinity(0))
        row[0, thread_state.MODE] = thread_state.KEEP
        affinity.set_cpus({*self.cpus, *self.leader_cpus})
        if self._policy:
            try:
                mode, nodes = libnuma.get_mempolicy(flags=True)
                libnuma.set_mempolicy(*self._policy)
                row[0, thread_state.MODE] = mode
                thread_state.set_bits(row[0, thread_state.NODES : thread_state.ROW], nodes)
            except (OSError, NumaLabError) as error:
                refusal = str(error)
        return row, refusal

    def _leave_alone(self, rows: Rows) -> None:
        row = rows[0]
        affinity.give_back(thread_state.bits(row[: thread_state.CPU_WORDS]))
        if row[thread_state.MODE] != thread_state.KEEP:
            libnuma.set_mempolicy(
                int(row[thread_state.MODE]), thread_state.bits(row[thread_state.NODES : thread_state.ROW])
            )


@contextmanager
def pinned_team(cpus: Sequence[int], policy: Policy | None = None) -> Iterator[list[openmp.TeamThread]]:
    """Compute with one thread on each of `cpus`, in that order; masks, policies and thread count come back on exit.

    Yields the team as it is pinned, nothing where torch's OpenMP library was not found. It is the calling thread's team
    alone; torch's other threads are not touched.
    """
    placement = Placement(cpus, policy)
    before = placement.enter()
    try:
        yield openmp.team(len(cpus)) if openmp.runtime() else []
    finally:
        placement.leave(before)
