"""Seats: one OpenMP team over several nodes, whose threads each take a core of one node for as long as a step lasts.

A step is one parallel region of the calling thread's own team, in one compiled call. Each thread takes the seat of the core that it is
on, computes its share of what is to be done at that seat's place, and the last thread merges. A thread on a core that has no free seat
takes a seat elsewhere, with its CPU and memory policy, and gives back at the end what it had. So there are no threads besides those of
torch, there is no lock, and there is no Python in between that a signal could interrupt: an exception of a signal's handler comes
before a step or after it.

Limits: a step waits for its slowest thread, so a foreign load on one core holds up all, as it does with torch's own operators. Within a
step the kernel may move a thread that is where it should be; inside of ``ReservedSeats`` all threads are pinned for many steps. Where
the calling thread's count of threads (``torch.set_num_threads``) is smaller than the number of seats and more than 1, libgomp ends
threads before torch's next operator and starts them before the next step, which takes some 20 us each; inside of ``ReservedSeats`` the
count is as large.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from numa_lab.attention import kernel_cache, openmp_regions, vectors
from numa_lab.attention.kernel_plan import Workspace
from numa_lab.errors import NodeUnavailable, NumaLabError
from numa_lab.machine import libnuma
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import memory, observation, openmp, team_replacement, thread_state
from numa_lab.placement.binding import effective
from numa_lab.placement.pinned_team import PinnedTeam, TeamContext, TeamEntry, cpus_outside, topology_outside
from numa_lab.placement.receipt import TeamSeen
from numa_lab.placement.thread_state import Exchange
from numa_lab.placement.thread_watch import threads_now


class Place(NamedTuple):
    """A node, and the CPUs on which threads compute what lies in its memory."""

    node: int
    cpus: tuple[int, ...]

    @property
    def policy(self) -> tuple[int, tuple[int, ...]]:
        """The memory policy of its threads: *preferred*, since a bound process whose node is full gets killed."""
        return libnuma.MPOL_PREFERRED, (self.node,)


def places(nodes: Sequence[int] | None = None) -> dict[int, Place]:
    """Return the place of each node: its physical cores.

    A node whose memory alone may be used has the place of the nearest node with CPUs.

    Parameters
    ----------
    nodes
        All effective nodes where None is given.

    Returns
    -------
    dict
        ``{node: place}``, in the order of `nodes`.

    Raises
    ------
    NodeUnavailable
        A node does not exist, or may not be used; or there is none.
    """
    topology = topology_outside()
    place_of = {}
    for node in topology.require_effective_nodes() if nodes is None else nodes:
        with_cpus = node if topology.cpus_of([node]) else topology.nearest_cpu_node(node)
        topology.require_effective(with_cpus)
        place_of[node] = Place(with_cpus, topology.cpus_for([with_cpus]))
    return place_of


class _Seating(NamedTuple):
    """Everything that depends on the CPUs that the seats are on, in one object, so that all of it changes at once."""

    places: tuple[Place, ...]
    pinned: PinnedTeam
    with_leader: PinnedTeam  # the same, except that the calling thread may use its whole node
    exchange: Exchange
    table: Any  # the words that ``numa_lab.attention.openmp_regions`` lists
    seat_of_cpu: Any  # an array to which the table points
    seats: int


class Seats:
    """The seats of some places, and working memory, for the team of one Python thread."""

    def __init__(self, places: tuple[Place, ...]) -> None:
        self.workspace = Workspace()
        # The counter of threads that are done has a cache line of its own.
        self._counter = np.zeros(2 * vectors.LINE_BYTES // openmp_regions.WORD, np.int64)
        self._region = kernel_cache.address(openmp_regions.SeatedRegion())
        self._parallel = openmp.require().library.GOMP_parallel
        self._now = self._seating(places)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the seats are now, which is elsewhere than was asked for where CPUs were taken away."""
        return self._now.places

    def _seating(self, places: tuple[Place, ...]) -> _Seating:
        pinned, nearest = _pinned_team(places), _seat_of_each_cpu(places)
        of_node = {cpu for cpu, (_, node) in _cores_and_nodes().items() if node == places[0].node}
        with_leader = _pinned_team(places, of_node & cpus_outside() or places[0].cpus)
        exchange, seat_of_cpu = Exchange(pinned.rows), (ctypes.c_int64 * len(nearest))(*nearest)
        seats = [
            (number, seat, len(place.cpus), 0) for number, place in enumerate(places) for seat in range(len(place.cpus))
        ]
        table = (ctypes.c_int64 * (openmp_regions.HEAD + openmp_regions.SEAT * len(seats)))()
        table[openmp_regions.SEATS] = len(seats)
        table[openmp_regions.THREAD_NUMBER], table[openmp_regions.TEAM_SIZE] = openmp_regions.team_functions()
        table[openmp_regions.CURRENT_CPU], table[openmp_regions.EXCHANGE] = _current_cpu(), exchange.function
        table[openmp_regions.THERE], table[openmp_regions.BACK] = exchange.there_address, exchange.back_address
        table[openmp_regions.SEAT_OF_CPU], table[openmp_regions.CPUS] = ctypes.addressof(seat_of_cpu), len(nearest)
        table[openmp_regions.ARRIVED] = -(-self._counter.ctypes.data // vectors.LINE_BYTES) * vectors.LINE_BYTES
        table[openmp_regions.HEAD :] = [word for seat in seats for word in seat]
        return _Seating(places, pinned, with_leader, exchange, table, seat_of_cpu, len(seats))

    def run(self, jobs: int, merge: int = 0, merge_arguments: int = 0, *, alone: bool = False) -> None:
        """Compute one step.

        Parameters
        ----------
        jobs
            The address of two words for each place: the address of its jobs, and their number. A job is the address of a kernel's
            arguments (``numa_lab.attention.openmp_regions``).
        merge, merge_arguments
            The addresses of a ``void (void *)``, which the last thread calls, and of what it gets. 0 for no call.
        alone
            Let the calling thread take all seats in turn, because the step is not worth waking others.

        Warns
        -----
        RuntimeWarning
            A thread could not be moved, as where a cpuset was rewritten. The step was computed wherever its threads were. From the
            next step on other CPUs are used, if there are any.
        """
        now = self._now
        table = now.table
        table[openmp_regions.PLACES], table[openmp_regions.MERGE], table[openmp_regions.MERGE_ARGUMENTS] = (
            jobs,
            merge,
            merge_arguments,
        )
        # A smaller team than torch's would end threads, which torch's next operator would start again.
        threads = 1 if alone else max(now.seats, torch.get_num_threads())
        self._parallel(self._region, ctypes.addressof(table), threads, 0)
        if now.exchange.failures() & thread_state.MASK_FAILED:
            try:
                self._move_seats()
            except NumaLabError as error:
                warnings.warn(
                    f"a step was computed where its threads happened to be: {error}", RuntimeWarning, stacklevel=6
                )

    def enter(self, entry: TeamEntry, *, pin_caller: bool = False) -> None:
        """Move the calling thread's team to the seats, until `entry` ends.

        The calling thread may then use its whole node, unless `pin_caller` is set: threads and processes that it starts inherit that.

        Raises
        ------
        NodeUnavailable
            No CPU of any node may be used any more.
        NotPermitted
            ``sched_setaffinity`` is refused.

        Warns
        -----
        RuntimeWarning
            CPUs were taken away, and others are used.
        """
        try:
            entry.move(self._now.pinned if pin_caller else self._now.with_leader)
        except NodeUnavailable:  # the cpuset was rewritten since
            self._move_seats()
            entry.move(self._now.pinned if pin_caller else self._now.with_leader)

    def _move_seats(self) -> None:
        """Put the seats on CPUs that may still be used, with a warning; raise where there is no reason to move any."""
        old_places = self.places
        places = tuple(
            place._replace(cpus=team_replacement.placed_again(PinnedTeam(place.cpus), place.node, elsewhere=True).cpus)
            for place in old_places
        )
        if places == old_places:
            with self._now.pinned:  # which says why a CPU is refused, if one still is
                return
        self._now = self._seating(places)
        changes = [
            f"node {old.node}'s team was placed on CPUs {format_cpulist(old.cpus)}, which may no longer be used, as where a cpuset is "
            f"rewritten, and is placed again on CPUs {format_cpulist(new.cpus)}"
            for old, new in zip(old_places, places, strict=True)
            if old != new
        ]
        warnings.warn("; ".join(changes), RuntimeWarning, stacklevel=6)


def _seat_of_each_cpu(places: Sequence[Place]) -> list[int]:
    """Return for each CPU of the machine the seat on its core.

    A CPU on whose core there is no seat gets ``NOT_ON_IT`` minus a seat that is near: the first one of its node, or seat 0 where its
    node has none.
    """
    core_and_node = _cores_and_nodes()
    seat_on_core: dict[int, int] = {}
    first_seat_on_node: dict[int, int] = {}
    for seat, cpu in enumerate(cpu for place in places for cpu in place.cpus):
        core, node = core_and_node.get(cpu, (-1, -1))  # where there is no such CPU, pinning says so
        seat_on_core.setdefault(core, seat)
        first_seat_on_node.setdefault(node, seat)
    cpus = (core_and_node.get(cpu, (-1, -1)) for cpu in range(max(core_and_node) + 1))
    return [seat_on_core.get(core, openmp_regions.NOT_ON_IT - first_seat_on_node.get(node, 0)) for core, node in cpus]


@cache
def _cores_and_nodes() -> dict[int, tuple[int, int]]:
    """Return the core and the node of each CPU; they are kept, because reading them takes longer than a step."""
    return {cpu.id: (cpu.core, cpu.node) for cpu in read_topology().cpus}


@cache
def _current_cpu() -> int:
    """Return the address of the C library's function that tells a thread's CPU."""
    return openmp.address_of(ctypes.CDLL(None).sched_getcpu)


class _ThreadSeats(threading.local):
    def __init__(self) -> None:
        self.of_places: dict[tuple[Place, ...], Seats] = {}


_of_thread = _ThreadSeats()


def seats_of(places: tuple[Place, ...]) -> Seats:
    """Return the calling thread's seats of these places."""
    seats = _of_thread.of_places.get(places)
    if seats is None:
        seats = _of_thread.of_places[places] = Seats(places)
    return seats


def _pinned_team(places: Sequence[Place], leader_cpus: Collection[int] = ()) -> PinnedTeam:
    cpus = [cpu for place in places for cpu in place.cpus]
    return PinnedTeam(cpus, [place.policy for place in places for _ in place.cpus], leader_cpus)


class ReservedSeats(TeamContext[TeamEntry]):
    """The seats of some places, kept for all steps of a ``with`` block; it raises and warns as ``Seats.enter``."""

    def __init__(self, places: tuple[Place, ...], *, pin_caller: bool = False) -> None:
        self._places, self._pin_caller = places, pin_caller

    def _enter(self, entry: TeamEntry) -> TeamEntry:
        enter(self._places, entry, pin_caller=self._pin_caller)
        return entry


def enter(places: tuple[Place, ...], entry: TeamEntry, *, pin_caller: bool = False) -> None:
    """Move the calling thread's team to the seats of some places until `entry` ends, as ``Seats.enter``.

    Where torch's OpenMP library is not found, the calling thread alone is moved, with a warning.
    """
    if openmp.runtime() is None:
        entry.move(_pinned_team(places))
    else:
        seats_of(places).enter(entry, pin_caller=pin_caller)


def look(places: tuple[Place, ...], topology: Topology) -> dict[Place, TeamSeen]:
    """Return for each place what the threads on its seats are granted, where they are, and what could not be placed or seen."""
    with ReservedSeats(places, pin_caller=True) as entry:
        if openmp.runtime() is None:
            return dict.fromkeys(places, observation.look(topology))
        place_of_seat = [place for place, now in zip(places, seats_of(places).places, strict=True) for _ in now.cpus]
        threads = threads_now(openmp.team(len(place_of_seat)))
        granted = openmp.run_on_each(lambda _: effective(topology), len(place_of_seat))
    notes = (*memory.stand_ins(), *([entry.refusal] if entry.refusal else []))
    seen = {}
    for place in places:
        # Of a team that is smaller than the seats, threads take several.
        numbers = [seat % len(threads) for seat, asked in enumerate(place_of_seat) if asked == place]
        seen[place] = TeamSeen(granted[numbers[0]], tuple(threads[number] for number in numbers), notes)
    return seen
