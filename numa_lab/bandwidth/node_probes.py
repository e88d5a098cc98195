"""Measures the limits that attention is compared with: read bandwidth and latency between all nodes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from numa_lab.attention.vectors import LINE_BYTES
from numa_lab.bandwidth.node_bandwidths import NodeProbes
from numa_lab.bandwidth.read_probe import LINE_WORDS, cycle_through, read_bandwidth, read_latency
from numa_lab.errors import InvalidInput, NodeUnavailable, NumaLabError
from numa_lab.machine import new_threads
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.placement import memory, openmp, page_location, pinned_team
from numa_lab.placement.receipt import team_of

CACHE_MULTIPLE = (
    4  # a buffer is so many times as large as the last-level caches: a pass finds little of the pass before
)
BUFFER_BYTES = 256 << 20  # a buffer is at least so large
CHASE_CACHE_MULTIPLE = (
    2  # a chase visits each line once, so that less suffices, and its random cycle takes long to make
)
CHASE_BYTES = 64 << 20
MEMORY_SHARE = 0.5  # of a node's available memory that a buffer may take
EMULATED_BYTES = 8 << 20  # a buffer of an emulated machine, whose caches are invented and whose times mean nothing
MIN_CELL_SECONDS = 0.05

Progress = Callable[[int, int, str], None]


def probe_nodes(topology: Topology, *, seconds: float = 10.0, progress: Progress | None = None) -> NodeProbes:
    """Measure bandwidth and latency for each CPU node and memory node that this process may use.

    Parameters
    ----------
    topology
        This machine.
    seconds
        Time for everything, divided over the pairs of nodes as they come. Making the buffers, and three passes over them for each
        pair, take the time that they need.
    progress
        Is called with the number of pairs that are done, the number of all, and the name of the next.

    Returns
    -------
    The bandwidths and latencies. What could not be measured is None, and a note says why.

    Raises
    ------
    NumaLabError
        No CPU, or no memory, may be used by this process.
    InvalidInput
        `seconds` is no positive time.
    """
    if not 0 < seconds < math.inf:
        raise InvalidInput(f"seconds={seconds}: expected a positive time, for all cells together")
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
        """Announce a pair of nodes, and return its share of the seconds that are left."""
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
        lines = _beyond_caches(topology, CHASE_BYTES, CHASE_CACHE_MULTIPLE) // LINE_BYTES
        following = cycle_through(buffer[: lines * LINE_BYTES])
        for i, cpu in enumerate(cpu_nodes):
            share = next_cell(f"c{cpu}m{mem}")
            # Each CPU node chases through lines of its own, which no other has brought into its caches.
            start_line = len(following) // LINE_WORDS * i // len(cpu_nodes)
            with pinned_team.pinned_team(cores[cpu]) as pinned:
                size = team_of(len(cores[cpu]), pinned)
                sentences = size.contradictions() if size else ()
                notes += [note for sentence in sentences if (note := f"Node {cpu}: {sentence}") not in notes]
                bandwidth[cpu, mem] = read_bandwidth(buffer, len(cores[cpu]), seconds=0.8 * share)
                latency[cpu, mem] = 1e9 * read_latency(following, start_line=start_line)
            done += 1
        del following, buffer  # before the next one is taken: nodes may share a small machine
    local = [node for node in cpu_nodes if (node, node) in bandwidth]
    share, together = next_cell("all nodes at once"), None
    try:
        together = _all_at_once(topology, local, cores, share, notes) if local else None
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


def _beyond_caches(topology: Topology, least: int, multiple: int) -> int:
    return EMULATED_BYTES if topology.emulated else max(least, multiple * topology.last_cache_bytes)


def _buffer(
    topology: Topology,
    node: int,
    cpus: Sequence[int],
    pages: dict[int, dict[int, int]],
    notes: list[str],
    sharers: int = 1,
) -> torch.Tensor:
    """A buffer on the node, filled by a team on `cpus`.

    `pages` is given the pages of the buffer by node, and `notes` a sentence where the buffer is smaller than wanted. `sharers` is the
    number of such buffers that exist at once.
    """
    available = topology.available_bytes([node], sharers)
    wanted, most = _beyond_caches(topology, BUFFER_BYTES, CACHE_MULTIPLE), int(MEMORY_SHARE * available)
    page = memory.page_unit(min(wanted, most))
    wanted = -(-wanted // page) * page
    size = min(wanted, most // page * page)
    if not size:
        raise NodeUnavailable(f"{available} bytes of it are available, too few to probe: free memory on it")
    with pinned_team.pinned_team(cpus):
        buffer = memory.empty((size,), torch.uint8, node)
        buffer.fill_(1)
    pages[node] = page_location.locate(buffer)
    if set(pages[node]) != {node}:
        raise NodeUnavailable(f"the pages of its buffer lie on nodes {pages[node]}")
    if size < wanted:
        notes.append(
            f"Node {node}: buffer of {size >> 20} MiB instead of {wanted >> 20} MiB, half of its available memory; "
            "caches may hold part of it."
        )
    return buffer


def _all_at_once(
    topology: Topology,
    nodes: Sequence[int],
    cores: Mapping[int, Sequence[int]],
    seconds: float,
    notes: list[str] | None = None,
) -> float:
    """The sum of the rates of all nodes, while a thread with a team on each reads its own memory."""
    new_notes: list[str] = []
    start = threading.Barrier(len(nodes))

    def lead(node: int) -> float:
        try:
            buffer = _buffer(topology, node, cores[node], {}, new_notes, len(nodes))
            with pinned_team.pinned_team(cores[node]):
                start.wait()
                return read_bandwidth(buffer, len(cores[node]), seconds=seconds)
        except BaseException:
            start.abort()  # the others would wait for this one
            raise

    rates = new_threads.run([partial(lead, node) for node in nodes])
    if notes is not None:
        notes += [note for note in sorted(new_notes) if note not in notes]  # most stand there since each read alone
    return sum(rates)


def render(probes: NodeProbes) -> str:
    """Write probes as two small tables for a terminal, with their notes."""
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
