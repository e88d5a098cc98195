"""Faults of this process: what it lacks, what it may not use, and what its environment does to its threads."""

from __future__ import annotations

import errno
import os
import re
import shutil

from numa_lab.commands import to_install
from numa_lab.doctor.examination import Check, Finding, Machine
from numa_lab.sysfs import format_cpulist


def _libnuma(machine: Machine) -> Finding | None:
    if machine.has_libnuma:
        return None
    return Finding(
        "libnuma",
        "libnuma.so.1 can't be loaded",
        "Without it memory policies can neither be set nor read back, and pages can't be located.",
        to_install("numactl"),
        "problem",
    )


def _numactl(machine: Machine) -> Finding | None:
    folders = machine.environ.get("PATH", os.defpath).split(os.pathsep)
    below_root = os.pathsep.join(str(machine.tree.root / folder.lstrip("/")) for folder in folders)
    if shutil.which("numactl", path=below_root):
        return None
    return Finding(
        "numactl",
        "numactl is not on the PATH",
        "A sweep starts each execution under numactl, so that everything is bound from its first instruction.",
        to_install("numactl"),
        "problem",
    )


_LOST = {
    "set_mempolicy": "memory is placed by first touch alone",
    "get_mempolicy": "the policy in force can't be read back",
    "mbind": "a tensor is placed by first touch of threads pinned to its node",
    "move_pages": "pages are counted from numa_maps, which knows whole mappings only",
}


def _numa_calls(machine: Machine) -> Finding | None:
    if not machine.refused:
        return None
    if errno.ENOSYS in machine.refused.values():
        fix = "use a kernel built with CONFIG_NUMA=y; in the sandbox gVisor: docker run --runtime=runc ..."
    elif "move_pages" in machine.refused:  # which Docker's default profile allows with no capability
        fix = (
            "docker run --security-opt seccomp=unconfined ...   # or a profile of your own that lists these calls\n"
            "# Kubernetes: securityContext.seccompProfile.type: Unconfined"
        )
    else:
        fix = 'docker run --cap-add SYS_NICE ...\n# Kubernetes: securityContext.capabilities.add: ["SYS_NICE"]'
    return Finding(
        "numa_calls",
        "the kernel refuses " + ", ".join(f"{call} ({os.strerror(code)})" for call, code in machine.refused.items()),
        f"So {'; '.join(_LOST[call] for call in machine.refused)}.",
        fix,
        "problem" if len(machine.memory_nodes) > 1 else "info",
    )


def _cpuset(machine: Machine) -> Finding | None:
    hidden = {
        "memory of nodes": {node.id for node in machine.memory_nodes} - set(machine.topology.allowed_nodes),
        "CPUs": machine.online - machine.cpuset_cpus,
    }
    if not any(hidden.values()):
        return None
    cpus, mems = format_cpulist(machine.online), format_cpulist(node.id for node in machine.memory_nodes)
    return Finding(
        "cpuset",
        "a cpuset hides " + " and ".join(f"{what} {format_cpulist(ids)}" for what, ids in hidden.items() if ids),
        "The kernel silently drops them from every binding; what is measured and advised holds for the rest alone.",
        f"docker run --cpuset-cpus={cpus} --cpuset-mems={mems} ...\n"
        f"systemctl set-property --runtime UNIT AllowedCPUs={cpus} AllowedMemoryNodes={mems}",
        "warning",
    )


def _cpu_quota(machine: Machine) -> Finding | None:
    allowed, quota = len(machine.topology.allowed_cpus), machine.cpu_quota
    if quota >= allowed:
        return None
    return Finding(
        "cpu_quota",
        f"a control group grants the time of {quota:g} {'CPU' if quota == 1 else 'CPUs'}, and this process may use {allowed}",
        "Threads that have used it up are stopped for the rest of each period, some 100 ms, and their team waits: "
        "times scatter. Whole CPUs do not do that.",
        f"docker run --cpuset-cpus=CPUS ...   # in place of --cpus={quota:g}\nsystemctl set-property --runtime UNIT CPUQuota=",
        "warning",
    )


def _affinity(machine: Machine) -> Finding | None:
    reachable = machine.cpuset_cpus
    lost = reachable - set(machine.topology.allowed_cpus)
    if not lost:
        return None
    return Finding(
        "affinity",
        f"this process is bound to CPUs {format_cpulist(machine.topology.allowed_cpus)}; "
        f"{format_cpulist(lost)} could serve too",
        "Threads inherit the mask of their maker, so the other CPUs stay idle whatever is asked for later.",
        f"taskset --cpu-list --pid {format_cpulist(reachable)} $$   # in the shell that starts numa-lab",
        "warning",
    )


def _affinity_variables(machine: Machine) -> Finding | None:
    names = ["KMP_AFFINITY"]
    if machine.environ.get("OMP_PROC_BIND", "").strip().lower() != "false":  # which also disarms the other two
        names += ["GOMP_CPU_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES"]
    values = {name: value for name in names if (value := machine.environ.get(name, "").strip())}
    if {"none", "disabled"} & set(values.get("KMP_AFFINITY", "").lower().split(",")):
        del values["KMP_AFFINITY"]
    if not values:
        return None
    return Finding(
        "affinity_variables",
        ", ".join(f"{name}={value}" for name, value in values.items()),
        "OpenMP then pins threads by itself as soon as torch is imported. It can shrink the process to one CPU, "
        "move threads off the node that numactl chose, and so keep a memory policy from ever acting. "
        "(KMP_AFFINITY acts on Intel's and LLVM's OpenMP, GNU's ignores it.)",
        f"unset {' '.join(values)}",
        "warning",
    )


def _thread_variables(machine: Machine) -> Finding | None:
    topology = machine.topology
    cores = len(topology.physical_cores(topology.allowed_cpus))
    sensible = {cores} | {len(topology.physical_cores(topology.cpus_of([node]))) for node in topology.node_ids}
    odd = {}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        first = machine.environ.get(name, "").split(",")[0].strip()  # OpenMP takes a number for each nesting level
        if first.isdecimal() and int(first) not in sensible:
            odd[name] = first
    if not odd:
        return None
    return Finding(
        "thread_variables",
        ", ".join(f"{name}={value}" for name, value in odd.items()),
        f"torch starts with so many threads, but this process may use {cores} physical cores, and no node has just so "
        "many either. numa_lab's own measurements set their number of threads themselves.",
        "export " + " ".join(f"{name}={cores}" for name in odd),
        "info",
    )


def _preloaded_allocator(machine: Machine) -> Finding | None:
    preloaded = re.split(r"[\s:]+", machine.environ.get("LD_PRELOAD", "").strip())
    allocators = [library for library in preloaded if re.search("jemalloc|tcmalloc|mimalloc", library)]
    if not allocators:
        return None
    others = ":".join(library for library in preloaded if library not in allocators)
    return Finding(
        "preloaded_allocator",
        f"LD_PRELOAD holds {', '.join(allocators)}",
        "It keeps freed pages for long and hands them out again whatever node they lie on, so a tensor made after a "
        "change of binding may be remote. Tensors of numa_lab.memory.empty bypass it.",
        f"export LD_PRELOAD={others}" if others else "unset LD_PRELOAD",
        "info",
    )


CHECKS: tuple[Check, ...] = (
    _libnuma,
    _numactl,
    _numa_calls,
    _cpuset,
    _cpu_quota,
    _affinity,
    _affinity_variables,
    _thread_variables,
    _preloaded_allocator,
)
