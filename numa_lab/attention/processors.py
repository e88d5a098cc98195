"""What the kernels do differently on one processor and on another, where that does not follow from their vectors: a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """How kernels are made for a processor. The defaults are for one that is not in the table."""

    # How many bytes before it is read each line of K and of V is prefetched, the largest number first. A core drops prefetches that
    # find its queue of misses full, which is why a line may be asked for several times.
    stream_ahead: tuple[int, ...] = ()
    # Whether each step prefetches what the next one reads: V of a block while K is scored, K of the next block while V is summed.
    next_step_ahead: bool = True
    score_steps: int = (
        4  # vectors of a KV row in one turn of the loop of scores; address arithmetic is done once per turn
    )
    pairs_first: bool = (
        False  # whether products of pairs of bfloat16 are faster than those of numbers widened to float32
    )


DEFAULTS = Processor()

# By the names that LLVM gives to processors.
_PROCESSORS = {
    # Measured with one thread on two cores of a shared server: with the defaults, groups 1 to 4 read at .6 to .76 of the limit, and at
    # .91 to 1.0 so. In the caches the four prefetches cost up to a third of the speed (float32, group 4).
    "znver4": Processor((16384, 12288, 8192, 4096), next_step_ahead=False, score_steps=8, pairs_first=True),
    # Not measured: taken to be as its predecessor.
    "znver5": Processor((16384, 12288, 8192, 4096), next_step_ahead=False, score_steps=8, pairs_first=True),
}


def processor(name: str) -> Processor:
    """Return what the table has for a processor, by LLVM's name; the defaults where it has none."""
    return _PROCESSORS.get(name, DEFAULTS)
