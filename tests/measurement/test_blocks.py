import random
import time

import pytest

from numa_lab.measurement.blocks import randomized_blocks

ARMS = ("a", "b", "c", "d", "e")


def test_each_block_holds_each_arm_once_in_an_order_of_its_own():
    blocks = [[], [], [], []]
    for block, arm in randomized_blocks(ARMS, 4):
        blocks[block].append(arm)
    assert all(sorted(block) == list(ARMS) for block in blocks)
    assert len(set(map(tuple, blocks))) > 1, "happens by chance once in two million runs"


def test_a_seed_gives_its_order_and_the_callers_own_is_left_alone():
    orders = [list(randomized_blocks(ARMS, 3, order=random.Random(1))) for _ in range(2)]
    assert orders[0] == orders[1]
    before = random.getstate()
    list(randomized_blocks(ARMS, 3))
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("limits", "blocks"),
    [({"seconds": 0.25}, 3), ({"seconds": 0.05}, 2), ({"seconds": 10, "most": 4}, 4), ({"seconds": 0, "most": 4}, 2)],
)
def test_time_decides_between_the_least_and_the_most(monkeypatch, limits, blocks):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    arms = 0
    for _ in randomized_blocks(("a", "b"), 2, **limits):
        clock[0] += 0.05  # a block takes 0.1 s
        arms += 1
    assert arms == 2 * blocks
