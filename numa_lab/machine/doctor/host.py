"""Checks the machine for faults that all its processes share: settings of the kernel, the layout and use of memory, and load."""

from __future__ import annotations

import re

from numa_lab.machine.doctor.examination import Check, Evidence, Finding
from numa_lab.machine.hardware import Node
from numa_lab.machine.identity import is_translated
from numa_lab.machine.page_maps import HUGE_PAGES, huge_page_bytes
from numa_lab.machine.sysfs import Tree, format_cpulist

NEARLY_FULL = 0.1  # a node of whose memory less is free is nearly full
CACHE_FILLS = 0.25  # of a node's memory holds file cache, and
CACHE_GATHERS = 0.8  # of the machine's file cache lies on this node: then large files were read there
BUSY_CPUS = 0.25  # CPUs' worth of time that others take; a team waits for its slowest thread
CAPTURED_AVERAGE = 2.0  # load average of a captured machine, of which one thread copied the files
WAITED = 0.1  # share of the time in which a thread waited for a CPU
STOLEN = 0.05  # share of the wanted CPU time that went to other guests
UNEVEN = 1.1  # largest to smallest node: 1.14 with one of eight memory modules missing, 1.03 by what the kernel keeps


def _emulated(evidence: Evidence) -> Finding | None:
    if not evidence.topology.emulated:
        return None
    return Finding(
        "emulated",
        f"software runs the instructions of this processor ({evidence.topology.model_name})",
        "Placement is real here, but times mean nothing: all memory is equally far, and each instruction slow.",
        _natively(evidence.tree),
        "problem",
    )


def _natively(tree: Tree) -> str:
    info = tree.text("proc/cpuinfo")
    arm = "CPU implementer" in info
    if is_translated(tree, info):
        return f"docker run --platform linux/{'arm64' if arm else 'amd64'} IMAGE   # the processor's own architecture"
    guest = "qemu-system-aarch64 -machine virt" if arm else "qemu-system-x86_64"
    return f"{guest} -accel kvm -cpu host   # starts the guest on the processor itself\nmeasure on real hardware"


def _numa_balancing(evidence: Evidence) -> Finding | None:
    mode = evidence.tree.text("proc/sys/kernel/numa_balancing")
    if mode in ("", "0") or len(evidence.memory_nodes) < 2:
        return None
    return Finding(
        "numa_balancing",
        f"kernel.numa_balancing = {mode}",
        "The kernel unmaps pages to see who uses them, and moves those that no policy binds, during a measurement too.",
        "sysctl -w kernel.numa_balancing=0   # as root; until the next boot",
        "warning",
    )


def _transparent_huge_pages(evidence: Evidence) -> Finding | None:
    folder, size = HUGE_PAGES, huge_page_bytes(evidence.tree)
    for name in (f"hugepages-{size >> 10}kB/enabled", "enabled"):  # the size's own setting stands above the general one
        chosen = re.search(r"\[(\w+)\]", evidence.tree.text(f"{folder}/{name}"))
        if chosen and chosen[1] != "inherit":
            break
    if not chosen or chosen[1] != "never":
        return None
    return Finding(
        "transparent_huge_pages",
        f"/{folder}/{name} is never",
        "K and V then lie on base pages, and a long cache costs a page walk for each of them at every token.",
        f"echo madvise > /{folder}/{name}   # as root; numa_lab asks for huge pages by madvise",
        "warning",
    )


def _smt(evidence: Evidence) -> Finding | None:
    cpus = evidence.topology.usable_cpus
    cores = evidence.topology.physical_cores(cpus)
    if len(cores) == len(cpus):
        return None
    return Finding(
        "smt",
        f"this process may use {len(cpus)} CPUs on {len(cores)} physical cores",
        "Two threads on one core share its path to memory: threads that nobody pins land so by chance, and times "
        "scatter. numa_lab pins one thread to each core; other programs do not.",
        f"taskset --cpu-list {format_cpulist(cores)} COMMAND",
        "info",
    )


def _cpu_governor(evidence: Evidence) -> Finding | None:
    slow: dict[str, list[int]] = {}
    for cpu in sorted(evidence.online):
        governor = evidence.tree.text(f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor")
        if governor not in ("", "performance"):
            slow.setdefault(governor, []).append(cpu)
    if not slow:
        return None
    return Finding(
        "cpu_governor",
        "; ".join(f"governor {governor} on CPUs {format_cpulist(cpus)}" for governor, cpus in slow.items()),
        "Cores that wait for memory look idle and are clocked down, so times depend on what ran before.",
        "for governor in /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor; do echo performance > $governor; done   # as root",
        "warning",
    )


def _nearly_full_nodes(evidence: Evidence) -> Finding | None:
    usable = [node for node in evidence.memory_nodes if node.id in evidence.topology.allowed_nodes]
    full = [node for node in usable if node.free_bytes < NEARLY_FULL * node.memory_bytes]
    if not full:
        return None
    cached = {node.id: _file_cache_bytes(evidence.tree, node) for node in full}
    roomiest = max(usable, key=lambda node: node.free_bytes)
    ways = []
    if any(node.free_bytes + cached[node.id] >= NEARLY_FULL * node.memory_bytes for node in full):
        given_back = _size(sum(cached.values()))
        ways.append(f"sync; echo 1 > /proc/sys/vm/drop_caches   # as root; gives back up to {given_back}")
    if roomiest not in full:
        ways.append(f"numactl --membind={roomiest.id} COMMAND   # {_size(roomiest.free_bytes)} free")
    return Finding(
        "nearly_full_nodes",
        "; ".join(
            f"node {node.id}: {_size(node.free_bytes)} of {_size(node.memory_bytes)} free, "
            f"{_size(cached[node.id])} hold file cache"
            for node in full
        ),
        "A process bound to a full node is killed (numa_lab refuses before that), and memory that is not bound goes "
        "to another node without a word.",
        "\n".join(ways) or "numastat -p PROCESS   # shows the memory of a process on each node; end what fills them",
        "warning",
    )


def _file_cache(evidence: Evidence) -> Finding | None:
    cached = {node.id: _file_cache_bytes(evidence.tree, node) for node in evidence.memory_nodes}
    most = max(evidence.memory_nodes, key=lambda node: cached[node.id], default=None)
    if most is None or len(cached) < 2:
        return None
    amount = cached[most.id]
    if amount < CACHE_FILLS * most.memory_bytes or amount < CACHE_GATHERS * sum(cached.values()):
        return None
    return Finding(
        "file_cache",
        f"node {most.id} holds {_size(amount)} of the {_size(sum(cached.values()))} of file cache",
        "Files lie on the node that read them first, and stay there between runs: weights that a process maps from a file "
        "are then far from its threads on other nodes, whatever the process is bound to.",
        "sync; echo 1 > /proc/sys/vm/drop_caches; numactl --interleave=all cat FILE > /dev/null   # as root; reads it anew",
        "warning",
    )


def _file_cache_bytes(tree: Tree, node: Node) -> int:
    """The bytes of file cache on a node that can be dropped; shared memory counts among file pages and can't be."""
    meminfo = dict(re.findall(r"(\w+):\s+(\d+) kB", tree.text(f"sys/devices/system/node/node{node.id}/meminfo")))
    return max(0, int(meminfo.get("FilePages", 0)) - int(meminfo.get("Shmem", 0))) * 1024


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"


def _uneven_nodes(evidence: Evidence) -> Finding | None:
    nodes = [node for node in evidence.memory_nodes if node.cpus]  # CXL and HBM nodes differ by design
    sizes = [node.memory_bytes for node in nodes]
    if len(nodes) < 2 or max(sizes) < UNEVEN * min(sizes):
        return None
    return Finding(
        "uneven_nodes",
        ", ".join(f"node {node.id}: {_size(node.memory_bytes)}" for node in nodes),
        "Work split evenly fills the smallest node first, and a node with fewer memory modules has less bandwidth.",
        f"dmidecode --type memory   # as root; lists empty slots; until then plan for {_size(min(sizes))} a node",
        "warning",
    )


def _load(evidence: Evidence) -> Finding | None:
    load = evidence.load
    crowded = load.others is None and ((load.average or 0) >= CAPTURED_AVERAGE or (load.waited or 0) >= WAITED)
    if evidence.topology.emulated or not (crowded or (load.others or 0) >= BUSY_CPUS):
        return None
    cpus = len(evidence.topology.usable_cpus)
    named = ", ".join(
        f"{process.name} (process {process.pid}) {process.cpus:.0%} of one"
        for process in load.busiest
        if process.cpus >= 0.1
    )
    measures = {
        f"other processes took the time of {{:.1f}} CPUs, and this one may use {cpus}": load.others,
        "{}": named or None,
        "run queue {:.1f}": load.queued,
        "load average {:.1f}": load.average,
        "threads waited for a CPU in {:.0%} of the last 10 s": load.waited,
    }
    busy = [process for process in load.busiest if process.cpus >= BUSY_CPUS]
    pids, names = (" ".join(str(getattr(process, name)) for process in busy) for name in ("pid", "name"))
    ways = [f"kill -STOP {pids}   # {names}; kill -CONT {pids} lets go on"] if busy else []
    return Finding(
        "load",
        "; ".join(text.format(value) for text, value in measures.items() if value is not None),
        "Threads that share a core or the memory of a node with other work are slow by chance, and a team waits for its slowest: "
        "times scatter, and no placement helps.",
        "\n".join([*ways, "top -b -n 1 -o %CPU   # what runs, in a container on its host; end it or wait for it"]),
        "warning",
    )


def _steal(evidence: Evidence) -> Finding | None:
    stolen = evidence.load.stolen or 0.0
    if evidence.topology.emulated or stolen < STOLEN:
        return None
    return Finding(
        "steal",
        f"the host gave {stolen:.0%} of the CPU time that was wanted here to other guests",
        "A virtual CPU that waits for its host stands still without a word, and its team waits with it: times scatter.",
        "measure on a machine of your own, or one whose CPUs are dedicated\n"
        "virsh vcpupin DOMAIN VCPU HOST_CPU   # on the host, for each virtual CPU, and no other guest on these",
        "warning",
    )


CHECKS: tuple[Check, ...] = (
    _emulated,
    _numa_balancing,
    _transparent_huge_pages,
    _smt,
    _cpu_governor,
    _nearly_full_nodes,
    _file_cache,
    _uneven_nodes,
    _load,
    _steal,
)
