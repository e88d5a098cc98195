"""Looks for what spoils NUMA performance or its measurement on this machine, and gives the exact fix for each finding.

Limits: only what this process can see is looked at, and load for less than a second; inside a container some of the fixes
have to be typed on the host. All files are read below a root that may be given. Only where that is ``/`` are the kernel's NUMA calls
and Numba tried, the environment looked at and processes watched; of another machine there is nothing but its files.
"""

from __future__ import annotations

import errno
import mmap
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from ctypes import addressof, c_char
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from numa_lab.machine import libnuma, new_threads
from numa_lab.machine.doctor import given, host, load, optional, process
from numa_lab.machine.doctor.examination import Evidence, Finding
from numa_lab.machine.sysfs import Tree
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology

__all__ = ["Finding", "examine", "render", "to_json"]

_SEVERITIES = ("problem", "warning", "info")


def examine(
    root: str | os.PathLike[str] = "/",
    environ: Mapping[str, str] | None = None,
    topology: Topology | None = None,
) -> list[Finding]:
    """Look for all that is known to spoil NUMA performance; a healthy machine gives an empty list.

    Parameters
    ----------
    root
        Where sysfs, procfs and programs are looked for: ``/``, or a folder with those of another machine.
    environ
        Environment variables; by default those of this process, and none for another root than ``/``.
    topology
        The machine below `root`, where it has been read already.

    Returns
    -------
    list[Finding]
        Problems first, then warnings, then information.

    Raises
    ------
    InvalidInput
        There is no sysfs below `root`.
    """
    tree, topology = Tree(Path(root)), topology or read_topology(root)
    has_libnuma = not tree.live or libnuma.available()
    evidence = Evidence(
        tree=tree,
        topology=topology,
        environ=environ if environ is not None else os.environ if tree.live else {},
        has_libnuma=has_libnuma,
        refused=_refused_calls() if tree.live and has_libnuma else {},
        load=load.look(tree, topology.usable_cpus),
        lacking=optional.refused_calls() if tree.live else {},
        uncompiled=process.compiler_failure() if tree.live else "",
    )
    checks = (*process.CHECKS, *optional.CHECKS, *given.CHECKS, *host.CHECKS)
    findings = [finding for check in checks if (finding := check(evidence))]
    return sorted(findings, key=lambda finding: _SEVERITIES.index(finding.severity))


def _refused_calls() -> dict[str, int]:
    """Try each NUMA call once, and return those that the kernel refuses, with the errno."""
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = addressof(c_char.from_buffer(page))
    calls: dict[str, Callable[[], object]] = {
        "set_mempolicy": lambda: libnuma.set_mempolicy(libnuma.MPOL_DEFAULT),
        "get_mempolicy": libnuma.get_mempolicy,
        "mbind": lambda: libnuma.mbind(address, mmap.PAGESIZE, libnuma.MPOL_DEFAULT, ()),
        "move_pages": lambda: libnuma.page_status(np.array([address], np.uint64)),
    }

    def attempt() -> dict[str, int]:
        refused = {}
        for name, call in calls.items():
            try:
                call()
            except PermissionError as error:
                refused[name] = error.errno or errno.EPERM
        return refused

    # A policy belongs to a thread, so one that is set on a thread that ends at once needs no restoring.
    return new_threads.run([attempt])[0]


def render(findings: Sequence[Finding]) -> str:
    """Write findings as text for a terminal; each way to fix one stands on a line of its own, unbroken, to be copied."""
    if not findings:
        return "Nothing found that spoils NUMA performance here."

    def block(finding: Finding) -> str:
        seen, why = (
            textwrap.fill(f"  {label}  {text}", 100, subsequent_indent=" " * 8, break_on_hyphens=False)
            for label, text in (("seen", finding.seen), ("why ", finding.why))
        )
        ways = "\n        ".join(finding.fixes)
        return f"{finding.severity}: {finding.name}\n{seen}\n{why}\n  fix   {ways}"

    several = any(len(finding.fixes) > 1 for finding in findings)
    last = ["Where a fix has several lines, each of them alone is one."] if several else []
    return "\n\n".join([*map(block, findings), *last])


def to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return findings as plain JSON values; `fixes` holds the lines of `fix`."""
    return [asdict(finding) | {"fixes": list(finding.fixes)} for finding in findings]
