"""In a process that lives, new tensors lie on the node of their block, whatever malloc hands out again; two sockets of two nodes."""

import threading
import warnings

import pytest
import torch

from multinode import witness
from numa_lab.machine import libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.one_node import NUMAOptimizedGQA
from numa_lab.nodes.thread_pool import NUMAThreadPool
from numa_lab.placement import memory, page_location, pinned_team, recycled_memory
from seccomp import refuse

pytestmark = pytest.mark.filterwarnings("ignore:numa_lab's decode kernel")  # the guest's CPUs are too old for it

KIB, MIB = 1 << 10, 1 << 20
MALLOCS_RECORD = 32  # bytes: the pointers of glibc's malloc_chunk
SIZES = (64 * KIB, MIB, 6 * MIB, 31 * MIB, 64 * MIB)


def helpers():
    return {node: NUMAOptimizedGQA(numa_node=node, auto_detect=False) for node in (0, 1, 2)}


def new(nbytes):
    return torch.ones(nbytes // 4)


def qkv(kv_len=2048):
    return torch.randn(1, 8, 1, 64), torch.randn(1, 2, kv_len, 64), torch.randn(1, 2, kv_len, 64)


def inner_pages(tensor):
    """Pages that malloc can give back: the first and last may hold the tensor's neighbours, and the first 32 bytes of free memory hold
    malloc's own record of it, which keeps the first page of a tensor that begins where a page does."""
    start = -(-(tensor.data_ptr() + MALLOCS_RECORD) // witness.PAGE) * witness.PAGE
    skipped = (start - tensor.data_ptr()) // tensor.element_size()
    whole = (tensor.nbytes - (start - tensor.data_ptr())) // witness.PAGE * witness.PAGE
    return witness.pages(tensor.flatten()[skipped : skipped + whole // tensor.element_size()])


def free_memory_on(node):
    """Has malloc keep freed memory of a node, between tensors that are returned: an allocation of 32 MiB that is freed allows it to."""
    with pinned_team.pinned_team(read_topology().cpus_of([0]), (libnuma.MPOL_BIND, [node])):
        new(32 * MIB - 64 * KIB)
        return [new(size) for size in SIZES[:-1] for _ in range(2)][::2]


def test_malloc_does_hand_out_memory_of_another_node():
    """What the others guard against: if this stops failing to place, they prove nothing."""
    _between = free_memory_on(3)
    with NUMAOptimizedGQA(1)._on_node():
        assert witness.pages(new(6 * MIB))[3] > 1000


@pytest.mark.parametrize("keep", [True, False])
def test_new_tensors_lie_on_each_node_in_turn(keep):
    kept = free_memory_on(3)
    for node in (0, 1, 2, 0):
        with NUMAOptimizedGQA(numa_node=node, auto_detect=False) as helper:
            for size in SIZES:
                tensor = new(size)
                assert inner_pages(tensor).keys() == {node}, f"{size} bytes"
                if keep and size < 64 * MIB:
                    kept.append(tensor)
            query, key, value = qkv()
            output = helper.compute(query, key, value)
            for tensor in (query, key, value, output):
                assert witness.pages(tensor).keys() == {node}
            assert helper.receipt().contradictions(read_topology().cpus_of([node]), [node]) == []
        kept += free_memory_on(3)
        with helper:
            assert inner_pages(new(6 * MIB)).keys() == {node}, "the same node again"


def test_new_tensors_lie_on_the_node_after_an_exception_and_inside_another_block():
    outer, inner = NUMAOptimizedGQA(0), NUMAOptimizedGQA(2)
    _between = free_memory_on(1)
    with pytest.raises(ZeroDivisionError), inner:
        tensor = new(6 * MIB)
        raise ZeroDivisionError
    del tensor
    with outer:
        assert inner_pages(new(6 * MIB)).keys() == {0}
        with inner, inner:
            assert inner_pages(new(6 * MIB)).keys() == {2}
        assert inner_pages(new(6 * MIB)).keys() == {0}


def test_a_cache_that_grows_and_names_that_are_bound_anew_lie_on_the_node():
    _between = free_memory_on(3)
    _, key, value = qkv(4096)
    for node, helper in helpers().items():
        with helper:
            query, key_, value_ = qkv(4096)  # frees nothing yet
            for _ in range(6):
                key = torch.cat([key, torch.randn(1, 2, 1, 64)], dim=2)
                value = torch.cat([value, torch.randn(1, 2, 1, 64)], dim=2)
                output = helper.compute(query, key, value)
                for tensor in (query, key, value, output):
                    assert witness.pages(tensor).keys() == {node}
            helper.compute(query, key_, value_)
            assert witness.pages(key_).keys() == witness.pages(value_).keys() == {node}


def test_two_threads_on_two_nodes_at_once():
    _between = free_memory_on(3)
    together, wrong = threading.Barrier(2), []

    def work(node):
        for size in (64 * KIB, 6 * MIB, 31 * MIB, 6 * MIB):
            together.wait()
            with NUMAOptimizedGQA(node) as helper:
                tensor, (query, key, value) = new(size), qkv()
                helper.compute(query, key, value)
                found = inner_pages(tensor).keys() | witness.pages(key).keys() | witness.pages(value).keys()
                if found != {node}:
                    wrong.append((node, size, found))

    for _ in range(2):  # the second pair may get the memory of the first
        threads = [threading.Thread(target=work, args=(node,)) for node in (0, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_memory_with_a_policy_of_its_own_and_calls_from_outside_move_nothing():
    helper = NUMAOptimizedGQA(1)
    query, _, _ = qkv()
    bound = [memory.empty((1, 2, 2048, 64), torch.float32, 2).normal_() for _ in range(2)]
    spread = [memory.interleaved((1, 2, 2048, 64), torch.float32, huge_pages=False).normal_() for _ in range(2)]
    with helper, warnings.catch_warnings():
        warnings.filterwarnings("error", "key lies on")
        helper.compute(query, *bound)
        helper.compute(query, *spread)
    assert all(witness.pages(tensor).keys() == {2} for tensor in bound)
    assert all(len(witness.pages(tensor)) == 4 for tensor in spread)
    with pinned_team.pinned_team(read_topology().cpus_of([2]), (libnuma.MPOL_BIND, [2])):
        query, key, value = qkv()
    where = witness.pages(key)
    helper.compute(query, key, value)
    assert witness.pages(key) == where


def test_tasks_of_pools_and_what_is_scattered_lie_on_their_nodes():
    _between = free_memory_on(3)
    for _ in range(2):  # threads of the second pool get memory of those that ended
        with NUMAThreadPool() as pool:
            for size in (64 * KIB, 6 * MIB, 31 * MIB):
                made = [pool.execute_on_numa(new, size, numa_node=node) for node in (2, 0, 1)]
                assert [list(inner_pages(tensor)) for tensor in made] == [[2], [0], [1]]
                copies = pool.scatter(made)
                assert [list(witness.pages(tensor)) for tensor in copies] == [[0], [1], [2]]
            # Touched first by this thread, on another node, and freed: the leader would get it again.
            with pinned_team.pinned_team(read_topology().cpus_of([0]), (libnuma.MPOL_BIND, [3])):
                pool.execute_on_numa(torch.empty, 4 * MIB // 4, numa_node=2).fill_(1)
            assert list(inner_pages(pool.execute_on_numa(new, 4 * MIB, numa_node=2))) == [2]


def test_what_cannot_be_kept_is_told_once_and_contradicts():
    _between = free_memory_on(3)
    refuse(["move_pages", "madvise", "mbind"])
    recycled_memory.gives_back.cache_clear()
    page_location.locator.cache_clear()
    assert not recycled_memory.gives_back()
    helper = NUMAOptimizedGQA(1)
    with helper:
        query, key, value = qkv(24 * KIB)
        with pytest.warns(
            RuntimeWarning, match=r"on other nodes than 1.*numa_gqa\.empty or create_tensors.*numactl"
        ) as told:
            helper.compute(query, key, value)
            helper.compute(query, key.clone(), value.clone())
    assert sum("lies on other nodes" in str(warning.message) for warning in told) == 1
    told = helper.receipt({"key": key}).contradictions(read_topology().cpus_of([1]), [1])
    assert any("pages of key lie on nodes" in sentence for sentence in told)
