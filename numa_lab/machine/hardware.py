"""Nodes, CPUs, caches and GPUs of a machine, and how they are read from its sysfs tree."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from numa_lab.machine.sysfs import Tree, parse_cpulist

_ALIKE = 1.25  # ratio up to which cores are of one kind
_GPU_CLASSES = ("0x03", "0x12")  # PCI display controllers and processing accelerators


@dataclass(frozen=True)
class Cpu:
    """An online CPU.

    `core` is the lowest CPU number of its physical core, and `socket` the processor package, -1 where the kernel does not tell it.
    """

    id: int
    core: int
    socket: int
    node: int
    kind: str = ""  # "performance" or "efficiency"; empty where all cores are alike


@dataclass(frozen=True)
class Cache:
    """One cache: its level, kind, size, and the online CPUs that share it."""

    level: int
    kind: str  # Data, Instruction or Unified
    size_bytes: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Gpu:
    """A GPU or accelerator on the PCI bus, and its nearest node where the kernel tells it."""

    pci: str
    node: int | None


@dataclass(frozen=True)
class Node:
    """A NUMA node: its online CPUs and its memory; `effective` where this process may use both.

    `free_bytes` is the memory that holds nothing. `available_bytes` adds the file cache that the kernel would give up first.
    """

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int
    free_bytes: int
    available_bytes: int
    effective: bool
    initiators: tuple[int, ...] = ()  # the nodes with the best access to its memory, where firmware tells (HMAT)


def read_cpus(tree: Tree, online: tuple[int, ...], node_of: Mapping[int, int]) -> tuple[Cpu, ...]:
    """Read the online CPUs; `node_of` gives the node of each."""
    kinds, present = core_kinds(tree, online), set(online)
    cpus = []
    for cpu in online:
        folder = f"{tree.cpu_dir}/cpu{cpu}/topology"
        siblings = tree.cpu_list(folder, "thread_siblings", "thread_siblings_list")
        core = min((sibling for sibling in siblings if sibling in present), default=cpu)
        socket = int(tree.text(f"{folder}/physical_package_id") or -1)
        cpus.append(Cpu(cpu, core, socket, node_of.get(cpu, 0), kinds.get(cpu, "")))
    return tuple(cpus)


def core_kinds(tree: Tree, online: tuple[int, ...]) -> dict[int, str]:
    """Tell big cores from little ones: by Intel's hybrid PMUs, else by capacity, and last by the highest clock.

    Among equal cores the favoured ones clock up to a fifth higher; the little ones of hybrid machines clock a quarter lower or more.
    ``acpi_cppc/highest_perf`` is not asked, since on AMD it ranks equal cores too, from 166 to 236.

    Returns
    -------
    "performance" or "efficiency" for each CPU; empty where all cores are alike.
    """
    kinds = {"cpu_core": "performance", "cpu_atom": "efficiency", "cpu_lowpower": "efficiency"}
    pmus = {pmu: parse_cpulist(tree.text(f"sys/devices/{pmu}/cpus")) for pmu in kinds}
    if pmus["cpu_core"] and pmus["cpu_atom"]:
        return {cpu: kinds[pmu] for pmu, cpus in pmus.items() for cpu in cpus}
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        if not tree.has(f"{tree.cpu_dir}/cpu{online[0] if online else 0}/{name}"):
            continue  # the kernel tells it of all CPUs or of none
        values = {cpu: int(tree.text(f"{tree.cpu_dir}/cpu{cpu}/{name}") or 0) for cpu in online}
        low, high = min(values.values(), default=0), max(values.values(), default=0)
        if low > 0:
            middle = (low + high) / 2
            alike = high <= _ALIKE * low
            return {} if alike else {c: "performance" if v > middle else "efficiency" for c, v in values.items()}
    return {}


def read_caches(tree: Tree, online: tuple[int, ...]) -> tuple[Cache, ...]:
    """Read every cache once, although several CPUs show it; none where the kernel does not tell."""
    caches: dict[tuple[int, str, int], Cache] = {}
    known: dict[str, set[int]] = defaultdict(
        set
    )  # by the name of a cache's folder: the CPUs whose cache was read already
    present = set(online)
    for cpu in online:
        for index in sorted(tree.names(f"{tree.cpu_dir}/cpu{cpu}/cache")):
            if cpu in known[index] or not index.startswith("index"):
                continue
            folder = f"{tree.cpu_dir}/cpu{cpu}/cache/{index}"
            level, kind = int(tree.text(f"{folder}/level") or 0), tree.text(f"{folder}/type")
            shared = tree.cpu_list(folder, "shared_cpu_map", "shared_cpu_list")
            sharing = tuple(c for c in shared if c in present) or (cpu,)
            size = re.fullmatch(r"(\d+)([KMG]?)", tree.text(f"{folder}/size"))
            scale = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
            if level and size:
                cache = Cache(level, kind, int(size[1]) * scale[size[2]], sharing)
                caches.setdefault((level, kind, sharing[0]), cache)
                known[index].update(sharing)
    return tuple(caches[key] for key in sorted(caches))


def read_memory(tree: Tree, node: int, *, only: bool) -> tuple[int, int, int]:
    """Read a node's memory in bytes: all of it, what is free, and what is available.

    `only` says that the machine has a single node: where its folder does not tell, the machine's memory is read.
    """
    text = tree.text(tree.node_dir(node) / "meminfo") or (tree.text("proc/meminfo") if only else "")
    amounts = [re.search(rf"{name}:\s+(\d+) kB", text) for name in ("MemTotal", "MemFree", r"Inactive\(file\)")]
    total, free, cache = (int(amount[1]) * 1024 if amount else 0 for amount in amounts)
    return total, free, free + cache


def read_allowed(tree: Tree) -> tuple[set[int] | None, set[int] | None]:
    """Read the CPUs that the calling thread may use, and the nodes whose memory it may use; None where the kernel does not tell.

    The CPUs of a captured machine may include some that are offline; those of the running one don't.
    """
    # Affinity belongs to a thread: /proc/self is the main one, which need not be the one that asks.
    status = tree.text("proc/thread-self/status") or tree.text("proc/self/status")
    lists = [re.search(rf"^{name}_allowed_list:[ \t]*(.*)$", status, re.MULTILINE) for name in ("Cpus", "Mems")]
    cpus, mems = (set(parse_cpulist(match[1])) if match else None for match in lists)
    if tree.live:
        with suppress(OSError):  # where a sandbox refuses the call, what the file says stays
            cpus = os.sched_getaffinity(0)
    return cpus, mems


def read_gpus(tree: Tree, nodes: list[int]) -> tuple[Gpu, ...]:
    """Read the GPUs of the PCI bus; where a captured tree has no folder of the bus, those among all devices."""
    folders = list((tree.root / "sys/bus/pci/devices").glob("*")) or [
        path.parent for path in (tree.root / "sys/devices").glob("pci*/**/class")
    ]
    node_of = {}
    for folder in folders:
        if tree.text(folder / "class").startswith(_GPU_CLASSES):
            node = int(tree.text(folder / "numa_node") or -1)
            node_of[folder.name] = node if node in nodes else nodes[0] if len(nodes) == 1 else None
    return tuple(Gpu(pci, node) for pci, node in sorted(node_of.items()))
