"""The limits that attention is held against: read bandwidth and latency between nodes.

Compiled by Numba and run on torch's own OpenMP team, so no C compiler and no second OpenMP runtime is needed. Limits: it
measures reading alone, with one thread per physical core; hardware prefetchers see plain streams, so the figure is that
of the best case. Latency is that of one dependent load at a time, the translation of its address included.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cfunc, njit, types

from numa_lab import memory, openmp
from numa_lab.errors import InvalidInput, NodeUnavailable, NumaLabError
from numa_lab.topology import Topology, format_cpulist

LINE_BYTES = 64
CACHE_MULTIPLE = 4  # buffers exceed the last-level caches so many times: a pass finds little of the pass before
BUFFER_BYTES = 256 << 20  # and are at least so large
CHASE_CACHE_MULTIPLE = 2  # a chase visits each line once, so that less suffices; its random cycle takes long to make
CHASE_BYTES = 64 << 20
MEMORY_SHARE = 0.5  # of a node's available memory that a buffer may take
LATENCY_LOADS = 200_000  # of one chase: about 20 ms
MIN_REPEATS = 3
MIN_CELL_SECONDS = 0.05

_WORD_BYTES = 8
_LINE_WORDS = LINE_BYTES // _WORD_BYTES
_WORDS = types.CPointer(types.int64)

Progress = Callable[[int, int, str], None]


@cache
def _team_body() -> Any:
    """What each thread of the team runs: add up its even share of the lines.

    It gets the addresses of the words, of a line per thread for the sums, and of the number of words. Each process
    compiles it once: Numba can't cache it on disk ("uses dynamic globals (such as ctypes pointers)").
    """
    library = openmp.require().library
    number, size = library.omp_get_thread_num, library.omp_get_num_threads
    for function in (number, size):
        function.argtypes, function.restype = [], ctypes.c_int

    # Integer sums may be reordered, so LLVM makes them unrolled vector loads. It does so through pointers, not through a
    # signed index into an array: that may wrap around, each word was then loaded alone, and one thread read a third less.
    # A second stream, as attention has in K and V, read up to a tenth more than one (AVX2, Zen 3); four streams and
    # prefetches added nothing.
    @cfunc(types.void(types.CPointer(_WORDS)), error_model="numpy")
    def body(arguments: Any) -> None:
        words, sums, count = arguments[0], arguments[1], arguments[2][0]
        me, threads, lines = number(), size(), (count + _LINE_WORDS - 1) // _LINE_WORDS
        first = lines * me // threads * _LINE_WORDS
        last = min(count, lines * (me + 1) // threads * _LINE_WORDS)
        half = (last - first) // 2
        one = two = 0
        for i in range(first, first + half):
            one += words[i]
            two += words[i + half]
        for i in range(first + 2 * half, last):
            one += words[i]
        sums[me * _LINE_WORDS] = one + two

    return body


@njit(error_model="numpy", nogil=True)
def _chase(following: Any, at: Any, steps: int) -> Any:
    for _ in range(steps):
        at = following[at]
    return at


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
    sums = np.zeros(threads * _LINE_WORDS, np.int64)
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
            "contiguous one of whole, aligned 8-byte words; take one from numa_lab.memory.empty"
        )


def read_bandwidth(tensor: torch.Tensor, threads: int, *, seconds: float = 0.2) -> float:
    """Bytes per second at which the calling thread's team reads a tensor: the median of at least three passes over it.

    Pin the team first (``openmp.pinned_team``), and take a tensor several times larger than the caches. Where torch's
    OpenMP library is not found, torch's own sum is timed instead, and a warning says so.

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
    """Make the buffer's lines one random cycle: the first word of each holds the index of the next line's first word.

    One cycle over all lines, so that a chase can't settle in a short loop that a cache holds.
    """
    words = buffer.view(torch.int64).numpy().view(np.uint64)  # Numba checks a signed index for wrapping around
    order = np.random.default_rng(0).permutation(len(words) // _LINE_WORDS) * _LINE_WORDS
    words[order] = np.roll(order, -1)
    return words


def read_latency(
    following: np.ndarray, *, start_line: int = 0, loads: int = LATENCY_LOADS, repeats: int = MIN_REPEATS
) -> float:
    """Seconds per load when each load's address is the value of the load before, median of `repeats` chases.

    Each chase goes on where the one before ended: the same lines again would come from a cache. So take a cycle (see
    ``cycle_through``) of more than ``loads * repeats`` lines, and of more bytes than the last-level cache has.
    """
    at = np.uint64(start_line * _LINE_WORDS)
    _chase(following, at, 1)  # compiles
    chases = []
    for _ in range(repeats):
        begin = time.perf_counter()
        at = np.uint64(_chase(following, at, loads))
        chases.append((time.perf_counter() - begin) / loads)
    return statistics.median(chases)


@dataclass(frozen=True)
class NodeProbes:
    """Measured limits: matrices have a row per CPU node and a column per memory node; None where nothing could be measured."""

    nodes: tuple[int, ...]
    read_bytes_per_s: tuple[tuple[float | None, ...], ...]  # one CPU node pulling alone
    latency_ns: tuple[tuple[float | None, ...], ...]  # from the first core of the CPU node
    all_nodes_bytes_per_s: (
        float | None
    )  # all nodes pulling their own memory at once, together; one node: measured again
    threads: tuple[int, ...]  # per CPU node
    pages: dict[int, dict[int, int]]  # where the buffer of each memory node lay
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the keys of ``pages`` become text."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain


def probe_nodes(topology: Topology, *, seconds: float = 10.0, progress: Progress | None = None) -> NodeProbes:
    """Measure bandwidth and latency for each CPU node and memory node that this process may use.

    Parameters
    ----------
    topology
        This machine.
    seconds
        Time for everything, divided over the cells as they come. Making the buffers, and three passes over them in each
        cell, take what they need.
    progress
        Called with cells done, cells in all, and what comes next.

    Raises
    ------
    NumaLabError
        No CPU, or no memory, may be used by this process.
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

    def next_cell(what: str) -> float:
        """Announce a cell; its share of the time that is left."""
        if progress:
            progress(done, cells, what)
        return max(MIN_CELL_SECONDS, (seconds - (time.perf_counter() - begin)) / (cells - done))

    if openmp.runtime() is None:
        notes.append("torch's OpenMP library was not found: torch.sum was timed, on threads that may not be pinned.")
    for mem in topology.allowed_nodes:
        try:
            buffer = _buffer(topology, mem, cores[topology.nearest_cpu_node(mem)], pages, notes)
        except NodeUnavailable as error:
            notes.append(f"Memory of node {mem} was not measured: {error}.")
            done += len(cpu_nodes)
            continue
        lines = max(CHASE_BYTES, CHASE_CACHE_MULTIPLE * topology.last_cache_bytes) // LINE_BYTES
        following = cycle_through(buffer[: lines * LINE_BYTES])
        for i, cpu in enumerate(cpu_nodes):
            share = next_cell(f"c{cpu}m{mem}")
            # Each CPU node chases through lines of its own, which no other has brought into its caches.
            start_line = len(following) // _LINE_WORDS * i // len(cpu_nodes)
            with openmp.pinned_team(cores[cpu]):
                bandwidth[cpu, mem] = read_bandwidth(buffer, len(cores[cpu]), seconds=0.8 * share)
                latency[cpu, mem] = 1e9 * read_latency(following, start_line=start_line)
            done += 1
        del following, buffer  # before the next one is taken: nodes may share a small machine
    local = [node for node in cpu_nodes if (node, node) in bandwidth]
    share, together = next_cell("all nodes at once"), None
    try:
        together = _all_at_once(topology, local, cores, share) if local else None
    except NodeUnavailable as error:
        notes.append(f"All nodes at once were not measured: {error}.")
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


def _buffer(
    topology: Topology, node: int, cpus: Sequence[int], pages: dict[int, dict[int, int]], notes: list[str]
) -> torch.Tensor:
    """A buffer on the node, filled by a team on `cpus`; says where its pages lie, and where it is smaller than wanted."""
    page = memory.HUGE_PAGE_BYTES
    available = topology.node(node).available_bytes
    wanted = -(-max(BUFFER_BYTES, CACHE_MULTIPLE * topology.last_cache_bytes) // page) * page
    size = min(wanted, int(MEMORY_SHARE * available) // page * page)
    if not size:
        raise NodeUnavailable(f"{available} bytes of it are available, too few to probe: free memory on it")
    with openmp.pinned_team(cpus):
        buffer = memory.empty((size,), torch.uint8, node)
        buffer.fill_(1)
    pages[node] = memory.locate(buffer)
    if set(pages[node]) != {node}:
        raise NodeUnavailable(f"the pages of its buffer lie on nodes {pages[node]}")
    if size < wanted:
        notes.append(
            f"Node {node}: buffer of {size >> 20} MiB instead of {wanted >> 20} MiB, half of its available memory; "
            "caches may hold part of it."
        )
    return buffer


def _all_at_once(topology: Topology, nodes: Sequence[int], cores: Mapping[int, Sequence[int]], seconds: float) -> float:
    """Sum of the rates of all nodes that read their own memory at the same time, a leader thread and a team for each."""
    rates: dict[int, float] = {}
    errors: list[Exception] = []
    start = threading.Barrier(len(nodes))

    def lead(node: int) -> None:
        try:
            buffer = _buffer(topology, node, cores[node], {}, [])  # what it has to say was said when it read alone
            with openmp.pinned_team(cores[node]):
                start.wait()
                rates[node] = read_bandwidth(buffer, len(cores[node]), seconds=seconds)
        except Exception as error:
            errors.append(error)
            start.abort()  # the others would wait for this one

    leaders = [threading.Thread(target=lead, args=(node,), name=f"probe-node-{node}") for node in nodes]
    for leader in leaders:
        leader.start()
    for leader in leaders:
        leader.join()
    # Setting a thread count also sets the default of threads started later, and leaders that overlap give back each
    # other's: it becomes the caller's again.
    torch.set_num_threads(torch.get_num_threads())
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
