"""The functions that OpenMP calls on each thread of a team, which tell a kernel as which of how many threads it computes.

A kernel is a ``void share(void *ARGUMENTS, int64_t number, int64_t threads)``, whose arguments hold its own address. ``TeamRegion``
runs one kernel on the calling thread's team. ``SeatedRegion`` is a step over several places, each with kernels of its own: a thread takes a
seat of one of the places for as long as the step lasts. Both are kept on disk as kernels are, so they get the addresses of all that they
call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from numa_lab.attention.decode_spec import ARGUMENTS
from numa_lab.placement import openmp

WORD = 8
SHARE, _NUMBER, _SIZE = (ARGUMENTS.fields[name][1] for name in ("share", "thread_number", "team_size"))  # type: ignore[index]

# A step gets a table of int64 words: the number of seats, the addresses of functions and of what they get, those of further tables, and
# that of the counter of seats that are done. Behind these, from HEAD on, each seat has four words: its place, its number there, the number
# of seats of the place, and how often it was asked for in this step. The table PLACES has two words for each place: the address of its jobs
# and their number; a job is the address of a kernel's arguments. The table SEAT_OF_CPU has for each CPU the seat on its core, or NOT_ON_IT
# minus a seat that is near.
(
    SEATS, THREAD_NUMBER, TEAM_SIZE, CURRENT_CPU, EXCHANGE, THERE, BACK, SEAT_OF_CPU, CPUS, PLACES, MERGE, MERGE_ARGUMENTS, ARRIVED,
    HEAD,
) = range(14)  # fmt: skip
SEAT, NOT_ON_IT = 4, -1
_OF_PLACE, _ASKED = 2, 3


@dataclass(frozen=True)
class TeamRegion:
    """The region in which the calling thread's team runs one kernel."""

    def build(self) -> Any:
        """Compile ``void region(void *ARGUMENTS)``."""
        from numba import cfunc, types

        from numa_lab.attention.tiles import call_int, call_with_three, load_word

        @cfunc(types.void(types.int64), error_model="numpy")
        def region(arguments):  # type: ignore[no-untyped-def]
            number, threads = call_int(load_word(arguments + _NUMBER)), call_int(load_word(arguments + _SIZE))
            call_with_three(load_word(arguments + SHARE), arguments, number, threads)

        return region


@dataclass(frozen=True)
class SeatedRegion:
    """The region in which a team computes one step, with its threads on seats of several places.

    A thread takes the seat on whose core it is, or else the next one that no other thread has taken. Only in the latter case is it moved:
    setting a mask is a system call, in which the thread may lose its slice of time to whatever else wants to run there. Where the team is
    smaller than the number of seats, threads take further seats where they are; where it is larger, the other threads have nothing to do.
    What is computed is the same. The thread that is done last merges the parts, and sets all counters back.
    """

    def build(self) -> Any:
        """Compile ``void region(int64_t table[])``."""
        from numba import cfunc, types

        from numa_lab.attention.tiles import (
            call_int,
            call_with_one,
            call_with_three,
            call_with_two,
            fetch_add,
            jit,
            load_word,
            store_word,
        )

        @jit
        def word(table, place):  # type: ignore[no-untyped-def]
            return load_word(table + WORD * place)

        @jit
        def take(table, nearest):  # type: ignore[no-untyped-def]
            seats = word(table, SEATS)
            seat = nearest
            while fetch_add(table + WORD * (HEAD + SEAT * seat + _ASKED)) != 0:
                seat = (seat + 1) % seats
            return seat

        @jit
        def compute(table, seat):  # type: ignore[no-untyped-def]
            at = HEAD + SEAT * seat
            number, seats = word(table, at + 1), word(table, at + _OF_PLACE)
            own = word(table, PLACES) + 2 * WORD * word(table, at)
            for job in range(word(own, 1)):
                arguments = word(word(own, 0), job)
                call_with_three(load_word(arguments + SHARE), arguments, number, seats)

        @jit
        def finish(table):  # type: ignore[no-untyped-def]
            store_word(word(table, ARRIVED), 0)
            for seat in range(word(table, SEATS)):
                store_word(table + WORD * (HEAD + SEAT * seat + _ASKED), 0)
            if word(table, MERGE):
                call_with_one(word(table, MERGE), word(table, MERGE_ARGUMENTS))

        @cfunc(types.void(types.int64), error_model="numpy")
        def region(table):  # type: ignore[no-untyped-def]
            me, size, seats = call_int(word(table, THREAD_NUMBER)), call_int(word(table, TEAM_SIZE)), word(table, SEATS)
            if me >= seats:
                return
            cpu, moved = call_int(word(table, CURRENT_CPU)), False
            here = word(word(table, SEAT_OF_CPU), cpu) if 0 <= cpu < word(table, CPUS) else NOT_ON_IT
            nearest = here
            if here < 0:  # such threads shall not all ask for the same seat
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

        return region


@cache
def team_functions() -> tuple[int, int]:
    """Return the addresses of the functions that tell a thread its number and the size of its team."""
    library = openmp.require().library
    return openmp.address_of(library.omp_get_thread_num), openmp.address_of(library.omp_get_num_threads)
