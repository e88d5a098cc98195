"""Tensors on a node: allocate them there, see where their pages lie, and move them.

A memory policy acts only when a page is first touched, and ``malloc`` hands freed pages of any node out again, so a
tensor created "under" a binding may lie elsewhere. ``empty`` and ``interleaved`` therefore take fresh pages from the
kernel each time; ``locate`` looks, and ``migrate`` moves what lies elsewhere.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from numa_lab.errors import LimitReached, NodeUnavailable, NotPermitted
from numa_lab.machine import affinity, free_memory, libnuma, new_threads, page_maps
from numa_lab.machine.page_maps import PAGE_BYTES
from numa_lab.machine.topology import Topology, read_topology

HUGE_PAGE_BYTES = page_maps.huge_page_bytes()  # 0 where the kernel has none
SMALL_HUGE_PAGE = 2 << 20  # up to this size one is taken for any tensor: what is padded is little
HUGE_PAGES_EACH = 4  # that a tensor holds on each node at least, where huge pages are larger or go round over nodes
HOME_SAMPLE = 16  # pages that `home` looks at: 64 took 13 us more
UNTOUCHED = -1  # the key under which `locate` counts pages that do not exist yet
MOVE_ATTEMPTS = 10  # at a page that is busy, a few milliseconds apart
_ENOENT, _EFAULT = -2, -14  # a page that does not exist, in move_pages' status


def empty(
    shape: Sequence[int], dtype: torch.dtype, node: int | None = None, *, huge_pages: bool = True
) -> torch.Tensor:
    """Allocate an uninitialised (zero) tensor on pages of its own.

    Limits: huge pages are asked for, not promised (see ``huge_page_share``); where they are larger than 2 MiB, as with base
    pages of 64 KiB, only for tensors that hold four of them. Without `node` the pages go where the toucher's policy sends
    them. The memory goes back to the kernel when the last view of the tensor dies.

    Parameters
    ----------
    shape, dtype
        As for ``torch.empty``.
    node
        The NUMA node on which all pages shall lie, enforced by ``mbind``. Where a container refuses that (see
        ``placer``), the pages are touched at once by a thread pinned to the node's CPUs.
    huge_pages
        Ask for transparent huge pages.

    Raises
    ------
    NodeUnavailable
        The node does not exist, or has too little free memory; without `node`, the nodes to which the calling thread's
        memory is bound have. Who touches more than a bound node holds is killed.
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
    """Allocate an uninitialised (zero) tensor whose pages go round over nodes.

    Limits: huge pages go round too. They are asked for where each node gets at least four of them for each of its turns; a
    smaller tensor goes round in base pages.

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

    Raises
    ------
    NodeUnavailable
        A node does not exist, or has too little free memory for its share.
    NotPermitted
        As for ``empty``.
    MissingDependency
        `weighted`, and this Linux is older than 6.9; or libnuma is not installed.
    """
    among = read_topology().allowed_nodes if nodes is None else tuple(sorted(set(nodes)))
    if not among:
        raise NodeUnavailable("nodes=(): expected at least one node to interleave over")
    shares = libnuma.interleave_weights(among) if weighted else dict.fromkeys(among, 1)
    free_memory.require(math.prod(shape) * dtype.itemsize, shares)
    mode = libnuma.MPOL_WEIGHTED_INTERLEAVE if weighted else libnuma.MPOL_INTERLEAVE
    return _allocate(shape, dtype, mode, shares, huge_pages=huge_pages)


def _allocate(
    shape: Sequence[int], dtype: torch.dtype, mode: int, weights: Mapping[int, int], *, huge_pages: bool
) -> torch.Tensor:
    """Fresh pages under a policy of their own, or under the toucher's where no nodes are given."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    unit = page_unit(nbytes, sum(weights.values()) or 1) if huge_pages else PAGE_BYTES
    huge = unit > PAGE_BYTES
    padded = -(-nbytes // unit) * unit + unit if huge else nbytes
    try:
        block = mmap.mmap(-1, padded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise LimitReached(
            f"the kernel gives no {padded / 2**20:,.0f} MiB of address space ({os.strerror(error.errno or 0)}): raise the limit "
            "(`ulimit -v unlimited`), or let more be promised than there is (sysctl vm.overcommit_memory=0)"
        ) from error
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    # Kernels before 6.7 start a mapping at any page, and a huge page only fits on its own boundary.
    offset = -start % unit
    with suppress(OSError):  # where the kernel has none, there are none to decline
        block.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    if weights:
        if placer() == "mbind":
            libnuma.mbind(start, padded, mode, weights)
        else:
            _touch_from(weights, block, offset, unit)
    # The tensor's storage holds the mapping, and the mapping unmaps itself when it is collected.
    with torch.inference_mode(False):  # a tensor of that mode can't be written to outside of it
        return torch.frombuffer(block, dtype=dtype, count=nbytes // dtype.itemsize, offset=offset).view(tuple(shape))


def page_unit(nbytes: int, turns: int = 1) -> int:
    """Bytes of the pages that a tensor of so many bytes asks for, where it is to go round over nodes in so many turns."""
    if not HUGE_PAGE_BYTES or no_huge_pages():
        return PAGE_BYTES
    small = turns == 1 and HUGE_PAGE_BYTES <= SMALL_HUGE_PAGE
    return HUGE_PAGE_BYTES if small or nbytes >= HUGE_PAGES_EACH * turns * HUGE_PAGE_BYTES else PAGE_BYTES


@cache
def no_huge_pages() -> str:
    """Why the kernel gives no huge pages to a process that asks for them, as a phrase; empty where it may."""
    page = mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:  # a kernel without them does not know the advice, and a filter may refuse any
        return os.strerror(error.errno or 0)
    return ""


@cache
def placer() -> str:
    """How tensors are put on a node here: by ``mbind``, or by ``first touch`` of pinned threads where it is refused.

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


def _touch_from(weights: Mapping[int, int], block: mmap.mmap, offset: int, unit: int) -> None:
    """First touch by a thread on each node, of its share of the units: what places pages where mbind is refused."""
    topology = read_topology()
    turns = [node for node, weight in weights.items() for _ in range(weight)]
    pages = np.frombuffer(block, np.uint8, offset=offset)[::PAGE_BYTES]
    turn_of = np.arange(len(pages)) // (unit // PAGE_BYTES) % len(turns)
    for node in weights:
        mine = np.isin(turn_of, [turn for turn, of in enumerate(turns) if of == node])
        new_threads.run([partial(_touch, topology, node, pages, mine)])  # mask and policy end with the thread


def _touch(topology: Topology, node: int, pages: NDArray[np.uint8], mine: NDArray[np.bool_]) -> None:
    nearest = topology.nearest_cpu_node(node)
    cpus = topology.cpus_of([nearest])
    if not os.sched_getaffinity(0) <= set(cpus):  # who runs there alone need not ask a sandbox that refuses it
        affinity.set_cpus(cpus)
    try:
        libnuma.set_mempolicy(libnuma.MPOL_BIND, [node])
    except PermissionError as error:
        if nearest != node:
            raise NotPermitted(
                error.errno,
                f"node {node} has no CPUs to touch its memory first, so nothing can be placed there: {error}",
            ) from error
    pages[mine] = 0


def locate(tensor: torch.Tensor) -> dict[int, int]:
    """Count the tensor's pages on each node: ``{node: pages}`` of the system's base page size.

    By ``move_pages``, page by page. Where that is refused (see ``locator``), from ``/proc/self/numa_maps``, which
    counts whole mappings: neighbours of the tensor in the same mapping are then counted too. Pages that were never
    touched stand under ``UNTOUCHED``. The first and last page may be shared with other data.

    Raises
    ------
    MissingDependency
        libnuma is not installed.
    """
    first, last = _span(tensor)
    if first == last:
        return {}
    if locator() == "numa_maps":
        return page_maps.pages_per_node(first, last)
    nodes, counts = np.unique(np.maximum(libnuma.page_status(page_addresses(tensor)), UNTOUCHED), return_counts=True)
    return {int(node): int(count) for node, count in zip(nodes, counts, strict=True)}


def home(tensor: torch.Tensor) -> int | None:
    """The node on which most of a tensor lies; None where nothing of it has been touched.

    By a sample of its pages, so that it is quick for a large one (see ``locate`` for all of them).
    """
    return homes([tensor])[0]


def homes(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """``home`` of each tensor, in one look.

    Beside an attention call, which leaves no code in the caches, a look takes 60 us, and each operation of numpy 20 more.
    """
    if locator() == "numa_maps":
        return [_most(locate(tensor)) for tensor in tensors]
    places = [_some_pages(tensor) for tensor in tensors]
    status = iter(libnuma.status_of_few(list(itertools.chain.from_iterable(places))))
    found = [list(itertools.islice(status, len(of_tensor))) for of_tensor in places]
    return [_most({node: nodes.count(node) for node in dict.fromkeys(nodes)}) for nodes in found]


def _most(pages: Mapping[int, int]) -> int | None:
    touched = {node: count for node, count in pages.items() if node >= 0}
    return max(touched, key=touched.__getitem__) if touched else None


def migrate(tensor: torch.Tensor, node: int) -> dict[int, int]:
    """Move the tensor's pages to a node, where they exist, and say where they lie then, as ``locate`` does.

    A page that is busy is asked for again, some times. Pages that were never touched stay untouched, and go where the
    policy of the tensor or of the toucher sends them. The first and last page may be shared with other data, which
    moves along. Where a container refuses ``move_pages``, ``mbind`` moves them, and leaves its policy on the pages.

    Raises
    ------
    NodeUnavailable
        The node does not exist, or has too little free memory.
    NotPermitted
        Both calls are refused: copy the tensor into ``empty(..., node)`` instead.
    MissingDependency
        libnuma is not installed.
    """
    pages = page_addresses(tensor)
    if not len(pages):
        return {}
    located = locate(tensor)
    elsewhere = sum(count for other, count in located.items() if other not in (node, UNTOUCHED))
    free_memory.require(elsewhere * PAGE_BYTES, {node: 1})
    if located and not elsewhere:  # where moving is refused, there is nothing to ask for
        return located
    if locator() == "numa_maps":
        nbytes = len(pages) * PAGE_BYTES
        libnuma.mbind(int(pages[0]), nbytes, libnuma.MPOL_BIND, [node], move=True)
        return locate(tensor)
    for attempt in range(MOVE_ATTEMPTS):
        libnuma.move_pages(pages, node)
        # What the call says of a page that was in use is not where it ended up.
        status = libnuma.page_status(pages)
        pages = pages[(status != node) & (status != _ENOENT) & (status != _EFAULT)]
        if not len(pages):
            break
        time.sleep(0.001 * attempt)
    return locate(tensor)


def huge_page_share(tensor: torch.Tensor) -> float:
    """Share of the tensor's resident memory that lies on huge pages, 0 to 1, as ``/proc/self/smaps`` counts it.

    NaN where there is no such file. Limits: smaps speaks of whole mappings, so neighbours in the same mapping count too.
    """
    return page_maps.huge_page_share(*_span(tensor))


@cache
def locator() -> str:
    """How ``locate`` sees pages here: ``move_pages``, or ``numa_maps`` where the kernel or a container refuses it."""
    probe = ctypes.create_string_buffer(PAGE_BYTES)
    try:
        libnuma.page_status(np.array([ctypes.addressof(probe) // PAGE_BYTES * PAGE_BYTES], np.uint64))
    except PermissionError:
        return "numa_maps"
    return "move_pages"


def lost() -> tuple[str, ...]:
    """What the kernel or a container refuses here, and what stands in for it: notes for a receipt."""
    notes = []
    if why := no_huge_pages():
        notes.append(f"madvise was refused ({why}): tensors lie on pages of {PAGE_BYTES >> 10} KiB, not on huge ones")
    if not libnuma.available():
        return (*notes, "libnuma is not installed: no memory policy was set or read, and no pages were looked at")
    if placer() != "mbind":
        notes.append("mbind was refused: tensors were placed by first touch of pinned threads")
    if locator() != "move_pages":
        notes.append("move_pages was refused: pages are those of whole mappings in numa_maps")
        if not os.access("/proc/self/numa_maps", os.R_OK):
            notes.append("there is no numa_maps: no pages were looked at")
    return tuple(notes)


def page_addresses(tensor: torch.Tensor, most: int | None = None) -> NDArray[np.uint64]:
    """Addresses of the pages that hold the tensor, or of `most` of them, the first and last included, spread evenly."""
    first, last = _page_span(tensor)
    if most is None or last - first <= most:
        return np.arange(first, last, dtype=np.uint64) * np.uint64(PAGE_BYTES)
    return np.linspace(first, last - 1, most).astype(np.uint64) * np.uint64(PAGE_BYTES)


def _some_pages(tensor: torch.Tensor) -> range:
    """Addresses of about ``HOME_SAMPLE`` of them, spread evenly."""
    first, last = _page_span(tensor)
    return range(first * PAGE_BYTES, last * PAGE_BYTES, max(1, (last - first) // HOME_SAMPLE) * PAGE_BYTES)


def _page_span(tensor: torch.Tensor) -> tuple[int, int]:
    """Number of the first page that holds some of the tensor, and of the page after the last."""
    first, last = _span(tensor)
    return first // PAGE_BYTES, -(-last // PAGE_BYTES)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of the tensor and the byte after its last, gaps of a strided tensor included."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
