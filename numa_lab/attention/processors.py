"""What the kernels do differently on one processor and on another, where that does not follow from their vectors: a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """How kernels are made for a processor. The defaults are for one that is not in the table."""

    # How many bytes before it is read each line of K and of V is prefetched, the largest number first. A core drops prefetches that
    # find its queue of misses full, which is why a line may be asked for several times. Each costs time where multiplying bounds.
    stream_ahead: tuple[int, ...] = ()
    busy_stream_ahead: tuple[int, ...] = ()  # the same for panels of a higher intensity than `bound_by_memory`
    bound_by_memory: float = 1.0  # see ``Panel.intensity``
    # Whether each step prefetches what the next one reads: V of a block while K is scored, K of the next block while V is summed.
    next_step_ahead: bool = True
    score_steps: int = (
        4  # vectors of a KV row in one turn of the loop of scores; address arithmetic is done once per turn
    )
    pairs_first: bool = (
        False  # whether products of pairs of bfloat16 are faster than those of numbers widened to float32
    )


DEFAULTS = Processor()

# Measured with one thread on two cores of a shared server (docs/decode-kernel.md has what was tried): with the defaults, groups 1 to 4 read
# at .6 to .76 of the limit, and at .92 to 1.0 so. In the caches four prefetches of each line cost up to a third of the speed.
_ZEN4 = Processor(
    stream_ahead=(16384, 12288, 8192, 4096),
    busy_stream_ahead=(32768, 8192),
    next_step_ahead=False,
    score_steps=8,
    pairs_first=True,
)

# By the names that LLVM gives to processors.
_PROCESSORS = {
    "znver4": _ZEN4,
    "znver5": _ZEN4,  # not measured: taken to be as its predecessor
}


def processor(name: str) -> Processor:
    """Return what the table has for a processor, by LLVM's name; the defaults where it has none."""
    return _PROCESSORS.get(name, DEFAULTS)
