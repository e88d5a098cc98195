"""One OpenMP team over several nodes: each of its threads has a seat, a core of one node, for as long as a step lasts.

A step is one parallel region of the calling thread's own team, in one compiled call: each thread takes the seat on whose core it is,
computes its share of what is to be done at that place, and the last one merges. A thread that is on the core of no free seat takes one
elsewhere, with its CPU and memory policy, and gives back what it had. So there is no thread besides those of torch, no lock, and no
Python in between that a signal could interrupt: an exception of its handler comes before a step or after it.

Limits: a step waits for its slowest thread, so a foreign load on one core holds up all, as it does with torch's own operators. Within a
step the kernel may move a thread that is where it should be; not inside of ``Taken``, which pins them all for many steps. Where the
calling thread's count of threads (``torch.set_num_threads``) is smaller than there are seats and more than 1, libgomp ends threads
before torch's next operator and starts them before the next step, some 20 us each; in ``Taken`` it is as large.
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

from numa_lab.attention import kernel_cache, openmp_regions, simd
from numa_lab.attention.kernel_plan import Room
from numa_lab.errors import NodeUnavailable, NumaLabError
from numa_lab.machine import libnuma
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology, read_topology
from numa_lab.placement import memory, observation, openmp, team_replacement, thread_state
from numa_lab.placement.binding import Binding, effective
from numa_lab.placement.pinned_team import Before, Block, Placement, cpus_outside, topology_outside
from numa_lab.placement.receipt import ThreadSeen, threads_now
from numa_lab.placement.thread_state import Exchange


class Place(NamedTuple):
    """A node, and the CPUs on which threads compute what lies in its memory."""

    node: int
    cpus: tuple[int, ...]

    @property
    def policy(self) -> tuple[int, tuple[int, ...]]:
        """The memory policy of its threads: *preferred*, since a bound process whose node is full gets killed."""
        return libnuma.MPOL_PREFERRED, (self.node,)


def places(nodes: Sequence[int] | None = None) -> dict[int, Place]:
    """For each node its physical cores; for one whose memory alone may be used the place of the nearest node.

    Parameters
    ----------
    nodes
        All effective nodes where None is given.

    Raises
    ------
    NodeUnavailable
        A node does not exist, or may not be used, or there is none.
    """
    topology = topology_outside()
    found = {}
    for node in topology.effective_nodes if nodes is None else nodes:
        home = node if topology.cpus_of([node]) else topology.nearest_cpu_node(node)
        topology.require_effective(home)
        found[node] = Place(home, topology.cpus_for([home]))
    if not found:
        raise NodeUnavailable("no node has both CPUs and memory that this process may use")
    return found


class _Seating(NamedTuple):
    """Everything that depends on which CPUs the seats are on, so that it changes at once."""

    places: tuple[Place, ...]
    pinned: Placement
    with_leader: Placement  # the same, but that the calling thread may use its whole node
    exchange: Exchange
    table: Any  # of words, as ``numa_lab.attention.openmp_regions`` says
    seat_of_cpu: Any  # to which the table points
    seats: int


class Seats:
    """The seats of some places, and working memory, for the team of one thread."""

    def __init__(self, places: tuple[Place, ...]) -> None:
        self.room = Room()
        # The counter of threads that are done has a line of its own.
        self._counter = np.zeros(2 * simd.LINE_BYTES // openmp_regions.WORD, np.int64)
        self._region = kernel_cache.address(openmp_regions.Seated())
        self._parallel = openmp.require().library.GOMP_parallel
        self._now = self._seating(places)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the seats are now: elsewhere than was asked for where CPUs were taken away."""
        return self._now.places

    def _seating(self, places: tuple[Place, ...]) -> _Seating:
        pinned, nearest = _placement(places), _seat_of_each_cpu(places)
        of_node = {cpu for cpu, (_, node) in _cores_and_nodes().items() if node == places[0].node}
        with_leader = _placement(places, of_node & cpus_outside() or places[0].cpus)
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
        table[openmp_regions.ARRIVED] = -(-self._counter.ctypes.data // simd.LINE_BYTES) * simd.LINE_BYTES
        table[openmp_regions.HEAD :] = [word for seat in seats for word in seat]
        return _Seating(places, pinned, with_leader, exchange, table, seat_of_cpu, len(seats))

    def run(self, jobs: int, merge: int = 0, merge_arguments: int = 0, *, alone: bool = False) -> None:
        """Compute one step.

        Parameters
        ----------
        jobs
            Address of two words for each place: where its jobs begin, and how many they are. A job is the address of a kernel's
            arguments (``numa_lab.attention.openmp_regions``).
        merge, merge_arguments
            What the last thread calls, a ``void (void *)``, and what it gets.
        alone
            Let the calling thread take all seats in turn, as it is not worth waking others.

        Warns
        -----
        RuntimeWarning
            A thread could not be moved, as where a cpuset was rewritten. The step was computed, wherever its threads were; from the next
            one on other CPUs are used, if there are any.
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
                self._sit_elsewhere()
            except NumaLabError as error:
                warnings.warn(
                    f"a step was computed where its threads happened to be: {error}", RuntimeWarning, stacklevel=6
                )

    def enter(self, before: Before, *, pin_caller: bool = False) -> None:
        """Let a block that begins keep the seats.

        The calling thread may then use its whole node, unless `pin_caller`: threads and processes that it starts inherit that.

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
            before.go(self._now.pinned if pin_caller else self._now.with_leader)
        except NodeUnavailable:  # the cpuset was rewritten since
            self._sit_elsewhere()
            before.go(self._now.pinned if pin_caller else self._now.with_leader)

    def _sit_elsewhere(self) -> None:
        before = self.places
        places = tuple(
            place._replace(cpus=team_replacement.anew(Placement(place.cpus), place.node, elsewhere=True).cpus)
            for place in before
        )
        if places == before:
            with self._now.pinned:  # which says why a CPU is refused, if one still is
                return
        self._now = self._seating(places)
        changes = [
            f"node {old.node}'s team was placed on CPUs {format_cpulist(old.cpus)}, which may no longer be used, as where a cpuset is "
            f"rewritten, and is placed again on CPUs {format_cpulist(new.cpus)}"
            for old, new in zip(before, places, strict=True)
            if old != new
        ]
        warnings.warn("; ".join(changes), RuntimeWarning, stacklevel=6)


def _seat_of_each_cpu(places: Sequence[Place]) -> list[int]:
    """For each CPU the seat on its core; or ``NOT_ON_IT`` minus the first of its node, or of all for those of other nodes."""
    where = _cores_and_nodes()
    on_core: dict[int, int] = {}
    on_node: dict[int, int] = {}
    for seat, cpu in enumerate(cpu for place in places for cpu in place.cpus):
        core, node = where.get(cpu, (-1, -1))  # of a CPU that there is not, as pinning says
        on_core.setdefault(core, seat)
        on_node.setdefault(node, seat)
    cpus = (where.get(cpu, (-1, -1)) for cpu in range(max(where) + 1))
    return [on_core.get(core, openmp_regions.NOT_ON_IT - on_node.get(node, 0)) for core, node in cpus]


@cache
def _cores_and_nodes() -> dict[int, tuple[int, int]]:
    """The core and the node of each CPU; reading them takes longer than a step."""
    return {cpu.id: (cpu.core, cpu.node) for cpu in read_topology().cpus}


@cache
def _current_cpu() -> int:
    """Address of the C library's function that tells a thread's CPU."""
    return openmp.address_of(ctypes.CDLL(None).sched_getcpu)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.seats: dict[tuple[Place, ...], Seats] = {}


_of_thread = _OfThread()


def seats_of(places: tuple[Place, ...]) -> Seats:
    """The calling thread's seats of these places."""
    found = _of_thread.seats.get(places)
    if found is None:
        found = _of_thread.seats[places] = Seats(places)
    return found


def _placement(places: Sequence[Place], leader_cpus: Collection[int] = ()) -> Placement:
    cpus = [cpu for place in places for cpu in place.cpus]
    return Placement(cpus, [place.policy for place in places for _ in place.cpus], leader_cpus)


class Taken(Block[Before]):
    """The seats of some places, kept for the steps of a ``with`` block; raises and warns as ``Seats.enter``."""

    def __init__(self, places: tuple[Place, ...], *, pin_caller: bool = False) -> None:
        self._places, self._pin_caller = places, pin_caller

    def _enter(self, before: Before) -> Before:
        enter(self._places, before, pin_caller=self._pin_caller)
        return before


def enter(places: tuple[Place, ...], before: Before, *, pin_caller: bool = False) -> None:
    """Let a block that begins keep the seats of some places, as ``Seats.enter``."""
    if openmp.runtime() is None:  # nobody but the caller can be placed
        before.go(_placement(places))
    else:
        seats_of(places).enter(before, pin_caller=pin_caller)


def look(
    places: tuple[Place, ...], topology: Topology
) -> dict[Place, tuple[Binding, tuple[ThreadSeen, ...], tuple[str, ...]]]:
    """For each place what the threads on its seats are granted, where they are, and what could not be placed or seen."""
    with Taken(places, pin_caller=True) as taken:
        if openmp.runtime() is None:
            return dict.fromkeys(places, observation.look(topology))
        asked = [place for place, now in zip(places, seats_of(places).places, strict=True) for _ in now.cpus]
        threads = threads_now(openmp.team(len(asked)))
        granted = openmp.run_on_each(lambda _: effective(topology), len(asked))
    notes = (*memory.lost(), *([taken.refusal] if taken.refusal else []))
    found = {}
    for place in places:
        # Of a team that is smaller than the seats, threads take several.
        own = [seat % len(threads) for seat, asking in enumerate(asked) if asking == place]
        found[place] = granted[own[0]], tuple(threads[thread] for thread in own), notes
    return found
