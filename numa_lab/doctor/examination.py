"""What the checks look at, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from numa_lab.sysfs import Tree, parse_cpulist
from numa_lab.topology import Node, Topology

Severity = Literal["problem", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One thing that spoils performance: its name, what was seen, why it matters, the exact fix, and how bad it is."""

    name: str
    seen: str
    why: str
    fix: str
    severity: Severity


@dataclass(frozen=True)
class Machine:
    """All that a check may look at: checks read nothing else, and change nothing."""

    tree: Tree
    topology: Topology
    environ: Mapping[str, str]
    has_libnuma: bool
    refused: Mapping[str, int]  # NUMA calls that the kernel refuses, with the errno

    @property
    def memory_nodes(self) -> list[Node]:
        """The nodes that have memory, whether or not this process may use it."""
        return [node for node in self.topology.nodes if node.memory_bytes]

    @property
    def online(self) -> set[int]:
        """All CPUs that are online."""
        return {cpu.id for cpu in self.topology.cpus}

    @property
    def cpuset_cpus(self) -> set[int]:
        """CPUs of the innermost control group that limits them; all that are online where none is told."""
        for line in self.tree.text("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpuset" not in controllers.split(","):
                continue
            mount = "sys/fs/cgroup/cpuset" if controllers else "sys/fs/cgroup"  # version 1, version 2
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                for name in ("cpuset.cpus.effective", "cpuset.effective_cpus"):
                    if listed := self.tree.text(f"{mount}{group}/{name}"):
                        return set(parse_cpulist(listed)) & self.online
        return self.online


Check = Callable[[Machine], Finding | None]
