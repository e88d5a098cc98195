"""The time that memory allows for decode attention, for each way to place it: predicted from measured bandwidths.

A strategy reads each byte of K and V once, from known memory by known CPUs, and

    seconds = max over limits(bytes through it / its bandwidth) + merge

with these limits: each path from CPUs to memory, at the bandwidth that this pair of nodes reached alone; the memory of each
node and the CPUs of each node, at the best that either reached with any other; the link from each socket to each
other, at the best that any pair across it reached in this direction; and all nodes reading at once, at what was measured of that.

Where several nodes compute one sequence, one of them collects the partial results of all, which are float32:

    merge = sum over the other nodes(latency + batch * q_heads * q_len * (head_dim + 1) * 4 bytes / bandwidth)

with latency and bandwidth of the collector's path to each of them; the collector is the one that is done first. Nodes that
share this work are faster: it matters for large batches, where instances need no merge at all.

Limits: only reading takes time, so that a kernel below the memory limit is slower, and so is waking threads (microseconds:
they matter below a megabyte). Caches that hold K and V make it faster. A link's bandwidth is a lower bound where one node alone
doesn't fill it, so that interleaving may do better than is said. Nodes with CPUs or memory alone take no part in sharding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from statistics import median

from numa_lab.attention.shapes import AttentionShape
from numa_lab.errors import InvalidInput
from numa_lab.measured import Groups, Measured, socket_groups
from numa_lab.sysfs import format_cpulist

PARTIAL_BYTES = 4  # of each number that nodes exchange: float32
Traffic = Mapping[tuple[int, int], float]  # bytes, by node of the CPUs and node of the memory


@dataclass(frozen=True)
class Strategy:
    """One way to place a decode step, and its predicted time."""

    kind: str  # single: own memory; remote: another node's; sharded; instances; interleaved: pages in turn on all nodes
    label: str  # a binding such as c0m1, or the kind with its nodes
    nodes: tuple[int, ...]  # of the CPUs, then of the memory where that is another
    seconds: float  # for the whole batch
    limit: str  # what bounds it
    parts: tuple[int, ...] = ()  # of each node: tokens of every sequence (sharded), or whole sequences (instances)
    merge_seconds: float = 0.0  # of `seconds`: collecting partial results
    fits: bool = True  # whether K and V fit into the memory of its nodes, as far as that is known


def predict(
    shape: AttentionShape,
    measured: Measured,
    *,
    socket_of: Mapping[int, int] | None = None,
    memory_bytes: Mapping[int, int] | None = None,
) -> list[Strategy]:
    """Predict each way to place a decode step.

    Parameters
    ----------
    shape
        One attention call with one new token per sequence.
    measured
        Bandwidths and latencies between the nodes.
    socket_of
        The socket of each node with CPUs; inferred as ``socket_groups`` says where it is None.
    memory_bytes
        Memory of each node; where it is not known, everything fits.

    Returns
    -------
    Strategies, the fastest first: ``single`` and ``remote`` for every pair of CPU node and memory node, ``sharded`` over the
    nodes of each socket and over all, and one of ``instances``: whole sequences per node, so that a batch smaller than
    the number of nodes leaves nodes idle.

    Raises
    ------
    InvalidInput
        Nothing was measured, or the shape is no decode step.
    """
    roofline = _roofline(shape, measured, socket_of, memory_bytes)
    local = tuple(node for node in measured.cpu_nodes if node in measured.mem_nodes)
    found = [roofline.pair(cpu, mem) for cpu in measured.cpu_nodes for mem in measured.mem_nodes]
    if len(local) > 1:
        teams = {tuple(node for node in group if node in local) for group in (*roofline.groups, local)}
        found += [roofline.sharded(nodes) for nodes in sorted(teams) if len(nodes) > 1]
        found.append(roofline.instances(local))
    return sorted(found, key=lambda strategy: strategy.seconds)


def predict_interleaved(
    shape: AttentionShape,
    measured: Measured,
    *,
    socket_of: Mapping[int, int] | None = None,
    memory_bytes: Mapping[int, int] | None = None,
) -> Strategy:
    """Predict ``numactl --interleave``, to compare with: each page on the next memory node, the work split evenly over all CPUs.

    Parameters and errors are those of ``predict``.
    """
    return _roofline(shape, measured, socket_of, memory_bytes).interleaved()


def predict_binding(
    shape: AttentionShape,
    measured: Measured,
    cpu_nodes: Sequence[int],
    mem_nodes: Sequence[int],
    *,
    socket_of: Mapping[int, int] | None = None,
    memory_bytes: Mapping[int, int] | None = None,
) -> Strategy | None:
    """Predict a binding: the CPUs of some nodes share the work evenly, and each page lies on the next of some memory nodes.

    None where a node's CPUs or memory were not measured. Other parameters and errors are those of ``predict``.
    """
    roofline = _roofline(shape, measured, socket_of, memory_bytes)
    if not set(cpu_nodes) <= set(measured.cpu_nodes) or not set(mem_nodes) <= set(measured.mem_nodes):
        return None
    return roofline.spread(tuple(cpu_nodes), tuple(mem_nodes))


def _roofline(
    shape: AttentionShape,
    measured: Measured,
    socket_of: Mapping[int, int] | None,
    memory_bytes: Mapping[int, int] | None,
) -> _Roofline:
    if shape.phase != "decode":
        raise InvalidInput(
            f"q_len={shape.q_len}: expected 1, since a prompt takes longer to compute than its K and V to read"
        )
    if not measured.cpu_nodes:
        raise InvalidInput(
            "no bandwidth was measured between nodes that may be used: see the notes of `numa-lab probe`"
        )
    return _Roofline(shape, measured, socket_groups(measured, socket_of), memory_bytes or {})


@dataclass(frozen=True)
class _Roofline:
    """The limits of a machine for one shape."""

    shape: AttentionShape
    measured: Measured
    groups: Groups
    memory_bytes: Mapping[int, int]

    @cached_property
    def _socket(self) -> dict[int, int]:
        return {node: number for number, group in enumerate(self.groups) for node in group}

    def rate(self, cpu: int, mem: int) -> float:
        """Bandwidth of a path. One that was left out counts as the median of those alike: own memory, same socket, or not."""

        def likeness(c: int, m: int) -> tuple[bool, bool]:
            return c == m, self._socket[c] == self._socket[m]

        if (found := self.measured.bandwidth(cpu, mem)) is not None:
            return found
        known = [(pair, rate) for pair in self._pairs() if (rate := self.measured.bandwidth(*pair)) is not None]
        alike = [rate for pair, rate in known if likeness(*pair) == likeness(cpu, mem)]
        return median(alike or [rate for (c, _), rate in known if c == cpu])

    def _pairs(self) -> Iterator[tuple[int, int]]:
        return ((cpu, mem) for cpu in self.measured.cpu_nodes for mem in self.measured.mem_nodes)

    def strategy(
        self, kind: str, label: str, nodes: tuple[int, ...], traffic: Traffic, *,
        parts: tuple[int, ...] = (), merge_seconds: float = 0.0, remark: str = "",
    ) -> Strategy:  # fmt: skip
        """The strategy that causes this traffic: the slowest of all limits, and what it is."""
        seconds, limit = max(self._limits(traffic), key=lambda found: found[0])
        held: dict[int, float] = defaultdict(float)
        for (_, mem), count in traffic.items():
            held[mem] += count
        full = [node for node, count in held.items() if count > self.memory_bytes.get(node, math.inf)]
        if full:
            limit = f"does not fit: {_gb(held[full[0]])} into the {_gb(self.memory_bytes[full[0]])} of node {full[0]}"
        elif merge_seconds > seconds:
            limit = f"collecting partial results; without it {limit}"
        total = seconds + merge_seconds
        return Strategy(kind, label, nodes, total, limit + remark, parts, merge_seconds, not full)

    def _limits(self, traffic: Traffic) -> Iterator[tuple[float, str]]:
        """Seconds and name of each limit; of limits that are equal the first is named."""
        through: dict[tuple[str, int, int], float] = defaultdict(float)
        for (cpu, mem), count in traffic.items():
            crosses = self._socket[cpu] != self._socket[mem]
            rate = self.rate(cpu, mem)
            guessed = "" if self.measured.bandwidth(cpu, mem) is not None else " (not measured: median of alike pairs)"
            across = "another socket's " if crosses else ""
            name = f"memory of node {mem}" if cpu == mem else f"node {cpu} reading {across}memory of node {mem}"
            yield count / rate, f"{name}, {_gb(rate)}/s{guessed}"
            through["cpu", cpu, cpu] += count
            through["mem", mem, mem] += count
            if crosses:
                through["link", self._socket[cpu], self._socket[mem]] += count
        for (what, a, b), count in through.items():
            rate, name = self._shared(what, a, b)
            yield count / rate, f"{name}, {_gb(rate)}/s"
        together = self.measured.all_nodes_bytes_per_s
        if together and len({cpu for cpu, _ in traffic}) > 1:
            yield sum(traffic.values()) / together, f"all nodes reading at once, {_gb(together)}/s"

    def _shared(self, what: str, a: int, b: int) -> tuple[float, str]:
        """Bandwidth and name of a limit that several paths share: the best that any of them reached alone."""
        if what == "link":
            crossing = [pair for pair in self._pairs() if (self._socket[pair[0]], self._socket[pair[1]]) == (a, b)]
            sockets = " to ".join(f"nodes {format_cpulist(self.groups[socket])}" for socket in (b, a))
            return max(self.rate(*pair) for pair in crossing), f"socket link from {sockets}"
        if what == "cpu":
            return max(self.rate(a, mem) for mem in self.measured.mem_nodes), f"CPUs of node {a}"
        return max(self.rate(cpu, a) for cpu in self.measured.cpu_nodes), f"memory of node {a}"

    def pair(self, cpu: int, mem: int) -> Strategy:
        """The CPUs of one node, and all K and V in the memory of one."""
        traffic = {(cpu, mem): float(self.shape.kv_bytes)}
        kind, nodes = ("single", (cpu,)) if cpu == mem else ("remote", (cpu, mem))
        return self.strategy(kind, f"c{cpu}m{mem}", nodes, traffic)

    def sharded(self, nodes: tuple[int, ...]) -> Strategy:
        """Each node owns a range of the tokens of every sequence, as long as its memory is fast."""
        upto = list(accumulate((self.rate(node, node) for node in nodes), initial=0.0))
        bounds = [round(self.shape.kv_len * part / upto[-1]) for part in upto]
        tokens = [end - begin for begin, end in pairwise(bounds)]
        owners = [node for node, count in zip(nodes, tokens, strict=True) if count]
        token_bytes = self.shape.kv_bytes / self.shape.kv_len
        traffic = {(node, node): count * token_bytes for node, count in zip(nodes, tokens, strict=True) if count}
        label = f"sharded {format_cpulist(nodes)}"
        merge = min(self._merge_seconds(collector, owners) for collector in owners)
        return self.strategy("sharded", label, nodes, traffic, parts=tuple(tokens), merge_seconds=merge)

    def _merge_seconds(self, collector: int, owners: Sequence[int]) -> float:
        partial = self.shape.batch * self.shape.q_heads * self.shape.q_len * (self.shape.head_dim + 1) * PARTIAL_BYTES
        return sum(
            1e-9 * (self.measured.latency(collector, node) or 0.0) + partial / self.rate(collector, node)
            for node in owners
            if node != collector
        )

    def instances(self, nodes: tuple[int, ...]) -> Strategy:
        """Each node computes whole sequences: so many that the last node is done as early as can be."""
        rates = {node: self.rate(node, node) for node in nodes}
        counts = {node: int(self.shape.batch * rate / sum(rates.values())) for node, rate in rates.items()}
        for _ in range(self.shape.batch - sum(counts.values())):
            counts[min(nodes, key=lambda node: (counts[node] + 1) / rates[node])] += 1
        sequence_bytes = self.shape.kv_bytes / self.shape.batch
        traffic = {(node, node): count * sequence_bytes for node, count in counts.items() if count}
        idle = len(nodes) - len(traffic)
        remark = f"; {idle} of {len(nodes)} nodes idle" if idle else ""
        label, parts = f"instances {format_cpulist(nodes)}", tuple(counts.values())
        return self.strategy("instances", label, nodes, traffic, parts=parts, remark=remark)

    def interleaved(self) -> Strategy:
        """All CPU nodes, and each page of K and V on the next memory node."""
        return self.spread(self.measured.cpu_nodes, self.measured.mem_nodes)

    def spread(self, cpus: tuple[int, ...], mems: tuple[int, ...]) -> Strategy:
        """Some CPU nodes share the work evenly, and each page of K and V lies on the next of some memory nodes."""
        share = self.shape.kv_bytes / len(cpus) / len(mems)
        traffic = {(cpu, mem): share for cpu in cpus for mem in mems}
        label = f"c{format_cpulist(cpus)}{'i' if len(mems) > 1 else 'm'}{format_cpulist(mems)}"
        merge = min(self._merge_seconds(collector, cpus) for collector in cpus)
        return self.strategy("interleaved", label, tuple(sorted({*cpus, *mems})), traffic, merge_seconds=merge)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
