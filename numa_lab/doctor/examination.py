"""What the checks look at, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from numa_lab.cpu_quota import cpu_quota
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
    lacking: Mapping[str, int] = field(default_factory=dict)  # other calls that it refuses
    live: bool = False  # whether this is the machine that the process runs on

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
        for group in self._control_groups("cpuset"):
            for name in ("cpuset.cpus.effective", "cpuset.effective_cpus"):
                if listed := self.tree.text(f"{group}/{name}"):
                    return set(parse_cpulist(listed)) & self.online
        return self.online

    @property
    def cpu_quota(self) -> float:
        """How many CPUs' worth of time the control groups grant; infinity where none limits it."""
        return cpu_quota(self.tree)

    def _control_groups(self, controller: str) -> Iterator[str]:
        """Folders of the control groups in which this process is under a controller, the innermost first."""
        for line in self.tree.text("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            mount = f"sys/fs/cgroup/{controller}" if controllers else "sys/fs/cgroup"  # version 1, version 2
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                yield f"{mount}{group}"


Check = Callable[[Machine], Finding | None]
