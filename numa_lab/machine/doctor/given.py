"""Checks what this process is given of the machine: CPUs, their time and memory, by control groups, affinity and containers."""

from __future__ import annotations

import re
import shlex

from numa_lab.machine.doctor.examination import Check, Evidence, Finding
from numa_lab.machine.sysfs import format_cpulist

_CPUS = "/sys/devices/system/cpu"


def _online_cpus(evidence: Evidence) -> Finding | None:
    listed = evidence.tree.listed(f"{_CPUS}/online".lstrip("/"))
    if not listed or set(listed) == evidence.online:
        return None
    mounts = re.findall(
        rf"^(?:\S+ ){{4}}({_CPUS}(?:/online)?) ", evidence.tree.text("proc/self/mountinfo"), re.MULTILINE
    )
    return Finding(
        "online_cpus",
        f"{_CPUS}/online says {format_cpulist(listed)}, and the kernel lets this process use CPUs "
        f"{format_cpulist(evidence.topology.allowed_cpus)} of {format_cpulist(evidence.online)}",
        "A container was shown a list that was made for it, as lxcfs does. numa_lab goes by the kernel's answer; other programs "
        "count their threads by that list, and name CPUs that are not theirs.",
        f"umount {' '.join(reversed(mounts)) or f'{_CPUS}/online'}   # as root, in this container; sysfs then shows the kernel's own",
        "warning",
    )


def _memory_limit(evidence: Evidence) -> Finding | None:
    topology = evidence.topology
    held = sum(node.memory_bytes for node in evidence.memory_nodes if node.id in topology.allowed_nodes)
    limit = min(topology.memory_limits, key=lambda limit: limit.limit_bytes, default=None)
    if limit is None or limit.limit_bytes >= held:
        return None
    version_1 = not limit.file.endswith((".max", ".high"))
    gib = -(-held >> 30)
    ways = [
        f"docker update --memory={gib}g --memory-swap={gib}g CONTAINER   # on the host",
        f"resources: {{limits: {{memory: {gib}Gi}}}}   # Kubernetes: in the container's spec",
        "systemctl set-property --runtime UNIT "
        + ("MemoryLimit=infinity" if version_1 else "MemoryMax=infinity MemoryHigh=infinity"),
        "srun --mem=0 COMMAND   # Slurm: all memory of the machine",
    ]
    if not limit.file.endswith("memory.stat"):  # that file holds the limit of a level that is not seen from here
        ways.append(
            f"echo {-1 if version_1 else 'max'} > {shlex.quote(limit.file)}   # as root, where the group may be written"
        )
    return Finding(
        "memory_limit",
        f"{limit.sentence()}; the nodes that it may use hold {held / 2**20:,.0f} MiB",
        "What nodes have free is then not there for this process. numa_lab chooses shapes and refuses tensors by the limit; other "
        "programs find out too late.",
        "\n".join(ways),
        "warning",
    )


def _cpuset(evidence: Evidence) -> Finding | None:
    hidden = {
        "memory of nodes": {node.id for node in evidence.memory_nodes} - set(evidence.topology.allowed_nodes),
        "CPUs": evidence.online - evidence.cpuset_cpus - evidence.isolated,
    }
    if not any(hidden.values()):
        return None
    cpus = format_cpulist(evidence.online - evidence.isolated)
    mems = format_cpulist(node.id for node in evidence.memory_nodes)
    return Finding(
        "cpuset",
        "a cpuset hides " + " and ".join(f"{what} {format_cpulist(ids)}" for what, ids in hidden.items() if ids),
        "The kernel silently drops them from every binding; what is measured and advised holds for the rest alone.",
        f"docker run --cpuset-cpus={cpus} --cpuset-mems={mems} IMAGE\n"
        f"systemctl set-property --runtime UNIT AllowedCPUs={cpus} AllowedMemoryNodes={mems}",
        "warning",
    )


def _cpu_quota(evidence: Evidence) -> Finding | None:
    allowed, quota = len(evidence.topology.usable_cpus), evidence.cpu_quota
    if quota >= allowed:
        return None
    whole = evidence.topology.physical_cores(evidence.topology.usable_cpus)[: max(1, int(quota))]
    return Finding(
        "cpu_quota",
        f"a control group grants the time of {quota:g} {'CPU' if quota == 1 else 'CPUs'}, and this process may use {allowed}",
        "Threads that have used it up are stopped for the rest of each period, some 100 ms, and their team waits: "
        "times scatter. Whole CPUs do not do that.",
        f"docker run --cpuset-cpus={format_cpulist(whole)} IMAGE   # in place of --cpus={quota:g}\n"
        "systemctl set-property --runtime UNIT CPUQuota=",
        "warning",
    )


def _affinity(evidence: Evidence) -> Finding | None:
    reachable, allowed = evidence.cpuset_cpus - evidence.isolated, set(evidence.topology.allowed_cpus)
    lost = reachable - allowed
    if not lost or allowed <= evidence.isolated:  # whoever takes isolated CPUs alone does so on purpose
        return None
    return Finding(
        "affinity",
        f"this process is bound to CPUs {format_cpulist(evidence.topology.allowed_cpus)}; "
        f"{format_cpulist(lost)} could serve too",
        "Threads inherit the mask of their maker, so the other CPUs stay idle whatever is asked for later.",
        f"taskset --cpu-list --pid {format_cpulist(reachable)} $$   # in the shell that starts numa-lab",
        "warning",
    )


CHECKS: tuple[Check, ...] = (_online_cpus, _cpuset, _cpu_quota, _affinity, _memory_limit)
