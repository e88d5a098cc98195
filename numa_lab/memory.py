"""Tensors on a node: allocate them there, and see where their pages lie.

A memory policy acts only when a page is first touched, and ``malloc`` hands freed pages of any node out again, so a
tensor created "under" a binding may lie elsewhere. ``empty`` therefore takes fresh pages from the kernel each time,
and ``locate`` looks.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from numa_lab import libnuma
from numa_lab.errors import NodeUnavailable
from numa_lab.topology import read_topology

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20  # what transparent huge pages have on x86-64 and on arm64 with 4 KiB pages
HOME_SAMPLE = 64  # pages that `home` looks at, about
UNTOUCHED = -1  # the key under which `locate` counts pages that do not exist yet


def empty(
    shape: Sequence[int], dtype: torch.dtype, node: int | None = None, *, huge_pages: bool = True
) -> torch.Tensor:
    """Allocate an uninitialised (zero) tensor on pages of its own.

    Limits: huge pages are asked for, not promised. Without `node` the pages go where the toucher's policy sends them.
    The memory goes back to the kernel when the last view of the tensor dies.

    Parameters
    ----------
    shape, dtype
        As for ``torch.empty``.
    node
        The NUMA node on which all pages shall lie, enforced by ``mbind``. Where a container refuses that, the pages
        are touched at once by a thread pinned to the node's CPUs.
    huge_pages
        Ask for transparent huge pages.

    Raises
    ------
    NodeUnavailable
        The node does not exist, or has too little free memory: binding to a full node gets the process killed.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(tuple(shape), dtype=dtype)
    if node is not None:
        _require_free(node, nbytes)
    padded = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES + HUGE_PAGE_BYTES if huge_pages else nbytes
    block = mmap.mmap(-1, padded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    # Kernels before 6.7 start a mapping at any page, and a huge page only fits on its own boundary.
    offset = -start % HUGE_PAGE_BYTES if huge_pages else 0
    if huge_pages:
        block.madvise(mmap.MADV_HUGEPAGE)
    if node is not None:
        try:
            libnuma.mbind(start, padded, libnuma.MPOL_BIND, [node])
        except PermissionError:
            _touch_from(node, block)
    # The tensor's storage holds the mapping, and the mapping unmaps itself when it is collected.
    return torch.frombuffer(block, dtype=dtype, count=nbytes // dtype.itemsize, offset=offset).view(tuple(shape))


def _require_free(node: int, nbytes: int) -> None:
    topology = read_topology()
    if node not in topology.allowed_nodes:
        topology.node(node)
        raise NodeUnavailable(
            f"node {node} has no memory that this process may use; nodes that have: {list(topology.allowed_nodes)}"
        )
    free = topology.node(node).available_bytes
    if nbytes > free:
        raise NodeUnavailable(
            f"node {node} has {free / 2**20:,.0f} MiB available and {nbytes / 2**20:,.0f} MiB were asked for: "
            "take a smaller shape or another node"
        )


def _touch_from(node: int, block: mmap.mmap) -> None:
    """First touch by a thread on the node: what places pages where mbind is refused."""
    topology = read_topology()
    cpus = topology.cpus_of([topology.nearest_cpu_node(node)])

    def touch() -> None:
        os.sched_setaffinity(0, cpus)
        np.frombuffer(block, np.uint8)[::PAGE_BYTES] = 0

    thread = threading.Thread(target=touch)
    thread.start()
    thread.join()


def locate(tensor: torch.Tensor) -> dict[int, int]:
    """Count the tensor's pages on each node: ``{node: pages}`` of the system's base page size.

    By ``move_pages``, page by page. Where that is refused (see ``locator``), from ``/proc/self/numa_maps``, which
    counts whole mappings: neighbours of the tensor in the same mapping are then counted too. Pages that were never
    touched stand under ``UNTOUCHED``. The first and last page may be shared with other data.
    """
    first, last = _span(tensor)
    if first == last:
        return {}
    if locator() == "numa_maps":
        return _from_numa_maps(Path("/proc/self/numa_maps").read_text(), first, last)
    start = first // PAGE_BYTES * PAGE_BYTES
    status = libnuma.page_status(np.arange(start, last, PAGE_BYTES, dtype=np.uint64))
    nodes, counts = np.unique(np.maximum(status, UNTOUCHED), return_counts=True)
    return {int(node): int(count) for node, count in zip(nodes, counts, strict=True)}


def home(tensor: torch.Tensor) -> int | None:
    """The node on which most of a tensor lies; None where nothing of it has been touched.

    By a sample of its pages, so that it is quick for a large one (see ``locate`` for all of them).
    """
    if locator() == "numa_maps":
        found = locate(tensor)
    else:
        first, last = _span(tensor)
        pages = np.arange(first // PAGE_BYTES, -(-last // PAGE_BYTES), dtype=np.uint64)
        status = libnuma.page_status(pages[:: max(1, len(pages) // HOME_SAMPLE)] * np.uint64(PAGE_BYTES))
        found = Counter(status.tolist())
    touched = {node: count for node, count in found.items() if node >= 0}
    return max(touched, key=touched.__getitem__) if touched else None


@cache
def locator() -> str:
    """How ``locate`` sees pages here: ``move_pages``, or ``numa_maps`` where the kernel or a container refuses it."""
    probe = ctypes.create_string_buffer(PAGE_BYTES)
    try:
        libnuma.page_status(np.array([ctypes.addressof(probe) // PAGE_BYTES * PAGE_BYTES], np.uint64))
    except PermissionError:
        return "numa_maps"
    return "move_pages"


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of the tensor and the byte after its last, gaps of a strided tensor included."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _mappings(numa_maps: str) -> Iterator[tuple[int, Counter[int]]]:
    """Start address and base pages per node of each mapping, in the order of addresses."""
    for line in numa_maps.splitlines():
        unit = re.search(r"kernelpagesize_kB=(\d+)", line)
        scale = max(1, int(unit[1]) * 1024 // PAGE_BYTES) if unit else 1
        yield (
            int(line.split(maxsplit=1)[0], 16),
            Counter({int(node): int(pages) * scale for node, pages in re.findall(r"\bN(\d+)=(\d+)", line)}),
        )


def _from_numa_maps(numa_maps: str, first: int, last: int) -> dict[int, int]:
    mappings = list(_mappings(numa_maps))
    ends = [start for start, _ in mappings[1:]] + [1 << 64]
    found: Counter[int] = Counter()
    for (start, pages), end in zip(mappings, ends, strict=True):
        if start < last and end > first:
            found += pages
    return dict(sorted(found.items()))
