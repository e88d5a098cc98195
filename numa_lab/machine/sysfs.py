"""Reads files of sysfs and procfs below a root, which are those of this machine or were captured on another."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from numa_lab.errors import InvalidInput
from numa_lab.machine import open_files


@lru_cache(maxsize=4096)  # neighbours in sysfs hold the same lists
def parse_cpulist(text: str) -> tuple[int, ...]:
    """Read a list such as ``0-3,8`` (the kernel's cpulist format), sorted and without repetitions.

    Raises
    ------
    InvalidInput
        The text is not such a list.
    """
    numbers: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        # Six digits are more CPUs than a kernel can have, and few enough that a typing error does not fill the memory.
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise InvalidInput(f"list {text!r}: expected numbers and ascending ranges such as 0-3,8")
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def format_cpulist(numbers: Iterable[int]) -> str:
    """Write numbers as ``0-3,8``; no numbers give the empty text."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


class Tree:
    """A tree of sysfs and procfs.

    Captured files may end in NUL bytes, and old kernels lack some files; so nothing here fails for a missing file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()  # so that a path below it stays the same when it is joined to it again
        self._prefix = f"{str(self.root).rstrip('/')}/"
        self.cpu_dir = self.root / "sys/devices/system/cpu"
        self.live = root.resolve() == Path("/")  # whether this is the running machine, whose kernel can be asked too

    def _below(self, path: str | Path) -> str:
        """The place of a path that is below the root already, or is relative to it."""
        path = os.fspath(path)
        return path if path.startswith(self._prefix) else f"{self._prefix}{path}"

    def node_dir(self, node: int) -> Path:
        """Return the folder of a NUMA node."""
        return self.root / f"sys/devices/system/node/node{node}"

    def text(self, path: str | Path) -> str:
        """Return the text of a file; empty where it is missing or can't be read (some sysfs files answer with an error)."""
        # A large machine has 100,000 small files, and pathlib's way to the text of one takes three times as long.
        try:
            descriptor = os.open(self._below(path), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            open_files.refuse(error, f"{path} can't be read")  # else the file would look as if it were missing
            return ""
        parts = []
        try:
            while part := os.read(descriptor, 1 << 16):
                parts.append(part)
        except OSError:
            return ""
        finally:
            os.close(descriptor)
        return b"".join(parts).decode(errors="replace").strip(" \t\n\0")

    def has(self, path: str | Path) -> bool:
        """Return whether there is such a file or folder."""
        return os.path.exists(self._below(path))

    def names(self, folder: str | Path) -> list[str]:
        """Return the names in a folder, in no order; none where the folder is missing."""
        try:
            return os.listdir(self._below(folder))
        except OSError:
            return []

    def listed(self, path: str | Path) -> tuple[int, ...]:
        """Return the numbers of a file that holds a list; none where it is missing, or says that there are none."""
        text = self.text(path)
        return () if text == "(null)" else parse_cpulist(text)  # some kernels write (null) for an empty mask

    def cpu_list(self, folder: str | Path, map_name: str, list_name: str) -> tuple[int, ...]:
        """Return the CPUs of a pair of files such as cpulist and cpumap, of which old kernels have only the map."""
        if listed := self.text(f"{folder}/{list_name}"):
            return parse_cpulist(listed)
        bits = int(self.text(f"{folder}/{map_name}").replace(",", "") or "0", 16)
        return tuple(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)

    def numbered(self, folder: str | Path, prefix: str) -> tuple[int, ...]:
        """Return the numbers of the entries ``prefix0``, ``prefix1``, ... of a folder; none where the folder is missing."""
        names = (name for name in self.names(folder) if name.startswith(prefix))
        return tuple(sorted(int(name[len(prefix) :]) for name in names if name[len(prefix) :].isdecimal()))
