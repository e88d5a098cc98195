"""The time that memory allows for decode attention, for each way to place it: predicted from measured bandwidths.

A strategy reads each byte of K and V once, from known memory by known CPUs, and

    seconds = max over limits(bytes through it / its bandwidth) + merge

with these limits: each path from CPUs to memory, at the bandwidth that this pair of nodes reached alone; the memory of each
node and the CPUs of each node, at the best that either reached with any other; the link from each socket to each
other, at the best that any pair across it reached in this direction; and all nodes reading at once, at what was measured of that.

Where several nodes compute one sequence, one of them collects the partial results of all, which are float32:

    merge = sum over the other nodes(latency + batch * q_heads * q_len * (head_dim + 1) * 4 bytes / bandwidth)

with latency and bandwidth of the collector's path to each of them; the collector is the node that is done first. Nodes that
share this work are faster: it matters for large batches, where instances need no merge at all.

Limits: only reading takes time, so that a kernel below the memory limit is slower, and so is waking threads (microseconds:
they matter below a megabyte). Caches that hold K and V make it faster. A link's bandwidth is a lower bound where one node alone
doesn't fill it, so that interleaving may do better than is said. Nodes with CPUs or memory alone take no part in sharding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

from numa_lab.attention.shapes import AttentionShape
from numa_lab.bandwidth.contention import Contention, Traffic, gb
from numa_lab.bandwidth.node_bandwidths import NodeBandwidths, socket_groups
from numa_lab.errors import InvalidInput
from numa_lab.machine.shell_commands import to_paste
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology

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


@dataclass(frozen=True)
class Roofline:
    """What the memory of one machine allows, from which each way to place a decode step is predicted.

    Parameters
    ----------
    bandwidths
        Bandwidths and latencies between the nodes.
    socket_of
        The socket of each node with CPUs; inferred as ``socket_groups`` says where it is None.
    memory_bytes
        Memory of each node; where it is not known, everything fits.
    limit_bytes
        What this process may hold on all nodes together, by the limits of its control groups.

    Raises
    ------
    InvalidInput
        Nothing was measured.
    """

    bandwidths: NodeBandwidths
    socket_of: Mapping[int, int] | None = None
    memory_bytes: Mapping[int, int] = field(default_factory=dict)
    limit_bytes: float = math.inf

    def __post_init__(self) -> None:
        """Refuse bandwidths of which none was measured."""
        if not self.bandwidths.cpu_nodes:
            raise InvalidInput(
                "no bandwidth was measured between nodes that may be used: see the notes of "
                f"`{to_paste('numa-lab', 'probe')}`"
            )

    @classmethod
    def of_topology(cls, topology: Topology, bandwidths: NodeBandwidths) -> Roofline:
        """Return what memory allows a process on a machine, of whose nodes it uses those that it may.

        Raises
        ------
        InvalidInput
            The nodes that were measured are not those of the topology, or none of them may be used.
        """
        if set(topology.node_ids) != set(bandwidths.nodes):
            raise InvalidInput(
                f"measured were nodes {format_cpulist(bandwidths.nodes)}, and the machine has "
                f"{format_cpulist(topology.node_ids)}: measure this machine with `{to_paste('numa-lab', 'probe')}`"
            )
        return cls(
            bandwidths.only(topology.cpu_nodes, topology.allowed_nodes),
            topology.node_sockets,
            {node.id: node.memory_bytes for node in topology.nodes},
            min((limit.limit_bytes for limit in topology.memory_limits), default=math.inf),
        )

    @cached_property
    def contention(self) -> Contention:
        """What paths between the nodes share."""
        return Contention(self.bandwidths, socket_groups(self.bandwidths, self.socket_of))

    def strategies(self, shape: AttentionShape) -> list[Strategy]:
        """Predict each way to place a decode step of one new token per sequence.

        Returns
        -------
        Strategies, the fastest first: ``single`` and ``remote`` for every pair of CPU node and memory node, ``sharded`` over
        the nodes of each socket and over all, and one of ``instances``: whole sequences per node, so that a batch smaller
        than the number of nodes leaves nodes idle.

        Raises
        ------
        InvalidInput
            The shape is no decode step.
        """
        _require_decode(shape)
        cpu_nodes, mem_nodes = self.bandwidths.cpu_nodes, self.bandwidths.mem_nodes
        local = tuple(node for node in cpu_nodes if node in mem_nodes)
        strategies = [self._pair(shape, cpu, mem) for cpu in cpu_nodes for mem in mem_nodes]
        if len(local) > 1:
            teams = {tuple(node for node in group if node in local) for group in (*self.contention.groups, local)}
            strategies += [self._sharded(shape, nodes) for nodes in sorted(teams) if len(nodes) > 1]
            strategies.append(self._instances(shape, local))
        return sorted(strategies, key=lambda strategy: strategy.seconds)

    def interleaved(self, shape: AttentionShape) -> Strategy:
        """Predict ``numactl --interleave``, to compare with: each page on the next memory node, the work split evenly over all CPUs.

        Raises
        ------
        InvalidInput
            The shape is no decode step.
        """
        _require_decode(shape)
        return self._spread(shape, self.bandwidths.cpu_nodes, dict.fromkeys(self.bandwidths.mem_nodes, 1.0))

    def binding(
        self,
        shape: AttentionShape,
        cpu_nodes: Sequence[int],
        mem_nodes: Sequence[int],
        weights: Mapping[int, float] | None = None,
    ) -> Strategy | None:
        """Predict a binding: the CPUs of some nodes share the work evenly, and pages lie on some memory nodes in turn.

        Parameters
        ----------
        shape
            A decode step.
        cpu_nodes, mem_nodes
            The nodes that compute, and those whose memory holds K and V.
        weights
            How many pages in turn each memory node gets; one where None are given.

        Returns
        -------
        The strategy; None where the CPUs or the memory of one of the nodes were not measured.

        Raises
        ------
        InvalidInput
            The shape is no decode step.
        """
        _require_decode(shape)
        if not set(cpu_nodes) <= set(self.bandwidths.cpu_nodes) or not set(mem_nodes) <= set(self.bandwidths.mem_nodes):
            return None
        return self._spread(shape, tuple(cpu_nodes), {node: weights[node] if weights else 1.0 for node in mem_nodes})

    def split(self, shape: AttentionShape, kind: str, shares: Mapping[int, int]) -> Strategy:
        """Predict a decode step as it is split over nodes, each with its share in its own memory.

        Parameters
        ----------
        shape
            A decode step.
        kind
            ``sharded``: shares are tokens of every sequence, or of anything in proportion. ``instances``: whole sequences.
        shares
            Of each node; not all 0.

        Raises
        ------
        InvalidInput
            The shape is no decode step, or a node was not measured.
        """
        _require_decode(shape)
        if unknown := set(shares) - set(self.bandwidths.cpu_nodes) & set(self.bandwidths.mem_nodes):
            raise InvalidInput(
                f"no bandwidth of node {format_cpulist(unknown)} was measured: measure it with `{to_paste('numa-lab', 'probe')}`"
            )
        return self._split(shape, kind, shares)

    def _pair(self, shape: AttentionShape, cpu: int, mem: int) -> Strategy:
        """The CPUs of one node, and all K and V in the memory of one."""
        kind, nodes = ("single", (cpu,)) if cpu == mem else ("remote", (cpu, mem))
        return self._strategy(kind, f"c{cpu}m{mem}", nodes, {(cpu, mem): float(shape.kv_bytes)})

    def _sharded(self, shape: AttentionShape, nodes: tuple[int, ...]) -> Strategy:
        """Each node owns a range of the tokens of every sequence, as long as its memory is fast."""
        sums = list(accumulate((self.contention.rate(node, node) for node in nodes), initial=0.0))
        bounds = [round(shape.kv_len * part / sums[-1]) for part in sums]
        tokens = [end - begin for begin, end in pairwise(bounds)]
        return self._split(shape, "sharded", dict(zip(nodes, tokens, strict=True)))

    def _instances(self, shape: AttentionShape, nodes: tuple[int, ...]) -> Strategy:
        """Each node computes whole sequences: so many that the last node is done as early as can be."""
        rates = {node: self.contention.rate(node, node) for node in nodes}
        counts = {node: int(shape.batch * rate / sum(rates.values())) for node, rate in rates.items()}
        for _ in range(shape.batch - sum(counts.values())):
            counts[min(nodes, key=lambda node: (counts[node] + 1) / rates[node])] += 1
        return self._split(shape, "instances", counts)

    def _split(self, shape: AttentionShape, kind: str, shares: Mapping[int, int]) -> Strategy:
        """Each node reads its share from its own memory: of the tokens of every sequence (sharded), or of whole sequences."""
        unit = shape.kv_bytes / sum(shares.values())
        traffic = {(node, node): count * unit for node, count in shares.items() if count}
        owners, nodes = [node for node, _ in traffic], tuple(shares)
        merge_seconds = self._merge_seconds(shape, owners) if kind == "sharded" else 0.0
        idle = len(nodes) - len(owners) if kind == "instances" else 0
        remark = f"; {idle} of {len(nodes)} nodes idle" if idle else ""
        label, parts = f"{kind} {format_cpulist(nodes)}", tuple(shares.values())
        return self._strategy(kind, label, nodes, traffic, parts=parts, merge_seconds=merge_seconds, remark=remark)

    def _spread(self, shape: AttentionShape, cpus: tuple[int, ...], weights: Mapping[int, float]) -> Strategy:
        """Some CPU nodes share the work evenly, and each memory node holds its part of the pages of K and V by weight."""
        share, mems = shape.kv_bytes / len(cpus) / sum(weights.values()), tuple(weights)
        traffic = {(cpu, mem): share * weight for cpu in cpus for mem, weight in weights.items()}
        label = f"c{format_cpulist(cpus)}{'i' if len(mems) > 1 else 'm'}{format_cpulist(mems)}"
        nodes = tuple(sorted({*cpus, *mems}))
        return self._strategy("interleaved", label, nodes, traffic, merge_seconds=self._merge_seconds(shape, cpus))

    def _merge_seconds(self, shape: AttentionShape, owners: Sequence[int]) -> float:
        """Seconds until the node that is done first has collected the partial results of all owners."""
        partial = shape.batch * shape.q_heads * shape.q_len * (shape.head_dim + 1) * PARTIAL_BYTES

        def collected_by(collector: int) -> float:
            return sum(
                1e-9 * (self.bandwidths.latency(collector, node) or 0.0)
                + partial / self.contention.rate(collector, node)
                for node in owners
                if node != collector
            )

        return min(map(collected_by, owners))

    def _strategy(
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


def _require_decode(shape: AttentionShape) -> None:
    if shape.phase != "decode":
        raise InvalidInput(
            f"q_len={shape.q_len}: expected 1, since a prompt takes longer to compute than its K and V to read"
        )
