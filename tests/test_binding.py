import dataclasses
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numa_lab import libnuma
from numa_lab.binding import Binding, MemPolicy, effective, mask_words
from numa_lab.errors import InvalidInput, MissingDependency, NodeUnavailable
from numa_lab.topology import read_topology

nodes = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(lambda ids: tuple(sorted(set(ids))))


@given(
    st.one_of(
        st.builds(Binding, st.one_of(st.just(()), nodes)),
        st.builds(
            Binding,
            nodes,
            nodes,
            st.sampled_from([MemPolicy.BIND, MemPolicy.INTERLEAVE, MemPolicy.WEIGHTED_INTERLEAVE]),
        ),
        st.builds(lambda cpus, node: Binding(cpus, (node,), MemPolicy.PREFERRED), nodes, st.integers(0, 40)),
        st.builds(lambda cpus: Binding(cpus, cpus[-1:], MemPolicy.FIRST_TOUCH), nodes),
    )
)
def test_labels_round_trip(binding):
    assert Binding.parse(str(binding)) == binding


@pytest.mark.parametrize(
    ("label", "argv"),
    [
        ("c3m0", ["numactl", "--cpunodebind=3", "--membind=0"]),
        ("c0-1i0-3", ["numactl", "--cpunodebind=0-1", "--interleave=0-3"]),
        ("c0w0,2", ["numactl", "--cpunodebind=0", "--weighted-interleave=0,2"]),
        ("c2p1", ["numactl", "--cpunodebind=2", "--preferred=1"]),
        ("c0-3f1", ["numactl", "--cpunodebind=0-3"]),
        ("c0m*", ["numactl", "--cpunodebind=0"]),
        ("c*m1", ["numactl", "--membind=1"]),
        ("c*m*", []),
        ("c*f1", []),
    ],
)
def test_numactl_words(label, argv):
    assert Binding.parse(label).numactl() == argv


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("c0m0", "numactl --cpunodebind=0 --membind=0"),
        ("c1m0", "numactl --physcpubind=3 --membind=0"),
        ("c0-1i0-1", "numactl --physcpubind=0-1,3 --interleave=0-1"),
        ("c1f1", "numactl --physcpubind=3"),
        ("c2m2", "numactl --cpunodebind=2 --membind=2"),  # it is refused elsewhere
        ("c*m1", "numactl --membind=1"),
    ],
)
def test_under_a_mask_numactl_names_the_cpus_that_are_left(four_nodes, label, words):
    masked = dataclasses.replace(four_nodes, allowed_cpus=(0, 1, 3))
    assert " ".join(Binding.parse(label).numactl(masked)) == words
    assert Binding.parse(label).numactl(four_nodes) == Binding.parse(label).numactl()
    assert mask_words(masked) == ["taskset", "-c", "0-1,3"]
    assert mask_words(four_nodes) == []


@pytest.mark.parametrize(
    "label", ["", "c0", "m0", "c0x1", "c0i*", "c1-0m0", "c0m0 ", "c0p0,1", "c-m0", "c0-1f0,1", "c0f*", "c0f1"]
)
def test_what_is_no_label_is_refused_with_its_text(label):
    with pytest.raises(InvalidInput, match=r"expected|exactly one|one of the CPU nodes|no meaning") as refused:
        Binding.parse(label)
    assert repr(label) in str(refused.value) or "mem_nodes" in str(refused.value)


def test_a_policy_without_nodes_can_not_be_made():
    with pytest.raises(InvalidInput, match="bind"):
        Binding((0,), (), MemPolicy.BIND)


def test_bind_sets_the_policy_and_gives_everything_back_after_an_error():
    topology = read_topology()
    node = topology.effective_nodes[0]
    affinity, policy = os.sched_getaffinity(0), libnuma.get_mempolicy()
    with pytest.raises(ZeroDivisionError), Binding.parse(f"c{node}m{node}").bind(topology) as granted:
        assert granted == effective(topology) == Binding((node,), (node,), MemPolicy.BIND)
        with Binding.parse(f"c{node}i{node}").bind(topology):
            assert effective(topology).policy is MemPolicy.INTERLEAVE
        assert libnuma.get_mempolicy() == (libnuma.MPOL_BIND, {node})
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == affinity
    assert libnuma.get_mempolicy() == policy


def test_first_touch_sets_no_policy_and_needs_cpus_on_its_node(four_nodes):
    topology = read_topology()
    node = topology.effective_nodes[0]
    before = libnuma.get_mempolicy()
    with Binding.parse(f"c{node}f{node}").bind(topology) as granted:
        assert granted == Binding((node,))
        assert libnuma.get_mempolicy() == before
    assert not Binding.parse("c0-2f1").confines_memory
    Binding.parse("c0-2f1").require(four_nodes)
    with pytest.raises(NodeUnavailable, match=r"c\*f3: node 3 has no CPUs"):
        Binding.parse("c*f3").require(four_nodes)


def test_a_node_that_does_not_exist_is_refused_and_nothing_changes():
    before = os.sched_getaffinity(0)
    with pytest.raises(NodeUnavailable, match="77"), Binding.parse("c77m0").bind(read_topology()):
        pass
    assert os.sched_getaffinity(0) == before


def test_effective_reads_what_numactl_set():
    node = read_topology().effective_nodes[0]
    code = (
        "from numa_lab.binding import effective\nfrom numa_lab.topology import read_topology\n"
        "print(effective(read_topology()))"
    )
    for label in (f"c{node}m{node}", f"c{node}p{node}", f"c{node}i{node}", f"c{node}m*"):
        words = [*Binding.parse(label).numactl(), sys.executable, "-c", code]
        assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == label


def test_weights_need_a_kernel_that_has_them(monkeypatch, tmp_path):
    node = read_topology().effective_nodes[0]
    binding = Binding.parse(f"c{node}w{node}")
    monkeypatch.setattr(libnuma, "WEIGHTS", tmp_path / "absent")
    with pytest.raises(MissingDependency, match=r"weighted interleaving needs Linux 6\.9 or later, and this is"):
        binding.require(read_topology())
    (tmp_path / f"node{node}").write_text("3\n")
    monkeypatch.setattr(libnuma, "WEIGHTS", tmp_path)
    binding.require(read_topology())
    assert libnuma.interleave_weights([node]) == {node: 3}
