"""torch's own OpenMP team: see its threads, pin them, run a compiled function on them.

torch computes on one team of threads per calling Python thread. They keep the mask that they were born with, so binding
the Python thread alone leaves the computing threads where they were. ``GOMP_parallel`` of the very library that torch
loaded reaches that same team (seen with libgomp; LLVM's libomp and Intel's libiomp5 export the same entry). A second
OpenMP runtime on the same cores would cost up to half of the speed.

Limits: Linux, and a torch built with OpenMP. Where its library can't be found, ``runtime()`` is None, ``pinned_team``
binds the calling thread alone and says so in a warning.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

    A process may hold several such libraries. torch's is the one whose entry a look-up through torch's own extension
    module and its dependencies finds.
    """
    torch_entry = _entry(torch._C.__file__)
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


def _entry(path: str) -> int | None:
    """Address of GOMP_parallel as the library at `path`, or one that it depends on, has it."""
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


@contextmanager
def pinned_team(cpus: Sequence[int]) -> Iterator[list[TeamThread]]:
    """Compute with one thread on each of `cpus`, in that order; masks and thread count come back on exit.

    Yields the team as it is pinned. It is the calling thread's team alone; torch's other threads are not touched.
    """
    threads_before = torch.get_num_threads()
    own_mask = os.sched_getaffinity(0)
    torch.set_num_threads(len(cpus))
    if runtime() is None:
        warnings.warn(
            "torch's OpenMP library was not found: only the calling thread is bound, and threads that torch starts "
            "from now on; those that exist keep their CPUs",
            stacklevel=3,
        )
        before = []
    else:
        before = team(len(cpus))  # makes the team grow while its leader may still use all CPUs: threads inherit masks

    def pin(number: int) -> None:
        os.sched_setaffinity(0, {cpus[number]})

    try:
        if before:
            run_on_each(pin, len(cpus))
            yield team(len(cpus))
        else:
            os.sched_setaffinity(0, set(cpus))
            yield []
    finally:
        for thread in before:
            if os.path.exists(f"/proc/self/task/{thread.tid}"):  # a team that was made smaller has ended its last ones
                os.sched_setaffinity(thread.tid, thread.cpus)
        os.sched_setaffinity(0, own_mask)
        torch.set_num_threads(threads_before)
