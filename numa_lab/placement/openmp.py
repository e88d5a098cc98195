"""torch's own OpenMP team: see its threads, run a function on them, set how many there are.

torch computes on one team of threads per calling Python thread. They keep the mask that they were born with, so binding
the Python thread alone leaves the computing threads where they were. ``GOMP_parallel`` of the very library that torch
loaded reaches that same team (seen with libgomp; LLVM's libomp and Intel's libiomp5 export the same entry). A second
OpenMP runtime on the same cores would cost up to half of the speed.

Limits: Linux, and a torch built with OpenMP. Where its library can't be found, ``runtime()`` is None.
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
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

from numa_lab.errors import NumaLabError

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
        """Its name and file, for receipts."""
        return f"{self.name} ({Path(self.path).name})"


class TeamThread(NamedTuple):
    """One thread of the calling thread's team: its kernel thread id and the CPUs that it may use."""

    tid: int
    cpus: frozenset[int]


@cache
def runtime() -> Runtime | None:
    """torch's OpenMP library, or None where it can't be found.

    A process may hold several such libraries. torch's is the one whose entry the loader finds for it: among what is global,
    where a preloaded library comes first (Intel's and LLVM's serve programs built for libgomp so), then among the
    dependencies of torch's own extension module.
    """
    torch_entry = _entry(None) or _entry(torch._C.__file__)
    for found in threadpoolctl.threadpool_info():
        if found["user_api"] == "openmp" and torch_entry and _entry(found["filepath"]) == torch_entry:
            library = ctypes.CDLL(found["filepath"])
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return Runtime(found["prefix"], found["filepath"], library)
    return None


def require() -> Runtime:
    """torch's OpenMP library.

    Raises
    ------
    NumaLabError
        It was not found, so nothing can run on its threads.
    """
    found = runtime()
    if found is None:
        raise NumaLabError(
            "torch's OpenMP library was not found, so nothing can run on its threads: expected a torch built with "
            "OpenMP (torch.__config__.parallel_info() tells)"
        )
    return found


def _entry(path: str | None) -> int | None:
    """Address of GOMP_parallel as the library at `path`, or one that it depends on, has it; None: what is global."""
    function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
    return address_of(function) if function else None


def address_of(function: Any) -> int:
    """Address of a function that ctypes has found, or has made of Python's."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def run_on_team(function: int, data: int, threads: int) -> None:
    """Run the compiled ``void function(void *data)`` once on each of `threads` threads of the calling thread's team.

    Parameters
    ----------
    function, data
        Addresses. The function learns its place from ``omp_get_thread_num`` of ``runtime().library``.

    Raises
    ------
    NumaLabError
        torch's OpenMP library was not found.
    """
    require().library.GOMP_parallel(function, data, threads, 0)


def run_on_each(function: Callable[[int], T], threads: int) -> list[T]:
    """Call a Python function once on each thread of the team, with the thread's number; results in that order.

    The threads take the interpreter lock one after the other, and the calling one comes last: for setting threads up, not for computing.

    Raises
    ------
    BaseException
        The calling thread's, or the first of the others', of whatever kind, after all have ended.
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
def _on_workers() -> int:
    """Address of ``void on_workers(void call(int))``, which calls it on each thread of a team but the calling one.

    On that one a signal's handler may raise where a callback begins, before any ``try``, and the exception would be lost. Handlers
    run in the main thread, which is a worker of nobody.
    """
    number = int_function("omp_get_thread_num")

    @cfunc(types.void(types.int64), error_model="numpy")
    def on_workers(call: Any) -> None:
        if number() > 0:
            _call_with_int(call, number())

    _keep_alive.append(on_workers)
    return int(on_workers.address)


@intrinsic
def _call_with_int(_context: Any, _function: Any, _argument: Any) -> Any:
    """Call the ``void function(int)`` at an address."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
        b.call(b.inttoptr(a[0], function.as_pointer()), a[1:])

    return types.void(types.int64, types.int32), emit


def team(threads: int | None = None) -> list[TeamThread]:
    """The ``torch.get_num_threads()`` threads on which torch computes for the calling thread, itself first."""
    ids = (ctypes.c_int64 * (threads or torch.get_num_threads()))()
    run_on_team(_note_id(), ctypes.addressof(ids), len(ids))
    return [TeamThread(tid, frozenset(os.sched_getaffinity(tid))) for tid in ids if tid]  # OpenMP may give fewer


@cache
def _note_id() -> int:
    """Address of ``void note_id(int64_t ids[])``, with which each thread of a team notes its id at its place."""
    number, own = int_function("omp_get_thread_num"), own_id()

    @cfunc(types.void(types.CPointer(types.int64)), error_model="numpy")
    def note_id(ids: Any) -> None:
        ids[number()] = own()

    _keep_alive.append(note_id)
    return int(note_id.address)


@cache
def own_id() -> Any:
    """A function for compiled code that tells the calling thread's id as the kernel knows it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gettid"):
        return ctypes.CFUNCTYPE(ctypes.c_int)(("gettid", libc))
    call = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long)(("syscall", libc))
    which = _GETTID[platform.machine()]

    @njit(error_model="numpy")
    def own_id() -> Any:
        return call(which)

    return own_id


def int_function(name: str) -> Any:
    """An ``int function(void)`` of torch's OpenMP library, for compiled code."""
    return ctypes.CFUNCTYPE(ctypes.c_int)((name, require().library))


_GETTID = {"x86_64": 186, "aarch64": 178}  # asm/unistd_64.h, asm-generic/unistd.h: glibc has had gettid since 2.30
_keep_alive: list[Any] = []  # compiled functions whose addresses are in use


def threads() -> int:
    """How many threads torch computes with for the calling thread."""
    return torch.get_num_threads()


def set_threads(count: int) -> int:
    """Compute with so many threads for the calling thread; the count before.

    ``torch.set_num_threads`` also sets the default of threads that are started later, so that two threads which each set
    and give back a count would leave the other's behind. OpenMP and MKL are therefore told directly.
    """
    before = torch.get_num_threads()
    if before == count:
        return before
    found = runtime()
    if found is None:
        torch.set_num_threads(count)
        return before
    mkl_set_threads()(count)  # first, as it is by OpenMP's that a count which is half set is noticed
    found.library.omp_set_num_threads(count)
    return before


@cache
def mkl_set_threads() -> Callable[[int], int]:
    """Set MKL's own thread count for the calling thread; what it was. Where torch has no MKL the function does nothing."""
    name, library = "MKL_Set_Num_Threads_Local", ctypes.CDLL(torch._C.__file__)
    found = (name, library) if hasattr(library, name) else ("abs", ctypes.CDLL(None))
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(found)


def _end_team() -> None:
    """End the forking thread's team; its next parallel region starts a new one."""
    found = runtime()
    if found is not None and hasattr(found.library, "omp_pause_resource_all"):
        found.library.omp_pause_resource_all(_PAUSE_HARD)


_PAUSE_HARD = 2  # omp_pause_hard
# A fork copies the calling thread alone. libgomp does not know, and the child's first parallel region would wait for
# ever for workers that only the parent has.
os.register_at_fork(before=_end_team)
