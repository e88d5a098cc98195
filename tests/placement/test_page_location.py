import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from numa_lab.errors import NodeUnavailable
from numa_lab.machine import libnuma, page_maps
from numa_lab.machine.sysfs import Tree
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import memory, page_location

MIB = 1 << 20


@pytest.mark.usefixtures("numa_calls")
def test_pages_are_untouched_until_written_and_then_lie_on_the_node():
    node = read_topology().effective_nodes[0]
    tensor = memory.empty((4 * MIB,), torch.uint8, node)
    pages = 4 * MIB // memory.PAGE_BYTES
    assert page_location.locate(tensor) == {page_location.UNTOUCHED: pages}
    tensor[: MIB * 2] = 1
    located = page_location.locate(tensor)
    assert located[node] >= pages // 2
    tensor[:] = 1
    assert page_location.locate(tensor) == {node: pages}


@pytest.mark.usefixtures("numa_calls")
def test_migrate_asks_again_for_busy_pages_and_leaves_untouched_ones(monkeypatch):
    tensor = memory.empty((8 * memory.PAGE_BYTES,), torch.uint8, huge_pages=False)
    where, asked = dict.fromkeys(page_location.page_addresses(tensor).tolist(), 0), []
    where[next(iter(where))] = -2  # never touched
    busy = list(where)[3]

    def move_pages(pages, node):
        asked.append(pages.tolist())
        for page in pages.tolist():
            if where[page] >= 0 and (page != busy or len(asked) > 2):
                where[page] = node

    monkeypatch.setattr(memory.free_memory, "require", lambda *_: None)
    monkeypatch.setattr(page_location, "locator", lambda: "move_pages")
    monkeypatch.setattr(libnuma, "move_pages", move_pages)
    monkeypatch.setattr(libnuma, "page_status", lambda pages: np.array([where[page] for page in pages.tolist()]))
    assert page_location.migrate(tensor, 1) == {page_location.UNTOUCHED: 1, 1: 7}
    assert asked[1:] == [[busy], [busy]]


@pytest.mark.usefixtures("numa_calls")
def test_what_is_there_already_stays_and_a_full_node_is_refused(monkeypatch):
    node = read_topology().effective_nodes[0]
    tensor = memory.empty((4 * MIB,), torch.uint8, node).fill_(1)
    located = page_location.locate(tensor)
    with monkeypatch.context() as patch:
        patch.setattr(libnuma, "move_pages", lambda *_: pytest.fail("there was nothing to move"))
        assert page_location.migrate(tensor, node) == located
    with pytest.raises(NodeUnavailable, match="77"):
        page_location.migrate(tensor, 77)
    assert page_location.migrate(torch.empty(0), node) == {}


@pytest.mark.usefixtures("numa_calls")
def test_huge_pages_are_reported_as_they_are():
    plain = memory.empty((16 * MIB,), torch.uint8, huge_pages=False).fill_(1)
    assert page_location.huge_page_share(plain) == 0
    granted = "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    huge = memory.empty((16 * MIB,), torch.uint8).fill_(1)
    assert (page_location.huge_page_share(huge) > 0) == granted


def test_where_move_pages_is_refused_numa_maps_tells(monkeypatch):
    node = read_topology().effective_nodes[0]
    tensor = memory.empty((64 * MIB,), torch.uint8, node).fill_(1)  # a policy of its own keeps its mapping apart
    monkeypatch.setattr(page_location, "locator", lambda: "numa_maps")
    located = page_location.locate(tensor)
    assert set(located) == {node}
    assert located[node] >= 64 * MIB // memory.PAGE_BYTES


def test_where_the_kernel_tells_nothing_of_pages_no_pages_are_claimed(monkeypatch, tmp_path):
    tensor = torch.zeros(9)
    monkeypatch.setattr(page_maps, "_PROC", Tree(tmp_path))  # a kernel without CONFIG_NUMA, or gVisor
    monkeypatch.setattr(page_location, "locator", lambda: "numa_maps")
    assert page_location.locate(tensor) == {}
    assert page_location.home(tensor) is None
    assert math.isnan(page_location.huge_page_share(tensor))
    assert page_maps.kernel_moves() == 0
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert memory.stand_ins()[-1] == "there is no numa_maps: no pages were looked at"


def test_a_strided_view_counts_the_pages_that_it_spans():
    cache = torch.zeros(1, 64, 8, 128)  # [B, S, H, D] seen as [B, H, S, D]
    assert sum(page_location.locate(cache.transpose(1, 2)).values()) == sum(page_location.locate(cache).values())
