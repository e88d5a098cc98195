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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from numa_lab.attention.shapes import AttentionShape
from numa_lab.bandwidth.contention import Contention, Traffic, gb
from numa_lab.bandwidth.node_bandwidths import NodeBandwidths, socket_groups
from numa_lab.errors import InvalidInput
from numa_lab.machine.shell_commands import to_paste
from numa_lab.machine.sysfs import format_cpulist

PARTIAL_BYTES = 4  # of each number that nodes exchange: float32


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
    measured: NodeBandwidths,
    *,
    socket_of: Mapping[int, int] | None = None,
    memory_bytes: Mapping[int, int] | None = None,
    limit_bytes: float = math.inf,
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
    limit_bytes
        What this process may hold on all nodes together, by the limits of its control groups.

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
    roofline = _roofline(shape, measured, socket_of, memory_bytes, limit_bytes)
    local = tuple(node for node in measured.cpu_nodes if node in measured.mem_nodes)
    found = [roofline.pair(cpu, mem) for cpu in measured.cpu_nodes for mem in measured.mem_nodes]
    if len(local) > 1:
        teams = {tuple(node for node in group if node in local) for group in (*roofline.contention.groups, local)}
        found += [roofline.sharded(nodes) for nodes in sorted(teams) if len(nodes) > 1]
        found.append(roofline.instances(local))
    return sorted(found, key=lambda strategy: strategy.seconds)


def predict_interleaved(
    shape: AttentionShape,
    measured: NodeBandwidths,
    *,
    socket_of: Mapping[int, int] | None = None,
    memory_bytes: Mapping[int, int] | None = None,
    limit_bytes: float = math.inf,
) -> Strategy:
    """Predict ``numactl --interleave``, to compare with: each page on the next memory node, the work split evenly over all CPUs.

    Parameters and errors are those of ``predict``.
    """
    return _roofline(shape, measured, socket_of, memory_bytes, limit_bytes).interleaved()


def predict_binding(
    shape: AttentionShape,
    measured: NodeBandwidths,
    cpu_nodes: Sequence[int],
    mem_nodes: Sequence[int],
    *,
    socket_of: Mapping[int, int] | None = None,
    memory_bytes: Mapping[int, int] | None = None,
    limit_bytes: float = math.inf,
    weights: Mapping[int, float] | None = None,
    contention: Contention | None = None,
) -> Strategy | None:
    """Predict a binding: the CPUs of some nodes share the work evenly, and pages lie on some memory nodes in turn.

    `weights` say how many pages in turn a node gets, where that is not one, and `contention` is that of the machine, for who asks for
    many bindings. None where a node's CPUs or memory were not measured. Other parameters and errors are those of ``predict``.
    """
    roofline = _roofline(shape, measured, socket_of, memory_bytes, limit_bytes, contention)
    if not set(cpu_nodes) <= set(measured.cpu_nodes) or not set(mem_nodes) <= set(measured.mem_nodes):
        return None
    return roofline.spread(tuple(cpu_nodes), {node: weights[node] if weights else 1.0 for node in mem_nodes})


def predict_split(
    shape: AttentionShape,
    measured: NodeBandwidths,
    kind: str,
    shares: Mapping[int, int],
    *,
    socket_of: Mapping[int, int] | None = None,
) -> Strategy:
    """Predict a decode step as it is split over nodes, each with its share in its own memory.

    Parameters
    ----------
    kind
        ``sharded``: shares are tokens of every sequence, or of anything in proportion. ``instances``: whole sequences.
    shares
        Of each node; not all 0.

    Other parameters and errors are those of ``predict``; nodes that were not measured are refused too.
    """
    roofline = _roofline(shape, measured, socket_of, None)
    if unknown := set(shares) - set(measured.cpu_nodes) & set(measured.mem_nodes):
        raise InvalidInput(
            f"no bandwidth of node {format_cpulist(unknown)} was measured: measure it with `{to_paste('numa-lab', 'probe')}`"
        )
    return roofline.split(kind, shares)


def _roofline(
    shape: AttentionShape,
    measured: NodeBandwidths,
    socket_of: Mapping[int, int] | None,
    memory_bytes: Mapping[int, int] | None,
    limit_bytes: float = math.inf,
    contention: Contention | None = None,
) -> _Roofline:
    if shape.phase != "decode":
        raise InvalidInput(
            f"q_len={shape.q_len}: expected 1, since a prompt takes longer to compute than its K and V to read"
        )
    if not measured.cpu_nodes:
        raise InvalidInput(
            f"no bandwidth was measured between nodes that may be used: see the notes of `{to_paste('numa-lab', 'probe')}`"
        )
    contention = contention or Contention(measured, socket_groups(measured, socket_of))
    return _Roofline(shape, contention, memory_bytes or {}, limit_bytes)


@dataclass(frozen=True)
class _Roofline:
    """The strategies of a machine for one shape."""

    shape: AttentionShape
    contention: Contention
    memory_bytes: Mapping[int, int]
    limit_bytes: float  # of control groups, for all nodes together

    def strategy(
        self, kind: str, label: str, nodes: tuple[int, ...], traffic: Traffic, *,
        parts: tuple[int, ...] = (), merge_seconds: float = 0.0, remark: str = "",
    ) -> Strategy:  # fmt: skip
        """The strategy that causes this traffic: the slowest of all limits, and what it is."""
        seconds, limit = self.contention.slowest(traffic)
        held: dict[int, float] = defaultdict(float)
        for (_, mem), count in traffic.items():
            held[mem] += count
        full = [node for node, count in held.items() if count > self.memory_bytes.get(node, math.inf)]
        beyond = sum(held.values()) > self.limit_bytes
        if beyond:
            limit = (
                f"does not fit: {gb(sum(held.values()))} into the {gb(self.limit_bytes)} that a control group allows"
            )
        elif full:
            limit = f"does not fit: {gb(held[full[0]])} into the {gb(self.memory_bytes[full[0]])} of node {full[0]}"
        elif merge_seconds > seconds:
            limit = f"collecting partial results; without it {limit}"
        total = seconds + merge_seconds
        return Strategy(kind, label, nodes, total, limit + remark, parts, merge_seconds, not (full or beyond))

    def pair(self, cpu: int, mem: int) -> Strategy:
        """The CPUs of one node, and all K and V in the memory of one."""
        traffic = {(cpu, mem): float(self.shape.kv_bytes)}
        kind, nodes = ("single", (cpu,)) if cpu == mem else ("remote", (cpu, mem))
        return self.strategy(kind, f"c{cpu}m{mem}", nodes, traffic)

    def sharded(self, nodes: tuple[int, ...]) -> Strategy:
        """Each node owns a range of the tokens of every sequence, as long as its memory is fast."""
        upto = list(accumulate((self.contention.rate(node, node) for node in nodes), initial=0.0))
        bounds = [round(self.shape.kv_len * part / upto[-1]) for part in upto]
        tokens = [end - begin for begin, end in pairwise(bounds)]
        return self.split("sharded", dict(zip(nodes, tokens, strict=True)))

    def split(self, kind: str, shares: Mapping[int, int]) -> Strategy:
        """Each node reads its share from its own memory: of the tokens of every sequence (sharded), or of whole sequences."""
        unit = self.shape.kv_bytes / sum(shares.values())
        traffic = {(node, node): count * unit for node, count in shares.items() if count}
        owners, nodes = [node for node, _ in traffic], tuple(shares)
        merge = min(self._merge_seconds(one, owners) for one in owners) if kind == "sharded" else 0.0
        idle = len(nodes) - len(owners) if kind == "instances" else 0
        remark = f"; {idle} of {len(nodes)} nodes idle" if idle else ""
        label, parts = f"{kind} {format_cpulist(nodes)}", tuple(shares.values())
        return self.strategy(kind, label, nodes, traffic, parts=parts, merge_seconds=merge, remark=remark)

    def _merge_seconds(self, collector: int, owners: Sequence[int]) -> float:
        partial = self.shape.batch * self.shape.q_heads * self.shape.q_len * (self.shape.head_dim + 1) * PARTIAL_BYTES
        return sum(
            1e-9 * (self.contention.measured.latency(collector, node) or 0.0)
            + partial / self.contention.rate(collector, node)
            for node in owners
            if node != collector
        )

    def instances(self, nodes: tuple[int, ...]) -> Strategy:
        """Each node computes whole sequences: so many that the last node is done as early as can be."""
        rates = {node: self.contention.rate(node, node) for node in nodes}
        counts = {node: int(self.shape.batch * rate / sum(rates.values())) for node, rate in rates.items()}
        for _ in range(self.shape.batch - sum(counts.values())):
            counts[min(nodes, key=lambda node: (counts[node] + 1) / rates[node])] += 1
        return self.split("instances", counts)

    def interleaved(self) -> Strategy:
        """All CPU nodes, and each page of K and V on the next memory node."""
        return self.spread(self.contention.measured.cpu_nodes, dict.fromkeys(self.contention.measured.mem_nodes, 1.0))

    def spread(self, cpus: tuple[int, ...], weights: Mapping[int, float]) -> Strategy:
        """Some CPU nodes share the work evenly, and each memory node holds its part of the pages of K and V by weight."""
        share, mems = self.shape.kv_bytes / len(cpus) / sum(weights.values()), tuple(weights)
        traffic = {(cpu, mem): share * weight for cpu in cpus for mem, weight in weights.items()}
        label = f"c{format_cpulist(cpus)}{'i' if len(mems) > 1 else 'm'}{format_cpulist(mems)}"
        merge = min(self._merge_seconds(collector, cpus) for collector in cpus)
        return self.strategy("interleaved", label, tuple(sorted({*cpus, *mems})), traffic, merge_seconds=merge)
