"""What the kernel tells of pages: of mappings per node (numa_maps) and on huge pages (smaps), and how many it moved.

Limits: numa_maps and smaps speak of whole mappings. The kernel merges neighbours of the same kind and policy into one, so memory beside
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
_PROC = Tree(Path("/proc"))  # some of it is missing without CONFIG_NUMA and CONFIG_PROC_PAGE_MONITOR, and in gVisor
HUGE_PAGES = "sys/kernel/mm/transparent_hugepage"


def huge_page_bytes(tree: Tree | None = None, page_bytes: int = PAGE_BYTES) -> int:
    """Bytes of a transparent huge page: 2 MiB with base pages of 4 KiB, 512 MiB with those of 64 KiB; 0 where the kernel has none."""
    tree = tree or Tree(Path("/"))
    if told := tree.text(f"{HUGE_PAGES}/hpage_pmd_size"):
        return int(told)
    if (tree.root / "sys/kernel/mm").is_dir() and not (tree.root / HUGE_PAGES).is_dir():
        return 0
    return page_bytes * page_bytes // 8  # before Linux 4.11, and without sysfs: what a page full of 8-byte entries maps


def pages_per_node(first: int, last: int, numa_maps: str | None = None) -> dict[int, int]:
    """Base pages on each node, of the mappings that hold bytes from `first` to before `last`; none where the kernel does not tell."""
    mappings = list(_numa_maps(_PROC.text("self/numa_maps") if numa_maps is None else numa_maps))
    ends = [start for start, _ in mappings[1:]] + [1 << 64]
    found: Counter[int] = Counter()
    for (start, pages), end in zip(mappings, ends, strict=bool(mappings)):
        if start < last and end > first:
            found += pages
    return dict(sorted(found.items()))


def _numa_maps(text: str) -> Iterator[tuple[int, Counter[int]]]:
    """Start address and base pages per node of each mapping, in the order of addresses."""
    for line in text.splitlines():
        unit = re.search(r"kernelpagesize_kB=(\d+)", line)
        scale = max(1, int(unit[1]) * 1024 // PAGE_BYTES) if unit else 1
        yield (
            int(line.split(maxsplit=1)[0], 16),
            Counter({int(node): int(pages) * scale for node, pages in re.findall(r"\bN(\d+)=(\d+)", line)}),
        )


def thread_policy(numa_maps: str | None = None) -> tuple[str, tuple[int, ...]]:
    """The calling thread's memory policy in the kernel's words, and its nodes, by its stack, which has no policy of its own.

    What the kernel lets a process look at where it refuses ``get_mempolicy``. "default" where it has no NUMA.
    """
    path = Path("/proc/thread-self/numa_maps")
    text = numa_maps if numa_maps is not None else path.read_text() if path.exists() else ""
    told = re.search(r"^[0-9a-f]+ ([^=:\n]+?)(?:=[^:\s]*)?(?::([\d,-]+))? stack\b", text, re.MULTILINE)
    return (told[1], parse_cpulist(told[2] or "")) if told else ("default", ())


def huge_page_share(first: int, last: int, smaps: str | None = None) -> float:
    """Share of the resident bytes that lie on huge pages, 0 to 1, of the mappings from `first` to before `last`.

    NaN where the kernel does not tell. smaps counts what is mapped by a single entry; numa_maps names the base page size for
    transparent huge pages too.
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
    """Pages that the kernel's NUMA balancing has moved on this machine since it was booted; 0 where it never can, or does not tell."""
    counted = re.search(r"^numa_pages_migrated (\d+)$", _PROC.text("vmstat"), re.MULTILINE)
    return int(counted[1]) if counted else 0
