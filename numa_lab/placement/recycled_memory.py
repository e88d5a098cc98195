"""Memory that malloc hands out again, whose pages lie where they were first touched, and tensors that were made of it.

A memory policy acts when a page is first touched. malloc keeps the pages of freed tensors for new ones (by glibc's default those of
tensors of up to 32 MiB, once a tensor of that size was freed), so that a tensor which is made on one node may lie on another.
``give_back`` lets malloc return free pages to the kernel, so that the next tensor gets pages that nobody has touched. What becomes
free after that may have been touched on another node again: ``settle`` looks at a tensor, and moves what is not on the node.

Limits: ``give_back`` needs glibc's malloc. Of another one (musl, jemalloc, tcmalloc) nothing is given back, and ``settle`` remains. No
malloc gives back a page that a tensor shares with its neighbours, and glibc's keeps a record in the first bytes of free memory: of a
tensor that begins where a page does, that page is kept too. Where the environment sets malloc's thresholds, free memory at the end of
the arenas of all threads but the main one stays.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import threading
import time
from collections.abc import Callable
from functools import cache

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from numa_lab.errors import MissingDependency, NumaLabError
from numa_lab.machine import libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import page_location

REST = 10  # times as long as giving back took in vain, before it is done again for the same node
PAGE_SECONDS = 2e-6  # more than it takes to give back a page, and less than it took to touch it
BLOCK_BYTES = 100_000  # less than what malloc ever takes from the kernel directly by default
REMEMBERED = 1024  # tensors, by ``Settled``
LOOK_PAGES = 1024  # of a tensor; one look at each of 1024 pages takes 50 to 200 us, as reading some MiB does


class _Thread(threading.local):
    """What a thread has done last: for which node it gave memory back, after how many page faults, and until when it rests."""

    node: int | None = None
    page_faults = 0
    rests_until = 0.0


_thread = _Thread()


def give_back(node: int, *, always: bool = False) -> None:
    """Let malloc return its free pages to the kernel, because the calling thread is on `node` from now on.

    That takes 5 to 40 us where little is free, and about 0.2 us for each page that is returned. In a process whose memory is in
    ten thousand pieces it takes ten milliseconds, even where no page is returned. So a thread that gave memory back for the same node
    before rests ten times as long as the last call took in vain, and does nothing meanwhile. The time that pages cost which were
    touched since then is not counted as in vain. With `always` it never rests. Where the process may use one node alone, nothing is
    done.
    """
    start = time.perf_counter()
    resting = not always and _thread.node == node and start < _thread.rests_until
    if resting or not can_lie_elsewhere():
        return
    malloc_trim()
    page_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    end = time.perf_counter()
    in_vain = max(0.0, end - start - PAGE_SECONDS * (page_faults - _thread.page_faults))
    _thread.node, _thread.page_faults, _thread.rests_until = node, page_faults, end + REST * in_vain


@cache
def can_lie_elsewhere() -> bool:
    """Return whether this process may use memory of several nodes."""
    return len(read_topology().allowed_nodes) > 1


def malloc_trim() -> None:
    """Let malloc return its free pages to the kernel; do nothing where this malloc can't.

    In threads other than the main one this also fixes malloc's thresholds, unless the environment has set them: at the values to
    which glibc raises them by itself once a tensor of 32 MiB was freed.
    """
    if trim := _libc_function("malloc_trim"):
        trim(ctypes.c_size_t(0))
        if threading.get_native_id() != os.getpid():
            _trim_end_of_arena()


def _trim_end_of_arena() -> None:
    """Let malloc return what is free at the end of the calling thread's arena; ``malloc_trim`` does that in the main one alone.

    glibc does it when a block of 64 KiB or more is freed and more is free there than a threshold, which is set to 0 for a moment.
    """
    mallopt, malloc, free = (_libc_function(name) for name in ("mallopt", "malloc", "free"))
    if mallopt is None or malloc is None or free is None or _thresholds_are_the_users():
        return
    with _lock:
        try:
            mallopt(_M_TRIM_THRESHOLD, 0)
            mallopt(_M_TOP_PAD, 0)
            free(ctypes.c_void_p(malloc(BLOCK_BYTES)))
        finally:
            for option, nbytes in _ADAPTED.items():
                mallopt(option, nbytes)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_ADAPTED = {_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20, _M_TOP_PAD: 128 << 10}  # mallopt(3)
# Thresholds are the process's, so one thread at a time sets them; no fork finds this held.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@cache
def _thresholds_are_the_users() -> bool:
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")
    return any(name in os.environ for name in names) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


@cache
def _libc_function(name: str) -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function and name == "malloc":
        function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_void_p
    return function


@cache
def gives_back() -> bool:
    """Return whether free pages can be given back here: there is ``malloc_trim``, and nothing refuses the ``madvise`` in it."""
    if _libc_function("malloc_trim") is None:
        return False
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        try:
            page.madvise(mmap.MADV_DONTNEED)
        except OSError:
            return False
        return page[0] == 0


def settle(tensor: Tensor, node: int) -> str:
    """Move those pages of a tensor to the node that lie elsewhere.

    Memory that was given a policy of its own, as ``numa_lab.placement.memory`` and sharded caches give it, stays where that policy
    says. The first and last page may be shared with other data, which moves along.

    Limits: of a tensor of more than ``LOOK_PAGES`` pages so many are looked at, spread evenly. Where ``move_pages`` is refused,
    single pages can't be seen: nothing is looked at if free pages can be given back, and whole mappings are looked at if they can't.

    Returns
    -------
    str
        Why some pages still lie elsewhere; empty where none do.
    """
    try:
        if page_location.locator() == "numa_maps":
            return (
                ""
                if gives_back() or not _away(page_location.locate(tensor), node)
                else "move_pages and madvise are refused"
            )
        status = libnuma.page_status(page_location.page_addresses(tensor, most=LOOK_PAGES))
        if not bool(np.any((status >= 0) & (status != node))) or _has_policy(tensor.data_ptr(), node):
            return ""
        away = _away(page_location.migrate(tensor, node), node)
    except MissingDependency:
        return ""  # without libnuma nothing can be seen, as entering the node said
    except (OSError, NumaLabError) as error:
        return str(error)
    return f"{away} of its pages could not be moved, which are in use or shared with other processes" if away else ""


class Settled:
    """A memory of which tensors one thread has settled, so that each is looked at once.

    A tensor is told by its storage and by the place in it where the tensor begins.
    """

    def __init__(self) -> None:
        # By the address of a storage and of the tensor's beginning. The reference keeps the former from being used again.
        self._looked_at: dict[tuple[int, int], StorageWeakRef] = {}

    def settle(self, tensor: Tensor, node: int) -> str:
        """Do and return what the function ``settle`` does.

        For a tensor that was looked at before, and where this process has one node, nothing is done, and an empty string returned.
        """
        if not can_lie_elsewhere():
            return ""
        storage = tensor.untyped_storage()
        identity = storage._cdata, tensor.data_ptr()
        if identity in self._looked_at:
            return ""
        why = settle(tensor, node)
        if len(self._looked_at) >= REMEMBERED:
            self._looked_at.clear()
        self._looked_at[identity] = StorageWeakRef(storage)
        return why


def _away(pages: dict[int, int], node: int) -> int:
    return sum(count for home, count in pages.items() if home not in (node, page_location.UNTOUCHED))


def _has_policy(address: int, node: int) -> bool:
    """Return whether the mapping at an address has a policy of its own that sends pages to other nodes."""
    try:
        mode, nodes = libnuma.policy_at(address)
    except PermissionError:
        return False  # what can't be read can't have been set
    return mode != libnuma.MPOL_DEFAULT and nodes != {node}
