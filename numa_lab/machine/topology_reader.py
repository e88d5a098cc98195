"""Reads the topology of a machine from sysfs and procfs.

Both are read below a root that may be given, so that a captured tree of another machine reads like a live one. Limits: caches and
core kinds are missing where the kernel does not tell them, and a virtual machine shows what its hypervisor invented. Source:
Documentation/ABI/stable/sysfs-devices-node and sysfs-devices-system-cpu.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from numa_lab.machine.control_groups import ControlGroups
from numa_lab.machine.hardware import Node, read_caches, read_cpus, read_gpus, read_memory
from numa_lab.machine.identity import hypervisor, is_emulated, model_name
from numa_lab.machine.kernel_files import MachineFiles
from numa_lab.machine.topology import Topology


def read_topology(root: str | os.PathLike[str] = "/") -> Topology:
    """Read the machine below a root.

    Parameters
    ----------
    root
        ``/`` for this machine, as the calling thread may use it; or a folder with captured ``sys`` and ``proc``.

    Raises
    ------
    InvalidInput
        `root` is no folder, or holds no sysfs.
    """
    files = MachineFiles(Path(root))
    listed = files.node_cpus
    allowed_cpus, allowed_nodes = files.allowed
    memory = {node: read_memory(files, node, only=len(listed) == 1) for node in listed}
    usable = tuple(node for node in allowed_nodes if memory[node][0])
    info = files.text("proc/cpuinfo")
    machine = Topology(
        nodes=tuple(Node(node, cpus, *memory[node], False, files.initiators(node)) for node, cpus in listed.items()),
        cpus=read_cpus(files, files.online, {cpu: node for node, cpus in listed.items() for cpu in cpus}),
        distances=files.distances(),
        allowed_cpus=allowed_cpus,
        allowed_nodes=usable,
        caches=read_caches(files, files.online),
        gpus=read_gpus(files, list(listed)),
        model_name=model_name(files, info),
        hypervisor=hypervisor(files, info),
        emulated=is_emulated(files, info),
        isolated_cpus=files.isolated,
        memory_limits=ControlGroups(files).memory_limits(),
    )
    nodes = (replace(node, effective=node.id in usable and bool(machine.cpus_of([node.id]))) for node in machine.nodes)
    return replace(machine, nodes=tuple(nodes))
