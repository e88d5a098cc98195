"""On which nodes the pages of a tensor lie, how much of it lies on huge pages, and moving it to another node."""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from numa_lab.machine import free_memory, libnuma, page_maps
from numa_lab.machine.page_maps import PAGE_BYTES

HOME_SAMPLE = 16  # pages that `home` looks at: 64 took 13 us more
UNTOUCHED = -1  # the key under which `locate` counts pages that do not exist yet
MOVE_ATTEMPTS = 10  # at a page that is busy, a few milliseconds apart
_ENOENT, _EFAULT = -2, -14  # a page that does not exist, in move_pages' status


def locate(tensor: torch.Tensor) -> dict[int, int]:
    """Count the tensor's pages on each node.

    ``move_pages`` tells the node of each page. Where it is refused (see ``locator``), ``/proc/self/numa_maps`` tells, which
    counts whole mappings: neighbours of the tensor in the same mapping are then counted too. The first and last page may be shared
    with other data.

    Returns
    -------
    dict
        ``{node: pages}``, in pages of the system's base size. Pages that were never touched are counted under ``UNTOUCHED``.

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
    """Return the node on which most of a tensor lies; None where nothing of it has been touched.

    A sample of its pages is looked at, so that it is quick for a large tensor (``locate`` looks at all of them).
    """
    return homes([tensor])[0]


def homes(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """Return the ``home`` of each tensor, by one system call for all of them.

    Beside an attention call, which leaves no code in the caches, the call takes 60 us, and each operation of numpy 20 us more.
    """
    if locator() == "numa_maps":
        return [_most(locate(tensor)) for tensor in tensors]
    addresses = [_sampled_addresses(tensor) for tensor in tensors]
    status = iter(libnuma.status_of_few(list(itertools.chain.from_iterable(addresses))))
    nodes_of_each = [list(itertools.islice(status, len(sampled))) for sampled in addresses]
    return [_most({node: nodes.count(node) for node in dict.fromkeys(nodes)}) for nodes in nodes_of_each]


def _most(pages: Mapping[int, int]) -> int | None:
    touched = {node: count for node, count in pages.items() if node >= 0}
    return max(touched, key=touched.__getitem__) if touched else None


def migrate(tensor: torch.Tensor, node: int) -> dict[int, int]:
    """Move those pages of the tensor that exist to a node.

    A page that is busy is tried again, ``MOVE_ATTEMPTS`` times in all. Pages that were never touched stay untouched, and go where the
    policy of the tensor, or of the thread that touches them, sends them. The first and last page may be shared with other data, which
    moves along. Where a container refuses ``move_pages``, ``mbind`` moves the pages, and leaves its policy on them.

    Returns
    -------
    dict
        Where the pages lie then, as ``locate`` tells it.

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
    """Return the share, 0 to 1, of the tensor's resident memory that lies on huge pages, as ``/proc/self/smaps`` counts it.

    It is NaN where there is no such file. Limits: smaps tells of whole mappings, so neighbours in the same mapping count too.
    """
    return page_maps.huge_page_share(*_span(tensor))


@cache
def locator() -> str:
    """Return how ``locate`` sees pages here: ``move_pages``, or ``numa_maps`` where the kernel or a container refuses that."""
    probe = ctypes.create_string_buffer(PAGE_BYTES)
    try:
        libnuma.page_status(np.array([ctypes.addressof(probe) // PAGE_BYTES * PAGE_BYTES], np.uint64))
    except PermissionError:
        return "numa_maps"
    return "move_pages"


def page_addresses(tensor: torch.Tensor, most: int | None = None) -> NDArray[np.uint64]:
    """Return the addresses of the pages that hold the tensor, ascending.

    Of more than `most` pages so many are chosen, spread evenly, with the first and the last.
    """
    first, last = _page_span(tensor)
    if most is None or last - first <= most:
        return np.arange(first, last, dtype=np.uint64) * np.uint64(PAGE_BYTES)
    return np.linspace(first, last - 1, most).astype(np.uint64) * np.uint64(PAGE_BYTES)


def _sampled_addresses(tensor: torch.Tensor) -> range:
    """Return the addresses of about ``HOME_SAMPLE`` pages of the tensor, spread evenly."""
    first, last = _page_span(tensor)
    return range(first * PAGE_BYTES, last * PAGE_BYTES, max(1, (last - first) // HOME_SAMPLE) * PAGE_BYTES)


def _page_span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the number of the first page that holds some of the tensor, and that of the page after the last."""
    first, last = _span(tensor)
    return first // PAGE_BYTES, -(-last // PAGE_BYTES)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of the tensor's first byte and of the byte after its last, with the gaps of a strided tensor."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
