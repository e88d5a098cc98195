"""Looks at pages and threads with nothing of numa_lab: what its answers are held against."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import threading
import time
from collections import Counter
from pathlib import Path

import torch

PAGE = mmap.PAGESIZE
_MOVE_PAGES = 279  # asm/unistd_64.h
_libc = ctypes.CDLL(None, use_errno=True)


def pages(tensor: torch.Tensor) -> Counter[int]:
    """Pages per node by ``move_pages``; -1 counts those that were never touched."""
    addresses = _page_addresses(tensor)
    pointers, status = (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_int * len(addresses))()
    if _libc.syscall(_MOVE_PAGES, 0, ctypes.c_ulong(len(addresses)), pointers, None, status, 0) != 0:
        raise OSError(ctypes.get_errno(), "move_pages")
    return Counter(max(node, -1) for node in status)


def pages_of_mapping(tensor: torch.Tensor) -> Counter[int]:
    """Pages per node of the mapping that holds the tensor's first byte, by ``/proc/self/numa_maps``."""
    held = None
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        if int(line.split()[0], 16) > tensor.data_ptr():
            break
        held = line
    assert held is not None
    return Counter({int(node): int(count) for node, count in re.findall(r" N(\d+)=(\d+)", held)})


def _page_addresses(tensor: torch.Tensor) -> list[int]:
    last = tensor.data_ptr() + (tensor.untyped_storage().nbytes() if not tensor.is_contiguous() else tensor.nbytes)
    return list(range(tensor.data_ptr() // PAGE * PAGE, last, PAGE))


class Threads:
    """Watches from a thread of its own where the others run: ``ran`` maps a thread's id to the CPUs it was seen on.

    A thread counts where it has used a clock tick of CPU time meanwhile.
    """

    def __enter__(self) -> Threads:
        self._start = {tid: _look(tid)[0] for tid in _ids()}
        self._seen: dict[int, set[int]] = {}
        self._end = threading.Event()
        self._watch = threading.Thread(target=self._run)
        self._watch.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._watch.join()
        used = {tid: _look(tid)[0] - self._start.get(tid, 0) for tid in _ids() if tid != self._watch.native_id}
        self.ran = {tid: self._seen[tid] for tid, ticks in used.items() if ticks > 0 and tid in self._seen}
        self.masks = {tid: os.sched_getaffinity(tid) for tid in self.ran}

    def _run(self) -> None:
        while not self._end.is_set():
            for tid in _ids():
                ticks, cpu, running = _look(tid)
                if running and ticks > self._start.get(tid, 0):
                    self._seen.setdefault(tid, set()).add(cpu)
            time.sleep(0.005)


def _ids() -> list[int]:
    return [int(tid) for tid in os.listdir("/proc/self/task")]


def _look(tid: int) -> tuple[int, int, bool]:
    """Clock ticks used, the CPU last used, and whether the thread is running: fields 14, 15, 39 and 3 of proc(5)'s stat."""
    try:
        fields = Path(f"/proc/self/task/{tid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, -1, False
    return int(fields[11]) + int(fields[12]), int(fields[36]), fields[0] == "R"
