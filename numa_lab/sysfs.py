"""Files of sysfs and procfs below a root: live ones, or those captured on another machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from numa_lab import descriptors
from numa_lab.errors import InvalidInput


def parse_cpulist(text: str) -> tuple[int, ...]:
    """Read a list such as ``0-3,8`` (the kernel's cpulist format), sorted and without repetitions.

    Raises
    ------
    InvalidInput
        The text is not such a list.
    """
    numbers: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        # Six digits: more CPUs than a kernel can have, and few enough to write out after a slip of the finger.
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise InvalidInput(f"list {text!r}: expected numbers and ascending ranges such as 0-3,8")
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def format_cpulist(numbers: Iterable[int]) -> str:
    """Write numbers as ``0-3,8``; the empty text for none."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


class Tree:
    """A tree of sysfs and procfs; captured files may end in NUL bytes, and old kernels lack some."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cpu_dir = root / "sys/devices/system/cpu"

    def node_dir(self, node: int) -> Path:
        """The folder of a NUMA node."""
        return self.root / f"sys/devices/system/node/node{node}"

    def text(self, path: str | Path) -> str:
        """A file's text, empty where it is missing or can't be read (some sysfs files answer with an error)."""
        try:
            return (self.root / path).read_text(errors="replace").strip(" \t\n\0")
        except OSError as error:
            descriptors.refuse(error, f"{path} can't be read")  # else it would look as if it were missing
            return ""

    def cpu_list(self, folder: Path, map_name: str, list_name: str) -> tuple[int, ...]:
        """CPUs of a pair of files such as cpulist and cpumap, of which old kernels have only the map."""
        if listed := self.text(folder / list_name):
            return parse_cpulist(listed)
        bits = int(self.text(folder / map_name).replace(",", "") or "0", 16)
        return tuple(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)

    def numbered(self, folder: Path, prefix: str) -> tuple[int, ...]:
        """The numbers of the entries ``prefix0``, ``prefix1``, ... of a folder, none where it is missing."""
        names = (path.name for path in folder.glob(f"{prefix}*"))
        return tuple(sorted(int(name[len(prefix) :]) for name in names if name[len(prefix) :].isdecimal()))
