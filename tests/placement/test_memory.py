import errno
import math
import mmap
import os
import resource
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from numa_lab.errors import LimitReached, MissingDependency, NodeUnavailable, NotPermitted
from numa_lab.machine import libnuma, page_maps
from numa_lab.machine.sysfs import Tree
from numa_lab.machine.topology import read_topology
from numa_lab.placement import memory

MIB = 1 << 20


@pytest.mark.usefixtures("numa_calls")
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
    assert tensor.data_ptr() % memory.page_unit(tensor.nbytes) == 0
    assert memory.empty((0, 8), dtype).shape == (0, 8)


def test_memory_goes_back_when_the_last_view_dies():
    process, sizes = psutil.Process(), []
    for _ in range(200):
        view = memory.empty((8 * MIB,), torch.uint8).fill_(1)[10:]
        sizes.append(process.memory_info().rss)
    del view
    assert max(sizes[100:]) - min(sizes[:100]) < 16 * MIB


def test_a_node_without_room_is_refused_with_the_numbers():
    node = read_topology().effective_nodes[0]
    with pytest.raises(NodeUnavailable, match=r"MiB available and 1,\d{3},\d{3},\d{3} MiB were asked for"):
        memory.empty((1 << 50,), torch.uint8, node)
    with pytest.raises(NodeUnavailable, match="77"):
        memory.empty((8,), torch.uint8, 77)


@pytest.mark.usefixtures("numa_calls")
@pytest.mark.parametrize("huge_pages", [True, False])
def test_where_mbind_is_refused_pinned_threads_touch_the_pages(monkeypatch, huge_pages):
    monkeypatch.setattr(memory, "placer", lambda: "first touch")
    node, affinity = read_topology().effective_nodes[0], os.sched_getaffinity(0)
    everywhere = {node: 4 * MIB // memory.PAGE_BYTES}
    assert memory.locate(memory.empty((4 * MIB,), torch.uint8, node, huge_pages=huge_pages)) == everywhere
    assert memory.locate(memory.interleaved((4 * MIB,), torch.uint8, [node], huge_pages=huge_pages)) == everywhere
    assert memory.lost() == ("mbind was refused: tensors were placed by first touch of pinned threads",)
    assert os.sched_getaffinity(0) == affinity


@pytest.mark.usefixtures("numa_calls")
def test_each_refused_call_has_its_stand_in(monkeypatch):
    def refuse(*_args, **_options):
        raise NotPermitted("refused")

    for function, call, stand_in in (
        ("mbind", memory.placer, "first touch"),
        ("page_status", memory.locator, "numa_maps"),
    ):
        call.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(libnuma, function, refuse)
            assert call() == stand_in
        call.cache_clear()
        assert call() in ("mbind", "move_pages")


@pytest.mark.usefixtures("numa_calls")
def test_migrate_asks_again_for_busy_pages_and_leaves_untouched_ones(monkeypatch):
    tensor = memory.empty((8 * memory.PAGE_BYTES,), torch.uint8, huge_pages=False)
    where, asked = dict.fromkeys(memory.page_addresses(tensor).tolist(), 0), []
    where[next(iter(where))] = -2  # never touched
    busy = list(where)[3]

    def move_pages(pages, node):
        asked.append(pages.tolist())
        for page in pages.tolist():
            if where[page] >= 0 and (page != busy or len(asked) > 2):
                where[page] = node

    monkeypatch.setattr(memory.free_memory, "require", lambda *_: None)
    monkeypatch.setattr(memory, "locator", lambda: "move_pages")
    monkeypatch.setattr(libnuma, "move_pages", move_pages)
    monkeypatch.setattr(libnuma, "page_status", lambda pages: np.array([where[page] for page in pages.tolist()]))
    assert memory.migrate(tensor, 1) == {memory.UNTOUCHED: 1, 1: 7}
    assert asked[1:] == [[busy], [busy]]


@pytest.mark.usefixtures("numa_calls")
def test_what_is_there_already_stays_and_a_full_node_is_refused(monkeypatch):
    node = read_topology().effective_nodes[0]
    tensor = memory.empty((4 * MIB,), torch.uint8, node).fill_(1)
    located = memory.locate(tensor)
    with monkeypatch.context() as patch:
        patch.setattr(libnuma, "move_pages", lambda *_: pytest.fail("there was nothing to move"))
        assert memory.migrate(tensor, node) == located
    with pytest.raises(NodeUnavailable, match="77"):
        memory.migrate(tensor, 77)
    assert memory.migrate(torch.empty(0), node) == {}


def test_pages_go_round_over_the_nodes_that_are_given(monkeypatch):
    node = read_topology().effective_nodes[0]
    assert memory.locate(memory.interleaved((4 * MIB,), torch.uint8).fill_(1)).keys() <= set(
        read_topology().allowed_nodes
    )
    with pytest.raises(NodeUnavailable, match="at least one node"):
        memory.interleaved((8,), torch.uint8, [])
    with pytest.raises(NodeUnavailable, match="77"):
        memory.interleaved((8,), torch.uint8, [node, 77])
    monkeypatch.setattr(libnuma, "WEIGHTS", Path("/nonexistent"))
    with pytest.raises(MissingDependency, match=r"Linux 6\.9"):
        memory.interleaved((8,), torch.uint8, [node], weighted=True)


@pytest.mark.usefixtures("numa_calls")
def test_huge_pages_are_reported_as_they_are():
    plain = memory.empty((16 * MIB,), torch.uint8, huge_pages=False).fill_(1)
    assert memory.huge_page_share(plain) == 0
    granted = "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    huge = memory.empty((16 * MIB,), torch.uint8).fill_(1)
    assert (memory.huge_page_share(huge) > 0) == granted


@pytest.mark.parametrize(
    ("huge", "nbytes", "turns", "unit"),
    [
        (2 * MIB, 100, 1, 2 * MIB),
        (2 * MIB, 63 * MIB, 8, memory.PAGE_BYTES),  # fewer than four for each of eight turns
        (2 * MIB, 64 * MIB, 8, 2 * MIB),
        (512 * MIB, 2047 * MIB, 1, memory.PAGE_BYTES),
        (512 * MIB, 2048 * MIB, 1, 512 * MIB),
        (512 * MIB, 2048 * MIB, 4, memory.PAGE_BYTES),  # one for each of four nodes, if they began on a boundary
        (0, 2048 * MIB, 1, memory.PAGE_BYTES),
    ],
)
def test_huge_pages_are_taken_where_a_tensor_holds_enough_of_them(monkeypatch, huge, nbytes, turns, unit):
    monkeypatch.setattr(memory, "HUGE_PAGE_BYTES", huge)
    assert memory.page_unit(nbytes, turns) == unit


def test_a_cache_goes_round_evenly_where_huge_pages_are_as_large_as_itself(monkeypatch):
    """As on kernels with base pages of 64 KiB, whose huge pages have 512 MiB."""
    monkeypatch.setattr(memory, "HUGE_PAGE_BYTES", 512 * MIB)
    turns, nodes = [], (0, 1, 2, 3)
    monkeypatch.setattr(memory.free_memory, "require", lambda *_: None)
    monkeypatch.setattr(memory, "placer", lambda: "first touch")
    monkeypatch.setattr(memory, "_touch", lambda _topology, node, pages, mine: turns.append((node, int(mine.sum()))))
    memory.interleaved((8 * MIB,), torch.uint8, nodes)
    assert turns == [(node, 2 * MIB // memory.PAGE_BYTES) for node in nodes]


@pytest.mark.usefixtures("numa_calls")
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM, errno.ENOSYS])
def test_without_huge_pages_a_tensor_is_made_all_the_same_and_the_receipt_says_so(monkeypatch, code):
    class Refusing(mmap.mmap):
        def madvise(self, *_args):
            raise OSError(code, os.strerror(code))

    node = read_topology().effective_nodes[0]
    memory.no_huge_pages.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(memory.mmap, "mmap", Refusing)
            for huge_pages in (True, False):
                tensor = memory.empty((100,), torch.uint8, node, huge_pages=huge_pages).fill_(1)
                assert memory.locate(tensor) == {node: 1}
            (note,) = memory.lost()
        assert f"madvise was refused ({os.strerror(code)})" in note
    finally:
        memory.no_huge_pages.cache_clear()


@pytest.mark.usefixtures("numa_calls")
def test_where_memory_is_bound_too_much_is_refused_before_it_is_touched():
    node = read_topology().effective_nodes[0]
    libnuma.set_mempolicy(libnuma.MPOL_BIND, [node])
    try:
        with pytest.raises(
            NodeUnavailable, match=f"bound to nodes {node}, which have .* MiB available, and 1,073,741,824"
        ):
            memory.empty((1 << 50,), torch.uint8)
    finally:
        libnuma.set_mempolicy(libnuma.MPOL_DEFAULT)


@pytest.mark.parametrize(
    "call",
    [
        lambda: memory.empty((8,), torch.uint8, read_topology().effective_nodes[0]),
        lambda: memory.interleaved((8,), torch.uint8),
        lambda: memory.locate(torch.zeros(8)),
        lambda: memory.home(torch.zeros(8)),
        lambda: memory.migrate(torch.zeros(8), read_topology().effective_nodes[0]),
    ],
    ids=["empty", "interleaved", "locate", "home", "migrate"],
)
def test_without_libnuma_each_call_says_what_is_missing(monkeypatch, call):
    def absent(_name, **_options):
        raise OSError("no such file")

    cached = (libnuma.library, memory.placer, memory.locator)
    for function in cached:
        function.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(libnuma.ctypes, "CDLL", absent)
            with pytest.raises(MissingDependency, match="apt-get install numactl"):
                call()
            assert memory.empty((8,), torch.uint8).shape == (8,)
            assert "libnuma is not installed" in " ".join(memory.lost())
    finally:
        for function in cached:
            function.cache_clear()


def test_where_move_pages_is_refused_numa_maps_tells(monkeypatch):
    node = read_topology().effective_nodes[0]
    tensor = memory.empty((64 * MIB,), torch.uint8, node).fill_(1)  # a policy of its own keeps its mapping apart
    monkeypatch.setattr(memory, "locator", lambda: "numa_maps")
    located = memory.locate(tensor)
    assert set(located) == {node}
    assert located[node] >= 64 * MIB // memory.PAGE_BYTES


def test_where_the_kernel_tells_nothing_of_pages_no_pages_are_claimed(monkeypatch, tmp_path):
    tensor = torch.zeros(9)
    monkeypatch.setattr(page_maps, "_PROC", Tree(tmp_path))  # a kernel without CONFIG_NUMA, or gVisor
    monkeypatch.setattr(memory, "locator", lambda: "numa_maps")
    assert memory.locate(tensor) == {}
    assert memory.home(tensor) is None
    assert math.isnan(memory.huge_page_share(tensor))
    assert page_maps.kernel_moves() == 0
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert memory.lost()[-1] == "there is no numa_maps: no pages were looked at"


@pytest.mark.usefixtures("numa_calls")
def test_a_limit_of_address_space_is_told():
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MIB, before[1]))
    try:
        with pytest.raises(LimitReached, match=r"gives no 258 MiB of address space .*ulimit -v"):
            memory.empty((256 * MIB,), torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_strided_view_counts_the_pages_that_it_spans():
    cache = torch.zeros(1, 64, 8, 128)  # [B, S, H, D] seen as [B, H, S, D]
    assert sum(memory.locate(cache.transpose(1, 2)).values()) == sum(memory.locate(cache).values())
