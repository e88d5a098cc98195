import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from numa_lab.errors import InvalidInput, NodeUnavailable
from numa_lab.machine import libnuma
from numa_lab.machine.topology import read_topology
from numa_lab.measurement import results
from numa_lab.nodes import optimal_node, rankings
from numa_lab.nodes.optimal_node import Visits, bind_to_numa_node, get_optimal_numa_node, rank_nodes
from numa_lab.nodes.rankings import sentence
from numa_lab.placement import openmp
from numa_lab.placement.binding import Binding, MemPolicy

NODE = read_topology().effective_nodes[0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def machine(monkeypatch, four_nodes, synthetic_rows):
    """A machine of three effective nodes whose visits have a planted truth; counts how often it is measured."""

    class Machine:
        measured, effects, waited, seed, noise = 0, {}, {}, 0, 0.01

        def visit(self, topology, shape, seconds):
            self.measured += 1
            labels = [f"c{node}m{node}" for node in topology.effective_nodes]
            rows = synthetic_rows(labels, 8, self.effects, self.noise, self.seed)
            case = rows[
                (rows["kv_len"] == 4096) & (rows["kv_heads"] == 8) & (rows["batch"] == 1) & (rows["threads"] == 2)
            ]
            return Visits(case.to_dict("records"), {node: [share] * 8 for node, share in self.waited.items()})

    planted = Machine()
    monkeypatch.setattr(optimal_node, "_visit", planted.visit)
    monkeypatch.setattr(optimal_node, "read_topology", lambda: four_nodes)
    return planted


def test_a_slow_node_is_found_with_its_cause_and_never_chosen(machine):
    machine.effects, machine.waited = {"c1m1": 1.3}, {1: 0.4}
    ranking = rank_nodes()
    assert ranking["tie_group"].to_dict() == {0: 1, 2: 1, 1: 2}
    assert ranking.loc[1, "cause"] == "other load"
    assert ranking.loc[1, "low"] < 1.3 < ranking.loc[1, "high"]
    assert "Node 1 is slower by" in sentence(ranking)
    assert "other load" in sentence(ranking)
    assert get_optimal_numa_node() in (0, 2)


def test_equal_nodes_tie(machine):
    claims = 0
    for machine.seed in range(20):
        ranking = rank_nodes(refresh=True)
        claims += set(ranking["tie_group"]) != {1}
    assert claims <= 1
    machine.seed = 0
    assert "Nodes 0-2 tie" in sentence(rank_nodes(refresh=True))


def test_of_nodes_that_tie_a_busy_one_is_avoided(machine):
    machine.waited = {0: 0.4}
    assert "Node 0: other load." in sentence(rank_nodes())
    assert get_optimal_numa_node() in (1, 2)


def test_in_a_tie_the_thread_stays_where_it_runs(machine, monkeypatch):
    for cpu, node in [(0, 0), (3, 1), (5, 2)]:
        monkeypatch.setattr(optimal_node, "last_cpu", lambda _tid, cpu=cpu: cpu)
        assert get_optimal_numa_node() == node
    machine.effects = {"c2m2": 1.4}
    assert get_optimal_numa_node(refresh=True) == 0


def test_a_ranking_is_kept_unless_load_was_seen_or_it_is_damaged(machine, tmp_path):
    first, again = rank_nodes(), rank_nodes()
    assert machine.measured == 1
    pd.testing.assert_frame_equal(first, again)
    assert first.attrs == again.attrs
    rank_nodes(refresh=True)
    rank_nodes("gemma-2-9b")
    assert machine.measured == 3
    for path in (tmp_path / "numa_lab").iterdir():
        path.write_text(path.read_text()[:50])
    machine.waited = {1: 0.5}
    rank_nodes()
    rank_nodes()
    assert machine.measured == 5, "a damaged copy and load of the moment are measured anew"


def test_what_is_of_the_moment_is_not_kept(machine, monkeypatch, four_nodes):
    node = four_nodes.node(1)
    object.__setattr__(node, "available_bytes", node.memory_bytes // 20)
    assert rank_nodes().loc[1, "cause"] == "memory nearly full"
    rank_nodes()
    assert machine.measured == 2
    object.__setattr__(node, "available_bytes", node.memory_bytes)
    monkeypatch.setattr(optimal_node, "contradictions", lambda rows, node_cpus: ["Threads were elsewhere."])
    assert "Threads were elsewhere." in set(rank_nodes()["receipt"])
    rank_nodes()
    assert machine.measured == 4


def test_fewer_cores_are_a_cause(machine, four_nodes):
    object.__setattr__(four_nodes, "allowed_cpus", (0, 1, 2, 3, 4))
    assert rank_nodes()["cause"].to_dict() == {0: "", 1: "", 2: "fewer cores"}


def test_a_full_first_node_leaves_the_noise_floor_to_the_next(monkeypatch):
    def room(size, node):
        if node == 0:
            raise NodeUnavailable("node 0 is full")
        return node

    monkeypatch.setattr(optimal_node, "KVPool", room)
    cpu, visits = min(os.sched_getaffinity(0)), Visits()
    pools = optimal_node._pools({0: [cpu], 1: [cpu], 2: [cpu]}, 1, visits)
    assert pools == {"c1m1": (1, 1), "c2m2": (2, 2), "c1m1~aa": (1, 1)}
    assert visits.too_small == {0: "node 0 is full"}
    with pytest.raises(NodeUnavailable, match="no node has room for the tensors: node 0 is full"):
        optimal_node._pools({0: [cpu]}, 1, visits)


def test_one_busy_core_of_the_team_is_seen_as_load():
    cpus = read_topology().cpus_for([NODE])
    busy = subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{cpus[-1]}}})\nwhile 1: 0"])
    try:
        visits = optimal_node._visit(read_topology(), optimal_node.DEFAULT_SHAPE.replace(kv_len=64), 0.05)
    finally:
        busy.kill()
        busy.wait()
    assert "other load" in optimal_node._rank(visits, read_topology()).loc[NODE, "cause"]


def test_a_cache_folder_that_cannot_be_written_is_told_once(machine, monkeypatch):
    def refuse(*_args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(rankings, "write_json", refuse)
    with pytest.warns(UserWarning, match="measured again next time: .*Read-only"):
        assert len(rank_nodes()) == 3


def test_a_node_without_room_comes_last_with_its_cause(machine, monkeypatch):
    def visit(topology, shape, seconds):
        visits = machine.visit(topology, shape, seconds)
        visits.rows = [row for row in visits.rows if row["cpu_nodes"] != "2"]
        visits.too_small[2] = "too little"
        return visits

    monkeypatch.setattr(optimal_node, "_visit", visit)
    ranking = rank_nodes()
    assert ranking.index[-1] == 2
    assert ranking.loc[2, "cause"] == "memory nearly full"
    assert "Node 2 is not usable" in sentence(ranking)


def test_one_node_returns_at_once(monkeypatch):
    topology = read_topology()
    object.__setattr__(topology, "nodes", (topology.node(NODE),))
    monkeypatch.setattr(optimal_node, "read_topology", lambda: topology)
    monkeypatch.setattr(optimal_node, "_visit", None)
    ranking = rank_nodes()
    assert list(ranking.index) == [NODE]
    assert math.isnan(ranking.loc[NODE, "median_seconds"])
    assert sentence(ranking) == f"One node, {NODE}: nothing to compare."
    assert get_optimal_numa_node() == NODE


def test_what_makes_no_sense_is_refused(monkeypatch, four_nodes):
    with pytest.raises(InvalidInput, match="llama-3-9b"):
        rank_nodes("llama-3-9b")
    with pytest.raises(InvalidInput, match="seconds=0"):
        rank_nodes(seconds=0)
    object.__setattr__(four_nodes, "nodes", ())
    monkeypatch.setattr(optimal_node, "read_topology", lambda: four_nodes)
    with pytest.raises(NodeUnavailable, match="allowed are CPUs 0-5"):
        rank_nodes()


def test_a_real_visit_has_receipts_that_hold():
    topology = read_topology()
    visits = optimal_node._visit(topology, optimal_node.DEFAULT_SHAPE.replace(kv_len=64), 0.01)
    rows = pd.DataFrame(visits.rows)
    assert set(rows) == {column.name for column in results.COLUMNS}
    assert set(rows["label"]) >= {f"c{NODE}m{NODE}", f"c{NODE}m{NODE}~aa"}
    assert all(np.isfinite(visits.waited[NODE]))
    ranking = optimal_node._rank(visits, topology)
    assert list(ranking["receipt"]) == [""] * len(ranking)
    assert ranking.loc[NODE, "visits"] == optimal_node.BLOCKS


def test_binding_for_good_moves_the_team_too():
    outside = os.sched_getaffinity(0)
    child = os.fork()  # what is bound for good stays bound
    if not child:
        status = 1
        try:
            openmp.team()
            topology = read_topology()
            granted = bind_to_numa_node(NODE)
            expected = [{cpu} for cpu in topology.cpus_for([NODE])][1:]
            policies = set(openmp.run_on_each(lambda _number: libnuma.get_mempolicy(), openmp.threads()))
            held = [thread.cpus for thread in openmp.team()][1:] == expected
            held &= policies == {(libnuma.MPOL_PREFERRED, frozenset({NODE}))}
            held &= granted == Binding((NODE,), (NODE,), MemPolicy.PREFERRED)
            status = 0 if held else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.sched_getaffinity(0) == outside
    with pytest.raises(NodeUnavailable, match="node 77"):
        bind_to_numa_node(77)
