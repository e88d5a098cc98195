import os
import threading

import psutil
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from numa_lab.attention.reference import attention as reference
from numa_lab.errors import InvalidInput, NodeUnavailable
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes import thread_pool
from numa_lab.nodes.one_node import NUMAOptimizedGQA
from numa_lab.nodes.thread_pool import NUMAThreadPool
from numa_lab.placement import memory, openmp, page_location

NODE = read_topology().effective_nodes[0]
CORES = read_topology().cpus_for([NODE])


@pytest.fixture
def threads():
    with NUMAThreadPool() as made:
        yield made


def batch(count):
    generator = torch.Generator().manual_seed(0)
    queries = list(torch.randn(count, 1, 8, 1, 64, generator=generator))
    keys, values = (list(torch.randn(count, 1, 2, 30, 64, generator=generator)) for _ in range(2))
    return queries, keys, values


def test_a_batch_comes_back_in_order_and_right(threads):
    queries, keys, values = batch(9)
    outputs = threads.parallel_gqa_compute(queries, keys, values, num_runs=2)
    for output, *arguments in zip(outputs, queries, keys, values, strict=True):
        assert (output - reference(*arguments, enable_gqa=True)[0]).abs().max() < 1e-5
    assert threads.parallel_gqa_compute([], [], []) == []


def test_what_the_calling_thread_has_set_holds_for_its_batch(threads):
    queries, keys, values = batch(3)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        outputs = threads.parallel_gqa_compute(queries, keys, values)
    assert [(output.dtype, output.is_inference()) for output in outputs] == [(torch.bfloat16, True)] * 3
    negated = threads.parallel_gqa_compute([torch._neg_view(one) for one in queries], keys, values)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no other kernel of the CPU
        counted = threads.parallel_gqa_compute(queries, keys, values)
    assert counter.get_total_flops() == sum(4 * one.numel() * 30 for one in queries)
    for plain, minus, *arguments in zip(counted, negated, queries, keys, values, strict=True):
        torch.testing.assert_close(plain.double(), reference(*arguments, enable_gqa=True)[0], rtol=0, atol=1e-5)
        arguments[0] = -arguments[0]
        torch.testing.assert_close(minus.double(), reference(*arguments, enable_gqa=True)[0], rtol=0, atol=1e-5)


def test_leaders_share_the_cores_of_a_node():
    with NUMAThreadPool(num_threads_per_node=len(CORES)) as threads:
        together = threading.Barrier(len(CORES))

        def where(_number):
            together.wait()
            return [set(thread.cpus) for thread in openmp.team()]

        futures = [threads.submit(where, number, numa_node=NODE) for number in range(len(CORES))]
        assert sorted(map(str, (f.result() for f in futures))) == sorted(str([{cpu}]) for cpu in CORES)


def test_receipts_show_every_leader_and_its_team_on_its_node(threads):
    for node, receipt in threads.receipts().items():
        cpus = read_topology().cpus_for([node])
        assert [thread.allowed for thread in receipt.threads] == [(cpu,) for cpu in cpus]
        assert receipt.contradictions(read_topology().cpus_of([node]), [node]) == []
        assert receipt.notes == ()


def test_a_failing_task_raises_in_the_caller_and_harms_no_other(threads):
    queries, keys, values = batch(3)
    with pytest.raises(InvalidInput, match="expected"):
        threads.parallel_gqa_compute(queries, [keys[0], keys[1][..., :32], keys[2]], values)
    with pytest.raises(ZeroDivisionError):
        threads.execute_on_numa(lambda: 1 / 0, numa_node=NODE)
    assert len(threads.parallel_gqa_compute(queries, keys, values)) == 3


def test_leaders_take_over_whether_gradients_are_wanted(threads):
    queries, keys, values = batch(1)
    queries[0].requires_grad_()
    assert threads.parallel_gqa_compute(queries, keys, values)[0].requires_grad
    with torch.no_grad():
        assert not threads.parallel_gqa_compute(queries, keys, values)[0].requires_grad


def test_what_makes_no_sense_is_refused(threads):
    with pytest.raises(InvalidInput, match="2 queries, 1 keys and 1 values"):
        threads.parallel_gqa_compute([1, 2], [1], [1])
    with pytest.raises(InvalidInput, match="num_runs=0"):
        threads.parallel_gqa_compute([], [], [], num_runs=0)
    with pytest.raises(InvalidInput, match="num_threads_per_node=999: expected 1 to"):
        NUMAThreadPool(999)
    with pytest.raises(InvalidInput, match="on_remote='move': expected one of compute_there, migrate, ignore"):
        NUMAThreadPool(on_remote="move")
    with pytest.raises(NodeUnavailable, match="node 77"):
        threads.submit(print, numa_node=77)
    threads.shutdown()
    with pytest.raises(RuntimeError, match="shutdown"):
        threads.submit(print)


def test_work_goes_where_its_tensors_lie(monkeypatch, four_nodes):
    tensor, nodes = torch.zeros(8), four_nodes.effective_nodes
    for home, node in [(2, 2), (1, 1), (None, None)]:
        monkeypatch.setattr(page_location, "homes", lambda tensors, home=home: [home] * len(tensors))
        assert thread_pool.node_of((tensor, "text"), nodes, four_nodes) == node
    monkeypatch.setattr(
        page_location, "homes", lambda tensors: [3] * len(tensors)
    )  # memory alone: the first of those nearest to it
    assert thread_pool.node_of((tensor,), nodes, four_nodes) in nodes


@pytest.mark.parametrize(
    ("on_remote", "told"),
    [("compute_there", "computed where they lay"), ("migrate", "migrated"), ("ignore", "read over a link")],
)
def test_inputs_of_another_node_are_treated_as_asked_for_and_counted(monkeypatch, on_remote, told):
    queries, keys, values = batch(5)
    moved, home = [], NODE if on_remote == "compute_there" else 77
    with NUMAThreadPool(on_remote=on_remote) as threads:
        monkeypatch.setattr(page_location, "homes", lambda tensors: [home] * len(tensors))
        monkeypatch.setattr(page_location, "migrate", lambda tensor, node: moved.append(tensor.data_ptr()))
        outputs = threads.parallel_gqa_compute(queries, keys, values)
        notes = [note for receipt in threads.receipts().values() for note in receipt.notes]
    assert set(moved) == ({tensor.data_ptr() for tensor in (*keys, *values)} if on_remote == "migrate" else set())
    assert sum(int(note.removeprefix(f"inputs {told}: ")) for note in notes) == 5
    for output, *arguments in zip(outputs, queries, keys, values, strict=True):
        assert (output - reference(*arguments, enable_gqa=True)[0]).abs().max() < 1e-5


def test_a_batch_of_one_equals_the_helper(threads):
    queries, keys, values = batch(1)
    (output,) = threads.parallel_gqa_compute(queries, keys, values)
    assert torch.equal(output, NUMAOptimizedGQA(NODE).compute(queries[0], keys[0], values[0]))


def test_what_waits_can_be_cancelled(threads):
    go, ran = threading.Event(), []
    blocker = threads.submit(go.wait, numa_node=NODE)
    waiting = [threads.submit(ran.append, number, numa_node=NODE) for number in range(3)]
    assert waiting[1].cancel()
    go.set()
    assert blocker.result()
    threads.execute_on_numa(int, numa_node=NODE)
    assert ran == [0, 2]


def test_10000_small_tasks_leave_nothing_behind(threads):
    process, tensor = psutil.Process(), torch.zeros(64)
    many = 500 if read_topology().emulated else 10000

    def run(count):
        for future in [threads.submit(tensor.sum, numa_node=NODE) for _ in range(count)]:
            future.result()

    run(many)
    before, fewer = process.memory_info().rss, len(os.listdir("/proc/self/fd"))
    run(many)
    assert process.memory_info().rss - before < 8 << 20
    assert len(os.listdir("/proc/self/fd")) == fewer


def test_scatter_binds_copies_to_the_nodes(threads):
    tensors = [torch.randn(1 << 16) for _ in range(len(threads.nodes) + 1)]
    copies = threads.scatter(tensors)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    assert [page_location.home(copy) for copy in copies] == [*threads.nodes, threads.nodes[0]]
    assert page_location.home(memory.empty((1 << 16,), torch.uint8)) is None, "nothing of it was touched"


def test_no_effective_node_is_told(monkeypatch, four_nodes):
    object.__setattr__(four_nodes, "allowed_cpus", ())
    object.__setattr__(four_nodes, "nodes", ())
    monkeypatch.setattr(thread_pool, "topology_outside", lambda: four_nodes)
    with pytest.raises(NodeUnavailable, match="allowed are CPUs none and memory of nodes 0-3"):
        NUMAThreadPool()
