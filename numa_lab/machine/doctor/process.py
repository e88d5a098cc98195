"""Checks this process: what it lacks, what the kernel refuses it, and what its environment does to its threads."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys

from numa_lab.machine.doctor.examination import Check, Evidence, Finding
from numa_lab.machine.shell_commands import to_install


def compiler_failure() -> str:
    """Let another process compile a kernel; return what it says where it can't. This one never loads Numba.

    A process that does not get so far, or that takes longer than ``COMPILER_SECONDS``, tells nothing of Numba.
    """
    code = "from numa_lab.attention import kernel_cache; print(kernel_cache.try_compiler())"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=COMPILER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    return "" if tried.returncode else tried.stdout.strip()


COMPILER_SECONDS = 60


def _decode_kernel(evidence: Evidence) -> Finding | None:
    if not evidence.uncompiled:
        return None
    seen, _, fix = evidence.uncompiled.rpartition("; type: ")
    return Finding(
        "decode_kernel",
        seen,
        "So torch's own operators compute attention, several times slower over a long cache, and a warning says so; what pins threads or "
        "measures bandwidth is compiled too, and says so where it can't be.",
        fix,
        "problem",
    )


def _libnuma(evidence: Evidence) -> Finding | None:
    if evidence.has_libnuma:
        return None
    return Finding(
        "libnuma",
        "libnuma.so.1 can't be loaded",
        "Without it memory policies can neither be set nor read back, and pages can't be located.",
        to_install("numactl"),
        "problem",
    )


def _numactl(evidence: Evidence) -> Finding | None:
    folders = evidence.environ.get("PATH", os.defpath).split(os.pathsep)
    below_root = os.pathsep.join(str(evidence.tree.root / folder.lstrip("/")) for folder in folders)
    has_programs = any(
        evidence.tree.has(folder) for folder in ("bin", "usr/bin")
    )  # a captured tree may hold no programs at all
    if not has_programs or shutil.which("numactl", path=below_root):
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
    "get_mempolicy": "the policy in force is read from numa_maps, without its flags",
    "mbind": "a tensor is placed by first touch of threads pinned to its node",
    "move_pages": "pages are counted from numa_maps, which knows whole mappings only",
}


def _numa_calls(evidence: Evidence) -> Finding | None:
    if not evidence.refused:
        return None
    if errno.ENOSYS in evidence.refused.values():
        fix = (
            "use a kernel that is built with CONFIG_NUMA=y\n"
            "docker run --runtime=runc IMAGE   # where the sandbox is gVisor"
        )
    elif "move_pages" in evidence.refused:  # Docker's default profile refuses it whatever the capabilities
        fix = (
            "docker run --security-opt seccomp=unconfined IMAGE   # or a profile of your own that lists these calls\n"
            "securityContext: {seccompProfile: {type: Unconfined}}   # Kubernetes: in the container's spec"
        )
    else:
        fix = (
            "docker run --cap-add SYS_NICE IMAGE\n"
            "securityContext: {capabilities: {add: [SYS_NICE]}}   # Kubernetes: in the container's spec"
        )
    return Finding(
        "numa_calls",
        "the kernel refuses " + ", ".join(f"{call} ({os.strerror(code)})" for call, code in evidence.refused.items()),
        f"So {'; '.join(_LOST[call] for call in evidence.refused)}.",
        fix,
        "problem" if len(evidence.memory_nodes) > 1 else "info",
    )


def _affinity_variables(evidence: Evidence) -> Finding | None:
    names = ["KMP_AFFINITY"]
    if evidence.environ.get("OMP_PROC_BIND", "").strip().lower() != "false":  # false turns the other two off as well
        names += ["GOMP_CPU_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES"]
    values = {name: value for name in names if (value := evidence.environ.get(name, "").strip())}
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


def _thread_variables(evidence: Evidence) -> Finding | None:
    topology = evidence.topology
    cores = len(topology.physical_cores(topology.allowed_cpus))
    sensible = {cores} | {len(topology.physical_cores(topology.cpus_of([node]))) for node in topology.node_ids}
    odd = {}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        first = evidence.environ.get(name, "").split(",")[0].strip()  # OpenMP takes a number for each nesting level
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


def _preloaded_allocator(evidence: Evidence) -> Finding | None:
    preloaded = re.split(r"[\s:]+", evidence.environ.get("LD_PRELOAD", "").strip())
    allocators = [library for library in preloaded if re.search("jemalloc|tcmalloc|mimalloc", library)]
    if not allocators:
        return None
    others = ":".join(library for library in preloaded if library not in allocators)
    return Finding(
        "preloaded_allocator",
        f"LD_PRELOAD holds {', '.join(allocators)}",
        "It keeps freed pages for long and hands them out again whatever node they lie on, so a tensor made after a "
        "change of binding may be remote. Tensors of numa_lab.placement.memory.empty bypass it.",
        f"export LD_PRELOAD={others}" if others else "unset LD_PRELOAD",
        "info",
    )


CHECKS: tuple[Check, ...] = (
    _libnuma,
    _decode_kernel,
    _numactl,
    _numa_calls,
    _affinity_variables,
    _thread_variables,
    _preloaded_allocator,
)
