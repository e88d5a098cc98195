"""Reads memory and times it: the bandwidth of a team over a tensor, and the latency of dependent loads.

The loops are compiled by Numba and run on torch's own OpenMP team, so that neither a C compiler nor a second OpenMP runtime is
needed. Limits: only reading is measured, with one thread per physical core, in plain streams and with the prefetches of the decode
kernel, so the figure is that of the best case. The latency is that of one dependent load at a time, and includes the translation of
its address.
"""

from __future__ import annotations

import ctypes
import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from numa_lab.attention import vectors
from numa_lab.attention.vectors import LINE_BYTES
from numa_lab.errors import InvalidInput
from numa_lab.placement import jit, openmp

LATENCY_LOADS = 200_000  # of one chase: about 20 ms
MIN_REPEATS = 3

_WORD_BYTES = 8
LINE_WORDS = LINE_BYTES // _WORD_BYTES


@cache
@jit.needed()
def _team_body() -> Any:
    """The function that each thread of the team runs: it adds up an even share of the lines.

    Its argument holds the addresses of the words, of a line for each thread's sum, and of the number of words. Each process
    compiles it once: Numba can't cache it on disk ("uses dynamic globals (such as ctypes pointers)").
    """
    from llvmlite import ir
    from numba import cfunc, types
    from numba.extending import intrinsic

    from numa_lab.attention import compiler, simd

    words_type = types.CPointer(types.int64)
    cpu_vectors = vectors.host()
    type_ = ir.VectorType(simd.I64, cpu_vectors.bytes // _WORD_BYTES if cpu_vectors else 2)
    width = type_.count * _WORD_BYTES

    @intrinsic
    def sum_lines(_context: Any, words: Any, first: Any, lines: Any) -> Any:
        """Add up the words of so many lines from the first on, read with the vectors and prefetches of the decode kernel.

        One stream: two that lie far apart read a quarter less (Zen 4), where their addresses compete for the same ways of a cache.
        On a CPU whose vectors are not known it prefetches nothing.
        """

        def generate(_c: Any, b: Any, _s: Any, arguments: Any) -> Any:
            sums = [compiler.alloca_once_value(b, ir.Constant(type_, None)) for _ in range(LINE_BYTES // width)]
            address, first, lines = arguments
            begin = b.add(b.ptrtoint(address, simd.I64), b.mul(first, simd.I64(LINE_BYTES)))
            with compiler.for_range(b, lines) as loop:
                line = b.add(begin, b.mul(loop.index, simd.I64(LINE_BYTES)))
                if cpu_vectors:
                    for chance in range(simd.CHANCES, 0, -1):
                        simd.prefetch(b, cpu_vectors, line, simd.I64(chance * simd.STEP_BYTES), 0)
                for i, cell in enumerate(sums):
                    x = b.load(simd.at(b, line, i * width), typ=type_, align=_WORD_BYTES)
                    b.store(b.add(b.load(cell, typ=type_), x), cell)
            total = simd.I64(0)
            for cell in sums:
                x = b.load(cell, typ=type_)
                for lane in range(type_.count):
                    total = b.add(total, b.extract_element(x, simd.I32(lane)))
            return total

        return types.int64(words_type, types.int64, types.int64), generate

    library = openmp.require().library
    number, size = library.omp_get_thread_num, library.omp_get_num_threads
    for function in (number, size):
        function.argtypes, function.restype = [], ctypes.c_int

    @cfunc(types.void(types.CPointer(words_type)), error_model="numpy")
    def body(arguments: Any) -> None:
        words, sums, count = arguments[0], arguments[1], arguments[2][0]
        me, threads, lines = number(), size(), count // LINE_WORDS
        first, end = lines * me // threads, lines * (me + 1) // threads
        total = sum_lines(words, first, end - first)
        if me == threads - 1:  # words behind the last whole line
            for i in range(lines * LINE_WORDS, count):
                total += words[i]
        sums[me * LINE_WORDS] = total

    return body


def _chase(following: np.ndarray, at: np.uint64, steps: int) -> np.uint64:
    """Follow `steps` indices from `at` on, each of which says where the next one is; return the last one."""
    return np.uint64(_compiled_chase()(following, at, steps))


@cache
@jit.needed()
def _compiled_chase() -> Any:
    from numba import njit

    @njit("uint64(uint64[::1], uint64, int64)", error_model="numpy", nogil=True)
    def chase(following: Any, at: Any, steps: Any) -> Any:
        for _ in range(steps):
            at = following[at]
        return at

    return chase


def read_once(tensor: torch.Tensor, threads: int) -> int:
    """Read every byte of a tensor once on `threads` threads of the calling thread's team.

    Each thread reads an even share of consecutive lines. Returns the sum of the tensor's 8-byte words as int64, which
    overflows silently.

    Raises
    ------
    InvalidInput
        The tensor is not contiguous, or not made of whole, aligned 8-byte words, or `threads` is not positive.
    NumaLabError
        torch's OpenMP library was not found.
    """
    _require_readable(tensor, threads)
    sums = np.zeros(threads * LINE_WORDS, np.int64)
    count = np.array([tensor.nbytes // _WORD_BYTES], np.int64)
    addresses = np.array([tensor.data_ptr(), sums.ctypes.data, count.ctypes.data], np.uint64)
    openmp.run_on_team(_team_body().address, addresses.ctypes.data, threads)
    return int(sums.sum())


def _require_readable(tensor: torch.Tensor, threads: int) -> None:
    # The compiled loop trusts address and size: an expanded tensor would be read past its end.
    if threads < 1:
        raise InvalidInput(f"threads={threads}: expected at least 1")
    if (
        not tensor.nbytes
        or not tensor.is_contiguous()
        or tensor.nbytes % _WORD_BYTES
        or tensor.data_ptr() % _WORD_BYTES
    ):
        raise InvalidInput(
            f"a tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()} and {tensor.nbytes} bytes: expected a "
            "contiguous one of whole, aligned 8-byte words; take one from numa_lab.placement.memory.empty"
        )


def read_bandwidth(tensor: torch.Tensor, threads: int, *, seconds: float = 0.2) -> float:
    """Return the bytes per second at which the calling thread's team reads a tensor: the median of at least three passes over it.

    Pin the team first, by ``placement.pinned_team.pinned_team``, and take a tensor several times larger than the caches. Where
    torch's OpenMP library is not found, torch's own sum is timed instead, and a warning says so.

    Raises
    ------
    InvalidInput
        As ``read_once`` says.
    """
    _require_readable(tensor, threads)
    if openmp.runtime() is None:
        warnings.warn("torch's OpenMP library was not found: torch.sum stands in for the read probe", stacklevel=2)
        read: Callable[[], object] = tensor.view(-1).view(torch.int64).sum
    else:

        def read() -> object:
            return read_once(tensor, threads)

    read()  # compiles, and wakes the team
    passes: list[float] = []
    end = time.perf_counter() + seconds
    while len(passes) < MIN_REPEATS or time.perf_counter() < end:
        begin = time.perf_counter()
        read()
        passes.append(time.perf_counter() - begin)
    return tensor.nbytes / statistics.median(passes)


def cycle_through(buffer: torch.Tensor) -> np.ndarray:
    """Make the buffer's lines one random cycle, where the first word of each holds the index of the next line's first word.

    It is one cycle over all lines, so that a chase can't settle in a short loop that a cache holds.

    Returns
    -------
    The buffer as an array of 8-byte words.
    """
    words = buffer.view(torch.int64).numpy().view(np.uint64)  # Numba checks a signed index for wrapping around
    order = np.random.default_rng(0).permutation(len(words) // LINE_WORDS) * LINE_WORDS
    words[order] = np.roll(order, -1)
    return words


def read_latency(
    following: np.ndarray, *, start_line: int = 0, loads: int = LATENCY_LOADS, repeats: int = MIN_REPEATS
) -> float:
    """Return the seconds per load where each load's address is the value of the load before: the median of `repeats` chases.

    Each chase goes on where the one before ended: the same lines again would come from a cache. So take a cycle (see
    ``cycle_through``) of more than ``loads * repeats`` lines, and of more bytes than the last-level cache has.
    """
    at = np.uint64(start_line * LINE_WORDS)
    _chase(following, at, 1)  # compiles
    chases = []
    for _ in range(repeats):
        begin = time.perf_counter()
        at = _chase(following, at, loads)
        chases.append((time.perf_counter() - begin) / loads)
    return statistics.median(chases)
