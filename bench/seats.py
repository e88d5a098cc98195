"""What a step costs beside its work, for more and more seats: a parallel region, and what its threads are placed by in it.

Beyond the cores that are here threads take turns on them, so that only what a seat adds can be compared with the row before it. On a
machine with as many cores, the kernel's own locks and the barrier over sockets show in the same columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import common
import torch
from numba import cfunc, types

from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.seats import Place, ReservedSeats, seats_of
from numa_lab.placement import openmp

SEATS = (2, 4, 8, 16, 32, 64, 128)
BARE, OUTSIDE, INSIDE = "a bare region", "a step", "inside a block"


@cfunc(types.void(types.int64))
def nothing(_data):  # type: ignore[no-untyped-def]
    """What the threads of a bare region run."""


def measure(turns: int) -> dict[tuple[str, str], float]:
    """Median seconds by seats and by what is done."""
    cores, node = common.cores_here(), read_topology().effective_nodes[0]
    seconds = {}
    for count in SEATS:  # one after the other: where their number changes, threads are ended and started
        place = Place(node, tuple(cores[seat % len(cores)] for seat in range(count)))
        own, no_jobs = seats_of((place,)), (ctypes.c_int64 * 2)()
        torch.set_num_threads(count)
        address = ctypes.addressof(no_jobs)
        calls: dict[str, Callable[[int], object]] = {
            BARE: lambda _, count=count: openmp.run_on_team(nothing.address, 0, count),
            OUTSIDE: lambda _, own=own, address=address: own.run(address),
        }
        work = {(f"{count} seats", name): common.seconds_of(call, 1) for name, call in calls.items()}
        work[f"{count} seats", INSIDE] = _inside(ReservedSeats((place,)), common.seconds_of(calls[OUTSIDE], 1))
        seconds |= common.medians(work, turns)
    return seconds


def _inside(taken: ReservedSeats, seconds: Callable[[], float]) -> Callable[[], float]:
    def inside() -> float:
        with taken:
            return seconds()

    return inside


def main() -> None:
    """Print a line for each number of seats: microseconds, and as multiples of a bare region."""
    options = common.parser(__doc__, turns=9).parse_args()
    seconds = common.in_own_process(len(common.cores_here()), measure, options.turns)
    print(f"\n{'seats':>5}  {BARE:>14}  {OUTSIDE:>10}  {'to bare':>8}  {INSIDE:>15}  {'to bare':>8}")
    for count in SEATS:
        bare, outside, inside = (seconds[f"{count} seats", name] for name in (BARE, OUTSIDE, INSIDE))
        print(
            f"{count:5}  {1e6 * bare:11.1f} us  {1e6 * outside:7.1f} us  {outside / bare:8.2f}"
            f"  {1e6 * inside:12.1f} us  {inside / bare:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
