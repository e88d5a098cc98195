"""Hand compiled work to the leader of a team and hear when it is done, without the interpreter on its side.

Threads of a process share the interpreter lock, so leaders that take work from a Python queue and put results back wait for each
other, the longer the more there are. A leader that serves here sleeps in compiled code, until an eventfd wakes it; it runs
functions on its team and counts them done on another eventfd. What it can't do is Python: for that it leaves.

Limits: Linux. The code is compiled in each process, which takes half a second once.
"""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from numa_lab import descriptors, openmp, simd

Job = tuple[int, int, int]  # what openmp.run_on_team takes: function, data, threads
Look = tuple[int, int, int]  # a compiled int64 function(int64, int64), and what it takes

LINGER_MS = 20  # a leader that hears nothing for so long leaves; a process that ends waits so long for it
TURNS = 1000  # after so many a leader looks about: whether the process ends, for example
_WAKE, _DONE, _POSTED, _SERVED, _LEAVE, _JOBS, _COUNT, _LINGER, _HEARD, _ONE, _POLLED, _ADDRESS = range(12)
_WORD = 8
_POLLIN = 1


class Desk:
    """Where a leader serves. All but ``serve`` is called by others, one at a time."""

    def __init__(self) -> None:
        with descriptors.told("a team's desk"):
            wake = os.eventfd(0)
        weakref.finalize(self, os.close, wake)
        self._words = (ctypes.c_int64 * 12)()
        address = ctypes.addressof(self._words)
        (polled,) = struct.unpack("q", struct.pack("ihh", wake, _POLLIN, 0))
        self._words[_WAKE], self._words[_LINGER], self._words[_ONE] = wake, LINGER_MS, 1
        self._words[_POLLED], self._words[_ADDRESS] = polled, address
        self._wake, self._function = wake, _serve()

    def serve(self) -> None:
        """Do what is posted, until ``leave`` asks for an end, nothing has come for a while, or much has been done.

        Called by the leader.
        """
        self._function(self._words[_ADDRESS])

    def lay_out(self, jobs: Sequence[Job], done: int) -> int:
        """Put down what the leader is to run, one after the other, before it counts one on the eventfd `done`; for ``run``."""
        self._jobs = (ctypes.c_int64 * (3 * len(jobs)))(*(word for job in jobs for word in job))
        words = self._words
        words[_JOBS], words[_COUNT], words[_DONE] = ctypes.addressof(self._jobs), len(jobs), done
        return words[_ADDRESS]

    def leave(self) -> None:
        """Ask the leader to leave; it does what was posted first."""
        self._words[_LEAVE] = 1
        os.eventfd_write(self._wake, 1)

    def idle(self) -> bool:
        """Forget that the leader was asked to leave, which it did; whether nothing was posted meanwhile."""
        self._words[_LEAVE] = 0
        return self._words[_POSTED] == self._words[_SERVED]


def run(desks: Sequence[int], done: int, looks: Sequence[Look] = ()) -> list[int]:
    """Let leaders run what was laid out on their desks (``Desk.lay_out``), and wait until all have counted on `done`.

    While they do, the calling thread runs `looks` itself; what these return is returned.

    In one compiled call, in which no signal's handler can run: whatever a handler raises is raised after it, when no leader
    writes into the caller's memory any more.
    """
    table = (ctypes.c_int64 * (2 + len(desks) + 3 * len(looks)))(0, 0, *desks, *chain.from_iterable(looks))
    _run()(ctypes.addressof(table), len(desks), len(looks), done)
    return table[2 + len(desks) :: 3]


@cache
def _run() -> Any:
    """The compiled ``void run(int64_t table[], int64_t desks, int64_t looks, int64_t done)``; the first of the table is its own."""
    libc, address, integer, long = ctypes.CDLL(None), ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
    read, write = (ctypes.CFUNCTYPE(long, integer, address, address)((name, libc)) for name in ("read", "write"))

    @cfunc(types.void(types.int64, types.int64, types.int64, types.int64), error_model="numpy")
    def run(table: Any, desks: Any, looks: Any, done: Any) -> None:
        for desk in range(desks):
            words = _word(table + (2 + desk) * _WORD)
            _count_up(words + _POSTED * _WORD)
            write(_word(words + _WAKE * _WORD), words + _ONE * _WORD, _WORD)
        for look in range(looks):
            at = table + (2 + desks + 3 * look) * _WORD
            _put(at, _called(_word(at), _word(at + _WORD), _word(at + 2 * _WORD)))
        heard = 0
        while heard < desks:
            if read(done, table, _WORD) == _WORD:  # else a signal came
                heard += _word(table)

    _keep_alive.append(run)
    return ctypes.CFUNCTYPE(None, address, long, long, long)(run.address)


@cache
def _serve() -> Any:
    """The compiled ``void serve(int64_t words[])``.

    The kernel's own locking of an eventfd orders memory: what was written before a write to it is seen after the read. A leader
    that another write woke sees what is posted by its count.
    """
    libc, address, integer, long = ctypes.CDLL(None), ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
    poll = ctypes.CFUNCTYPE(integer, address, address, integer)(("poll", libc))
    read, write = (ctypes.CFUNCTYPE(long, integer, address, address)((name, libc)) for name in ("read", "write"))
    parallel = ctypes.CFUNCTYPE(None, address, address, ctypes.c_uint, ctypes.c_uint)(
        ("GOMP_parallel", openmp.require().library)
    )

    @cfunc(types.void(types.CPointer(types.int64)), error_model="numpy")
    def serve(words: Any) -> None:
        own = words[_ADDRESS]
        for _ in range(TURNS):
            if poll(own + _WORD * _POLLED, 1, words[_LINGER]) <= 0:  # nothing came, or a signal
                return
            if read(words[_WAKE], own + _WORD * _HEARD, _WORD) != _WORD:
                return
            if _counted(own + _WORD * _POSTED) != words[_SERVED]:
                for job in range(words[_COUNT]):
                    at = words[_JOBS] + 3 * _WORD * job
                    parallel(_word(at), _word(at + _WORD), _word(at + 2 * _WORD), 0)
                words[_SERVED] += 1
                write(words[_DONE], own + _WORD * _ONE, _WORD)
            if words[_LEAVE]:
                return

    _keep_alive.append(serve)
    return ctypes.CFUNCTYPE(None, address)(serve.address)


@intrinsic
def _word(_context: Any, _address: Any) -> Any:
    """The int64 at an address."""
    return types.int64(types.int64), lambda _c, b, _s, a: b.load(simd.at(b, a[0]), typ=simd.I64)


@intrinsic
def _put(_context: Any, _address: Any, _value: Any) -> Any:
    """Write an int64 to an address."""
    return types.void(types.int64, types.int64), lambda _c, b, _s, a: b.store(
        a[1], b.inttoptr(a[0], simd.I64.as_pointer())
    )


@intrinsic
def _called(_context: Any, _function: Any, _first: Any, _second: Any) -> Any:
    """What the ``int64 function(int64, int64)`` at an address returns."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        function = ir.FunctionType(simd.I64, [simd.I64, simd.I64])
        return b.call(b.inttoptr(a[0], function.as_pointer()), a[1:])

    return types.int64(types.int64, types.int64, types.int64), emit


@intrinsic
def _count_up(_context: Any, _address: Any) -> Any:
    """``simd.count_up``."""
    return types.int64(types.int64), lambda _c, b, _s, a: simd.count_up(b, a[0])


@intrinsic
def _counted(_context: Any, _address: Any) -> Any:
    """The int64 at an address, before whatever is read after it: what was written before it was counted up is seen."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        pointer = b.inttoptr(a[0], simd.I64.as_pointer())
        return b.load_atomic(pointer, "acquire", _WORD)

    return types.int64(types.int64), emit


_keep_alive: list[Any] = []  # compiled functions whose addresses are in use
