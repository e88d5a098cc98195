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
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import threadpoolctl
import torch

from numa_lab.errors import NumaLabError

T = TypeVar("T")

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


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


@dataclass(frozen=True)
class TeamThread:
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
    return ctypes.cast(function, ctypes.c_void_p).value if function else None


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

    The threads take the interpreter lock one after the other: for setting threads up, not for computing.

    Raises
    ------
    Exception
        The first exception of a thread, after all have ended.
    """
    library = require().library
    results: dict[int, T] = {}
    errors: list[Exception] = []

    def body(_data: int | None) -> None:
        number = library.omp_get_thread_num()
        try:
            results[number] = function(number)
        except Exception as error:
            errors.append(error)  # nothing may pass through the C frames of the OpenMP library

    callback = _Body(body)
    run_on_team(ctypes.cast(callback, ctypes.c_void_p).value or 0, 0, threads)
    if errors:
        raise errors[0]
    return [results[number] for number in sorted(results)]


def team(threads: int | None = None) -> list[TeamThread]:
    """The ``torch.get_num_threads()`` threads on which torch computes for the calling thread, itself first."""

    def look(_number: int) -> TeamThread:
        return TeamThread(threading.get_native_id(), frozenset(os.sched_getaffinity(0)))

    return run_on_each(look, threads or torch.get_num_threads())


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
    found.library.omp_set_num_threads(count)
    if mkl := _mkl_set_threads():
        mkl(count)
    return before


@cache
def _mkl_set_threads() -> Callable[[int], int] | None:
    """MKL's own thread count for the calling thread, None where torch has no MKL."""
    function = getattr(ctypes.CDLL(torch._C.__file__), "MKL_Set_Num_Threads_Local", None)
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
    return function


def _end_team() -> None:
    """End the forking thread's team; its next parallel region starts a new one."""
    found = runtime()
    if found is not None and hasattr(found.library, "omp_pause_resource_all"):
        found.library.omp_pause_resource_all(_PAUSE_HARD)


_PAUSE_HARD = 2  # omp_pause_hard
# A fork copies the calling thread alone. libgomp does not know, and the child's first parallel region would wait for
# ever for workers that only the parent has.
os.register_at_fork(before=_end_team)
