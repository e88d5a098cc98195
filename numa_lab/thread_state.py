"""Masks and memory policies of a whole team, exchanged in one parallel region.

Affinity and policy belong to a thread, and only ``sched_setaffinity`` can be asked for another one. So each thread of the
team runs a compiled function that saves its own and takes new ones. That takes some microseconds for a whole node, and no
thread id need be known.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, types
from numpy.typing import NDArray

from numa_lab import libnuma, openmp

# A thread's row of words: its CPU mask, and the mode and the node mask of its policy.
CPU_WORDS = 128  # 8192 CPUs: a kernel wants room for all that it was built for, and the largest are built for so many
MODE = CPU_WORDS
NODES = MODE + 1
ROW = NODES + libnuma.MAX_NODES // 64
KEEP = -1  # in place of a mode: the policy is left alone
MASK_FAILED, POLICY_FAILED = 1, 2
_FAILED = 5  # where both are noted among the arguments

Rows = NDArray[np.int64]
_WORDS = types.CPointer(types.int64)


@cache
def _exchange() -> int:
    """Address of what each thread of a team runs: save its mask and policy in its old row, and take those of its new row.

    It gets pointers to the new rows, to the old rows, and to three numbers: the addresses of both, and one in which it
    notes which of its calls failed.
    """
    libc, number = ctypes.CDLL(None), openmp.require().library.omp_get_thread_num
    number.argtypes, number.restype = [], ctypes.c_int
    # Without libnuma no row names a policy, and what stands in for its calls is never called.
    numa = libnuma.library() if libnuma.available() else None
    address, integer = ctypes.c_size_t, ctypes.c_int
    affinity = ctypes.CFUNCTYPE(integer, integer, address, address)
    set_mask, get_mask = affinity(("sched_setaffinity", libc)), affinity(("sched_getaffinity", libc))
    set_policy = ctypes.CFUNCTYPE(integer, integer, address, address)(
        ("set_mempolicy" if numa else "abs", numa or libc)
    )
    get_policy = ctypes.CFUNCTYPE(integer, address, address, address, address, integer)(
        ("get_mempolicy" if numa else "abs", numa or libc)
    )
    cpu_bytes, max_nodes = 8 * CPU_WORDS, libnuma.MAX_NODES + 1

    @cfunc(types.void(types.CPointer(_WORDS)), error_model="numpy")
    def body(arguments: Any) -> None:
        row = number() * ROW
        new, old = arguments[0], arguments[1]
        new_address, old_address = arguments[2][0] + 8 * row, arguments[2][1] + 8 * row
        failed = 0
        get_mask(0, cpu_bytes, old_address)
        if set_mask(0, cpu_bytes, new_address) != 0:
            failed |= MASK_FAILED
        old[row + MODE] = KEEP
        if new[row + MODE] != KEEP:
            old[row + MODE] = 0  # the kernel writes the lower half
            if get_policy(old_address + 8 * MODE, old_address + 8 * NODES, max_nodes, 0, 0) != 0:
                old[row + MODE] = KEEP
                failed |= POLICY_FAILED
            elif set_policy(new[row + MODE], new_address + 8 * NODES, max_nodes) != 0:
                failed |= POLICY_FAILED
        if failed:
            arguments[2][2] |= failed

    _keep_alive.append(body)
    return int(body.address)


_keep_alive: list[Any] = []  # compiled functions whose addresses are in use


class Exchange:
    """Memory for one exchange and for the way back, set up once.

    Beside an attention call the caches are cold, and each line of Python then costs microseconds: entering and leaving
    took 106 us around torch's own call, and 47 with everything prepared here.
    """

    def __init__(self, new: Rows) -> None:
        self.old = np.zeros_like(new)
        self._new, self._lost = new, np.zeros_like(new)  # keep alive what is pointed to
        self._there, self._back = _arguments(new, self.old), _arguments(self.old, self._lost)
        self._there_address, self._back_address = self._there.ctypes.data, self._back.ctypes.data
        self._function, self._parallel = _exchange(), openmp.require().library.GOMP_parallel
        self._threads = len(new)

    def there(self) -> int:
        """Take the new rows; which calls failed."""
        self._parallel(self._function, self._there_address, self._threads, 0)
        failed = int(self._there[_FAILED])
        if failed:
            self._there[_FAILED] = 0
        return failed

    def back(self) -> None:
        """Take the old rows."""
        self._parallel(self._function, self._back_address, self._threads, 0)


def _arguments(new: Rows, old: Rows) -> Rows:
    """What ``_exchange`` gets: three pointers, and the three numbers that the last of them points to."""
    words = np.zeros(6, np.int64)
    words[:5] = new.ctypes.data, old.ctypes.data, words.ctypes.data + 24, new.ctypes.data, old.ctypes.data
    return words


def set_bits(words: Rows, numbers: Collection[int]) -> None:
    """Set the bits with these numbers."""
    for bit in numbers:
        words.view(np.uint64)[bit // 64] |= np.uint64(1 << bit % 64)


def bits(words: Rows) -> set[int]:
    """The numbers of the bits that are set."""
    return {int(bit) for bit in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))}
