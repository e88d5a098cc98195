"""What OpenMP calls on each thread of a team: it tells a kernel which of how many threads it computes as.

A kernel is a ``void share(void *ARGUMENTS, int64_t number, int64_t threads)``, whose arguments hold its own address. ``Alone``
runs one on the whole team. ``Seated`` is a step over places, each with kernels of its own: a thread takes a seat of one of
them for as long as the step lasts. Both are kept on disk as kernels are, so all that they call is told to them by address.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from numba import cfunc, types

from numa_lab.attention.decode_kernel import ARGUMENTS, compiled
from numa_lab.attention.tiles import (
    call_int,
    call_with_one,
    call_with_three,
    call_with_two,
    fetch_add,
    load_word,
    store_word,
)
from numa_lab.placement import openmp

WORD = 8
SHARE, _NUMBER, _SIZE = (ARGUMENTS.fields[name][1] for name in ("share", "thread_number", "team_size"))  # type: ignore[index]

# What a step gets, in words: how many seats there are, addresses of functions and of what they get, of tables, and of the counter of
# seats that are done. Behind them each seat has four: its place, its number there, how many seats the place has, and how often it was
# asked for in this step. A place has two, where its jobs begin and how many they are; a job is the address of a kernel's arguments. For
# each CPU there is the seat on its core, or NOT_ON_IT minus one that is near.
(
    SEATS, THREAD_NUMBER, TEAM_SIZE, CURRENT_CPU, EXCHANGE, THERE, BACK, SEAT_OF_CPU, CPUS, PLACES, MERGE, MERGE_ARGUMENTS, ARRIVED,
    HEAD,
) = range(14)  # fmt: skip
SEAT, NOT_ON_IT = 4, -1
_OF_PLACE, _ASKED = 2, 3


@dataclass(frozen=True)
class Alone:
    """The calling thread's team computes what one kernel has to do."""

    def build(self) -> Any:
        """Compile ``void alone(void *ARGUMENTS)``."""

        @cfunc(types.void(types.int64), error_model="numpy")
        def alone(arguments):  # type: ignore[no-untyped-def]
            number, threads = call_int(load_word(arguments + _NUMBER)), call_int(load_word(arguments + _SIZE))
            call_with_three(load_word(arguments + SHARE), arguments, number, threads)

        return alone


@dataclass(frozen=True)
class Seated:
    """A step of a team whose threads have seats of several places.

    A thread takes the seat on whose core it is, and else the next that no other has. It is moved in the latter case alone: setting a
    mask is a system call, in which it may lose its slice of time to whatever else wants to run there. A team that is smaller than
    the table of seats takes further ones where it is, and of a larger one the others have nothing to do: what is computed is the same. Who
    is done last merges, and lays all counters back.
    """

    def build(self) -> Any:
        """Compile ``void seated(int64_t table[])``."""

        @compiled
        def word(table, place):  # type: ignore[no-untyped-def]
            return load_word(table + WORD * place)

        @compiled
        def take(table, nearest):  # type: ignore[no-untyped-def]
            seats = word(table, SEATS)
            seat = nearest
            while fetch_add(table + WORD * (HEAD + SEAT * seat + _ASKED)) != 0:
                seat = (seat + 1) % seats
            return seat

        @compiled
        def compute(table, seat):  # type: ignore[no-untyped-def]
            at = HEAD + SEAT * seat
            number, seats = word(table, at + 1), word(table, at + _OF_PLACE)
            own = word(table, PLACES) + 2 * WORD * word(table, at)
            for job in range(word(own, 1)):
                arguments = word(word(own, 0), job)
                call_with_three(load_word(arguments + SHARE), arguments, number, seats)

        @compiled
        def finish(table):  # type: ignore[no-untyped-def]
            store_word(word(table, ARRIVED), 0)
            for seat in range(word(table, SEATS)):
                store_word(table + WORD * (HEAD + SEAT * seat + _ASKED), 0)
            if word(table, MERGE):
                call_with_one(word(table, MERGE), word(table, MERGE_ARGUMENTS))

        @cfunc(types.void(types.int64), error_model="numpy")
        def seated(table):  # type: ignore[no-untyped-def]
            me, size, seats = call_int(word(table, THREAD_NUMBER)), call_int(word(table, TEAM_SIZE)), word(table, SEATS)
            if me >= seats:
                return
            cpu, moved = call_int(word(table, CURRENT_CPU)), False
            here = word(word(table, SEAT_OF_CPU), cpu) if 0 <= cpu < word(table, CPUS) else NOT_ON_IT
            nearest = here
            if here < 0:  # of many such threads not all ask for the same
                nearest = NOT_ON_IT - here
                nearest += me % word(table, HEAD + SEAT * nearest + _OF_PLACE)
            for turn in range((seats - me + size - 1) // size):
                seat = take(table, nearest)
                if turn == 0 and seat != here:
                    call_with_two(word(table, EXCHANGE), word(table, THERE), seat)
                    moved = True
                compute(table, seat)
                if fetch_add(word(table, ARRIVED)) == seats - 1:
                    finish(table)
            if moved:
                call_with_two(word(table, EXCHANGE), word(table, BACK), 0)

        return seated


@cache
def team_functions() -> tuple[int, int]:
    """Addresses of the functions that tell a thread its number and the size of its team."""
    library = openmp.require().library
    return openmp.address_of(library.omp_get_thread_num), openmp.address_of(library.omp_get_num_threads)
