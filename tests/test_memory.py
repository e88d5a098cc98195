import os

import psutil
import pytest
import torch

from numa_lab import libnuma, memory
from numa_lab.errors import NodeUnavailable, NotPermitted
from numa_lab.topology import read_topology

MIB = 1 << 20


def test_pages_are_untouched_until_written_and_then_lie_on_the_node():
    node = read_topology().effective_nodes[0]
    tensor = memory.empty((4 * MIB,), torch.uint8, node)
    pages = 4 * MIB // memory.PAGE_BYTES
    assert memory.locate(tensor) == {memory.UNTOUCHED: pages}
    tensor[: MIB * 2] = 1
    located = memory.locate(tensor)
    assert located[node] >= pages // 2
    tensor[:] = 1
    assert memory.locate(tensor) == {node: pages}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_a_normal_tensor_on_a_huge_page_boundary(dtype):
    tensor = memory.empty((3, 5, 8), dtype)
    assert tensor.shape == (3, 5, 8)
    assert tensor.dtype is dtype
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % memory.HUGE_PAGE_BYTES == 0
    assert memory.empty((0, 8), dtype).shape == (0, 8)


def test_memory_goes_back_when_the_last_view_dies():
    process, sizes = psutil.Process(), []
    for _ in range(40):
        view = memory.empty((8 * MIB,), torch.uint8).fill_(1)[10:]
        sizes.append(process.memory_info().rss)
    del view
    assert max(sizes[20:]) - min(sizes[20:]) < 16 * MIB


def test_a_node_without_room_is_refused_with_the_numbers():
    node = read_topology().effective_nodes[0]
    with pytest.raises(NodeUnavailable, match=r"MiB available and 1,\d{3},\d{3},\d{3} MiB were asked for"):
        memory.empty((1 << 50,), torch.uint8, node)
    with pytest.raises(NodeUnavailable, match="77"):
        memory.empty((8,), torch.uint8, 77)


def test_where_mbind_is_refused_a_pinned_thread_touches_the_pages(monkeypatch):
    def refuse(*_args, **_options):
        raise NotPermitted("mbind")

    monkeypatch.setattr(libnuma, "mbind", refuse)
    node, affinity = read_topology().effective_nodes[0], os.sched_getaffinity(0)
    tensor = memory.empty((4 * MIB,), torch.uint8, node)
    assert memory.locate(tensor) == {node: 4 * MIB // memory.PAGE_BYTES}
    assert os.sched_getaffinity(0) == affinity


def test_where_move_pages_is_refused_numa_maps_tells(monkeypatch):
    node = read_topology().effective_nodes[0]
    tensor = memory.empty((64 * MIB,), torch.uint8, node).fill_(1)  # a policy of its own keeps its mapping apart
    monkeypatch.setattr(memory, "locator", lambda: "numa_maps")
    located = memory.locate(tensor)
    assert set(located) == {node}
    assert located[node] >= 64 * MIB // memory.PAGE_BYTES


def test_numa_maps_are_read_by_mapping():
    text = (
        "7f0000000000 bind:0 anon=512 dirty=512 N0=512 kernelpagesize_kB=4\n"
        "7f0000400000 default\n"
        "7f0000800000 default file=/anon_hugepage huge dirty=2 N1=2 kernelpagesize_kB=2048\n"
    )
    assert memory._from_numa_maps(text, 0x7F0000000000, 0x7F0000200000) == {0: 512}
    assert memory._from_numa_maps(text, 0x7F0000000000, 0x7F0000900000) == {0: 512, 1: 1024}


def test_a_strided_view_counts_the_pages_that_it_spans():
    cache = torch.zeros(1, 64, 8, 128)  # [B, S, H, D] seen as [B, H, S, D]
    assert sum(memory.locate(cache.transpose(1, 2)).values()) == sum(memory.locate(cache).values())
