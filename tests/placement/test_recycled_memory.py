from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from numa_lab.machine import libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import memory, page_location, recycled_memory

NODE = read_topology().effective_nodes[0]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def several_nodes(monkeypatch):
    monkeypatch.setattr(recycled_memory, "can_lie_elsewhere", lambda: True)
    monkeypatch.setattr(recycled_memory, "_thread", recycled_memory._Thread())


def test_what_malloc_would_hand_out_again_is_touched_anew():
    torch.empty(32 * MIB - 4096, dtype=torch.uint8)  # freed at once, so malloc keeps what is smaller from now on
    held = [torch.ones(8 * MIB, dtype=torch.uint8) for _ in range(3)]
    pages = page_location.page_addresses(held[1])[1:-1]
    del held[1]  # between two others, so that it stays mapped
    assert set(libnuma.page_status(pages)) == {NODE}
    recycled_memory.give_back(NODE)
    assert max(libnuma.page_status(pages)) < 0


def test_a_thread_gives_back_the_end_of_its_arena_too():
    torch.empty(32 * MIB - 65536, dtype=torch.uint8)

    def left():
        kept = [torch.ones(2 * MIB, dtype=torch.uint8) for _ in range(8)]  # what is free before has been filled then
        tensor = torch.ones(6 * MIB, dtype=torch.uint8)
        first = tensor.data_ptr() // memory.PAGE_BYTES + 1
        del tensor  # nothing but free memory comes after it
        pages = np.arange(first, first + 6 * MIB // memory.PAGE_BYTES - 2, dtype=np.uint64) * memory.PAGE_BYTES
        before = int((libnuma.page_status(pages) >= 0).sum())
        recycled_memory.give_back(NODE)
        return before, int((libnuma.page_status(pages) >= 0).sum()), len(kept)

    for _ in range(8):  # some of these threads find an arena that one before them has grown
        with ThreadPoolExecutor(1) as threads:
            before, after, _ = threads.submit(left).result()
        assert before > 1000 > 64 > after


def test_a_thread_that_stays_on_its_node_gives_back_for_nothing_for_a_tenth_of_the_time(monkeypatch):
    now, faults, given_back = [0.0], [0], []
    monkeypatch.setattr(recycled_memory.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(recycled_memory.resource, "getrusage", lambda _who: SimpleNamespace(ru_minflt=faults[0]))

    def trim():
        given_back.append(now[0])
        now[0] += 1

    monkeypatch.setattr(recycled_memory, "malloc_trim", trim)
    for _ in range(100):
        recycled_memory.give_back(NODE)
        now[0] += 1
    assert 9 <= len(given_back) <= 10
    count = len(given_back)
    recycled_memory.give_back(NODE + 1)
    recycled_memory.give_back(NODE)
    recycled_memory.give_back(NODE, always=True)
    assert len(given_back) == count + 3
    now[0] += 20
    for _ in range(5):
        faults[0] += 1_000_000  # pages that were touched, and go
        recycled_memory.give_back(NODE)
    assert len(given_back) == count + 8


def test_a_tensor_is_moved_unless_its_memory_has_a_policy_of_its_own(monkeypatch):
    plain, bound = torch.ones(MIB), memory.empty((MIB,), torch.float32, NODE).fill_(1)
    moved = []
    # This machine may have one node: the kernel's answers are those of tensors on the next one.
    monkeypatch.setattr(libnuma, "page_status", lambda addresses: addresses.astype("int32") * 0 + NODE + 1)
    monkeypatch.setattr(
        page_location, "migrate", lambda tensor, node: moved.append((tensor.data_ptr(), node)) or {node: 1}
    )
    assert recycled_memory.settle(plain, NODE) == recycled_memory.settle(bound, NODE + 2) == ""
    assert moved == [(plain.data_ptr(), NODE)]
    monkeypatch.setattr(page_location, "migrate", lambda _tensor, node: {node: 1, node + 1: 3})
    assert "3 of its pages could not be moved" in recycled_memory.settle(plain, NODE)


def test_a_malloc_that_gives_nothing_back_is_no_error(monkeypatch):
    monkeypatch.setattr(recycled_memory, "_libc_function", lambda _name: None)
    assert not recycled_memory.gives_back.__wrapped__()
    recycled_memory.give_back(NODE)
