import os
import statistics
import subprocess
import sys

import numpy as np
import pytest

from numa_lab.attention.shapes import preset
from numa_lab.errors import NodeUnavailable
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement import results
from numa_lab.nodes import node_visits, optimal_node
from numa_lab.nodes.node_visits import BLOCKS, Visits

NODE = read_topology().effective_nodes[0]
SHAPE = preset("llama-3-8b", kv_len=64)


def test_a_full_first_node_leaves_the_noise_floor_to_the_next(monkeypatch):
    def room(size, node):
        if node == 0:
            raise NodeUnavailable("node 0 is full")
        return node

    monkeypatch.setattr(node_visits, "KVPool", room)
    cpu, visits = min(os.sched_getaffinity(0)), Visits()
    pools = node_visits._pools({0: [cpu], 1: [cpu], 2: [cpu]}, 1, visits)
    assert pools == {"c1m1": (1, 1), "c2m2": (2, 2), "c1m1~aa": (1, 1)}
    assert visits.too_small == {0: "node 0 is full"}
    with pytest.raises(NodeUnavailable, match="no node has room for the tensors: node 0 is full"):
        node_visits._pools({0: [cpu]}, 1, visits)


def test_one_busy_core_of_the_team_is_seen_as_load():
    cpus = read_topology().cpus_for([NODE])
    busy = subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{cpus[-1]}}})\nwhile 1: 0"])
    try:
        visits = node_visits.visit_nodes(read_topology(), SHAPE, 0.05)
    finally:
        busy.kill()
        busy.wait()
    assert statistics.median_high(visits.waited[NODE]) > optimal_node.BUSY_SHARE


def test_a_real_visit_has_receipts_that_hold():
    topology = read_topology()
    visits = node_visits.visit_nodes(topology, SHAPE, 0.01)
    label = node_visits.label_of(NODE)
    assert set(visits.rows) >= {label, f"{label}~aa"}
    assert all(len(each) == BLOCKS for each in visits.rows.values())
    assert set(visits.rows[label][0][0]) == {column.name for column in results.COLUMNS}
    assert all(np.isfinite(visits.waited[NODE]))
    ranking = optimal_node.rank_visits(visits, topology)
    assert [row.receipt for row in ranking.nodes] == [""] * len(ranking.nodes)
    assert next(row.visits for row in ranking.nodes if row.node == NODE) == BLOCKS
