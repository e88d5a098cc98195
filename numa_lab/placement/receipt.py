"""Receipt: what was requested, what the kernel granted, and what was seen while something was timed.

Limits: a thread's CPU is the one that it was last on, read after samples, not a trace; pages are looked at before and
after, not during. What could not be seen at all stands in ``notes``.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from numa_lab.machine.control_groups import ControlGroups
from numa_lab.machine.sysfs import Tree, format_cpulist, parse_cpulist
from numa_lab.placement.binding import Binding, MemPolicy

Pages = Mapping[str, Mapping[int, int]]  # tensor name -> node -> pages; node -1 counts pages that were never touched


@dataclass(frozen=True)
class ThreadSeen:
    """A thread that computed: the CPUs that its mask allows, and those on which it was seen."""

    tid: int
    allowed: tuple[int, ...]
    seen: tuple[int, ...]


class ThreadWatch:
    """Which threads of this process run while something is timed, and on which CPUs.

    Threads are told by their time on a CPU, so that a thread of any OpenMP runtime, pinned or not, is found without
    asking the runtime. Call ``look`` between samples.
    """

    def __init__(self) -> None:
        self._at_start = {tid: _run_nanoseconds(tid) for tid in _thread_ids()}
        self._seen: dict[int, set[int]] = {}

    def look(self) -> None:
        """Note the CPU that each thread was last on."""
        for tid in _thread_ids():
            cpu = last_cpu(tid)
            if cpu is not None:
                self._seen.setdefault(tid, set()).add(cpu)

    def threads(self, share: float = 0.2) -> tuple[ThreadSeen, ...]:
        """The threads that ran at least `share` as long as the busiest one since the watch began."""
        ran = {tid: _run_nanoseconds(tid) - self._at_start.get(tid, 0) for tid in self._seen}
        enough = share * max(ran.values(), default=0)
        found = []
        for tid in sorted(tid for tid, time in ran.items() if time >= enough and time > 0):
            try:
                allowed = tuple(sorted(os.sched_getaffinity(tid)))
            except ProcessLookupError:  # it has ended: where it ran is known, what it was allowed is not
                allowed = ()
            found.append(ThreadSeen(tid, allowed, tuple(sorted(self._seen[tid]))))
        return tuple(found)


def _thread_ids() -> list[int]:
    return [int(tid) for tid in os.listdir("/proc/self/task")]


def schedstat(tid: int) -> tuple[int, int]:
    """Nanoseconds that a thread of this process has run, and has waited for a CPU that others had; 0 where it has ended."""
    try:
        ran, waited, _ = Path(f"/proc/self/task/{tid}/schedstat").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return int(ran), int(waited)


def _run_nanoseconds(tid: int) -> int:
    return schedstat(tid)[0]


def last_cpu(tid: int) -> int | None:
    """The CPU that the thread was last on (field 39 of proc(5)'s stat), None for a thread that has ended."""
    try:
        stat = Path(f"/proc/self/task/{tid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[36])  # the name in parentheses may hold blanks; field 3 comes after it


def threads_now(team: Iterable[tuple[int, Iterable[int]]]) -> tuple[ThreadSeen, ...]:
    """Threads given by thread id and mask, each with the CPU that it was last on."""
    return tuple(
        ThreadSeen(tid, tuple(sorted(cpus)), (cpu,) if (cpu := last_cpu(tid)) is not None else ()) for tid, cpus in team
    )


@dataclass(frozen=True)
class Team:
    """How many threads were to compute, how many OpenMP gave, and how many CPUs' worth of time control groups grant them."""

    asked: int
    granted: int
    quota: float = math.inf

    def contradictions(self) -> list[str]:
        """Each way in which it is smaller than was asked for, as a sentence."""
        found = []
        if self.granted < self.asked:
            found.append(
                f"{self.asked} threads were requested and {self.granted} computed: OpenMP granted no more "
                "(OMP_THREAD_LIMIT, OMP_DYNAMIC)."
            )
        if self.quota < self.asked:
            found.append(
                f"{self.asked} threads were requested, and a control group grants the time of {self.quota:g} CPUs."
            )
        return found

    def to_json(self) -> dict[str, float | None]:
        """Plain JSON values; no limit is null."""
        return {
            "asked": self.asked,
            "granted": self.granted,
            "quota": self.quota if math.isfinite(self.quota) else None,
        }


def team_of(asked: int, threads: Collection[object]) -> Team | None:
    """What was asked for, the threads of the team that were found, and the quota now; None where the team can't be seen."""
    return Team(asked, len(threads), ControlGroups(Tree(Path("/"))).cpu_quota()) if threads else None


@dataclass(frozen=True)
class Receipt:
    """Proof of placement for one measured case.

    `pages_before` and `pages_after` give the pages of each tensor per node, around the timed region; `huge_pages` the
    share of each, 0 to 1, that lies on huge pages. `promised` names the nodes on which all tensors shall lie, where that is
    more than the requested policy alone sees to. `team` is None where it is not known how many threads there were to be.
    """

    requested: Binding
    effective: Binding
    threads: tuple[ThreadSeen, ...]
    pages_before: Pages
    pages_after: Pages
    notes: tuple[str, ...] = ()
    huge_pages: Mapping[str, float] = field(default_factory=dict)
    promised: tuple[int, ...] = ()
    team: Team | None = None

    def __str__(self) -> str:
        """What was requested, granted and seen, in one line."""
        pages = {
            format_cpulist([node]) if node >= 0 else "none": n for node, n in sorted(self.pages_per_node().items())
        }
        of = f" of {self.team.asked}" if self.team and self.team.granted < self.team.asked else ""
        seen = f"{len(self.threads)}{of} threads on CPUs {format_cpulist(self.observed_cpus) or 'none'}"
        lie = ", ".join(f"node {node}: {count}" for node, count in pages.items()) or "none looked at"
        return f"requested {self.requested}, granted {self.effective}, seen {seen}, pages {lie}"

    @property
    def observed_cpus(self) -> tuple[int, ...]:
        """CPUs on which computing threads were seen."""
        return tuple(sorted({cpu for thread in self.threads for cpu in thread.seen}))

    def pages_per_node(self) -> Counter[int]:
        """Pages of all tensors per node, after the measurement."""
        total: Counter[int] = Counter()
        for pages in self.pages_after.values():
            total.update(pages)
        return total

    def page_share(self, nodes: Collection[int]) -> float:
        """Share of all pages that lie on these nodes, 0 to 1."""
        pages = self.pages_per_node()
        return sum(pages[node] for node in nodes) / max(1, pages.total())

    def contradictions(self, cpus: Collection[int], cpu_nodes: Collection[int]) -> list[str]:
        """Each way in which what was observed contradicts what was asked for, as a sentence.

        Parameters
        ----------
        cpus
            The CPUs that the requested binding allows.
        cpu_nodes
            Their nodes.
        """
        found = []
        if self.requested.cpu_nodes and self.effective.cpu_nodes != tuple(sorted(cpu_nodes)):
            found.append(
                f"CPUs of nodes {format_cpulist(cpu_nodes)} were requested, "
                f"and the kernel granted nodes {format_cpulist(self.effective.cpu_nodes)}."
            )
        asked = self.requested.asked_of_kernel
        if not asked.places_as(self.effective):
            found.append(
                f"Memory policy {asked.memory_words} was requested, and the kernel granted {self.effective.memory_words}."
            )
        if not self.threads:
            found.append("No thread was seen computing.")
        if self.team:
            found += self.team.contradictions()
        if outside := [thread for thread in self.threads if set(thread.seen) - set(cpus)]:
            who = f"Thread {outside[0].tid}" if len(outside) == 1 else f"{len(outside)} of {len(self.threads)} threads"
            seen = {cpu for thread in outside for cpu in thread.seen} - set(cpus)
            found.append(
                f"{who} computed on CPUs {format_cpulist(seen)}, outside the requested CPUs {format_cpulist(cpus)}."
            )
        return found + self._page_contradictions()

    def _page_contradictions(self) -> list[str]:
        found = []
        for name, before in self.pages_before.items():
            after = self.pages_after.get(name, {})
            if dict(before) != dict(after):
                found.append(
                    f"Pages of {name} moved during the measurement: {dict(before)} before, {dict(after)} after."
                )
        for name, pages in self.pages_after.items():
            if pages.get(-1):
                found.append(f"{pages[-1]} of {sum(pages.values())} pages of {name} were never touched.")
            # One thread touches K and V first; query and output are touched by those that compute, on any node.
            touched_first = self.requested.policy is MemPolicy.FIRST_TOUCH and name in ("key", "value")
            confined = self.requested.confines_memory or touched_first
            if nodes := self.promised or (self.requested.mem_nodes if confined else ()):
                elsewhere = {n: count for n, count in pages.items() if n >= 0 and n not in nodes}
                if elsewhere:
                    found.append(
                        f"{sum(elsewhere.values())} of {sum(pages.values())} pages of {name} lie on nodes "
                        f"{format_cpulist(elsewhere)} instead of {format_cpulist(nodes)}."
                    )
        return found

    def to_columns(self) -> dict[str, str]:
        """The three receipt columns of a row, each JSON."""
        return {
            "requested": str(self.requested),
            "effective": str(self.effective),
            "observed": json.dumps(
                {
                    "threads": [
                        {"tid": t.tid, "allowed": format_cpulist(t.allowed), "seen": format_cpulist(t.seen)}
                        for t in self.threads
                    ],
                    "pages_before": self.pages_before,
                    "pages_after": self.pages_after,
                    "notes": self.notes,
                    "huge_pages": self.huge_pages,
                    **({"promised": format_cpulist(self.promised)} if self.promised else {}),
                    **({"team": self.team.to_json()} if self.team else {}),
                }
            ),
        }

    @classmethod
    def from_columns(cls, columns: Mapping[str, str]) -> Receipt:
        """Read back what ``to_columns`` wrote."""
        observed = json.loads(columns["observed"])
        before, after = (
            {name: {int(node): count for node, count in pages.items()} for name, pages in observed[key].items()}
            for key in ("pages_before", "pages_after")
        )
        threads = tuple(
            ThreadSeen(t["tid"], parse_cpulist(t["allowed"]), parse_cpulist(t["seen"])) for t in observed["threads"]
        )
        return cls(
            Binding.parse(columns["requested"]),
            Binding.parse(columns["effective"]),
            threads,
            before,
            after,
            tuple(observed["notes"]),
            observed.get("huge_pages", {}),
            parse_cpulist(observed.get("promised", "")),
            Team(told["asked"], told["granted"], told["quota"] or math.inf) if (told := observed.get("team")) else None,
        )


def least_huge_pages(observed: Iterable[str]) -> float:
    """The least share of a tensor's memory on huge pages, over values of the column ``observed``; NaN where none tells."""
    shares = [share for text in set(observed) for share in json.loads(text).get("huge_pages", {}).values()]
    return min(shares, default=math.nan)
