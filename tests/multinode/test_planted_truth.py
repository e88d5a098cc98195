"""The ranking of nodes against a known truth: equal nodes tie, and a busy one is avoided and named."""

import math
import subprocess
import sys

import pytest

from numa_lab.attention.shapes import preset
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.optimal_node import choose, rank

SHAPE = preset("llama-3-8b", kv_len=512, q_heads=2, kv_heads=1, head_dim=64)  # small: software computes it
REPEATS = 20


def ranked():
    return rank(SHAPE, seconds=1.0, refresh=True)


@pytest.mark.guest("two-sockets", seconds=900)
def test_equal_nodes_tie():
    rankings = [ranked() for _ in range(REPEATS)]
    false_claims = [ranking for ranking in rankings if len(ranking.tied) < len(ranking.nodes)]
    assert len(false_claims) <= 1, false_claims
    assert all(row.receipt == "" for ranking in rankings for row in ranking.nodes)
    assert all(ranking.noise_floor > 0 for ranking in rankings)


@pytest.mark.guest("two-sockets", seconds=300)
@pytest.mark.parametrize("busy", [0, 2])
def test_a_busy_node_is_avoided_and_the_ranking_says_why(busy):
    # One for each CPU: the kernel would move a single one to the CPU that waits for the other.
    words = [sys.executable, "-c", "while True: pass"]
    hogs = [subprocess.Popen(["numactl", f"--physcpubind={cpu}", *words]) for cpu in read_topology().cpus_of([busy])]
    try:
        ranking = ranked()
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert [row.node for row in ranking.nodes if "other load" in row.cause] == [busy], ranking
    assert choose(ranking) != busy
    assert all(math.isfinite(row.low) and math.isfinite(row.high) for row in ranking.nodes), "how sure it is"
