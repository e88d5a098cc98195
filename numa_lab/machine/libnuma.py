"""Calls the four system calls of Linux's NUMA interface, through libnuma.so.1.

The calls are passed on as they are: errno becomes an exception, and node sets become Python sets. A memory policy belongs to a
*thread*; ``set_mempolicy`` and ``get_mempolicy`` act on the calling thread. libnuma's own helpers (``numa_alloc_onnode``
and the like) are left alone, since they hide errors and print to stderr. Source: set_mempolicy(2), mbind(2),
move_pages(2), and linux/mempolicy.h for the numbers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from numa_lab.errors import MissingDependency, NotPermitted
from numa_lab.machine.shell_commands import to_install

MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE, MPOL_LOCAL = range(5)
MPOL_PREFERRED_MANY = 5  # from Linux 5.15
MPOL_WEIGHTED_INTERLEAVE = 6  # from Linux 6.9
MPOL_F_STATIC_NODES, MPOL_F_RELATIVE_NODES, MPOL_F_NUMA_BALANCING = 1 << 15, 1 << 14, 1 << 13
MPOL_MODE_FLAGS = 0xE000  # all three flags, which the kernel returns together with the mode
MPOL_MF_MOVE = 1 << 1
_MPOL_F_ADDR = 1 << 1

WEIGHTS = Path("/sys/kernel/mm/mempolicy/weighted_interleave")

MAX_NODES = 1024  # the largest CONFIG_NODES_SHIFT of a distribution kernel; the kernel wants room for all of its nodes
_LONG_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_Mask = ctypes.c_ulong * (MAX_NODES // _LONG_BITS)


@cache
def library() -> ctypes.CDLL:
    """Load libnuma.

    Raises
    ------
    MissingDependency
        It is not installed; the message holds the line to type.
    """
    try:
        library = ctypes.CDLL("libnuma.so.1", use_errno=True)
    except OSError as error:
        raise MissingDependency(
            "libnuma.so.1 is not installed, and NUMA policies can't be set or read without it; "
            f"type the line for this system:\n{to_install('numactl')}"
        ) from error
    long, unsigned_long, pointer, integer = ctypes.c_long, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_int
    library.set_mempolicy.argtypes = [integer, pointer, unsigned_long]
    library.get_mempolicy.argtypes = [pointer, pointer, unsigned_long, pointer, unsigned_long]
    library.mbind.argtypes = [pointer, unsigned_long, integer, pointer, unsigned_long, ctypes.c_uint]
    library.move_pages.argtypes = [integer, unsigned_long, pointer, pointer, pointer, integer]
    for call in (library.set_mempolicy, library.get_mempolicy, library.mbind, library.move_pages):
        call.restype = long
    return library


def available() -> bool:
    """Return whether libnuma.so.1 can be loaded."""
    try:
        library()
    except MissingDependency:
        return False
    return True


def _check(status: int, call: str, what: str) -> None:
    if status >= 0:
        return
    code = ctypes.get_errno()
    if code in (errno.EPERM, errno.ENOSYS):
        raise NotPermitted(
            code,
            f"{call} ({what}) was refused: {os.strerror(code)}. Containers refuse it by default; allow it with "
            + ("--security-opt seccomp=unconfined" if call == "move_pages" else "--cap-add SYS_NICE")
            + " (Docker, Podman) or a seccomp profile that lists it",
        )
    raise OSError(code, f"{call} ({what}): {os.strerror(code)}")


def _mask(nodes: Iterable[int]) -> ctypes.Array[ctypes.c_ulong]:
    mask = _Mask()
    for node in nodes:
        if not 0 <= node < MAX_NODES:
            raise ValueError(f"node {node}: Linux numbers nodes from 0 to {MAX_NODES - 1}")
        mask[node // _LONG_BITS] |= 1 << node % _LONG_BITS
    return mask


def _nodes(mask: ctypes.Array[ctypes.c_ulong]) -> frozenset[int]:
    return frozenset(
        word * _LONG_BITS + bit for word, bits in enumerate(mask) for bit in range(_LONG_BITS) if bits >> bit & 1
    )


def set_mempolicy(mode: int, nodes: Iterable[int] = ()) -> None:
    """Set the calling thread's memory policy; it acts on pages first touched from now on.

    The kernel silently drops nodes outside the process's cpuset: read the policy back.

    Raises
    ------
    NotPermitted
        The kernel refuses the call altogether, as containers do.
    OSError
        EINVAL where none of the nodes has memory that may be used.
    """
    nodes = frozenset(nodes)
    # The kernel reads one bit less than the number that it is given (an old off-by-one that it keeps for compatibility).
    _check(
        library().set_mempolicy(mode, _mask(nodes), MAX_NODES + 1),
        "set_mempolicy",
        f"mode {mode}, nodes {set(nodes)}",
    )


def get_mempolicy(*, flags: bool = False) -> tuple[int, frozenset[int]]:
    """Return mode and nodes of the calling thread's memory policy, as the kernel granted them.

    With `flags` the mode holds the policy's flags too, so that ``set_mempolicy`` sets the same policy again. Static and relative
    nodes are returned as they were asked for.
    """
    mode, mask = ctypes.c_int(), _Mask()
    _check(library().get_mempolicy(ctypes.byref(mode), mask, MAX_NODES + 1, None, 0), "get_mempolicy", "calling thread")
    return mode.value if flags else mode.value & ~MPOL_MODE_FLAGS, _nodes(mask)


def policy_at(address: int) -> tuple[int, frozenset[int]]:
    """Return mode and nodes of the policy that ``mbind`` gave the mapping of an address; ``MPOL_DEFAULT`` where it has none."""
    mode, mask = ctypes.c_int(), _Mask()
    status = library().get_mempolicy(ctypes.byref(mode), mask, MAX_NODES + 1, address, _MPOL_F_ADDR)
    _check(status, "get_mempolicy", "an address")
    return mode.value & ~MPOL_MODE_FLAGS, _nodes(mask)


def mbind(address: int, nbytes: int, mode: int, nodes: Iterable[int], *, move: bool = False) -> None:
    """Set the policy of an address range (page-aligned start); with `move`, pages that exist follow where they can."""
    nodes = frozenset(nodes)
    flags = MPOL_MF_MOVE if move else 0
    _check(
        library().mbind(address, nbytes, mode, _mask(nodes), MAX_NODES + 1, flags),
        "mbind",
        f"mode {mode}, nodes {set(nodes)}",
    )


def page_status(addresses: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Return for each page address the node that the page lies on, or a negative errno.

    A page that was never touched is -2 (ENOENT), or -14 (EFAULT) before Linux 6.2 and for the shared page of zeros.
    """
    return _move_pages(addresses, None)


def status_of_few(addresses: Sequence[int]) -> list[int]:
    """Return what ``page_status`` does, for few pages: without numpy, whose calls take longer than they save there."""
    pages, status = (ctypes.c_uint64 * len(addresses))(*addresses), (ctypes.c_int32 * len(addresses))()
    what = f"{len(addresses)} pages"
    _check(
        library().move_pages(0, len(addresses), ctypes.addressof(pages), None, ctypes.addressof(status), 0),
        "move_pages",
        what,
    )
    return status[:]


def move_pages(addresses: NDArray[np.uint64], node: int) -> NDArray[np.int32]:
    """Move the pages at these addresses to a node, and return for each the node that it lies on now, or a negative errno.

    Pages that do not exist are -2 or -14, as in ``page_status``; -16 (EBUSY) stands for a page that is in use this moment; some of
    these have moved all the same, so look again.
    """
    return _move_pages(addresses, np.full(len(addresses), node, np.int32))


def _move_pages(addresses: NDArray[np.uint64], nodes: NDArray[np.int32] | None) -> NDArray[np.int32]:
    addresses = np.ascontiguousarray(addresses, np.uint64)
    status = np.empty(len(addresses), np.int32)
    _check(
        library().move_pages(
            0,
            len(addresses),
            addresses.ctypes.data,
            nodes.ctypes.data if nodes is not None else None,
            status.ctypes.data,
            MPOL_MF_MOVE if nodes is not None else 0,
        ),
        "move_pages",
        f"{len(addresses)} pages",
    )
    return status


def interleave_weights(nodes: Iterable[int]) -> dict[int, int]:
    """Return how many pages in turn each node gets under weighted interleaving, as the system's administrator chose.

    Raises
    ------
    MissingDependency
        This Linux does not have it.
    """
    if not WEIGHTS.is_dir():
        raise MissingDependency(
            f"weighted interleaving needs Linux 6.9 or later, and this is {platform.release()}: interleave without "
            "weights (i instead of w in a label)"
        )
    return {node: int((WEIGHTS / f"node{node}").read_text()) for node in nodes}
