"""Masks, memory policies and thread counts of a whole team, exchanged in one parallel region.

Affinity and memory policy belong to a thread. ``sched_setaffinity`` can set the mask of another thread, and no call can set another
thread's policy. So each thread of the team runs a compiled function that saves its own mask and policy, and takes new ones. That takes
some microseconds for a whole node, and nobody has to know the threads' ids. All of it is one compiled call, in which no signal's
handler runs: an exchange is done completely, or was not begun.

An exchange goes two ways. On the way *there* the threads take what is new, and on the way *back* what they had.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from numa_lab.machine import affinity, libnuma
from numa_lab.placement import jit, openmp

# A thread's row of words: its CPU mask, the mode and the node mask of its policy, and its id.
CPU_WORDS = affinity.MAX_CPUS // 64  # a kernel wants room for all that it was built for
MODE = CPU_WORDS
NODES = MODE + 1
TID = NODES + libnuma.MAX_NODES // 64
ROW = TID + 1
KEEP = -1  # in place of a mode: the policy is left alone
MASK_FAILED, POLICY_FAILED = 1, 2
MOVED, ENDED = 1, 2  # what can have become of a thread
# The words that both ways of an exchange share: how many rows there are, and how many threads OpenMP gave; whether the new rows were
# taken and not given back; whether a mask or a policy could not be set; and the caller's thread counts before, OpenMP's and MKL's.
_ROWS, _SIZE, _TAKEN, _NO_MASK, _NO_POLICY, _COUNT, _MKL_COUNT, _SHARED = range(8)
_NEW, _OLD, _SEEN, _LEADER, _LEADER_GRANTED, _BACK, _OWN, _NUMBERS = range(
    8
)  # the numbers of one way: see ``_exchange``
_ARGUMENTS = 5  # pointers, in front of the numbers
_Go = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_size_t)

Rows = NDArray[np.int64]


@cache
@jit.needed()
def _exchange() -> tuple[int, int, int]:
    """Compile the exchange; return the addresses of three functions.

    1. ``void take(int64 *arguments[5], int64 row)`` lets the thread that calls it take the new row of this number on the way there, and
       its own old row on the way back. It serves steps over several nodes, in which each thread chooses its row
       (``numa_lab.attention.openmp_regions``).
    2. ``int64 there(int64 *arguments[5])``, called by the first thread of a team, lets every thread take the new row at its own place,
       and sets the thread counts. It returns whether any call failed.
    3. ``int64 back(int64 *arguments[5])``, called likewise, lets every thread take its old row, and sets the old thread counts.

    On the way there a thread first saves its mask and policy in its old row. A thread without a row was born while the exchange was in
    force: on the way back it takes the old row of the first thread.

    The five arguments are pointers: to the new rows, to the old rows, to the words that both ways share (``_ROWS`` and so on), to the
    numbers of this way, and to rows that receive the masks that are found on the way back. The numbers are, in this order:

    - ``_NEW``, ``_OLD`` and ``_SEEN``: the addresses of these three kinds of rows, since compiled code can't take a pointer's address,
    - ``_LEADER``: the address of a mask that the first thread takes last, or 0 for none,
    - ``_LEADER_GRANTED``: the address where it notes which mask it was granted,
    - ``_BACK``: 1 on the way back and 0 on the way there,
    - ``_OWN``: the address of these arguments, which the parallel region passes on.
    """
    from numba import cfunc, njit, types

    words = types.CPointer(types.int64)
    libc, library, own_id = ctypes.CDLL(None), openmp.require().library, openmp.own_id()
    number, size = openmp.int_function("omp_get_thread_num"), openmp.int_function("omp_get_num_threads")
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

    @njit(error_model="numpy")
    def differ(masks: Any, row: Any, others: Any, other: Any) -> Any:
        differing = 0
        for word in range(CPU_WORDS):
            differing |= masks[row + word] ^ others[other + word]
        return differing != 0

    @njit(error_model="numpy")
    def exchange(arguments: Any, wanted: Any) -> None:
        new, old, shared, numbers = arguments[0], arguments[1], arguments[2], arguments[3]
        there, place = numbers[_BACK] == 0, number()
        row = place * ROW
        # The thread's own row tells, since in a step over several nodes one thread may be on its way back before another comes.
        born_inside = not there and (place >= shared[_ROWS] or old[row + TID] == 0)
        if place >= shared[_ROWS] and not born_inside:
            return
        if born_inside:
            row = 0
        taken = wanted * ROW if there else row
        new_address, old_address = numbers[_NEW] + 8 * taken, numbers[_OLD] + 8 * row
        if place == 0:
            shared[_TAKEN] = there
            if there:
                shared[_SIZE] = size()
        # A mask that is there already is not set again: threads that set theirs at once wait for each other in the kernel.
        differs = born_inside
        if there:
            get_mask(0, cpu_bytes, old_address)
            differs = differ(old, row, new, taken)
            old[row + TID] = own_id()
            old[row + MODE] = KEEP
        elif not born_inside:
            get_mask(0, cpu_bytes, numbers[_SEEN] + 8 * row)
            differs = differ(arguments[4], row, new, row)
            old[row + TID] = 0
        if differs and set_mask(0, cpu_bytes, new_address) != 0 and there:
            shared[_NO_MASK] = 1
        if place == 0 and numbers[_LEADER] != 0:
            if set_mask(0, cpu_bytes, numbers[_LEADER]) != 0:
                shared[_NO_MASK] = 1
            get_mask(0, cpu_bytes, numbers[_LEADER_GRANTED])
        if new[taken + MODE] != KEEP:
            if there:
                old[row + MODE] = 0  # the kernel writes the lower half
                if get_policy(old_address + 8 * MODE, old_address + 8 * NODES, max_nodes, 0, 0) != 0:
                    old[row + MODE] = KEEP
                    shared[_NO_POLICY] = 1
                    return
            if set_policy(new[taken + MODE], new_address + 8 * NODES, max_nodes) != 0 and there:
                shared[_NO_POLICY] = 1

    @cfunc(types.void(types.CPointer(words)), error_model="numpy")
    def body(arguments: Any) -> None:
        exchange(arguments, number())

    @cfunc(types.void(types.CPointer(words), types.int64), error_model="numpy")
    def take(arguments: Any, wanted: Any) -> None:
        exchange(arguments, wanted)

    run = body.address
    parallel = ctypes.CFUNCTYPE(None, address, address, ctypes.c_uint, ctypes.c_uint)(("GOMP_parallel", library))
    count, mkl_set_count = openmp.int_function("omp_get_max_threads"), openmp.mkl_set_threads()
    set_count = ctypes.CFUNCTYPE(None, integer)(("omp_set_num_threads", library))

    @cfunc(types.int64(types.CPointer(words)), error_model="numpy")
    def there(arguments: Any) -> Any:
        shared, rows = arguments[2], arguments[2][_ROWS]
        shared[_COUNT] = count()
        shared[_MKL_COUNT] = mkl_set_count(rows)
        set_count(rows)
        parallel(run, arguments[3][_OWN], rows, 0)
        return shared[_NO_MASK] | shared[_NO_POLICY]

    @cfunc(types.int64(types.CPointer(words)), error_model="numpy")
    def back(arguments: Any) -> Any:
        shared = arguments[2]
        if shared[_TAKEN] != 0:
            parallel(run, arguments[3][_OWN], max(count(), shared[_ROWS]), 0)
            set_count(shared[_COUNT])
            mkl_set_count(shared[_MKL_COUNT])
        return 0

    _keep_alive.extend((body, take, there, back))
    return take.address, there.address, back.address


@cache
@jit.needed()
def _look() -> Any:
    """Compile ``int64 look(int64 *arguments[4], int64 count)``, which tells what has become of the masks of `count` threads.

    It returns ``MOVED`` where a thread has another mask than it took, and ``ENDED`` where a thread is gone; both together where both
    happened, and 0 where neither did. The arguments are pointers: to the rows that hold the threads' ids, to the rows with the masks that
    they took, to room for a mask, and to the arguments themselves.
    """
    from numba import cfunc, types

    libc, address, integer = ctypes.CDLL(None), ctypes.c_size_t, ctypes.c_int
    get_mask = ctypes.CFUNCTYPE(integer, integer, address, address)(("sched_getaffinity", libc))

    @cfunc(types.int64(types.CPointer(types.CPointer(types.int64)), types.int64), error_model="numpy")
    def look(arguments: Any, count: Any) -> Any:
        rows, given, now = arguments[0], arguments[1], arguments[2]
        now_address, changes = arguments[3][2], 0
        for thread in range(count):
            if get_mask(rows[thread * ROW + TID], 8 * CPU_WORDS, now_address) != 0:
                changes |= ENDED
            else:
                differing = 0
                for word in range(CPU_WORDS):
                    differing |= now[word] ^ given[thread * ROW + word]
                if differing != 0:
                    changes |= MOVED
        return changes

    _keep_alive.append(look)
    return ctypes.CFUNCTYPE(ctypes.c_int64, address, ctypes.c_int64)(look.address)


_keep_alive: list[Any] = []  # compiled functions whose addresses are in use


class Exchange:
    """An exchange there and back: its memory is set up once, and used again and again.

    Beside an attention call the caches are cold, and each line of Python then costs microseconds: entering and leaving
    took 106 us around torch's own call, and 47 us with everything prepared here.

    Parameters
    ----------
    new
        ``[threads, ROW]``: what each thread takes.
    leader_cpus
        What the first thread may use once it is on the CPUs of its row; those of its row alone where it is empty.
    """

    def __init__(self, new: Rows, leader_cpus: Collection[int] = ()) -> None:
        self.old = np.zeros_like(new)
        self.given = new.copy()  # where the first row's mask is what was granted of leader_cpus
        self._new, self._seen = new, np.zeros_like(new)  # keep alive what is pointed to
        self._shared = (ctypes.c_int64 * _SHARED)()
        self._shared[_ROWS] = len(new)
        self._there, self._back = (np.zeros(_ARGUMENTS + _NUMBERS, np.int64) for _ in range(2))
        self.there_address = self._arguments(self._there, new, self.old, back=0)
        self.back_address = self._arguments(self._back, self.old, self.old, back=1)
        self._leader = np.zeros((2, CPU_WORDS), np.int64)
        if leader_cpus:
            set_bits(self._leader[0], leader_cpus)
            numbers = self._there[_ARGUMENTS:]
            numbers[_LEADER], numbers[_LEADER_GRANTED] = self._leader[0].ctypes.data, self.given.ctypes.data
        self._look, self._look_arguments = _look(), np.zeros(4, np.int64)
        self._look_address = self._look_arguments.ctypes.data
        now = self._leader[1].ctypes.data
        self._look_arguments[:] = self.old.ctypes.data, self.given.ctypes.data, now, self._look_address
        self.function, there, back = _exchange()
        self._go_there, self._go_back = _Go(there), _Go(back)

    def _arguments(self, words: Rows, new: Rows, old: Rows, *, back: int) -> int:
        """Lay the arguments of ``_exchange`` out for one way; return their address."""
        own, rows = words.ctypes.data, (new.ctypes.data, old.ctypes.data)
        words[:_ARGUMENTS] = *rows, ctypes.addressof(self._shared), own + 8 * _ARGUMENTS, self._seen.ctypes.data
        words[_ARGUMENTS:] = *rows, self._seen.ctypes.data, 0, 0, back, own
        return int(own)

    @property
    def granted(self) -> int:
        """How many threads took rows: fewer than there are where OpenMP gave fewer."""
        return min(self._shared[_ROWS], self._shared[_SIZE])

    def there(self) -> int:
        """Take the new rows, and compute with as many threads; return which calls failed, as ``failures``."""
        torch.get_num_threads()  # the first time in a thread it sets the count
        return self.failures() if self._go_there(self.there_address) else 0

    def failures(self) -> int:
        """Return which calls failed since this was asked last: ``MASK_FAILED``, ``POLICY_FAILED``, both together, or 0."""
        failed = MASK_FAILED * self._shared[_NO_MASK] + POLICY_FAILED * self._shared[_NO_POLICY]
        self._shared[_NO_MASK] = self._shared[_NO_POLICY] = 0
        return failed

    def back(self) -> None:
        """Take the old rows and counts again, if the new ones were taken; a second call does nothing."""
        self._go_back(self.back_address)

    def continue_from(self, earlier: Exchange) -> None:
        """Let ``back`` lead to where the threads were before an earlier exchange, which was in force when this one came."""
        masks_and_policies, threads = slice(TID), min(earlier.granted, len(self.old))
        self.old[:, masks_and_policies] = earlier.old[0, masks_and_policies]
        self.old[:threads, masks_and_policies] = earlier.old[:threads, masks_and_policies]
        for count in (_COUNT, _MKL_COUNT):
            self._shared[count] = earlier._shared[count]

    def cpus_before(self) -> frozenset[int]:
        """Return what the calling thread could use before."""
        return frozenset(bits(self.old[0, :CPU_WORDS]))

    def look(self) -> int:
        """Return what has become of the masks that were taken: ``MOVED`` and ``ENDED`` for any of the threads, 0 for no change."""
        return int(self._look(self._look_address, self.granted))

    def thread_ids(self) -> list[int]:
        """Return the kernel's ids of the threads that took their rows."""
        return [int(tid) for tid in self.old[: self.granted, TID]]


def set_bits(words: Rows, numbers: Collection[int]) -> None:
    """Set the bits with these numbers."""
    for bit in numbers:
        words.view(np.uint64)[bit // 64] |= np.uint64(1 << bit % 64)


def bits(words: Rows) -> set[int]:
    """The numbers of the bits that are set."""
    return {int(bit) for bit in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))}
