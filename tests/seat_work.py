"""A job that notes where each seat computed it: what the tests of seats, here and in guests, hand to them."""

import ctypes

import numpy as np
from numba import cfunc, types

from numa_lab.attention.kernel_plan import KernelArguments
from numa_lab.attention.openmp_regions import SHARE
from numa_lab.attention.tiles import fetch_add, load_word, store_word
from numa_lab.machine import libnuma

LIBC = ctypes.CDLL(None)
getcpu = ctypes.CFUNCTYPE(ctypes.c_int)(("sched_getcpu", LIBC))
get_policy = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t, *[ctypes.c_size_t] * 3, ctypes.c_int)(
    ("get_mempolicy", libnuma.library())
)


@cfunc(types.void(types.int64, types.int64, types.int64))
def note(arguments, number, threads):
    """Write down for each seat that computed: how many share the job, the CPU, the mode of the policy."""
    row = load_word(arguments) + 32 * number
    store_word(row, threads)
    store_word(row + 8, getcpu())
    get_policy(row + 16, 0, 0, 0, 0)
    fetch_add(row + 24)


@cfunc(types.void(types.int64))
def count_up(address):
    fetch_add(address)


class Work:
    """One job for each place, each with a row for every seat, and a merge that counts."""

    def __init__(self, places):
        self.rows = [np.full((len(place.cpus), 4), 0, np.int64) for place in places]
        self.jobs, self.merges = [KernelArguments() for _ in places], ctypes.c_int64()
        for job, rows in zip(self.jobs, self.rows, strict=True):
            job.fields[0], job.fields[SHARE // 8] = rows.ctypes.data, note.address
        self._own = [(ctypes.c_int64 * 1)(job.address) for job in self.jobs]
        table = [word for own in self._own for word in (ctypes.addressof(own), 1)]
        self._table = (ctypes.c_int64 * len(table))(*table)
        self.arguments = ctypes.addressof(self._table), count_up.address, ctypes.addressof(self.merges)
