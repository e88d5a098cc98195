"""Checks what is optional and may be missing: a cache folder, shared memory, open files, huge pages, threads and their masks."""

from __future__ import annotations

import errno
import mmap
import os
import resource

from numa_lab.machine import affinity, cache_folder
from numa_lab.machine.doctor.examination import Check, Evidence, Finding
from numa_lab.machine.page_maps import PAGE_BYTES
from numa_lab.machine.sysfs import format_cpulist


def refused_calls() -> dict[str, int]:
    """Try the calls that need no libnuma, and return those that the kernel refuses, with the errno. Nothing is changed."""
    refused = {}
    try:
        os.sched_setaffinity(
            0, []
        )  # no CPU at all, for which the kernel answers EINVAL unless the call itself is refused
    except OSError as error:
        if error.errno in affinity.REFUSALS:
            refused["sched_setaffinity"] = error.errno
    with mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        try:
            page.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            refused["madvise"] = error.errno or errno.EPERM
    return refused


def _affinity_refused(evidence: Evidence) -> Finding | None:
    code = evidence.lacking.get("sched_setaffinity")
    if code is None:
        return None
    return Finding(
        "affinity_refused",
        f"the kernel refuses sched_setaffinity ({os.strerror(code)})",
        "So no thread can be pinned: NUMAOptimizedGQA, NUMAThreadPool and NodeShardedKVCache say so and stop; attention itself runs, "
        f"on CPUs {format_cpulist(evidence.topology.allowed_cpus)}, as the process was started.",
        "\n".join(affinity.ALLOW),
        "problem",
    )


def _huge_pages_refused(evidence: Evidence) -> Finding | None:
    code = evidence.lacking.get("madvise")
    if code is None:
        return None
    none = code == errno.EINVAL
    return Finding(
        "huge_pages_refused",
        f"madvise(MADV_HUGEPAGE) is refused ({os.strerror(code)})"
        + (": this kernel was built without transparent huge pages" if none else ""),
        f"K and V then lie on pages of {PAGE_BYTES >> 10} KiB, and a long cache costs a page walk for each of them at every token.",
        "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y; one with PREEMPT_RT may have none"
        if none
        else "docker run --security-opt seccomp=unconfined IMAGE   # or a profile of your own that lists madvise",
        "info",
    )


def _short_teams(evidence: Evidence) -> Finding | None:
    cores = len({cpu.core for cpu in evidence.topology.cpus})
    given = {name: evidence.environ.get(name, "").strip() for name in (*_LIMITS, "OMP_DYNAMIC")}
    short = {
        name: value for name, value in given.items() if name in _LIMITS and value.isdecimal() and int(value) < cores
    }
    if given["OMP_DYNAMIC"].lower() in ("true", "1", "yes", "on"):
        short["OMP_DYNAMIC"] = given["OMP_DYNAMIC"]
    if not short:
        return None
    return Finding(
        "short_teams",
        ", ".join(f"{name}={value}" for name, value in short.items()),
        f"OpenMP then gives fewer threads than are asked for, without a word ({cores} physical cores here; OMP_DYNAMIC gives fewer "
        "the busier the machine is). Such rows contradict their receipts, and a sweep refuses them.",
        f"unset {' '.join(short)}",
        "warning",
    )


_LIMITS = ("OMP_THREAD_LIMIT", "KMP_DEVICE_THREAD_LIMIT", "KMP_ALL_THREADS")  # the latter two are LLVM's and Intel's


def _cache_folder(evidence: Evidence) -> Finding | None:
    why = cache_folder.unusable() if evidence.tree.live else ""
    if not why:
        return None
    return Finding(
        "cache_folder",
        f"compiled kernels and rankings of nodes can't be kept: {why}",
        "So each process compiles the decode kernel anew, which takes some seconds, and ranks the nodes anew.",
        "export XDG_CACHE_HOME=FOLDER   # one that this user can write",
        "info",
    )


def _shared_memory(evidence: Evidence) -> Finding | None:
    if not evidence.tree.live:
        return None
    try:
        about = os.statvfs("/dev/shm")
        size, has = about.f_blocks * about.f_frsize, f"has {about.f_blocks * about.f_frsize / 2**20:,.0f} MiB"
    except OSError:
        size, has = 0, "does not exist"
    if size >= LEAST_SHARED_BYTES:
        return None
    return Finding(
        "shared_memory",
        f"/dev/shm {has}",
        "NUMAProcessPool, and all else that passes tensors between processes of torch, shares them there; it refuses what finds no "
        "room. Containers have 64 MiB by default.",
        "docker run --shm-size=8g IMAGE\nmount -o remount,size=50% /dev/shm   # as root\n"
        "emptyDir: {medium: Memory}   # Kubernetes: of a volume that is mounted at /dev/shm",
        "info",
    )


def _open_files(evidence: Evidence) -> Finding | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not evidence.tree.live or soft == resource.RLIM_INFINITY or soft >= LEAST_FILES:
        return None
    return Finding(
        "open_files",
        f"this process may have {soft} files open",
        "Each process of a pool and each tensor that processes share takes some.",
        f"ulimit -n {LEAST_FILES}\ndocker run --ulimit nofile={LEAST_FILES}:{LEAST_FILES} IMAGE",
        "info",
    )


LEAST_SHARED_BYTES = 256 << 20
LEAST_FILES = 1024

CHECKS: tuple[Check, ...] = (
    _affinity_refused,
    _huge_pages_refused,
    _short_teams,
    _cache_folder,
    _shared_memory,
    _open_files,
)
