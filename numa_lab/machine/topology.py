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
    """A machine, and what the process may use of it that read it.

    The rows and columns of `distances` are in the order of `nodes`; it is None where the firmware gives no distances that fit them.
    """

    nodes: tuple[Node, ...]
    cpus: tuple[Cpu, ...]
    distances: tuple[tuple[int, ...], ...] | None
    allowed_cpus: tuple[int, ...]
    allowed_nodes: tuple[int, ...]  # whose memory this process may use
    caches: tuple[Cache, ...]
    gpus: tuple[Gpu, ...]
    model_name: str
    hypervisor: str | None  # its name, or "unknown"; None where no hypervisor is seen
    emulated: bool  # whether software runs the instructions, so that times mean nothing
    isolated_cpus: tuple[int, ...] = ()  # online CPUs that are kept free of ordinary work, by isolcpus and nohz_full
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
        """The CPUs on which threads are placed: those that this process may use and that are not isolated.

        Isolated CPUs (``isolcpus``, ``nohz_full``) were set aside at boot for something else, and the kernel does not balance threads
        between them. A process that may use isolated CPUs alone was put there on purpose, so they are all usable then.
        """
        isolated = set(self.isolated_cpus)
        return tuple(cpu for cpu in self.allowed_cpus if cpu not in isolated) or self.allowed_cpus

    @cached_property
    def _usable(self) -> frozenset[int]:
        return frozenset(self.usable_cpus)

    @cached_property
    def _usable_by_node(self) -> dict[int, tuple[int, ...]]:
        by_node: dict[int, list[int]] = {}
        for cpu in self.cpus:
            if cpu.id in self._usable:
                by_node.setdefault(cpu.node, []).append(cpu.id)
        return {node: tuple(cpus) for node, cpus in by_node.items()}

    @cached_property
    def cpu_nodes(self) -> tuple[int, ...]:
        """Ids of the nodes with CPUs among ``usable_cpus``."""
        return tuple(node for node in self.node_ids if node in self._usable_by_node)

    @cached_property
    def sockets(self) -> tuple[int, ...]:
        """Ids of the processor packages as the kernel numbers them; empty where it does not tell them."""
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
        """Return the node with this id.

        Raises
        ------
        NodeUnavailable
            There is no such node; the message names those that exist.
        """
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise NodeUnavailable(f"node {node_id} does not exist; nodes of this machine: {format_cpulist(self.node_ids)}")

    def node_of_cpu(self, cpu: int) -> int:
        """Return the node of an online CPU.

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
        """Return the CPUs among ``usable_cpus`` that belong to these nodes, in ascending order."""
        lists = [self._usable_by_node[node] for node in set(nodes) if node in self._usable_by_node]
        return lists[0] if len(lists) == 1 else tuple(sorted(cpu for cpus in lists for cpu in cpus))

    def physical_cores(self, cpus: Iterable[int]) -> tuple[int, ...]:
        """Return one CPU for each physical core among `cpus`: the lowest that is usable (``usable_cpus``)."""
        first: dict[int, int] = {}
        for cpu in sorted(self._usable.intersection(cpus)):
            first.setdefault(self._cpu_by_id[cpu].core, cpu)
        return tuple(sorted(first.values()))

    def cpus_for(self, nodes: Collection[int], threads: int | None = None) -> tuple[int, ...]:
        """Return a CPU for each of `threads` threads on these nodes; one for each physical core where None is given.

        The CPUs are spread evenly, hence over the caches. Two threads share a core only where the cores don't suffice.

        Raises
        ------
        InvalidInput
            `threads` is less than 1, or more than the CPUs that may be used there.
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
        """Return the bytes that this process may hold on these nodes at most: their memory, or less by a control group's limit."""
        limits = (limit.limit_bytes for limit in self.memory_limits)
        return min([sum(self.node(node).memory_bytes for node in nodes), *limits])

    def available_bytes(self, nodes: Iterable[int], sharers: int = 1) -> int:
        """Return the bytes that this process could still take on these nodes, file cache included, when the machine was read.

        What a control group leaves is divided by the number of `sharers` that take memory at the same time.
        """
        limits = (limit.available_bytes // sharers for limit in self.memory_limits)
        return min([sum(self.node(node).available_bytes for node in nodes), *limits])

    def free_bytes(self, nodes: Iterable[int]) -> int:
        """Return what ``available_bytes`` does, without memory that holds file cache."""
        limits = (limit.available_bytes for limit in self.memory_limits)
        return min([sum(self.node(node).free_bytes for node in nodes), *limits])

    def last_cache_bytes_of(self, cpus: Iterable[int]) -> int:
        """Return the bytes of all last-level caches that these CPUs reach; 0 where the kernel does not tell."""
        wanted = set(cpus)
        reached = [cache for cache in self.caches if cache.kind != "Instruction" and wanted & set(cache.cpus)]
        last = max((cache.level for cache in reached), default=0)
        return sum(cache.size_bytes for cache in reached if cache.level == last)

    @property
    def last_cache_bytes(self) -> int:
        """Bytes of all last-level caches of the machine."""
        return self.last_cache_bytes_of(cpu.id for cpu in self.cpus)

    def distance(self, first: int, second: int) -> int | None:
        """Return the relative distance of two nodes as firmware gives it, 10 for a node and itself; None where it gives none."""
        if self.distances is None:
            return None
        return self.distances[self.node_ids.index(first)][self.node_ids.index(second)]

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
                f"node {node_id} has no CPUs, or no memory, that this process may use{self.isolation_note(node_id)}; nodes with "
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

    def isolation_note(self, node_id: int) -> str:
        """Return why CPUs of a node are left alone, to be added to a message; empty where none is isolated."""
        isolated = set(self.node(node_id).cpus).intersection(self.isolated_cpus)
        return f" (its CPUs {format_cpulist(isolated)} are isolated by isolcpus or nohz_full)" if isolated else ""

    def nearest_cpu_node(self, node_id: int) -> int:
        """Return the node whose CPUs are nearest to this node's memory, which is the node itself where it has usable CPUs.

        Raises
        ------
        NodeUnavailable
            There is no such node, or this process may use no CPU at all.
        """
        node = self.node(node_id)
        if not self.cpu_nodes:
            allowed = format_cpulist(self.allowed_cpus) or "none"
            raise NodeUnavailable(f"no node has CPUs that this process may use (allowed: {allowed}): widen its cpuset")

        def farness(cpu_node: int) -> tuple[bool, bool, int, int]:
            distance = self.distance(cpu_node, node_id) or 0
            return (cpu_node != node_id, cpu_node not in node.initiators, distance, cpu_node)

        return min(self.cpu_nodes, key=farness)

    def fingerprint(self) -> str:
        """Return a short hash of the hardware, which depends neither on what this process may use nor on free memory."""
        identity = [
            self.model_name,
            # The size of a node's memory is left out, since a virtual machine is given and loses memory while it runs.
            [(n.id, n.cpus, n.memory_bytes > 0) for n in self.nodes],
            self.distances,
            sorted((c.level, c.kind, c.size_bytes, c.cpus) for c in self.caches),
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """Return the whole topology as plain JSON values; sizes are bytes."""
        return {
            "nodes": [vars(n) | {"cpus": list(n.cpus), "initiators": list(n.initiators)} for n in self.nodes],
            "distances": [list(row) for row in self.distances] if self.distances else None,
            "allowed_cpus": list(self.allowed_cpus),
            "allowed_nodes": list(self.allowed_nodes),
            "isolated_cpus": list(self.isolated_cpus),
            "memory_limits": [{**vars(limit)} for limit in self.memory_limits],
            "gpus": [{**vars(gpu)} for gpu in self.gpus],
            "sockets": [{"id": s, "cpus": [cpu.id for cpu in self.cpus if cpu.socket == s]} for s in self.sockets],
            "cpus": [{**vars(cpu)} for cpu in self.cpus],
            "caches": [vars(cache) | {"cpus": format_cpulist(cache.cpus)} for cache in self.caches],
            "model_name": self.model_name,
            "hypervisor": self.hypervisor,
            "emulated": self.emulated,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Topology:
        """Read back what ``to_json`` gave.

        Older versions stored neither isolated CPUs nor memory limits, which are then taken for none, and the first one did not store
        what is available, for which the free memory stands in.

        Raises
        ------
        InvalidInput
            It is something else; the message says what is wrong with it.
        """
        try:
            return cls(
                nodes=tuple(_stored_node(node) for node in stored["nodes"]),
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


def _stored_node(stored: Mapping[str, Any]) -> Node:
    lists = {name: tuple(stored[name]) for name in ("cpus", "initiators")}
    return Node(**{"available_bytes": stored["free_bytes"], **stored, **lists})


def spread(cpus: Sequence[int], count: int) -> tuple[int, ...]:
    """Return so many of these CPUs, at even distances, so that they are spread over the caches."""
    return tuple(cpus[i * len(cpus) // count] for i in range(count))
