import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from numa_lab.attention.reference import attention as reference
from numa_lab.attention.scaled_dot_product import scaled_dot_product_attention_gqa
from numa_lab.errors import InvalidInput, MissingDependency, NodeUnavailable
from numa_lab.machine import libnuma
from numa_lab.machine.hardware import Gpu
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes import one_node
from numa_lab.nodes.one_node import NUMAOptimizedGQA
from numa_lab.placement import openmp, page_location

NODE = read_topology().effective_nodes[0]
CPUS = set(read_topology().cpus_of([NODE]))  # as seen outside, whose mask is not tested


def state():
    """Mask and policy of each thread of the caller's team, and its thread count."""

    def look(_number):
        return os.sched_getaffinity(0), libnuma.get_mempolicy()

    threads = torch.get_num_threads()
    return threads, openmp.run_on_each(look, threads)


def masks():
    return openmp.run_on_each(lambda _number: os.sched_getaffinity(0), torch.get_num_threads())


def inputs(dtype=torch.float32, q_len=1, kv_len=40):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, q_len, 64, generator=generator)
    key, value = torch.randn(2, 2, 2, kv_len, 64, generator=generator).unbind()
    return query.to(dtype), key.to(dtype), value.to(dtype)


def assert_inside(helper):
    threads, team = state()
    assert threads == helper.threads
    assert team[0][0] == CPUS, "threads that it starts would inherit another mask than the node's"
    assert [mask for mask, _ in team[1:]] == [{cpu} for cpu in helper.cpus[1:]]
    assert {policy for _, policy in team} == {(libnuma.MPOL_PREFERRED, frozenset({NODE}))}


def test_all_threads_are_on_the_node_inside_and_as_before_outside():
    outside, helper = state(), NUMAOptimizedGQA(NODE)
    with helper as entered:
        assert entered is helper
        assert_inside(helper)
    assert state() == outside
    with pytest.raises(ZeroDivisionError), helper:
        raise ZeroDivisionError
    assert state() == outside


def test_it_is_nested_in_itself_and_in_others():
    outside, wide, narrow = state(), NUMAOptimizedGQA(NODE), NUMAOptimizedGQA(NODE, threads=1)
    with wide:
        within = state()
        with wide, narrow:
            assert state()[0] == 1
            with wide:
                assert state() == within
        assert state() == within
        assert NUMAOptimizedGQA(NODE).cpus == wide.cpus, "made inside, where the thread's own mask is narrower"
    assert state() == outside


def test_eight_threads_share_one_object():
    helper, outside = NUMAOptimizedGQA(NODE), state()
    query, key, value = inputs()
    expected, _ = reference(query, key, value, enable_gqa=True)
    together = threading.Barrier(8)

    def work(_number):
        before = state()
        together.wait()
        for _ in range(20):
            with helper:
                assert_inside(helper)
                output = helper.compute(query, key, value)
        assert state() == before
        return (output - expected).abs().max().item()

    with ThreadPoolExecutor(8) as threads:
        assert max(threads.map(work, range(8))) < 1e-5
    assert state() == outside


def test_an_unknown_node_is_refused_and_the_node_wins_over_detection(monkeypatch):
    with pytest.raises(NodeUnavailable, match=f"node 77 does not exist; nodes of this machine: {NODE}"):
        NUMAOptimizedGQA(77)
    with pytest.raises(InvalidInput, match="auto_detect=True"):
        NUMAOptimizedGQA(auto_detect=False)
    with pytest.raises(InvalidInput, match="threads=1000: expected 1 to"):
        NUMAOptimizedGQA(NODE, threads=1000)
    monkeypatch.setattr(one_node, "get_optimal_numa_node", lambda: 77)
    assert NUMAOptimizedGQA(NODE, auto_detect=True).node == NODE
    with pytest.raises(NodeUnavailable, match="node 77"):
        NUMAOptimizedGQA()


def test_a_node_outside_the_cpuset_is_refused_with_those_that_serve(monkeypatch, four_nodes):
    monkeypatch.setattr(one_node, "read_topology", lambda: four_nodes)
    with pytest.raises(NodeUnavailable, match=r"node 3 has no CPUs, or no memory.*0-2"):
        NUMAOptimizedGQA(3)
    assert NUMAOptimizedGQA(1).cpus == (2, 3)


@pytest.mark.parametrize(("gpu", "node"), [(0, 1), (1, 2), ("0000:65:00.0", 2), ("65:00.0", 2)])
def test_near_gpu_takes_the_node_that_the_gpu_hangs_on(monkeypatch, four_nodes, gpu, node):
    gpus = (Gpu("0000:17:00.0", 1), Gpu("0000:65:00.0", 2))
    object.__setattr__(four_nodes, "gpus", gpus)
    monkeypatch.setattr(one_node, "read_topology", lambda: four_nodes)
    assert NUMAOptimizedGQA(near_gpu=gpu).node == node
    with pytest.raises(InvalidInput, match=r"near_gpu=7: .*0000:17:00.0 on node 1"):
        NUMAOptimizedGQA(near_gpu=7)


def test_a_gpu_whose_node_firmware_hides_is_told(monkeypatch, four_nodes):
    object.__setattr__(four_nodes, "gpus", (Gpu("0000:17:00.0", None),))
    monkeypatch.setattr(one_node, "read_topology", lambda: four_nodes)
    with pytest.raises(NodeUnavailable, match="name one by numa_node"):
        NUMAOptimizedGQA(near_gpu=0)


def test_tensors_lie_on_the_node_and_the_receipt_says_so():
    helper = NUMAOptimizedGQA(NODE)
    shapes = {"query": (1, 8, 1, 64), "key": (1, 2, 4096, 64), "value": (1, 2, 4096, 64)}
    tensors = helper.create_tensors_on_numa(shapes, torch.bfloat16)
    assert 0.9 < tensors["key"].float().std() < 1.1
    output = helper.compute(**tensors)
    receipt = helper.receipt()
    assert helper.receipts().keys() == {NODE}
    assert output.shape == shapes["query"]
    assert set(receipt.pages_after) == {"query", "key", "value", "output"}
    assert set(receipt.pages_after["key"]) == {NODE}
    assert receipt.contradictions(read_topology().cpus_of([NODE]), [NODE]) == []
    assert receipt.effective == receipt.requested
    assert set(receipt.observed_cpus) <= set(read_topology().cpus_of([NODE]))
    assert [thread.allowed for thread in receipt.threads[1:]] == [(cpu,) for cpu in helper.cpus[1:]]
    # malloc may hand a page of another node out for the small output: then the receipt says so.
    assert [
        note for note in receipt.notes if not note.endswith(f"pages of output lie on other nodes than {NODE}")
    ] == []


def test_without_libnuma_threads_are_pinned_and_the_receipt_says_what_is_lost(monkeypatch):
    def absent():
        raise MissingDependency("libnuma.so.1 is not installed")

    monkeypatch.setattr(libnuma, "library", absent)
    outside, helper = masks(), NUMAOptimizedGQA(NODE)
    with helper:
        output = helper.compute(*inputs())
        assert masks()[1:] == [{cpu} for cpu in helper.cpus[1:]]
    assert masks() == outside
    assert output.shape == (2, 8, 1, 64)
    receipt = helper.receipt()
    assert receipt.pages_after == {}
    assert any("libnuma is not installed" in note for note in receipt.notes)
    assert "Memory policy" in " ".join(receipt.contradictions(helper.cpus, [NODE]))
    with pytest.raises(MissingDependency):
        helper.empty((9,))


def test_the_memory_pool_hands_the_same_touched_memory_out_again():
    helper = NUMAOptimizedGQA(NODE)
    first = helper.memory_pool({"query": (1, 8, 1, 64), "key": (1, 2, 4096, 64)}, torch.bfloat16)
    assert set(page_location.locate(first["key"])) == {NODE}
    address, first = first["key"].data_ptr(), None
    gc.collect()
    again = helper.memory_pool({"key": (1, 2, 1024, 64)})
    assert again["key"].data_ptr() == address
    assert again["key"].shape == (1, 2, 1024, 64)
    assert again["key"].dtype == torch.get_default_dtype()
    assert helper.memory_pool({"key": (1, 2, 9000, 64)})["key"].data_ptr() != address


@pytest.mark.guest(None)  # to load torch's compiler takes minutes in a guest
def test_a_compiled_model_calls_it_between_graphs_without_a_word(capfd):
    helper, (query, key, value) = NUMAOptimizedGQA(NODE, threads=1), inputs()
    threads = []  # with which the graphs compute

    def model(query):
        with helper:
            inside = scaled_dot_product_attention_gqa(query, key, value)
        return inside + helper.compute(2 * query, key, value)

    def look(graph, _):
        return lambda *given: (threads.append(torch.get_num_threads()), graph.forward(*given))[1]

    outside = state()
    torch.testing.assert_close(torch.compile(model, backend=look)(query), model(query))
    assert 1 in threads
    assert state() == outside
    assert capfd.readouterr() == ("", "")
