"""Tensors whose memory lies on chosen nodes, by pages of their own.

A memory policy acts only when a page is first touched, and ``malloc`` hands freed pages of any node out again, so a
tensor that is created "under" a binding may lie elsewhere. ``empty`` and ``interleaved`` therefore take fresh pages from the
kernel each time. ``numa_lab.placement.page_location`` tells where they lie, and moves them.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from numa_lab.errors import LimitReached, NodeUnavailable, NotPermitted
from numa_lab.machine import affinity, free_memory, libnuma, new_threads, page_maps
from numa_lab.machine.page_maps import PAGE_BYTES
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import page_location

HUGE_PAGE_BYTES = page_maps.huge_page_bytes()  # 0 where the kernel has none
SMALL_HUGE_PAGE = 2 << 20  # huge pages of up to this size are taken for any tensor: little is lost to padding
HUGE_PAGES_EACH = 4  # how many a tensor has to hold on each node where they are larger, or are interleaved over nodes


def empty(
    shape: Sequence[int], dtype: torch.dtype, node: int | None = None, *, huge_pages: bool = True
) -> torch.Tensor:
    """Allocate a tensor of zeros on pages of its own.

    Without `node` each page goes where the policy of the thread that touches it first sends it. The memory goes back to the kernel when
    the last view of the tensor dies.

    Limits: huge pages are asked for, and the kernel may not give them (``page_location.huge_page_share`` tells how many it gave). Where
    they are larger than 2 MiB, as with base pages of 64 KiB, only tensors that hold four of them ask for some.

    Parameters
    ----------
    shape, dtype
        As for ``torch.empty``.
    node
        The NUMA node on which all pages shall lie, enforced by ``mbind``. Where a container refuses that (see
        ``placer``), the pages are touched at once by a thread pinned to the node's CPUs.
    huge_pages
        Ask for transparent huge pages.

    Returns
    -------
    torch.Tensor
        Contiguous, on the CPU; with `node` its pages come on that node when they are first written.

    Raises
    ------
    NodeUnavailable
        The node does not exist, or has too little free memory; or, without `node`, the nodes have to which the calling thread's
        memory is bound. A process that touches more than a bound node holds is killed.
    LimitReached
        The kernel refuses so much address space.
    NotPermitted
        ``mbind`` is refused, and so is ``sched_setaffinity``, or the node has no CPUs and ``set_mempolicy`` is refused.
    MissingDependency
        A node is given, and libnuma is not installed.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if node is not None:
        free_memory.require(nbytes, {node: 1})
    else:
        free_memory.require_where_bound(nbytes)
    weights = {node: 1} if node is not None else {}
    return _allocate(shape, dtype, libnuma.MPOL_BIND, weights, huge_pages=huge_pages)


def interleaved(
    shape: Sequence[int],
    dtype: torch.dtype,
    nodes: Collection[int] | None = None,
    *,
    weighted: bool = False,
    huge_pages: bool = True,
) -> torch.Tensor:
    """Allocate a tensor of zeros whose pages are interleaved over nodes.

    Limits: huge pages are interleaved too. They are asked for where each node gets at least four of them for each of its turns; a
    smaller tensor is interleaved in base pages.

    Parameters
    ----------
    shape, dtype
        As for ``torch.empty``.
    nodes
        All nodes whose memory may be used by default.
    weighted
        Give each node as many pages in turn as its weight in ``/sys/kernel/mm/mempolicy/weighted_interleave`` says.
    huge_pages
        Ask for transparent huge pages.

    Returns
    -------
    torch.Tensor
        Contiguous, on the CPU.

    Raises
    ------
    NodeUnavailable
        A node does not exist, or has too little free memory for its share; or `nodes` is empty.
    NotPermitted
        As for ``empty``.
    MissingDependency
        `weighted`, and this Linux is older than 6.9; or libnuma is not installed.
    """
    chosen = read_topology().allowed_nodes if nodes is None else tuple(sorted(set(nodes)))
    if not chosen:
        raise NodeUnavailable("nodes=(): expected at least one node to interleave over")
    shares = libnuma.interleave_weights(chosen) if weighted else dict.fromkeys(chosen, 1)
    free_memory.require(math.prod(shape) * dtype.itemsize, shares)
    mode = libnuma.MPOL_WEIGHTED_INTERLEAVE if weighted else libnuma.MPOL_INTERLEAVE
    return _allocate(shape, dtype, mode, shares, huge_pages=huge_pages)


def _allocate(
    shape: Sequence[int], dtype: torch.dtype, mode: int, weights: Mapping[int, int], *, huge_pages: bool
) -> torch.Tensor:
    """Return a tensor on fresh pages under a policy of their own; without weights under that of the thread that touches them."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    unit = page_unit(nbytes, sum(weights.values()) or 1) if huge_pages else PAGE_BYTES
    huge = unit > PAGE_BYTES
    padded = -(-nbytes // unit) * unit + unit if huge else nbytes
    try:
        mapping = mmap.mmap(-1, padded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise LimitReached(
            f"the kernel gives no {padded / 2**20:,.0f} MiB of address space ({os.strerror(error.errno or 0)}): raise the limit "
            "(`ulimit -v unlimited`), or let more be promised than there is (sysctl vm.overcommit_memory=0)"
        ) from error
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    # Kernels before 6.7 start a mapping at any page, and a huge page only fits on its own boundary.
    offset = -start % unit
    with suppress(OSError):  # where the kernel has none, there are none to decline
        mapping.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    if weights:
        if placer() == "mbind":
            libnuma.mbind(start, padded, mode, weights)
        else:
            _touch_from(weights, mapping, offset, unit)
    # The tensor's storage holds the mapping, and the mapping unmaps itself when it is collected.
    with torch.inference_mode(False):  # a tensor of that mode can't be written to outside of it
        return torch.frombuffer(mapping, dtype=dtype, count=nbytes // dtype.itemsize, offset=offset).view(tuple(shape))


def page_unit(nbytes: int, turns: int = 1) -> int:
    """Return the size in bytes of the pages that a tensor asks for.

    Parameters
    ----------
    nbytes
        Of the tensor.
    turns
        In how many turns its pages are interleaved over nodes; 1 where they all lie on one.
    """
    if not HUGE_PAGE_BYTES or no_huge_pages():
        return PAGE_BYTES
    small = turns == 1 and HUGE_PAGE_BYTES <= SMALL_HUGE_PAGE
    return HUGE_PAGE_BYTES if small or nbytes >= HUGE_PAGES_EACH * turns * HUGE_PAGE_BYTES else PAGE_BYTES


@cache
def no_huge_pages() -> str:
    """Return why the kernel gives no huge pages to a process that asks for them, as a phrase; empty where it may give some."""
    page = mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:  # a kernel without them does not know the advice, and a filter may refuse any
        return os.strerror(error.errno or 0)
    return ""


@cache
def placer() -> str:
    """Return how tensors are put on a node here: ``mbind``, or ``first touch`` by pinned threads where that is refused.

    Raises
    ------
    MissingDependency
        libnuma is not installed.
    """
    page = mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        libnuma.mbind(ctypes.addressof(ctypes.c_char.from_buffer(page)), PAGE_BYTES, libnuma.MPOL_DEFAULT, ())
    except PermissionError:
        return "first touch"
    return "mbind"


def _touch_from(weights: Mapping[int, int], mapping: mmap.mmap, offset: int, unit: int) -> None:
    """Let a thread on each node touch its share of the units first, which places pages where ``mbind`` is refused."""
    topology = read_topology()
    turns = [node for node, weight in weights.items() for _ in range(weight)]
    pages = np.frombuffer(mapping, np.uint8, offset=offset)[::PAGE_BYTES]
    turn_of = np.arange(len(pages)) // (unit // PAGE_BYTES) % len(turns)
    for node in weights:
        own = np.isin(turn_of, [turn for turn, owner in enumerate(turns) if owner == node])
        new_threads.run([partial(_touch, topology, node, pages, own)])  # mask and policy end with the thread


def _touch(topology: Topology, node: int, pages: NDArray[np.uint8], own: NDArray[np.bool_]) -> None:
    nearest = topology.nearest_cpu_node(node)
    cpus = topology.cpus_of([nearest])
    if not os.sched_getaffinity(0) <= set(cpus):  # a thread that runs only there need not ask a sandbox that may refuse
        affinity.set_cpus(cpus)
    try:
        libnuma.set_mempolicy(libnuma.MPOL_BIND, [node])
    except PermissionError as error:
        if nearest != node:
            raise NotPermitted(
                error.errno,
                f"node {node} has no CPUs to touch its memory first, so nothing can be placed there: {error}",
            ) from error
    pages[own] = 0


def stand_ins() -> tuple[str, ...]:
    """Return what the kernel or a container refuses here, and what stands in for it, as notes for a receipt."""
    notes = []
    if why := no_huge_pages():
        notes.append(f"madvise was refused ({why}): tensors lie on pages of {PAGE_BYTES >> 10} KiB, not on huge ones")
    if not libnuma.available():
        return (*notes, "libnuma is not installed: no memory policy was set or read, and no pages were looked at")
    if placer() != "mbind":
        notes.append("mbind was refused: tensors were placed by first touch of pinned threads")
    if page_location.locator() != "move_pages":
        notes.append("move_pages was refused: pages are those of whole mappings in numa_maps")
        if not os.access("/proc/self/numa_maps", os.R_OK):
            notes.append("there is no numa_maps: no pages were looked at")
    return tuple(notes)
