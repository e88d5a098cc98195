"""Reads from a machine's files which CPUs and nodes it has; where two files differ, the kernel's answer for this process counts.

Containers show a process files that were made for it (by lxcfs, as LXC, LXD and Incus use it): ``cpu/online`` then counts from 0, or
names the container's CPUs alone, while ``Cpus_allowed_list``, the affinity and the CPUs of the nodes stay the kernel's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from numa_lab.errors import InvalidInput
from numa_lab.machine.hardware import read_allowed
from numa_lab.machine.sysfs import Tree, parse_cpulist

_NODES = "sys/devices/system/node"


class MachineFiles(Tree):
    """Reads one machine below a root, which is `/` for this one.

    Raises
    ------
    InvalidInput
        The root is no folder, or holds no sysfs.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        if not self.cpu_dir.is_dir():
            what = "holds no sys/devices/system/cpu" if root.is_dir() else "is not a folder"
            raise InvalidInput(
                f"root {str(root)!r} {what}: expected / of a Linux with sysfs, or a folder with captured sys and proc"
            )

    @cached_property
    def listed_online(self) -> tuple[int, ...] | None:
        """The CPUs that ``cpu/online`` names, which may be a list that was made for a container; None without that file."""
        listed = self.text(self.cpu_dir / "online")
        return parse_cpulist(listed) if listed else None

    @cached_property
    def online(self) -> tuple[int, ...]:
        """The CPUs that run: those that ``cpu/online`` lists, and those that the kernel lets this process use or shows to be running.

        A node may list CPUs that are offline, and the CPUs that a process is allowed may include some too.
        """
        allowed = self._allowed_cpus or set()
        listed = set(self._with_folder if self.listed_online is None else self.listed_online)
        known = self._node_of.keys() or self._with_folder
        # The affinity holds no CPU that is offline. A captured list may, but at least one of a process's CPUs runs.
        certain = allowed if self.live or not (known or allowed & listed) else allowed & known
        others = (certain | self._node_of.keys()) - listed
        if self.has(self.cpu_dir / "offline"):
            offline = set(self.listed(self.cpu_dir / "offline"))
            return tuple(sorted((listed | others) - offline | (certain if self.live else set())))
        asked = others if self.listed_online is not None else others | listed
        switches = {cpu: self.text(f"{self.cpu_dir}/cpu{cpu}/online") for cpu in asked}
        off = {
            cpu for cpu, switch in switches.items() if switch != "1" and (switch == "0" or cpu not in listed | certain)
        }
        return tuple(sorted((listed | others) - off))

    @cached_property
    def node_cpus(self) -> dict[int, tuple[int, ...]]:
        """The online CPUs of each node. Where the kernel shows no nodes, one has all: the first whose memory this process may use."""
        if not self._listed:
            return {min(self._allowed_nodes or {0}): self.online}
        by_node: dict[int, list[int]] = {node: [] for node in self._listed}
        for cpu in self.online:
            by_node[self._node_of[cpu] if cpu in self._node_of else self._named_node(cpu)].append(cpu)
        return {node: tuple(cpus) for node, cpus in by_node.items()}

    @cached_property
    def allowed(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The online CPUs and the nodes that this process may use; all of them where the kernel does not tell."""
        cpus, mems = self._allowed_cpus, self._allowed_nodes
        return (
            tuple(cpu for cpu in self.online if cpus is None or cpu in cpus),
            tuple(node for node in self.node_cpus if mems is None or node in mems),
        )

    @cached_property
    def isolated(self) -> tuple[int, ...]:
        """The online CPUs that were set aside at boot: ``isolcpus`` takes them out of scheduling, ``nohz_full`` stops their clock."""
        isolated = {*self.listed(self.cpu_dir / "isolated"), *self.listed(self.cpu_dir / "nohz_full")}
        if not self.has(self.cpu_dir / "isolated"):  # before Linux 4.2
            flags = r"(?:(?:[a-z_]+,)*domain,(?:[a-z_]+,)*)?"  # without any, domain is meant
            for option in re.findall(
                rf"(?<!\S)(?:isolcpus={flags}|nohz_full=)(\d[\d,-]*)(?!\S)", self.text("proc/cmdline")
            ):
                with suppress(InvalidInput):  # the kernel could not read such a list either
                    isolated.update(parse_cpulist(option))
        return tuple(cpu for cpu in self.online if cpu in isolated)

    @cached_property
    def _with_folder(self) -> set[int]:
        return set(self.numbered(self.cpu_dir, "cpu"))

    def initiators(self, node: int) -> tuple[int, ...]:
        """Read the nodes with the best access to a node's memory; none where firmware does not tell."""
        for access in ("access0", "access1"):  # 0: all initiators, 1: CPUs only
            if nodes := self.numbered(self.node_dir(node) / access / "initiators", "node"):
                return nodes
        return ()

    def distances(self) -> tuple[tuple[int, ...], ...] | None:
        """Read the distances of each node to all, in the order of the nodes; None where firmware gives none that fit them."""
        rows = tuple(tuple(map(int, self.text(self.node_dir(n) / "distance").split())) for n in self.node_cpus)
        return rows if all(len(row) == len(self.node_cpus) for row in rows) else None

    @cached_property
    def _listed(self) -> Mapping[int, tuple[int, ...]]:
        """The CPUs that each node lists."""
        ids = self.numbered(_NODES, "node")
        return {node: self.cpu_list(self.node_dir(node), "cpumap", "cpulist") for node in ids}

    @cached_property
    def _node_of(self) -> Mapping[int, int]:
        return {cpu: node for node, cpus in self._listed.items() for cpu in cpus}

    def _named_node(self, cpu: int) -> int:
        """The node that the folder of a CPU names, for a CPU that no node lists; the first node where the folder names none."""
        named = [node for node in self.numbered(f"{self.cpu_dir}/cpu{cpu}", "node") if node in self._listed]
        return (named or list(self._listed))[0]

    @cached_property
    def _permitted(self) -> tuple[set[int] | None, set[int] | None]:
        return read_allowed(self)

    @property
    def _allowed_cpus(self) -> set[int] | None:
        return self._permitted[0]

    @property
    def _allowed_nodes(self) -> set[int] | None:
        return self._permitted[1]
