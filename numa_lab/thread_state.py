"""Masks and memory policies of a whole team, exchanged in one parallel region.

Affinity and policy belong to a thread, and only ``sched_setaffinity`` can be asked for another one. So each thread of the
team runs a compiled function that saves its own and takes new ones. That takes some microseconds for a whole node, and no
thread id need be known.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numpy.typing import NDArray

from numa_lab import affinity, libnuma, openmp

# A thread's row of words: its CPU mask, the mode and the node mask of its policy, and its id.
CPU_WORDS = affinity.MAX_CPUS // 64  # a kernel wants room for all that it was built for
MODE = CPU_WORDS
NODES = MODE + 1
TID = NODES + libnuma.MAX_NODES // 64
ROW = TID + 1
KEEP = -1  # in place of a mode: the policy is left alone
MASK_FAILED, POLICY_FAILED = 1, 2
MOVED, ENDED = 1, 2  # what can have become of a thread
_FAILED, _GRANTED = 5, 6  # where it is noted among the arguments what failed, and how many threads there were
_GETTID = {"x86_64": 186, "aarch64": 178}  # asm/unistd_64.h, asm-generic/unistd.h: glibc has had gettid since 2.30

Rows = NDArray[np.int64]
_WORDS = types.CPointer(types.int64)


@cache
def _exchange() -> int:
    """Address of what each thread of a team runs: save its mask and policy in its old row, and take those of its new row.

    It gets pointers to the new rows, to the old rows, and to numbers: the addresses of both, one in which it notes which of
    its calls failed, one for the size of the team, and the addresses of a mask that the first thread takes last, and of where
    it notes what it was granted of that; no mask is 0.
    """
    libc, library = ctypes.CDLL(None), openmp.require().library
    number, size = library.omp_get_thread_num, library.omp_get_num_threads
    for function in (number, size):
        function.argtypes, function.restype = [], ctypes.c_int
    own_id = _own_id(libc)
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
        old[row + TID] = own_id()
        if set_mask(0, cpu_bytes, new_address) != 0:
            failed |= MASK_FAILED
        if row == 0:
            arguments[2][3] = size()
            if arguments[2][4] != 0:
                if set_mask(0, cpu_bytes, arguments[2][4]) != 0:
                    failed |= MASK_FAILED
                get_mask(0, cpu_bytes, arguments[2][5])
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


@cache
def _look() -> Any:
    """The compiled ``int64 look(int64 *words)``: what has become of so many threads' masks since they took their rows.

    The words are the addresses of the rows with their ids, of the rows that were taken, of a free mask, and of the words.
    """
    libc, address, integer = ctypes.CDLL(None), ctypes.c_size_t, ctypes.c_int
    get_mask = ctypes.CFUNCTYPE(integer, integer, address, address)(("sched_getaffinity", libc))

    @cfunc(types.int64(types.CPointer(_WORDS), types.int64), error_model="numpy")
    def look(arguments: Any, count: Any) -> Any:
        rows, given, now = arguments[0], arguments[1], arguments[2]
        now_address, found = arguments[3][2], 0
        for thread in range(count):
            if get_mask(rows[thread * ROW + TID], 8 * CPU_WORDS, now_address) != 0:
                found |= ENDED
            else:
                differing = 0
                for word in range(CPU_WORDS):
                    differing |= now[word] ^ given[thread * ROW + word]
                if differing != 0:
                    found |= MOVED
        return found

    _keep_alive.append(look)
    return ctypes.CFUNCTYPE(ctypes.c_int64, address, ctypes.c_int64)(look.address)


def _own_id(libc: ctypes.CDLL) -> Any:
    """A function for compiled code that tells the calling thread's id."""
    if hasattr(libc, "gettid"):
        return ctypes.CFUNCTYPE(ctypes.c_int)(("gettid", libc))
    call = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long)(("syscall", libc))
    which = _GETTID[platform.machine()]

    @njit(error_model="numpy")
    def own_id() -> Any:
        return call(which)

    return own_id


_keep_alive: list[Any] = []  # compiled functions whose addresses are in use


class Exchange:
    """Memory for one exchange and for the way back, set up once.

    Parameters
    ----------
    new
        A row for each thread.
    leader_cpus
        What the first thread may use once it is on the CPUs of its row; those alone where it is empty.

    Beside an attention call the caches are cold, and each line of Python then costs microseconds: entering and leaving
    took 106 us around torch's own call, and 47 with everything prepared here.
    """

    def __init__(self, new: Rows, leader_cpus: Collection[int] = ()) -> None:
        self.old = np.zeros_like(new)
        self.granted = 0  # threads that there were
        self.given = new.copy()  # where the first row's mask is what was granted of leader_cpus
        self._new, self._lost = new, np.zeros_like(new)  # keep alive what is pointed to
        self._there, self._back = _arguments(new, self.old), _arguments(self.old, self._lost)
        self._leader = np.zeros((2, CPU_WORDS), np.int64)
        if leader_cpus:
            set_bits(self._leader[0], leader_cpus)
            self._there[_GRANTED + 1 : _GRANTED + 3] = self._leader[0].ctypes.data, self.given.ctypes.data
        self._look, self._looked_at = _look(), np.zeros(4, np.int64)
        now = self._leader[1].ctypes.data
        self._looked_at[:] = self.old.ctypes.data, self.given.ctypes.data, now, self._looked_at.ctypes.data
        self._there_address, self._back_address = self._there.ctypes.data, self._back.ctypes.data
        self._function, self._parallel = _exchange(), openmp.require().library.GOMP_parallel
        self._threads, self._looked_at_address = len(new), self._looked_at.ctypes.data

    def there(self) -> int:
        """Take the new rows; which calls failed."""
        self._parallel(self._function, self._there_address, self._threads, 0)
        failed, self.granted = int(self._there[_FAILED]), int(self._there[_GRANTED])
        if failed:
            self._there[_FAILED] = 0
        if self.granted < self._threads:
            self.old[self.granted :] = self.old[0]  # for threads that are born until the way back
        return failed

    def look(self) -> int:
        """What has become of the masks that were taken: MOVED and ENDED, for any of the threads; 0 while all are as they were."""
        return int(self._look(self._looked_at_address, min(self.granted, self._threads)))

    def looking(self) -> tuple[int, int, int]:
        """The same as the address of a compiled ``int64 look(int64, int64)``, and what it takes."""
        address = ctypes.cast(self._look, ctypes.c_void_p).value or 0
        return address, self._looked_at_address, min(self.granted, self._threads)

    def thread_ids(self) -> list[int]:
        """The kernel's ids of the threads that took their rows."""
        return [int(tid) for tid in self.old[: self.granted, TID]]

    def back(self) -> None:
        """Take the old rows."""
        self._parallel(self._function, self._back_address, self._threads, 0)


def _arguments(new: Rows, old: Rows) -> Rows:
    """What ``_exchange`` gets: three pointers, and the numbers that the last of them points to."""
    words = np.zeros(_GRANTED + 3, np.int64)
    words[:5] = new.ctypes.data, old.ctypes.data, words.ctypes.data + 24, new.ctypes.data, old.ctypes.data
    return words


def set_bits(words: Rows, numbers: Collection[int]) -> None:
    """Set the bits with these numbers."""
    for bit in numbers:
        words.view(np.uint64)[bit // 64] |= np.uint64(1 << bit % 64)


def bits(words: Rows) -> set[int]:
    """The numbers of the bits that are set."""
    return {int(bit) for bit in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))}
