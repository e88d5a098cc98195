"""A machine and what this process may use of it: nodes, CPUs, memory, distances, caches and GPUs, and the CPUs to place threads on.

``numa_lab.machine.topology_reader`` reads one from the kernel's files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numa_lab.errors import InvalidInput, NodeUnavailable
from numa_lab.machine.control_groups import MemoryLimit
from numa_lab.machine.hardware import Cache, Cpu, Gpu, Node
from numa_lab.machine.sysfs import format_cpulist, parse_cpulist


@dataclass(frozen=True)
class Topology:
    """A machine; `distances` stands in the order of `nodes`, and is None where the firmware gave none that fits."""

    nodes: tuple[Node, ...]
    cpus: tuple[Cpu, ...]
    distances: tuple[tuple[int, ...], ...] | None
    allowed_cpus: tuple[int, ...]
    allowed_nodes: tuple[int, ...]  # whose memory this process may use
    caches: tuple[Cache, ...]
    gpus: tuple[Gpu, ...]
    model_name: str
    hypervisor: str | None  # its name as far as it is told, None where none is seen
    emulated: bool  # its instructions are run by software, so that times mean nothing
    isolated_cpus: tuple[int, ...] = ()  # online, and kept free of ordinary work: isolcpus and nohz_full
    memory_limits: tuple[MemoryLimit, ...] = ()  # of the control groups of this process

    @cached_property
    def node_ids(self) -> tuple[int, ...]:
        """Ids of all nodes; they may have gaps."""
        return tuple(node.id for node in self.nodes)

    @cached_property
    def node_cpus(self) -> dict[int, tuple[int, ...]]:
        """Online CPUs of each node."""
        return {node.id: node.cpus for node in self.nodes}

    @cached_property
    def allowed_node_cpus(self) -> dict[int, tuple[int, ...]]:
        """CPUs of each node that this process may use."""
        allowed = set(self.allowed_cpus)
        return {node.id: tuple(cpu for cpu in node.cpus if cpu in allowed) for node in self.nodes}

    @cached_property
    def effective_nodes(self) -> tuple[int, ...]:
        """Ids of the nodes whose CPUs and memory this process may use."""
        return tuple(node.id for node in self.nodes if node.effective)

    @cached_property
    def usable_cpus(self) -> tuple[int, ...]:
        """The CPUs that this process may use and that are not isolated, which threads are placed on.

        Isolated ones (``isolcpus``, ``nohz_full``) were set aside at boot for something else, and threads that share them are
        not balanced between them. A process that may use these alone was put there on purpose: then they serve.
        """
        isolated = set(self.isolated_cpus)
        return tuple(cpu for cpu in self.allowed_cpus if cpu not in isolated) or self.allowed_cpus

    @cached_property
    def _usable(self) -> frozenset[int]:
        return frozenset(self.usable_cpus)

    @cached_property
    def _usable_by_node(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, list[int]] = {}
        for cpu in self.cpus:
            if cpu.id in self._usable:
                found.setdefault(cpu.node, []).append(cpu.id)
        return {node: tuple(cpus) for node, cpus in found.items()}

    @cached_property
    def cpu_nodes(self) -> tuple[int, ...]:
        """Ids of the nodes with CPUs among ``usable_cpus``."""
        return tuple(node for node in self.node_ids if node in self._usable_by_node)

    @cached_property
    def sockets(self) -> tuple[int, ...]:
        """Ids of the processor packages as the kernel numbers them, none where it does not tell them."""
        return tuple(sorted({cpu.socket for cpu in self.cpus} - {-1}))

    @cached_property
    def node_sockets(self) -> dict[int, int] | None:
        """The socket of each node with CPUs; None where the kernel does not tell one, or a node spans several."""
        pairs = {(cpu.node, cpu.socket) for cpu in self.cpus}
        socket_of = dict(pairs)
        return None if len(socket_of) < len(pairs) or -1 in socket_of.values() else socket_of

    @cached_property
    def _cpu_by_id(self) -> Mapping[int, Cpu]:
        return {cpu.id: cpu for cpu in self.cpus}

    def node(self, node_id: int) -> Node:
        """The node with this id.

        Raises
        ------
        NodeUnavailable
            There is none; the message names those that exist.
        """
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise NodeUnavailable(f"node {node_id} does not exist; nodes of this machine: {format_cpulist(self.node_ids)}")

    def node_of_cpu(self, cpu: int) -> int:
        """The node of an online CPU.

        Raises
        ------
        InvalidInput
            There is no such CPU, or it is offline.
        """
        try:
            return self._cpu_by_id[cpu].node
        except KeyError:
            raise InvalidInput(f"CPU {cpu} is not online; online are {format_cpulist(self._cpu_by_id)}") from None

    def cpus_of(self, nodes: Iterable[int]) -> tuple[int, ...]:
        """Online CPUs of these nodes that this process may use, without isolated ones (see ``usable_cpus``)."""
        lists = [self._usable_by_node[node] for node in set(nodes) if node in self._usable_by_node]
        return lists[0] if len(lists) == 1 else tuple(sorted(cpu for cpus in lists for cpu in cpus))

    def physical_cores(self, cpus: Iterable[int]) -> tuple[int, ...]:
        """One CPU for each physical core among `cpus`: the lowest of ``usable_cpus``."""
        first: dict[int, int] = {}
        for cpu in sorted(self._usable.intersection(cpus)):
            first.setdefault(self._cpu_by_id[cpu].core, cpu)
        return tuple(sorted(first.values()))

    def cpus_for(self, nodes: Collection[int], threads: int | None = None) -> tuple[int, ...]:
        """A CPU for each of `threads` threads on these nodes; as many as there are physical cores where None is given.

        They are spread evenly, hence over the caches. Two threads share a core only where the cores don't suffice.

        Raises
        ------
        InvalidInput
            More threads than CPUs that may be used there, or none.
        """
        cpus = self.cpus_of(nodes)
        cores = self.physical_cores(cpus)
        threads = len(cores) if threads is None else threads
        if not 1 <= threads <= len(cpus):
            raise InvalidInput(
                f"threads={threads}: expected 1 to {len(cpus)}, since this process may use {len(cpus)} CPUs "
                f"({len(cores)} physical cores) of nodes {format_cpulist(nodes)}"
            )
        if threads > len(cores):
            return (*cores, *(cpu for cpu in cpus if cpu not in cores))[:threads]
        return spread(cores, threads)

    def capacity_bytes(self, nodes: Iterable[int]) -> int:
        """Bytes that this process may hold on these nodes at most: their memory, or less by a control group's limit."""
        limits = (limit.limit_bytes for limit in self.memory_limits)
        return min([sum(self.node(node).memory_bytes for node in nodes), *limits])

    def available_bytes(self, nodes: Iterable[int], sharers: int = 1) -> int:
        """Bytes that this process could still take on these nodes, file cache included, when the machine was read.

        What a control group leaves is divided by the `sharers` that take at once.
        """
        limits = (limit.available_bytes // sharers for limit in self.memory_limits)
        return min([sum(self.node(node).available_bytes for node in nodes), *limits])

    def free_bytes(self, nodes: Iterable[int]) -> int:
        """As ``available_bytes``, of memory that holds nothing, not even file cache."""
        limits = (limit.available_bytes for limit in self.memory_limits)
        return min([sum(self.node(node).free_bytes for node in nodes), *limits])

    def last_cache_bytes_of(self, cpus: Iterable[int]) -> int:
        """Bytes of the last-level caches that these CPUs reach, all together; 0 where the kernel does not tell."""
        wanted = set(cpus)
        reached = [cache for cache in self.caches if cache.kind != "Instruction" and wanted & set(cache.cpus)]
        last = max((cache.level for cache in reached), default=0)
        return sum(cache.size_bytes for cache in reached if cache.level == last)

    @property
    def last_cache_bytes(self) -> int:
        """Bytes of all last-level caches of the machine."""
        return self.last_cache_bytes_of(cpu.id for cpu in self.cpus)

    def distance(self, one: int, other: int) -> int | None:
        """Relative distance of two nodes as firmware gives it (10: itself), None where it gives none."""
        if self.distances is None:
            return None
        return self.distances[self.node_ids.index(one)][self.node_ids.index(other)]

    def require_effective(self, node_id: int) -> None:
        """Refuse a node whose CPUs and memory this process may not use.

        Raises
        ------
        NodeUnavailable
            The message names the nodes that serve.
        """
        self.node(node_id)
        if node_id not in self.effective_nodes:
            raise NodeUnavailable(
                f"node {node_id} has no CPUs, or no memory, that this process may use{self.isolated_words(node_id)}; nodes with "
                f"both: {format_cpulist(self.effective_nodes) or 'none'}"
            )

    def require_effective_nodes(self, nodes: Iterable[int] | None = None) -> tuple[int, ...]:
        """Return some nodes, or all effective ones where None are given; refuse nodes that this process may not use, and none at all.

        Raises
        ------
        NodeUnavailable
            The message names the nodes that serve, or what this process may use.
        """
        chosen = self.effective_nodes if nodes is None else tuple(nodes)
        for node_id in chosen:
            self.require_effective(node_id)
        if not chosen:
            raise NodeUnavailable(
                "no node has both CPUs and memory that this process may use: allowed are CPUs "
                f"{format_cpulist(self.allowed_cpus) or 'none'} and memory of nodes "
                f"{format_cpulist(self.allowed_nodes) or 'none'}; widen the cpuset"
                if nodes is None
                else "nodes=(): expected at least one node"
            )
        return chosen

    def isolated_words(self, node_id: int) -> str:
        """Why CPUs of a node are left alone, to be added to a message; empty where none is isolated."""
        isolated = set(self.node(node_id).cpus).intersection(self.isolated_cpus)
        return f" (its CPUs {format_cpulist(isolated)} are isolated by isolcpus or nohz_full)" if isolated else ""

    def nearest_cpu_node(self, node_id: int) -> int:
        """The node whose CPUs are nearest to this node's memory: itself where it has usable CPUs.

        Raises
        ------
        NodeUnavailable
            No such node, or no CPU may be used at all.
        """
        node = self.node(node_id)
        if not self.cpu_nodes:
            allowed = format_cpulist(self.allowed_cpus) or "none"
            raise NodeUnavailable(f"no node has CPUs that this process may use (allowed: {allowed}): widen its cpuset")

        def nearness(other: int) -> tuple[bool, bool, int, int]:
            return (other != node_id, other not in node.initiators, self.distance(other, node_id) or 0, other)

        return min(self.cpu_nodes, key=nearness)

    def fingerprint(self) -> str:
        """Short hash of the hardware, independent of what this process may use and of free memory."""
        identity = [
            self.model_name,
            # Not its size: virtual machines are given and robbed of memory while they run.
            [(n.id, n.cpus, n.memory_bytes > 0) for n in self.nodes],
            self.distances,
            sorted((c.level, c.kind, c.size_bytes, c.cpus) for c in self.caches),
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """The whole as plain JSON values; sizes are bytes."""
        return {
            "nodes": [vars(n) | {"cpus": list(n.cpus), "initiators": list(n.initiators)} for n in self.nodes],
            "distances": [list(row) for row in self.distances] if self.distances else None,
            "allowed_cpus": list(self.allowed_cpus),
            "allowed_nodes": list(self.allowed_nodes),
            "isolated_cpus": list(self.isolated_cpus),
            "memory_limits": [vars(limit) for limit in self.memory_limits],
            "gpus": [vars(gpu) for gpu in self.gpus],
            "sockets": [{"id": s, "cpus": [cpu.id for cpu in self.cpus if cpu.socket == s]} for s in self.sockets],
            "cpus": [vars(cpu) for cpu in self.cpus],
            "caches": [vars(cache) | {"cpus": format_cpulist(cache.cpus)} for cache in self.caches],
            "model_name": self.model_name,
            "hypervisor": self.hypervisor,
            "emulated": self.emulated,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Topology:
        """Read back what ``to_json`` gave. What was written before isolated CPUs and memory limits were looked at has none of them.

        Raises
        ------
        InvalidInput
            It is something else; the message says what is wrong with it.
        """
        try:
            return cls(
                nodes=tuple(
                    Node(**n | {"cpus": tuple(n["cpus"]), "initiators": tuple(n["initiators"])})
                    for n in stored["nodes"]
                ),
                cpus=tuple(Cpu(**cpu) for cpu in stored["cpus"]),
                distances=tuple(map(tuple, stored["distances"])) if stored["distances"] else None,
                allowed_cpus=tuple(stored["allowed_cpus"]),
                allowed_nodes=tuple(stored["allowed_nodes"]),
                caches=tuple(Cache(**cache | {"cpus": parse_cpulist(cache["cpus"])}) for cache in stored["caches"]),
                gpus=tuple(Gpu(**gpu) for gpu in stored["gpus"]),
                **{name: stored[name] for name in ("model_name", "hypervisor", "emulated")},
                isolated_cpus=tuple(stored.get("isolated_cpus", ())),
                memory_limits=tuple(MemoryLimit(**limit) for limit in stored.get("memory_limits", ())),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise InvalidInput(f"a topology ({error!r}): expected what `numa-lab topology --json` prints") from error


def spread(cpus: Sequence[int], count: int) -> tuple[int, ...]:
    """So many of these CPUs, at even distances: spread over the caches."""
    return tuple(cpus[i * len(cpus) // count] for i in range(count))
