"""Shows a machine's topology in a few lines, for a terminal or a notebook."""

from __future__ import annotations

from collections import Counter

from numa_lab.machine.hardware import Node
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology


def overview(topology: Topology) -> str:
    """Return a few lines that show a topology, for a terminal or a notebook."""
    cores, kinds = {cpu.core for cpu in topology.cpus}, Counter(cpu.kind for cpu in topology.cpus if cpu.kind)
    memory_bytes = sum(topology.node(node).memory_bytes for node in topology.allowed_nodes)
    lines = [
        f"{topology.model_name or 'unknown processor'}: sockets {len(topology.sockets) or 'not told'}, cores {len(cores)}, "
        f"CPUs online {len(topology.cpus)}{''.join(f', {n} {kind}' for kind, n in sorted(kinds.items()))}, "
        f"last-level cache {f'{topology.last_cache_bytes / 2**20:.0f} MiB' if topology.last_cache_bytes else 'not told'}",
        *([f"virtual machine ({topology.hypervisor})"] if topology.hypervisor else []),
        *(["EMULATED: software runs these instructions, so times mean nothing here"] if topology.emulated else []),
        f"this process may use CPUs {format_cpulist(topology.allowed_cpus)} "
        f"and memory of nodes {format_cpulist(topology.allowed_nodes)}",
        *([f"isolated CPUs {format_cpulist(topology.isolated_cpus)} are left alone"] if _left_alone(topology) else []),
        *(limit.sentence() for limit in topology.memory_limits if limit.limit_bytes < memory_bytes),
        "",
        f"{'node':>4}  {'memory':>9}  {'free':>9}  {'usable':<14} CPUs",
    ]
    lines += [
        f"{node.id:>4}  {node.memory_bytes / 2**30:>5.1f} GiB  {node.free_bytes / 2**30:>5.1f} GiB  "
        f"{_usable(topology, node):<14} {format_cpulist(node.cpus) or 'none'}"
        for node in topology.nodes
    ]
    if topology.distances and len(topology.nodes) > 1:
        lines += ["", "distances " + " ".join(f"{node:>4}" for node in topology.node_ids)]
        lines += [
            f"{node:>9} " + " ".join(f"{value:>4}" for value in row)
            for node, row in zip(topology.node_ids, topology.distances, strict=True)
        ]
    elif len(topology.nodes) > 1:
        lines += ["", "distances: not told"]
    lines += [f"GPU {gpu.pci}: node {'not told' if gpu.node is None else gpu.node}" for gpu in topology.gpus]
    return "\n".join(lines)


def _left_alone(topology: Topology) -> bool:
    return not set(topology.isolated_cpus) & set(topology.usable_cpus) and bool(topology.isolated_cpus)


def _usable(topology: Topology, node: Node) -> str:
    cpus, memory = bool(topology.cpus_of([node.id])), node.id in topology.allowed_nodes
    return {(True, True): "yes", (True, False): "CPUs only", (False, True): "memory only"}.get((cpus, memory), "no")
