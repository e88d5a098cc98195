"""Reads in which control groups this process is, and how much memory and CPU time they leave it, by versions 1 and 2.

Limits: only groups are read that are mounted where this process sees them. Of version 1 the kernel tells the tightest limit
of all levels; of version 2 the limits above a container stay hidden from it. Source: the kernel's
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, proc_pid_mountinfo(5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

from numa_lab.machine.sysfs import Tree

NO_LIMIT = (
    1 << 60
)  # for no limit, version 1 gives the largest multiple of a page in 63 bits, which depends on the page's size


@dataclass(frozen=True)
class MemoryLimit:
    """A limit of one control group: the bytes that all its processes together may hold, and the bytes that are left of them.

    File cache that the group itself would give up counts as left. Beyond a limit that `throttles`, the kernel slows the
    processes down while it takes memory back from them; beyond any other limit it kills.
    """

    file: str
    limit_bytes: int
    available_bytes: int
    throttles: bool = False

    def sentence(self) -> str:
        """Return a clause that names the limit, its file, what is left of it, and what happens beyond it."""
        beyond = "slows this process down, to take its memory back" if self.throttles else "kills"
        return (
            f"{self.file} limits this process to {self.limit_bytes / 2**20:,.0f} MiB, of which "
            f"{self.available_bytes / 2**20:,.0f} MiB are left (beyond it the kernel {beyond})"
        )


def tightest(limits: Iterable[MemoryLimit]) -> MemoryLimit | None:
    """Return the limit that leaves least; None where there are no limits."""
    return min(limits, key=lambda limit: limit.available_bytes, default=None)


_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")


class ControlGroups:
    """The control groups of this process below a tree's root."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def cpu_quota(self) -> float:
        """Return how many CPUs' worth of time the groups grant; infinity where none limits it."""
        grants = [math.inf]
        for group in self.folders("cpu"):
            # Version 2 has both numbers in one file, "max" for no limit; version 1 has two files, -1 for no limit.
            numbers = self._tree.text(f"{group}/cpu.max").split() or [
                self._tree.text(f"{group}/cpu.cfs_{name}_us") for name in ("quota", "period")
            ]
            if all(number.isdecimal() for number in numbers):
                grants.append(int(numbers[0]) / int(numbers[1]))
        return min(grants)

    @cached_property
    def _mounts(self) -> list[tuple[frozenset[str], str, str]]:
        """Each mounted hierarchy: its controllers (none in version 2), which of its groups is mounted, and where."""
        mounts = []
        for line in self._tree.text("proc/self/mountinfo").splitlines():
            mount, _, file_system = line.partition(" - ")
            if file_system.startswith(("cgroup ", "cgroup2 ")) and len(mount.split(" ")) > 4:
                version_1 = file_system.startswith("cgroup ")
                controllers = frozenset(file_system.split(" ")[-1].split(",") if version_1 else ())
                root, point = map(_unescaped, mount.split(" ")[3:5])
                mounts.append((controllers, root, point))
        return mounts

    def folders(self, controller: str) -> Iterator[str]:
        """Yield the folders of the groups under a controller, the innermost first, then every level above that can be seen."""
        for line in self._tree.text("proc/self/cgroup").splitlines():
            _, _, membership = line.partition(":")
            controllers, _, path = membership.partition(":")
            if not path or (controllers and controller not in controllers.split(",")):
                continue
            mounts = [
                (root, point)
                for mounted, root, point in self._mounts
                if (controller in mounted if controllers else not mounted)
            ] or [("/", f"/sys/fs/cgroup/{controller}" if controllers else "/sys/fs/cgroup")]
            # Where folders are bind-mounted, the group of another container may be in sight too.
            root, point = next((mount for mount in mounts if _holds(mount[0], path)), mounts[0])
            # A namespace can hide how root and path are related; then the group that is mounted is this process's own.
            inner = PurePosixPath(path[len(root.rstrip("/")) :].strip("/") if _holds(root, path) else "")
            for group in (inner, *inner.parents):
                yield f"{point}/{group}".removesuffix("/.").lstrip("/")

    def memory_limits(self) -> tuple[MemoryLimit, ...]:
        """Return every limit on this process's memory, that of its own group first; none where nothing limits it."""
        limits: list[MemoryLimit] = []
        folders = [folder for folder in dict.fromkeys(self.folders("memory")) if self._tree.has(folder)]
        for level, folder in enumerate(folders):
            amounts = {name: self._tree.text(f"{folder}/{name}") for name in _LIMITS}
            if amounts["memory.limit_in_bytes"] and not level:
                amounts["memory.stat"] = self._stat(folder).get("hierarchical_memory_limit", "")
            elif level and self._tree.text(f"{folder}/memory.use_hierarchy") == "0":
                continue  # in version 1, what the groups below use then does not count in this one
            for name, amount in amounts.items():
                known = min((limit.limit_bytes for limit in limits), default=NO_LIMIT)
                if amount.isdecimal() and int(amount) < (known if name == "memory.stat" else NO_LIMIT):
                    left = max(0, int(amount) - self._held_bytes(folder))
                    limits.append(MemoryLimit(f"/{folder}/{name}", int(amount), left, name == "memory.high"))
        return tuple(limits)

    def _held_bytes(self, folder: str) -> int:
        """The bytes that a group holds, without the file cache that it would give up first."""
        used = self._tree.text(f"{folder}/memory.current") or self._tree.text(f"{folder}/memory.usage_in_bytes")
        stat = self._stat(folder)
        cached = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
        return max(0, int(used or 0) - cached)

    def _stat(self, folder: str) -> dict[str, str]:
        return dict(re.findall(r"^(\w+) (\d+)$", self._tree.text(f"{folder}/memory.stat"), re.MULTILINE))


def _holds(root: str, path: str) -> bool:
    """Whether the group at `root` is the group at `path`, or one above it."""
    return ".." not in path and (path == root or path.startswith(root.rstrip("/") + "/"))


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)
