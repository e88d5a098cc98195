"""What a cpuset hides, what a container refuses, and what the kernel moves by itself: each is told in the receipt."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from seat_work import Work

from multinode import witness
from numa_lab.attention.shapes import preset
from numa_lab.errors import NodeUnavailable, NotPermitted
from numa_lab.machine import libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement.case_timing import KVPool, sample_case
from numa_lab.measurement.workloads import Case
from numa_lab.nodes import seats
from numa_lab.nodes.kv_cache import NodeShardedKVCache
from numa_lab.nodes.one_node import NUMAOptimizedGQA
from numa_lab.nodes.thread_pool import NUMAThreadPool
from numa_lab.placement import memory, page_location, pinned_team
from numa_lab.placement.binding import Binding, effective
from numa_lab.placement.receipt import Receipt
from seccomp import refuse

pytestmark = pytest.mark.guest("two-sockets")

MIB = 1 << 20
SHAPE = preset("llama-3-8b", kv_len=64)


def measured(binding, pool, topology, seconds=0.3):
    cpus = sorted(os.sched_getaffinity(0))
    with pinned_team.pinned_team(cpus):
        rows = sample_case(
            Case(SHAPE, len(cpus)), pool, requested=binding, granted=effective(topology), topology=topology,
            backend="auto", seconds=seconds, identity={"label": str(binding)},
        )  # fmt: skip
    return Receipt.from_columns(rows[0])


def hide():
    """Put this process into a control group that hides nodes 0 and 3."""
    group = Path("/sys/fs/cgroup/lab")
    (group.parent / "cgroup.subtree_control").write_text("+cpuset")
    group.mkdir(exist_ok=True)
    (group / "cpuset.cpus").write_text("2-5")
    (group / "cpuset.mems").write_text("1-2")
    (group / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def cpuset():
    hide()


@pytest.mark.usefixtures("cpuset")
def test_a_cpuset_drops_nodes_and_the_receipt_says_so_in_one_line():
    topology, asked = read_topology(), Binding.parse("c0-1m0-1")
    assert topology.allowed_nodes == (1, 2)
    assert len(topology.nodes) == 4, "sysfs shows them all"
    with pytest.raises(
        NodeUnavailable, match="node 0 has no CPUs that this process may use; nodes with usable CPUs: 1-2"
    ):
        asked.require(topology)
    with pytest.raises(NodeUnavailable, match="nodes that have: 1-2"):
        memory.empty((MIB,), torch.uint8, 3)

    pool = KVPool(8 * MIB, node=2)
    os.sched_setaffinity(0, range(4))  # as numactl would, all of it: the kernel drops what the cpuset hides
    libnuma.set_mempolicy(libnuma.MPOL_BIND, [0, 1])
    receipt = measured(asked, pool, topology)
    assert str(receipt).startswith("requested c0-1m0-1, granted c1m1, seen 2 threads on CPUs 2-3, pages ")
    assert receipt.effective == Binding.parse("c1m1")
    assert receipt.pages_after["key"].keys() == {2}
    told = " ".join(receipt.contradictions(range(4), (0, 1)))
    assert "CPUs of nodes 0-1 were requested, and the kernel granted nodes 1." in told
    assert "Memory policy bind:0-1 was requested, and the kernel granted bind:1." in told
    assert "pages of key lie on nodes 2 instead of 0-1" in told


def test_a_node_that_disappears_from_the_cpuset_is_told_and_its_tokens_stay_readable():
    cache = NodeShardedKVCache(1, 2, 64, capacity=1024, dtype=torch.float32, block=64)
    assert cache.nodes == (0, 1, 2)
    key, value = torch.randn(2, 1, 2, 1000, 64)
    cache.append(key, value)
    query = torch.randn(1, 4, 1, 64)
    before = cache.attend(query)
    hide()  # nodes 0 and 3
    assert read_topology().effective_nodes == (1, 2)
    with pytest.warns(
        RuntimeWarning, match=r"node 0's team.* was placed on CPUs 0-1, .* is placed again on CPUs [2-5-]+"
    ):
        torch.testing.assert_close(cache.attend(query), before, rtol=0, atol=1e-6)  # by torch, without AVX2
        receipts = cache.receipts()
    topology = read_topology()
    told = {
        node: receipt.contradictions(topology.cpus_of([node]) or [0, 1], [node]) for node, receipt in receipts.items()
    }
    assert "CPUs of nodes 0 were requested" in " ".join(told[0])
    assert told[1] == told[2] == []
    assert seats.places().keys() == {1, 2}
    assert NodeShardedKVCache(1, 2, 64, capacity=1024, dtype=torch.float32).nodes == (1, 2)


def test_a_step_whose_cpus_disappear_is_computed_and_the_next_one_uses_others():
    places = tuple(seats.places().values())
    work, own = Work(places), seats.Seats(places)
    own.run(*work.arguments)
    hide()  # nodes 0 and 3
    with pytest.warns(RuntimeWarning, match=r"node 0's team was placed on CPUs 0-1, .* placed again on CPUs [2-5-]+"):
        own.run(*work.arguments)
    own.run(*work.arguments)
    assert work.merges.value == 3
    assert [rows[:, 3].tolist() for rows in work.rows] == [[3, 3]] * 3
    assert all(cpu in range(2, 6) for rows in work.rows for cpu in rows[:, 1])


def test_refused_mbind_is_replaced_by_first_touch():
    refuse(["mbind"])
    tensor = memory.empty((4 * MIB,), torch.uint8, 3)
    assert page_location.locate(tensor) == witness.pages(tensor) == {3: 1024}
    helper = NUMAOptimizedGQA(2)
    tensors = helper.create_tensors({"query": (1, 8, 1, 64), "key": (1, 2, 512, 64), "value": (1, 2, 512, 64)})
    helper.compute(**tensors)
    receipt = helper.receipt()
    assert receipt.pages_after["key"].keys() == {2}
    assert any("mbind was refused: tensors were placed by first touch" in note for note in receipt.notes)


def test_a_node_without_cpus_can_not_be_placed_on_where_all_is_refused():
    refuse(["mbind", "set_mempolicy"])
    with pytest.raises(NotPermitted, match="node 3 has no CPUs to touch its memory first"):
        memory.empty((MIB,), torch.uint8, 3)
    assert page_location.locate(memory.empty((MIB,), torch.uint8, 1)) == {1: 256}


def test_refused_set_mempolicy_leaves_the_threads_pinned():
    refuse(["set_mempolicy", "get_mempolicy"])
    topology, helper = read_topology(), NUMAOptimizedGQA(1)
    tensors = helper.create_tensors({"key": (1, 2, 512, 64)})
    receipt = helper.receipt()
    assert witness.pages(tensors["key"]).keys() == {1}
    assert set(receipt.observed_cpus) <= set(topology.cpus_of([1]))
    assert any("get_mempolicy" in note and "refused" in note for note in receipt.notes)
    assert "Memory policy preferred:1 was requested, and the kernel granted default." in receipt.contradictions(
        topology.cpus_of([1]), [1]
    )
    with NUMAThreadPool() as pool:
        assert all("refused" in " ".join(receipt.notes) for receipt in pool.receipts().values())
    with pytest.raises(NotPermitted, match="--cap-add SYS_NICE"), Binding.parse("c0m1").bind(topology):
        pass


def test_refused_move_pages_is_replaced_by_numa_maps():
    refuse(["move_pages"])
    topology = read_topology()
    pool = KVPool(8 * MIB, node=3)
    receipt = measured(Binding.parse("c0-2m3"), pool, topology)
    assert receipt.pages_after["key"].keys() == {3}
    assert any("move_pages was refused: pages are those of whole mappings" in note for note in receipt.notes)
    assert page_location.home(pool.keys) == 3
    assert page_location.migrate(pool.keys, 1).get(1, 0) >= len(pool.keys) // memory.PAGE_BYTES, "by mbind"
    refuse(["mbind"])
    memory.placer.cache_clear()
    with pytest.raises(NotPermitted, match="mbind"):
        page_location.migrate(pool.keys, 0)


@pytest.fixture
def balancing():
    """Let the kernel move pages to those who use them, in a tenth of the time that it takes by default."""
    tracing, switch = Path("/sys/kernel/debug"), Path("/proc/sys/kernel/numa_balancing")
    subprocess.run(["mount", "-t", "debugfs", "debugfs", tracing], check=True)
    for setting, milliseconds in {"delay": 0, "period_min": 100, "period_max": 200}.items():
        (tracing / "sched/numa_balancing" / f"scan_{setting}_ms").write_text(str(milliseconds))
    switch.write_text("1")
    yield
    switch.write_text("0")


@pytest.mark.guest("two-sockets", seconds=180)
@pytest.mark.usefixtures("balancing")
def test_pages_that_the_kernel_moves_meanwhile_are_seen():
    topology, told, end = read_topology(), [], time.monotonic() + 120
    while not told and time.monotonic() < end:
        with Binding.parse("c2m*").bind(topology):
            pool = KVPool(8 * MIB)  # first touched on node 2, bound nowhere
        os.sched_setaffinity(0, topology.cpus_of([0]))
        receipt = measured(Binding.parse("c0m*"), pool, topology, seconds=6.0)
        told = [one for one in receipt.contradictions(topology.cpus_of([0]), [0]) if "moved during" in one]
    assert told
    assert any("kernel.numa_balancing moved" in note for note in receipt.notes)
