"""How much time on CPUs the control groups of this process grant it: their bandwidth limit, not their cpuset.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from numa_lab.sysfs import Tree


def cpu_quota(tree: Tree | None = None) -> float:
    """How many CPUs' worth of time the control groups grant; infinity where none limits it."""
    tree = tree or Tree(Path("/"))
    grants = [math.inf]
    for group in _groups(tree):
        # Version 2 has both numbers in one file, "max" for no limit; version 1 has two files, -1 for no limit.
        numbers = tree.text(f"{group}/cpu.max").split() or [
            tree.text(f"{group}/cpu.cfs_{name}_us") for name in ("quota", "period")
        ]
        if all(number.isdecimal() for number in numbers):
            grants.append(int(numbers[0]) / int(numbers[1]))
    return min(grants)


def _groups(tree: Tree) -> Iterator[str]:
    """Folders of the groups in which this process is under the controller, the innermost first."""
    for line in tree.text("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = "sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup"  # version 1, version 2
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield f"{mount}{group}"
