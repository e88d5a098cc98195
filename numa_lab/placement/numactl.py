"""Command lines that start a program on certain CPUs, by ``numactl`` and by ``taskset``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology


def cpu_options(
    cpu_nodes: Collection[int], node_cpus: Mapping[int, Collection[int]], usable: Collection[int]
) -> list[str]:
    """Return the option of numactl by which a command runs on the usable CPUs of these nodes, and on no others.

    ``--cpunodebind`` gives all CPUs of a node, also those that an affinity mask (``taskset``, batch systems) leaves out: where
    a mask does, the usable ones are named one by one. Where `usable` holds none of the nodes' CPUs, the nodes are named.

    Parameters
    ----------
    cpu_nodes
        The nodes on which the command is to run.
    node_cpus
        All CPUs of each node.
    usable
        The CPUs that the process may use.
    """
    of_nodes = {cpu for node in cpu_nodes for cpu in node_cpus.get(node, ())}
    left = of_nodes & set(usable)
    if left and left != of_nodes:
        return [f"--physcpubind={format_cpulist(left)}"]
    return [f"--cpunodebind={format_cpulist(cpu_nodes)}"]


def taskset_words(topology: Topology) -> list[str]:
    """Return the words that give a command the CPUs of this process; there are none where it may use all of the machine."""
    if set(topology.allowed_cpus) == {cpu.id for cpu in topology.cpus}:
        return []
    return ["taskset", "-c", format_cpulist(topology.allowed_cpus)]
