"""Looks at pages and threads with nothing of numa_lab: what its answers are held against."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import re
import select
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAGE = mmap.PAGESIZE
MILLISECOND = 1_000_000
_MOVE_PAGES = {"x86_64": 279, "aarch64": 239}[platform.machine()]  # asm/unistd_64.h, asm-generic/unistd.h
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
    """Watches from another process where this one's threads run: ``ran`` maps a thread's id to the CPUs it was seen on.

    A thread counts where it has run a millisecond meanwhile; ``masks`` gives the mask of each.
    """

    def __enter__(self) -> Threads:
        words = [sys.executable, "-S", __file__, str(os.getpid())]
        self._watch = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._watch.stdout is not None
        self._watch.stdout.readline()
        return self

    def __exit__(self, *_error: object) -> None:
        seen = json.loads(self._watch.communicate()[0])
        self.ran = {int(tid): set(cpus) for tid, cpus in seen.items()}
        self.masks = {tid: os.sched_getaffinity(tid) for tid in self.ran}


def _watch(pid: int) -> None:
    """Sample the threads of a process until standard input ends, then print where those ran that used CPU time."""
    start = {tid: _look(pid, tid)[0] for tid in _ids(pid)}
    seen: dict[int, set[int]] = {}
    print("watching", flush=True)
    while not select.select([sys.stdin], [], [], 0.005)[0]:
        for tid in _ids(pid):
            ran, cpu = _look(pid, tid)
            if ran > start.get(tid, 0) + MILLISECOND:
                seen.setdefault(tid, set()).add(cpu)
    print(json.dumps({tid: sorted(cpus) for tid, cpus in seen.items()}))


def _ids(pid: int) -> list[int]:
    return [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]


def _look(pid: int, tid: int) -> tuple[int, int]:
    """Nanoseconds that a thread has run (schedstat), and the CPU that it was last on (field 39 of proc(5)'s stat)."""
    try:
        with open(f"/proc/{pid}/task/{tid}/schedstat") as schedstat, open(f"/proc/{pid}/task/{tid}/stat") as stat:
            return int(schedstat.read().split()[0]), int(stat.read().rpartition(")")[2].split()[36])
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0, -1


if __name__ == "__main__":
    _watch(int(sys.argv[1]))
