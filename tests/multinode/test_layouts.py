"""Machines of odd shapes: gaps between node ids, nodes without memory, threads that share cores."""

import os

import pytest

from numa_lab.errors import NodeUnavailable
from numa_lab.experiments import sweep_bindings
from numa_lab.machine import libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement.binding import Binding, effective

MACHINES = {  # CPUs of each node, nodes with memory, physical cores, effective nodes
    "two-sockets": ({0: (0, 1), 1: (2, 3), 2: (4, 5), 3: ()}, (0, 1, 2, 3), 6, (0, 1, 2)),
    "two-nodes": ({0: (0, 1), 1: (2, 3)}, (0, 1), 4, (0, 1)),
    "memoryless": ({0: (0, 1), 1: (2, 3), 2: (4, 5)}, (0, 2), 6, (0, 2)),
    "gaps": ({0: (0, 1, 2, 3), 2: (4, 5), 4: ()}, (0, 2, 4), 3, (0, 2)),
}


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.guest(name)) for name in MACHINES])
def test_the_machine_is_read_as_it_was_made(layout):
    cpus, with_memory, cores, effective_nodes = MACHINES[layout]
    topology = read_topology()
    assert topology.node_cpus == cpus
    assert topology.allowed_nodes == with_memory
    assert len(topology.physical_cores(topology.allowed_cpus)) == cores
    assert topology.effective_nodes == effective_nodes
    assert topology.emulated
    assert topology.hypervisor
    if layout == "two-sockets":
        assert topology.distances == ((10, 12, 32, 32), (12, 10, 32, 32), (32, 32, 10, 12), (32, 32, 12, 10))
        assert len(topology.sockets) == 2
        assert topology.nearest_cpu_node(3) == 2


@pytest.mark.guest("memoryless")
def test_a_node_without_memory_computes_on_the_memory_of_others():
    topology = read_topology()
    with pytest.raises(
        NodeUnavailable, match="node 1 has no memory that this process may use; nodes with usable memory: 0,2"
    ):
        Binding.parse("c1m1").require(topology)
    with Binding.parse("c1m2").bind(topology) as granted:
        assert granted == Binding.parse("c1m2")
        assert os.sched_getaffinity(0) == {2, 3}
    assert effective(topology).policy.value == "default"
    assert list(map(str, sweep_bindings.choose_bindings("local", topology))) == ["c0m0", "c2m2"]
    assert "c1m0" in map(str, sweep_bindings.choose_bindings("matrix", topology))


@pytest.mark.guest("gaps")
def test_nodes_behind_gaps_are_bound_by_their_own_ids():
    topology = read_topology()
    for label in ("c2m4", "c0i0,2,4", "c2p0", "c0,2w2,4"):
        with Binding.parse(label).bind(topology) as granted:
            assert str(granted) == label
            assert libnuma.get_mempolicy()[1] == set(granted.mem_nodes)
    with pytest.raises(NodeUnavailable, match="node 1 does not exist; nodes of this machine: 0,2,4"):
        Binding.parse("c1m0").require(topology)
    assert topology.cpus_for([0]) == (0, 2), "one thread of each core"
