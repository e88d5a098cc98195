"""Reads what the kernel tells of pages: on which nodes they lie (numa_maps), which are huge (smaps), and how many it has moved.

Limits: numa_maps and smaps describe whole mappings. The kernel merges neighbours of the same kind and policy into one, so memory beside
the range that is asked for may be counted too. Source: numa(7) and proc(5).
"""

from __future__ import annotations

import math
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from numa_lab.machine.sysfs import Tree, parse_cpulist

PAGE_BYTES = mmap.PAGESIZE
_PROC = Tree(Path("/proc"))  # some files are missing without CONFIG_NUMA and CONFIG_PROC_PAGE_MONITOR, and in gVisor
HUGE_PAGES = "sys/kernel/mm/transparent_hugepage"


def huge_page_bytes(tree: Tree | None = None, page_bytes: int = PAGE_BYTES) -> int:
    """Return the bytes of a transparent huge page: 2 MiB with base pages of 4 KiB, 512 MiB with 64 KiB; 0 where the kernel has none."""
    tree = tree or Tree(Path("/"))
    if size := tree.text(f"{HUGE_PAGES}/hpage_pmd_size"):
        return int(size)
    if (tree.root / "sys/kernel/mm").is_dir() and not (tree.root / HUGE_PAGES).is_dir():
        return 0
    return page_bytes * page_bytes // 8  # before Linux 4.11, and without sysfs: what a page full of 8-byte entries maps


def pages_per_node(first: int, last: int, numa_maps: str | None = None) -> dict[int, int]:
    """Count the base pages on each node, of the mappings with bytes from `first` to before `last`; none where the kernel does not tell."""
    mappings = list(_numa_maps(_PROC.text("self/numa_maps") if numa_maps is None else numa_maps))
    ends = [start for start, _ in mappings[1:]] + [1 << 64]
    counts: Counter[int] = Counter()
    for (start, pages), end in zip(mappings, ends, strict=bool(mappings)):
        if start < last and end > first:
            counts += pages
    return dict(sorted(counts.items()))


def _numa_maps(text: str) -> Iterator[tuple[int, Counter[int]]]:
    """Yield start address and base pages per node of each mapping, in the order of addresses."""
    for line in text.splitlines():
        unit = re.search(r"kernelpagesize_kB=(\d+)", line)
        scale = max(1, int(unit[1]) * 1024 // PAGE_BYTES) if unit else 1
        yield (
            int(line.split(maxsplit=1)[0], 16),
            Counter({int(node): int(pages) * scale for node, pages in re.findall(r"\bN(\d+)=(\d+)", line)}),
        )


def thread_policy(numa_maps: str | None = None) -> tuple[str, tuple[int, ...]]:
    """Return the calling thread's memory policy by the name that the kernel gives it, and its nodes.

    They are read from the line of the thread's stack in numa_maps, since a stack has no policy of its own. A process may look at that
    where the kernel refuses ``get_mempolicy``. A kernel without NUMA gives "default".
    """
    path = Path("/proc/thread-self/numa_maps")
    text = numa_maps if numa_maps is not None else path.read_text() if path.exists() else ""
    policy = re.search(r"^[0-9a-f]+ ([^=:\n]+?)(?:=[^:\s]*)?(?::([\d,-]+))? stack\b", text, re.MULTILINE)
    return (policy[1], parse_cpulist(policy[2] or "")) if policy else ("default", ())


def huge_page_share(first: int, last: int, smaps: str | None = None) -> float:
    """Return the share of resident bytes that lie on huge pages, 0 to 1, of the mappings with bytes from `first` to before `last`.

    It is NaN where the kernel does not tell. It is read from smaps, which counts the bytes that a single entry maps; numa_maps gives the
    base page size for transparent huge pages too.
    """
    text = _PROC.text("self/smaps") if smaps is None else smaps
    if not text:
        return math.nan
    resident = huge = 0
    inside = False
    for line in text.splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) < last and int(bounds[2], 16) > first
        elif inside and (amount := re.match(r"(Rss|AnonHugePages|(?:Private|Shared)_Hugetlb):\s+(\d+) kB", line)):
            resident += int(amount[2]) * (amount[1] != "AnonHugePages")  # hugetlb pages are not part of Rss
            huge += int(amount[2]) * (amount[1] != "Rss")
    return huge / resident if resident else 0.0


def kernel_moves() -> int:
    """Return the pages that NUMA balancing has moved on this machine since it was booted; 0 where the kernel does not tell."""
    counted = re.search(r"^numa_pages_migrated (\d+)$", _PROC.text("vmstat"), re.MULTILINE)
    return int(counted[1]) if counted else 0
