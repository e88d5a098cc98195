"""What on this machine spoils NUMA performance or its measurement, and the exact fix for each.

Limits: it looks at settings and at memory, not at load, and only at what this process can see; inside a container some
of the fixes have to be typed on the host. All files are read below an injectable root. The kernel's NUMA calls are
tried only where that root is ``/``: a captured tree says nothing of them.
"""

from __future__ import annotations

import errno
import mmap
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import addressof, c_char
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from numa_lab import libnuma
from numa_lab.doctor import host, optional, process
from numa_lab.doctor.examination import Finding, Machine
from numa_lab.sysfs import Tree
from numa_lab.topology import Topology, read_topology

__all__ = ["Finding", "examine", "render", "to_json"]

_SEVERITIES = ("problem", "warning", "info")


def examine(
    root: str | os.PathLike[str] = "/",
    environ: Mapping[str, str] = os.environ,
    topology: Topology | None = None,
) -> list[Finding]:
    """Look for all that is known to spoil NUMA performance; a healthy machine gives an empty list.

    Parameters
    ----------
    root
        Where sysfs, procfs and programs are looked for.
    environ
        Environment variables, those of this process by default.
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
    live = Path(root).resolve() == Path("/")
    has_libnuma = not live or libnuma.available()
    machine = Machine(
        tree=Tree(Path(root)),
        topology=topology or read_topology(root),
        environ=environ,
        has_libnuma=has_libnuma,
        refused=_refused_calls() if live and has_libnuma else {},
        lacking=optional.refused_calls() if live else {},
        live=live,
    )
    findings = [finding for check in (*process.CHECKS, *optional.CHECKS, *host.CHECKS) if (finding := check(machine))]
    return sorted(findings, key=lambda finding: _SEVERITIES.index(finding.severity))


def _refused_calls() -> dict[str, int]:
    """Try each NUMA call once; those that the kernel refuses, with the errno."""
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

    # A policy belongs to a thread: what is set in one that ends at once needs no restoring. (Setting back what
    # get_mempolicy says would lose the policy's flags.)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(attempt).result()


def render(findings: Sequence[Finding]) -> str:
    """Findings as text for a terminal; each fix stands on a line of its own, unbroken, to be copied."""
    if not findings:
        return "Nothing found that spoils NUMA performance here."

    def block(finding: Finding) -> str:
        seen, why = (
            textwrap.fill(f"  {label}  {text}", 100, subsequent_indent=" " * 8, break_on_hyphens=False)
            for label, text in (("seen", finding.seen), ("why ", finding.why))
        )
        return f"{finding.severity}: {finding.name}\n{seen}\n{why}\n  fix   {finding.fix}"

    return "\n\n".join(map(block, findings))


def to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as plain JSON values."""
    return [asdict(finding) for finding in findings]
