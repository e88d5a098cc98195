"""torch's own OpenMP team: functions that show its threads, run a function on them, and set how many there are.

torch computes on one team of threads per calling Python thread. They keep the mask that they were born with, so binding
the Python thread alone leaves the computing threads where they were. ``GOMP_parallel`` of the library that torch has
loaded reaches that same team (this was seen with libgomp; LLVM's libomp and Intel's libiomp5 export the same function). A second
OpenMP runtime on the same cores would cost up to half of the speed.

Limits: this needs Linux, and a torch that was built with OpenMP. Where its library can't be found, ``runtime()`` is None.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import threadpoolctl
import torch

from numa_lab.errors import NumaLabError
from numa_lab.placement import jit

T = TypeVar("T")

_Call = ctypes.CFUNCTYPE(None, ctypes.c_int)


@dataclass(frozen=True)
class Runtime:
    """The OpenMP library that torch runs on."""

    name: str  # libgomp, libomp or libiomp
    path: str
    library: ctypes.CDLL

    @property
    def description(self) -> str:
        """The library's name and file, for receipts."""
        return f"{self.name} ({Path(self.path).name})"


class TeamThread(NamedTuple):
    """One thread of the calling thread's team: its kernel thread id and the CPUs that it may use."""

    tid: int
    cpus: frozenset[int]


@cache
def runtime() -> Runtime | None:
    """Return torch's OpenMP library, or None where it can't be found.

    A process may hold several such libraries. torch's is the one whose ``GOMP_parallel`` the loader finds for it: first among the
    global symbols, where a preloaded library comes first (Intel's and LLVM's serve programs that were built for libgomp so), then
    among the dependencies of torch's own extension module.
    """
    torch_entry = _entry(None) or _entry(torch._C.__file__)
    for loaded in threadpoolctl.threadpool_info():
        if loaded["user_api"] == "openmp" and torch_entry and _entry(loaded["filepath"]) == torch_entry:
            library = ctypes.CDLL(loaded["filepath"])
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return Runtime(loaded["prefix"], loaded["filepath"], library)
    return None


def require() -> Runtime:
    """Return torch's OpenMP library.

    Raises
    ------
    NumaLabError
        It was not found, so nothing can run on its threads.
    """
    torch_runtime = runtime()
    if torch_runtime is None:
        raise NumaLabError(
            "torch's OpenMP library was not found, so nothing can run on its threads: expected a torch built with "
            "OpenMP (torch.__config__.parallel_info() tells)"
        )
    return torch_runtime


def _entry(path: str | None) -> int | None:
    """Return the address of ``GOMP_parallel`` in the library at `path` or in one that it depends on; with no path, the global one."""
    function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
    return address_of(function) if function else None


def address_of(function: Any) -> int:
    """Return the address of a function that ctypes has found, or that it has made of a Python function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def run_on_team(function: int, data: int, threads: int) -> None:
    """Run the compiled ``void function(void *data)`` once on each of `threads` threads of the calling thread's team.

    Parameters
    ----------
    function, data
        The addresses of the function and of what it gets. It learns its place in the team from ``omp_get_thread_num`` of
        ``runtime().library``.
    threads
        The size of the team; OpenMP may give fewer.

    Raises
    ------
    NumaLabError
        torch's OpenMP library was not found.
    """
    require().library.GOMP_parallel(function, data, threads, 0)


def run_on_each(function: Callable[[int], T], threads: int) -> list[T]:
    """Call a Python function once on each thread of the team, with the thread's number.

    The threads take the interpreter lock one after the other, and the calling one comes last: this is for setting threads up, and not
    for computing.

    Returns
    -------
    list
        What the function returns, in the order of the threads' numbers.

    Raises
    ------
    BaseException
        What the function raises on the calling thread, or else what it raises first on another one, after all have ended.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def on_worker(number: int) -> None:
        try:
            results[number] = function(number)
        except BaseException as error:
            errors.append(error)  # nothing may pass through the C frames of the OpenMP library

    callback = _Call(on_worker)
    run_on_team(_on_workers(), address_of(callback), threads)
    results[0] = function(0)
    if errors:
        raise errors[0]
    return [results[number] for number in sorted(results)]


@cache
@jit.needed()
def _on_workers() -> int:
    """Return the address of ``void on_workers(void call(int))``, which calls `call` on each thread of a team but the calling one.

    On the calling thread a signal's handler may raise where a callback begins, before any ``try``, and the exception would be lost.
    Handlers run in the main thread, which is no worker of any team.
    """
    from llvmlite import ir
    from numba import cfunc, types
    from numba.extending import intrinsic

    number = int_function("omp_get_thread_num")

    @intrinsic
    def call_with_int(_context: Any, _function: Any, _argument: Any) -> Any:
        """Let compiled code call the ``void function(int)`` at an address."""

        def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
            function = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            b.call(b.inttoptr(a[0], function.as_pointer()), a[1:])

        return types.void(types.int64, types.int32), emit

    @cfunc(types.void(types.int64), error_model="numpy")
    def on_workers(call: Any) -> None:
        if number() > 0:
            call_with_int(call, number())

    _keep_alive.append(on_workers)
    return int(on_workers.address)


def team(threads: int | None = None) -> list[TeamThread]:
    """Return the threads on which torch computes for the calling thread, itself first.

    They are ``torch.get_num_threads()``, or as many as `threads` says; OpenMP may give fewer.
    """
    ids = (ctypes.c_int64 * (threads or torch.get_num_threads()))()
    run_on_team(_note_id(), ctypes.addressof(ids), len(ids))
    return [TeamThread(tid, frozenset(os.sched_getaffinity(tid))) for tid in ids if tid]


@cache
@jit.needed()
def _note_id() -> int:
    """Return the address of ``void note_id(int64_t ids[])``, with which each thread of a team notes its id at its place."""
    from numba import cfunc, types

    number, own = int_function("omp_get_thread_num"), own_id()

    @cfunc(types.void(types.CPointer(types.int64)), error_model="numpy")
    def note_id(ids: Any) -> None:
        ids[number()] = own()

    _keep_alive.append(note_id)
    return int(note_id.address)


@cache
def own_id() -> Any:
    """Return a function for compiled code that tells the calling thread's id as the kernel knows it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gettid"):
        return ctypes.CFUNCTYPE(ctypes.c_int)(("gettid", libc))
    call = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long)(("syscall", libc))
    gettid = _GETTID[platform.machine()]
    with jit.needed():
        from numba import njit

    @njit(error_model="numpy")
    def own_id() -> Any:
        return call(gettid)

    return own_id


def int_function(name: str) -> Any:
    """Return the ``int function(void)`` of this name of torch's OpenMP library, for compiled code."""
    return ctypes.CFUNCTYPE(ctypes.c_int)((name, require().library))


_GETTID = {"x86_64": 186, "aarch64": 178}  # asm/unistd_64.h, asm-generic/unistd.h: glibc has had gettid since 2.30
_keep_alive: list[Any] = []  # compiled functions whose addresses are in use


def threads() -> int:
    """Return how many threads torch computes with for the calling thread."""
    return torch.get_num_threads()


def set_threads(count: int) -> int:
    """Compute with so many threads for the calling thread; return the count from before.

    ``torch.set_num_threads`` also sets the default of threads that are started later: of two threads which each set a count
    and give it back, one would leave the other's behind. Therefore OpenMP and MKL are told directly.
    """
    before = torch.get_num_threads()
    if before == count:
        return before
    torch_runtime = runtime()
    if torch_runtime is None:
        torch.set_num_threads(count)
        return before
    mkl_set_threads()(count)  # first, because a count that is half set is noticed by OpenMP's
    torch_runtime.library.omp_set_num_threads(count)
    return before


@cache
def mkl_set_threads() -> Callable[[int], int]:
    """Return a function that sets MKL's own thread count for the calling thread, and returns the count from before.

    Where torch has no MKL the function changes nothing.
    """
    name, library = "MKL_Set_Num_Threads_Local", ctypes.CDLL(torch._C.__file__)
    exported = (name, library) if hasattr(library, name) else ("abs", ctypes.CDLL(None))
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(exported)


def _end_team() -> None:
    """End the team of the thread that forks; its next parallel region starts a new one."""
    torch_runtime = runtime()
    if torch_runtime is not None and hasattr(torch_runtime.library, "omp_pause_resource_all"):
        torch_runtime.library.omp_pause_resource_all(_PAUSE_HARD)


_PAUSE_HARD = 2  # omp_pause_hard
# A fork copies the calling thread alone. libgomp does not know, and the child's first parallel region would wait for
# ever for workers that only the parent has.
os.register_at_fork(before=_end_team)
