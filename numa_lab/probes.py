"""The limits that attention is held against: read bandwidth and latency between nodes.

Compiled by Numba and run on torch's own OpenMP team, so no C compiler and no second OpenMP runtime is needed. Limits:
it measures reading alone, with one thread per physical core; hardware prefetchers see a plain stream, so the figure is
that of the best case. Latency is that of one dependent load at a time, the translation of its address included.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, int64, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from numa_lab import memory, openmp
from numa_lab.errors import NumaLabError
from numa_lab.sysfs import format_cpulist
from numa_lab.topology import Topology

LINE_BYTES = 64
CACHE_MULTIPLE = 4  # buffers exceed the last-level cache so many times, so that a pass finds little of the pass before
BUFFER_BYTES = 256 << 20  # and are at least so large
MEMORY_SHARE = 0.5  # of a node's free memory that a buffer may take
LATENCY_LOADS = 200_000  # of one chase: about 20 ms
MIN_REPEATS = 3

_WORDS = LINE_BYTES // 8

Progress = Callable[[int, int, str], None]


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """An address as the pointer that ``carray`` takes."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), codegen


@njit(error_model="numpy", nogil=True)
def _add_up(words: Any, first: int, last: int) -> int:
    # Integer sums may be reordered, so LLVM makes unrolled vector loads of this without leave to bend floating point.
    total = 0
    for i in range(first, last):
        total += words[i]
    return total


@njit(error_model="numpy", nogil=True)
def _chase(following: Any, steps: int) -> int:
    at = 0
    for _ in range(steps):
        at = following[at]
    return at


@cache
def _team_body() -> Any:
    """What each thread of the team runs: add up its even share of the lines.

    Its argument block holds int64 values: the buffer, its lines, and one line per thread for the sums, which keep the
    loads from being optimised away.
    """
    library = openmp.require().library
    number, size = library.omp_get_thread_num, library.omp_get_num_threads
    for function in (number, size):
        function.argtypes, function.restype = [], ctypes.c_int

    @cfunc(types.void(types.voidptr), error_model="numpy")
    def body(arguments: Any) -> None:
        block = carray(arguments, (3,), int64)
        me, threads, lines = number(), size(), block[1]
        words = carray(_pointer(block[0]), (lines * _WORDS,), int64)
        sums = carray(_pointer(block[2]), (threads * _WORDS,), int64)
        sums[me * _WORDS] = _add_up(words, lines * me // threads * _WORDS, lines * (me + 1) // threads * _WORDS)

    return body


def read_once(tensor: torch.Tensor, threads: int) -> int:
    """Read all whole lines of a contiguous tensor on `threads` threads of the caller's team; their sum as int64."""
    sums = np.zeros(threads * _WORDS, np.int64)
    block = np.array([tensor.data_ptr(), tensor.nbytes // LINE_BYTES, sums.ctypes.data], np.int64)
    openmp.run_on_team(_team_body().address, block.ctypes.data, threads)
    return int(sums.sum())


def read_bandwidth(tensor: torch.Tensor, threads: int, *, seconds: float = 0.2) -> float:
    """Bytes per second at which the calling thread's team reads a tensor: the median of passes over it.

    Pin the team first (``openmp.pinned_team``), and take a tensor several times larger than the caches. Where torch's
    OpenMP library is not found, torch's own sum is timed instead, and a warning says so.
    """
    if openmp.runtime() is None:
        warnings.warn("torch's OpenMP library was not found: torch.sum stands in for the read probe", stacklevel=2)
        words = tensor.view(torch.int64)
        read: Callable[[], object] = words.sum
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
    """Make the buffer's lines one random cycle: the first word of each holds the index of the next line's first word.

    One cycle over all lines, so that a chase can't settle in a short loop that a cache holds.
    """
    words = buffer.view(torch.int64).numpy()
    order = np.random.default_rng(0).permutation(len(words) // _WORDS) * _WORDS
    words[order] = np.roll(order, -1)
    return words


def read_latency(following: np.ndarray, *, loads: int = LATENCY_LOADS, repeats: int = MIN_REPEATS) -> float:
    """Seconds per load when each load's address is the value of the load before, median of `repeats` chases."""
    _chase(following, 1)
    chases = []
    for _ in range(repeats):
        begin = time.perf_counter()
        _chase(following, loads)
        chases.append((time.perf_counter() - begin) / loads)
    return statistics.median(chases)


@dataclass(frozen=True)
class NodeProbes:
    """Measured limits: matrices have a row per CPU node and a column per memory node, None where there is nothing."""

    nodes: tuple[int, ...]
    read_bytes_per_s: tuple[tuple[float | None, ...], ...]  # one CPU node pulling alone
    latency_ns: tuple[tuple[float | None, ...], ...]
    all_nodes_bytes_per_s: float | None  # all nodes pulling their own memory at once, together
    threads: tuple[int, ...]  # per CPU node
    pages: dict[int, dict[int, int]]  # where the buffer of each memory node lay
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"pages": {str(n): {str(k): v for k, v in p.items()} for n, p in self.pages.items()}}


def probe_nodes(topology: Topology, *, seconds: float = 10.0, progress: Progress | None = None) -> NodeProbes:
    """Measure bandwidth and latency for each CPU node and memory node that this process may use.

    Parameters
    ----------
    topology
        This machine.
    seconds
        Time for all cells together, buffers not counted; each cell takes what its minimum of passes needs.
    progress
        Called with cells done, cells in all, and what comes next.

    Raises
    ------
    NumaLabError
        No node has both CPUs and memory that this process may use.
    """
    begin = time.perf_counter()
    cores = {node: topology.physical_cores(topology.cpus_of([node])) for node in topology.node_ids}
    cpu_nodes = [node for node, cpus in cores.items() if cpus]
    if not cpu_nodes or not topology.allowed_nodes:
        raise NumaLabError(
            f"nothing to probe: CPUs {format_cpulist(topology.allowed_cpus)}, memory nodes "
            f"{format_cpulist(topology.allowed_nodes)}; widen the cpuset of this process"
        )
    bandwidth: dict[tuple[int, int], float] = {}
    latency: dict[tuple[int, int], float] = {}
    pages: dict[int, dict[int, int]] = {}
    notes: list[str] = []
    cells, done = len(cpu_nodes) * len(topology.allowed_nodes) + 1, 0
    share = seconds / cells
    for mem in topology.allowed_nodes:
        buffer, note = _buffer(topology, mem)
        notes += [note] if note else []
        words = cycle_through(buffer)  # also touches every page
        pages[mem] = memory.locate(buffer)
        if set(pages[mem]) != {mem}:
            notes.append(f"The buffer of node {mem} lies on {pages[mem]}: not measured.")
            continue
        for cpu in cpu_nodes:
            if progress:
                progress(done, cells, f"c{cpu}m{mem}")
            with openmp.pinned_team(cores[cpu]):
                bandwidth[cpu, mem] = read_bandwidth(buffer, len(cores[cpu]), seconds=share / 2)
                latency[cpu, mem] = 1e9 * read_latency(words)
            done += 1
        del words, buffer  # before the next one is taken: nodes may share a small machine
    if progress:
        progress(done, cells, "all nodes at once")
    local = [node for node in cpu_nodes if (node, node) in bandwidth]
    together = _all_at_once(topology, local, cores, share) if local else None
    if progress:
        progress(cells, cells, "done")
    ids = topology.node_ids
    return NodeProbes(
        ids,
        tuple(tuple(bandwidth.get((cpu, mem)) for mem in ids) for cpu in ids),
        tuple(tuple(latency.get((cpu, mem)) for mem in ids) for cpu in ids),
        together,
        tuple(len(cores[node]) for node in ids),
        pages,
        tuple(notes),
        round(time.perf_counter() - begin, 2),
    )


def _buffer(topology: Topology, node: int) -> tuple[torch.Tensor, str]:
    """An untouched buffer on the node, and a sentence where its memory did not allow the wanted size."""
    wanted = max(BUFFER_BYTES, CACHE_MULTIPLE * topology.last_cache_bytes)
    allowed = int(MEMORY_SHARE * topology.node(node).free_bytes)
    size, wanted = (n // memory.HUGE_PAGE_BYTES * memory.HUGE_PAGE_BYTES for n in (min(wanted, allowed), wanted))
    if not size:
        free = topology.node(node).free_bytes
        raise NumaLabError(f"node {node} has {free} bytes free, too few to probe: free memory on it")
    note = f"Node {node}: buffer of {size >> 20} MiB instead of {wanted >> 20} MiB, half of its free memory."
    return memory.empty((size,), torch.uint8, node), note if size < wanted else ""


def _all_at_once(topology: Topology, nodes: Sequence[int], cores: dict[int, tuple[int, ...]], seconds: float) -> float:
    """Sum of the rates of all nodes that read their own memory at once, a leader thread and a team for each."""
    rates: dict[int, float] = {}
    errors: list[Exception] = []
    start = threading.Barrier(len(nodes))

    def lead(node: int) -> None:
        try:
            with openmp.pinned_team(cores[node]):
                buffer, _ = _buffer(topology, node)
                buffer.fill_(1)
                read_once(buffer, len(cores[node]))
                start.wait(timeout=60)
                rates[node] = read_bandwidth(buffer, len(cores[node]), seconds=seconds)
        except Exception as error:
            errors.append(error)
            start.abort()  # the others would wait for this one

    leaders = [threading.Thread(target=lead, args=(node,), name=f"probe-node-{node}") for node in nodes]
    for leader in leaders:
        leader.start()
    for leader in leaders:
        leader.join()
    if errors:
        raise errors[0]
    return sum(rates.values())


def render(probes: NodeProbes) -> str:
    """Two small tables for a terminal."""
    lines = []
    for title, matrix, scale in (
        ("read bandwidth, GB/s", probes.read_bytes_per_s, 1e-9),
        ("latency of a dependent load, ns", probes.latency_ns, 1.0),
    ):
        lines.append(f"{title} (rows: CPU node, columns: memory node)")
        lines.append("      " + "".join(f"{node:>8}" for node in probes.nodes))
        for node, row in zip(probes.nodes, matrix, strict=True):
            cells = ("-" if value is None else f"{value * scale:.1f}" for value in row)
            lines.append(f"{node:>6}" + "".join(f"{cell:>8}" for cell in cells))
        lines.append("")
    if probes.all_nodes_bytes_per_s is not None:
        lines.append(f"all nodes at once, each its own memory: {probes.all_nodes_bytes_per_s / 1e9:.1f} GB/s")
    return "\n".join([*lines, *probes.notes])
