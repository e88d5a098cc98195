"""What the threads of this process have now: CPUs and memory policies of all of them, and with how many threads it computes."""

import ctypes
import os
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import torch

from numa_lab.placement import openmp

PATIENCE_SECONDS = 5.0  # for threads that were told to end


class State(NamedTuple):
    """Threads that are alike are counted: OpenMP may replace one by another, which is no loss."""

    threads: Counter[tuple[str, str, str]]  # main or other, CPUs, memory policy
    counts: dict[str, int]  # who computes with how many

    def differences(self, before: "State") -> dict[str, str]:
        """What differs, in words, by what a table counts it as: threads or states."""
        found = {}
        if (now := self.threads.total()) != (then := before.threads.total()):
            found["threads"] = f"{now} threads, {then} before"
        elif self.threads != before.threads:
            gone, new = before.threads - self.threads, self.threads - before.threads
            found["states"] = f"{_listed(new)} instead of {_listed(gone)}"
        if other := {name: count for name, count in self.counts.items() if count != before.counts[name]}:
            found["states"] = f"{found.get('states', '')} counts of threads {other} instead of {before.counts}".strip()
        return found


def _listed(threads: Counter[tuple[str, str, str]]) -> str:
    return "; ".join(f"{count} x {' '.join(thread)}" for thread, count in sorted(threads.items()))


def now() -> State:
    """As the kernel, OpenMP and MKL tell it."""
    threads: Counter[tuple[str, str, str]] = Counter()
    for tid in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
            cpus = ",".join(map(str, sorted(os.sched_getaffinity(tid))))
            threads["main" if tid == os.getpid() else "other", f"on CPUs {cpus}", policy(tid)] += 1
    return State(threads, _counts())


def settled(before: State) -> State:
    """The same, when there are as many threads as before, or those that end have had time for it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (found := now()).threads.total() != before.threads.total() and time.monotonic() < end:
        time.sleep(0.001)
    return found


def policy(tid: int) -> str:
    """The memory policy of any thread: the kernel shows it beside the first mapping that has none of its own (numa(7)).

    Raises
    ------
    ProcessLookupError
        The thread ends just now.
    """
    if not os.path.exists("/proc/self/numa_maps"):  # a kernel without NUMA
        return ""
    descriptor = os.open(f"/proc/self/task/{tid}/numa_maps", os.O_RDONLY)
    try:
        words = os.read(descriptor, 128).split()  # of the program's own text, the lowest of all mappings
    finally:
        os.close(descriptor)
    if not words:
        raise ProcessLookupError(f"thread {tid}")
    return words[1].decode()


def _counts() -> dict[str, int]:
    found = {"torch": torch.get_num_threads()}
    if runtime := openmp.runtime():
        found["OpenMP"] = runtime.library.omp_get_max_threads()
    if mkl := getattr(ctypes.CDLL(torch._C.__file__), "MKL_Get_Max_Threads", None):
        found["MKL"] = mkl()
    new = threading.Thread(target=lambda: found.update({"torch in a new thread": torch.get_num_threads()}))
    new.start()
    new.join()
    return found
