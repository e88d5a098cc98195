"""The order of measurements: randomised complete blocks.

Each block holds every arm once, in random order, so that what drifts over a run (clocks, temperature, other load) falls
on all arms alike.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

Arm = TypeVar("Arm")


def randomized_blocks(
    arms: Collection[Arm],
    least: int,
    *,
    seconds: float = 0.0,
    most: float = math.inf,
    order: random.Random | None = None,
) -> Iterator[tuple[int, Arm]]:
    """Give each arm once per block, in random order, until the time is over.

    Parameters
    ----------
    arms
        What is compared; they are given in the same order only by chance.
    least, most
        How many blocks there are at least, however long they take, and at most, however short they are.
    seconds
        No further block begins once so much time has passed since the first arm was asked for; a block that has begun
        is finished.
    order
        Where the random order comes from. By default it is a source of its own: that of the caller, which may be
        seeded, is left as it is.

    Returns
    -------
    Pairs of the number of the block, from 0, and the arm.
    """
    order, begin, block = order or random.Random(), time.perf_counter(), 0
    while block < least or (block < most and time.perf_counter() - begin < seconds):
        for arm in order.sample(list(arms), len(arms)):
            yield block, arm
        block += 1
