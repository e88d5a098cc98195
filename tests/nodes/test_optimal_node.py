import math
import os

import pytest

from numa_lab.errors import InvalidInput, NodeUnavailable, UntrustedResult
from numa_lab.machine import libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes import optimal_node, rankings
from numa_lab.nodes.node_visits import Visits
from numa_lab.nodes.optimal_node import bind_to_numa_node, get_optimal_numa_node, rank
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
            rows = {}
            for (label, _), visit in case.groupby(["label", "execution_id"]):
                rows.setdefault(label, []).append(visit.to_dict("records"))
            return Visits(rows, {node: [share] * 8 for node, share in self.waited.items()})

    planted = Machine()
    monkeypatch.setattr(optimal_node, "visit_nodes", planted.visit)
    monkeypatch.setattr(optimal_node, "read_topology", lambda: four_nodes)
    return planted


def causes(ranking):
    return {row.node: row.cause for row in ranking.nodes}


def test_a_slow_node_is_found_with_its_cause_and_never_chosen(machine):
    machine.effects, machine.waited = {"c1m1": 1.3}, {1: 0.4}
    ranking = rank()
    assert {row.node: row.tie_group for row in ranking.nodes} == {0: 1, 2: 1, 1: 2}
    slow = ranking.nodes[-1]
    assert (slow.node, slow.cause) == (1, "other load")
    assert slow.low < 1.3 < slow.high
    assert "Node 1 is slower by" in ranking.sentence()
    assert "other load" in ranking.sentence()
    assert get_optimal_numa_node() in (0, 2)


def test_equal_nodes_tie(machine):
    claims = 0
    for machine.seed in range(20):
        ranking = rank(refresh=True)
        claims += len(ranking.tied) < 3
    assert claims <= 1
    machine.seed = 0
    assert "Nodes 0-2 tie" in rank(refresh=True).sentence()


def test_of_nodes_that_tie_a_busy_one_is_avoided(machine):
    machine.waited = {0: 0.4}
    assert "Node 0: other load." in rank().sentence()
    assert get_optimal_numa_node() in (1, 2)


def test_in_a_tie_the_thread_stays_where_it_runs(machine, monkeypatch):
    for cpu, node in [(0, 0), (3, 1), (5, 2)]:
        monkeypatch.setattr(optimal_node, "last_cpu", lambda _tid, cpu=cpu: cpu)
        assert get_optimal_numa_node() == node
    machine.effects = {"c2m2": 1.4}
    assert get_optimal_numa_node(refresh=True) == 0


def test_a_ranking_is_kept_unless_load_was_seen_or_it_is_damaged(machine, tmp_path):
    first, again = rank(), rank()
    assert machine.measured == 1
    assert first == again
    rank(refresh=True)
    rank("gemma-2-9b")
    assert machine.measured == 3
    for path in (tmp_path / "numa_lab").iterdir():
        path.write_text(path.read_text()[:50])
    machine.waited = {1: 0.5}
    rank()
    rank()
    assert machine.measured == 5, "a damaged copy and load of the moment are measured anew"


def test_what_is_of_the_moment_is_not_kept(machine, monkeypatch, four_nodes):
    node = four_nodes.node(1)
    object.__setattr__(node, "available_bytes", node.memory_bytes // 20)
    assert causes(rank())[1] == "memory nearly full"
    rank()
    assert machine.measured == 2
    object.__setattr__(node, "available_bytes", node.memory_bytes)
    monkeypatch.setattr(optimal_node, "contradictions", lambda rows, node_cpus: ["Threads were elsewhere."])
    ranking = rank()
    assert {row.receipt for row in ranking.nodes} == {"Threads were elsewhere."}
    with pytest.raises(UntrustedResult, match="Threads were elsewhere"):
        ranking.require_receipts()
    rank()
    assert machine.measured == 4


def test_fewer_cores_are_a_cause(machine, four_nodes):
    object.__setattr__(four_nodes, "allowed_cpus", (0, 1, 2, 3, 4))
    assert causes(rank()) == {0: "", 1: "", 2: "fewer cores"}


def test_a_cache_folder_that_cannot_be_written_is_told_once(machine, monkeypatch):
    def refuse(*_args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(rankings, "write_json", refuse)
    with pytest.warns(UserWarning, match="measured again next time: .*Read-only"):
        assert len(rank().nodes) == 3


def test_a_node_without_room_comes_last_with_its_cause(machine, monkeypatch):
    def visit(topology, shape, seconds):
        visits = machine.visit(topology, shape, seconds)
        del visits.rows["c2m2"]
        visits.too_small[2] = "too little"
        return visits

    monkeypatch.setattr(optimal_node, "visit_nodes", visit)
    ranking = rank()
    assert (ranking.nodes[-1].node, ranking.nodes[-1].cause) == (2, "memory nearly full")
    assert "Node 2 is not usable" in ranking.sentence()


def test_one_node_returns_at_once(monkeypatch):
    topology = read_topology()
    object.__setattr__(topology, "nodes", (topology.node(NODE),))
    monkeypatch.setattr(optimal_node, "read_topology", lambda: topology)
    monkeypatch.setattr(optimal_node, "visit_nodes", None)
    ranking = rank()
    assert [row.node for row in ranking.nodes] == [NODE]
    assert math.isnan(ranking.nodes[0].median_seconds)
    assert ranking.sentence() == f"One node, {NODE}: nothing to compare."
    assert get_optimal_numa_node() == NODE


def test_what_makes_no_sense_is_refused(monkeypatch, four_nodes):
    with pytest.raises(InvalidInput, match="llama-3-9b"):
        rank("llama-3-9b")
    with pytest.raises(InvalidInput, match="seconds=0"):
        rank(seconds=0)
    object.__setattr__(four_nodes, "nodes", ())
    monkeypatch.setattr(optimal_node, "read_topology", lambda: four_nodes)
    with pytest.raises(NodeUnavailable, match="allowed are CPUs 0-5"):
        rank()


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
