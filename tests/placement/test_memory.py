import errno
import mmap
import os
import resource
from pathlib import Path

import psutil
import pytest
import torch

from numa_lab.errors import LimitReached, MissingDependency, NodeUnavailable, NotPermitted
from numa_lab.machine import libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import memory, page_location

MIB = 1 << 20


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
    assert page_location.locate(memory.empty((4 * MIB,), torch.uint8, node, huge_pages=huge_pages)) == everywhere
    assert (
        page_location.locate(memory.interleaved((4 * MIB,), torch.uint8, [node], huge_pages=huge_pages)) == everywhere
    )
    assert memory.stand_ins() == ("mbind was refused: tensors were placed by first touch of pinned threads",)
    assert os.sched_getaffinity(0) == affinity


@pytest.mark.usefixtures("numa_calls")
def test_each_refused_call_has_its_stand_in(monkeypatch):
    def refuse(*_args, **_options):
        raise NotPermitted("refused")

    for function, call, stand_in in (
        ("mbind", memory.placer, "first touch"),
        ("page_status", page_location.locator, "numa_maps"),
    ):
        call.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(libnuma, function, refuse)
            assert call() == stand_in
        call.cache_clear()
        assert call() in ("mbind", "move_pages")


def test_pages_go_round_over_the_nodes_that_are_given(monkeypatch):
    node = read_topology().effective_nodes[0]
    assert page_location.locate(memory.interleaved((4 * MIB,), torch.uint8).fill_(1)).keys() <= set(
        read_topology().allowed_nodes
    )
    with pytest.raises(NodeUnavailable, match="at least one node"):
        memory.interleaved((8,), torch.uint8, [])
    with pytest.raises(NodeUnavailable, match="77"):
        memory.interleaved((8,), torch.uint8, [node, 77])
    monkeypatch.setattr(libnuma, "WEIGHTS", Path("/nonexistent"))
    with pytest.raises(MissingDependency, match=r"Linux 6\.9"):
        memory.interleaved((8,), torch.uint8, [node], weighted=True)


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
                assert page_location.locate(tensor) == {node: 1}
            (note,) = memory.stand_ins()
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
        lambda: page_location.locate(torch.zeros(8)),
        lambda: page_location.home(torch.zeros(8)),
        lambda: page_location.migrate(torch.zeros(8), read_topology().effective_nodes[0]),
    ],
    ids=["empty", "interleaved", "locate", "home", "migrate"],
)
def test_without_libnuma_each_call_says_what_is_missing(monkeypatch, call):
    def absent(_name, **_options):
        raise OSError("no such file")

    cached = (libnuma.library, memory.placer, page_location.locator)
    for function in cached:
        function.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(libnuma.ctypes, "CDLL", absent)
            with pytest.raises(MissingDependency, match="apt-get install numactl"):
                call()
            assert memory.empty((8,), torch.uint8).shape == (8,)
            assert "libnuma is not installed" in " ".join(memory.stand_ins())
    finally:
        for function in cached:
            function.cache_clear()


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
