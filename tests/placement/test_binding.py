import dataclasses
import json
import os
import platform
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

import seccomp
from numa_lab.errors import InvalidInput, MissingDependency, NodeUnavailable
from numa_lab.machine import libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement.binding import Binding, MemPolicy, effective

nodes = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(lambda ids: tuple(sorted(set(ids))))


@given(
    st.one_of(
        st.builds(Binding, st.one_of(st.just(()), nodes)),
        st.builds(
            Binding,
            nodes,
            nodes,
            st.sampled_from(
                [MemPolicy.BIND, MemPolicy.PREFERRED_MANY, MemPolicy.INTERLEAVE, MemPolicy.WEIGHTED_INTERLEAVE]
            ),
        ),
        st.builds(lambda cpus: Binding(cpus, (), MemPolicy.LOCAL), nodes),
        st.builds(
            Binding,
            nodes,
            st.one_of(st.just(()), nodes),
            st.just(MemPolicy.UNKNOWN),
            st.one_of(st.none(), st.integers(7, 99)),
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
        ("c2P0-1", ["numactl", "--cpunodebind=2", "--preferred-many=0-1"]),
        ("c0l*", ["numactl", "--cpunodebind=0", "--localalloc"]),
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


@pytest.mark.parametrize(
    "label",
    [
        "",
        "c0",
        "m0",
        "c0x1",
        "c0i*",
        "c1-0m0",
        "c0m0 ",
        "c0p0,1",
        "c-m0",
        "c0-1f0,1",
        "c0f*",
        "c0f1",
        "c0P*",
        "c0l1",
        "c0u",
        "c0u7",
        "c0um",
    ],
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
        "from numa_lab.placement.binding import effective\nfrom numa_lab.machine.topology_reader import read_topology\n"
        "print(effective(read_topology()))"
    )
    for letter in ("m{}", "p{}", "P{}", "i{}", "m*", "l*"):
        label = f"c{node}{letter.format(node)}"
        words = [*Binding.parse(label).numactl(), sys.executable, "-c", code]
        assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == label


UNREAD = """
    import json, sys
    from numa_lab.machine import libnuma
    from numa_lab.placement.binding import effective
    from numa_lab.machine.topology_reader import read_topology
    from seccomp import refuse

    libnuma.set_mempolicy(*json.loads(sys.argv[1]))
    refuse(["get_mempolicy", "set_mempolicy"])
    print(effective(read_topology()))
"""


@pytest.mark.skipif(
    platform.machine() not in seccomp.NUMBERS, reason="system call numbers are known for x86_64 and aarch64"
)
def test_a_policy_that_may_not_be_read_back_is_told_all_the_same():
    node = read_topology().effective_nodes[0]
    cpus = str(Binding(effective(read_topology()).cpu_nodes)).removesuffix("m*")
    found = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(seccomp.__file__), *sys.path])}
    for mode, nodes, memory in (
        (libnuma.MPOL_DEFAULT, [], "m*"),
        (libnuma.MPOL_BIND, [node], f"m{node}"),
        (libnuma.MPOL_BIND | libnuma.MPOL_F_STATIC_NODES, [node], f"m{node}"),
        (libnuma.MPOL_PREFERRED_MANY, [node], f"P{node}"),
        (libnuma.MPOL_LOCAL, [], "l*"),
    ):
        words = [sys.executable, "-c", textwrap.dedent(UNREAD), json.dumps([mode, nodes])]
        told = subprocess.run(words, capture_output=True, text=True, check=True, env=found).stdout
        assert told.strip() == f"{cpus}{memory}"


@pytest.mark.parametrize(
    ("told", "nodes", "memory"),
    [
        (9, {1, 3}, "u9m1,3"),
        (9, set(), "u9m*"),
        (libnuma.MPOL_WEIGHTED_INTERLEAVE, {0, 2}, "w0,2"),
        (libnuma.MPOL_PREFERRED_MANY | libnuma.MPOL_F_STATIC_NODES, {0, 9}, "P0"),  # the cpuset has no node 9
        (libnuma.MPOL_INTERLEAVE | libnuma.MPOL_F_RELATIVE_NODES, {1, 4}, "i0-1"),  # second and first of four
        (libnuma.MPOL_BIND | libnuma.MPOL_F_NUMA_BALANCING, {2}, "m2"),
        (libnuma.MPOL_PREFERRED, set(), "l*"),  # before Linux 5.14
        (libnuma.MPOL_LOCAL, set(), "l*"),
    ],
)
def test_every_policy_is_told_by_name_or_number(monkeypatch, four_nodes, told, nodes, memory):
    monkeypatch.setattr(libnuma, "get_mempolicy", lambda *, flags: (told, frozenset(nodes)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    granted = effective(four_nodes)
    assert str(granted) == f"c0{memory}"
    assert Binding.parse(str(granted)) == granted
    assert granted.confines_memory is (memory[0] in "imw")


def test_what_is_not_known_is_not_asked_for(four_nodes):
    unknown = Binding.parse("c0u9m1")
    assert unknown.memory_words == "unknown policy 9:1"
    with pytest.raises(InvalidInput, match=r"binding c0u9m1: numa_lab does not know this memory policy"):
        unknown.require(four_nodes)
    with pytest.raises(InvalidInput, match="policies to ask for: default, local, bind"):
        unknown.numactl()
    with pytest.raises(InvalidInput, match="mode=2: its number is known"):
        Binding((0,), (0,), MemPolicy.BIND, 2)


def test_bind_gives_back_a_policy_with_its_flags():
    topology = read_topology()
    node = topology.effective_nodes[0]
    mode = libnuma.MPOL_BIND | libnuma.MPOL_F_STATIC_NODES

    def policy_after():
        libnuma.set_mempolicy(mode, [node])
        with Binding.parse(f"c{node}P{node}").bind(topology) as granted:
            assert granted.policy is MemPolicy.PREFERRED_MANY
        return libnuma.get_mempolicy(flags=True)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(policy_after).result() == (mode, {node})


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
