"""Holds what the checks of the doctor look at, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from numa_lab.machine.control_groups import ControlGroups
from numa_lab.machine.doctor.load import Load
from numa_lab.machine.hardware import Node
from numa_lab.machine.sysfs import Tree, parse_cpulist
from numa_lab.machine.topology import Topology

Severity = Literal["problem", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """Something that spoils performance: its name, what was seen, why it matters, the exact fix, and how bad it is.

    Each line of the fix is enough by itself, and can be copied as it stands: a shell takes what follows a ``#`` for a comment.
    """

    name: str
    seen: str
    why: str
    fix: str
    severity: Severity

    @property
    def fixes(self) -> tuple[str, ...]:
        """Every way to fix it, of which one is enough."""
        return tuple(self.fix.splitlines())


@dataclass(frozen=True)
class Evidence:
    """All that a check may look at: checks read nothing else, and change nothing."""

    tree: Tree
    topology: Topology
    environ: Mapping[str, str]
    has_libnuma: bool
    refused: Mapping[str, int]  # NUMA calls that the kernel refuses, with the errno
    load: Load
    lacking: Mapping[str, int] = field(default_factory=dict)  # other calls that it refuses
    uncompiled: str = ""  # why the decode kernel can't be compiled, with the line to type

    @property
    def memory_nodes(self) -> list[Node]:
        """The nodes that have memory, whether or not this process may use it."""
        return [node for node in self.topology.nodes if node.memory_bytes]

    @property
    def online(self) -> set[int]:
        """All CPUs that are online."""
        return {cpu.id for cpu in self.topology.cpus}

    @property
    def isolated(self) -> set[int]:
        """CPUs that were set aside at boot: that they are not used is no fault, and no fix names them."""
        return set(self.topology.isolated_cpus)

    @property
    def cpuset_cpus(self) -> set[int]:
        """The CPUs of the innermost control group that limits them, with those that the kernel grants; all online CPUs without a limit."""
        for group in self._groups.folders("cpuset"):
            for name in ("cpuset.cpus.effective", "cpuset.effective_cpus"):
                if listed := self.tree.text(f"{group}/{name}"):
                    return set(parse_cpulist(listed)) & self.online | set(self.topology.allowed_cpus)
        return self.online

    @property
    def cpu_quota(self) -> float:
        """How many CPUs' worth of time the control groups grant; infinity where none limits it."""
        return self._groups.cpu_quota()

    @cached_property
    def _groups(self) -> ControlGroups:
        return ControlGroups(self.tree)


Check = Callable[[Evidence], Finding | None]
