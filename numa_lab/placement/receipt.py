"""Receipt: what was requested, what the kernel granted, and what was seen while something was timed.

Limits: a thread's CPU is the one that it was last on, read after samples, and is not traced; pages are looked at before and
after, and not during. What could not be seen at all stands in ``notes``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from numa_lab.machine.control_groups import ControlGroups
from numa_lab.machine.sysfs import Tree, format_cpulist, parse_cpulist
from numa_lab.placement.binding import Binding, MemPolicy
from numa_lab.placement.thread_watch import ThreadSeen

Pages = Mapping[str, Mapping[int, int]]  # tensor name -> node -> pages; node -1 counts pages that were never touched


@dataclass(frozen=True)
class Team:
    """The size of a team: how many threads were to compute, how many OpenMP gave, and how many CPUs' time control groups grant."""

    asked: int
    granted: int
    quota: float = math.inf

    def contradictions(self) -> list[str]:
        """Return each way in which the team is smaller than was asked for, as a sentence."""
        sentences = []
        if self.granted < self.asked:
            sentences.append(
                f"{self.asked} threads were requested and {self.granted} computed: OpenMP granted no more "
                "(OMP_THREAD_LIMIT, OMP_DYNAMIC)."
            )
        if self.quota < self.asked:
            sentences.append(
                f"{self.asked} threads were requested, and a control group grants the time of {self.quota:g} CPUs."
            )
        return sentences

    def to_json(self) -> dict[str, float | None]:
        """Return plain JSON values; a quota without limit is null."""
        return {
            "asked": self.asked,
            "granted": self.granted,
            "quota": self.quota if math.isfinite(self.quota) else None,
        }


def team_of(asked: int, threads: Collection[object]) -> Team | None:
    """Return the size of a team whose threads were found, with the quota of now; None where none of them can be seen."""
    return Team(asked, len(threads), ControlGroups(Tree(Path("/"))).cpu_quota()) if threads else None


class TeamSeen(NamedTuple):
    """A team as it was seen at one moment."""

    granted: Binding  # by the kernel, to its threads
    threads: tuple[ThreadSeen, ...]
    notes: tuple[str, ...]  # what could not be placed or seen


@dataclass(frozen=True)
class Receipt:
    """Proof of placement, of one measured case or of a team as it is now.

    Attributes
    ----------
    requested, effective
        The binding that was asked for, and what the kernel granted.
    threads
        The threads that computed.
    pages_before, pages_after
        Pages of each tensor per node, before and after the timed region: ``{name: {node: pages}}``. Pages that were never touched
        are counted under node -1. Of a team as it is now there is no *before*.
    notes
        What could not be placed or seen, and what is doubtful, each as a phrase.
    huge_pages
        The share of each tensor, 0 to 1, that lies on huge pages.
    promised
        The nodes on which all tensors shall lie, where that is more than the requested policy alone sees to.
    team
        How many threads there were to be, and were; None where that is not known.
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
        """Say in one line what was requested, granted and seen."""
        pages = {
            format_cpulist([node]) if node >= 0 else "none": n for node, n in sorted(self.pages_per_node().items())
        }
        missing = f" of {self.team.asked}" if self.team and self.team.granted < self.team.asked else ""
        threads = f"{len(self.threads)}{missing} threads on CPUs {format_cpulist(self.observed_cpus) or 'none'}"
        nodes = ", ".join(f"node {node}: {count}" for node, count in pages.items()) or "none looked at"
        return f"requested {self.requested}, granted {self.effective}, seen {threads}, pages {nodes}"

    @classmethod
    def of_team(
        cls,
        node: int,
        threads: int,
        seen: TeamSeen,
        *,
        pages: Pages | None = None,
        notes: Iterable[str] = (),
        huge_pages: Mapping[str, float] | None = None,
        promised: tuple[int, ...] = (),
    ) -> Receipt:
        """Return the receipt of a team as it is now, whose threads were to run on a node and to prefer its memory.

        Parameters
        ----------
        node, threads
            What was asked for.
        seen
            What the kernel granted, and where the threads are. One that appears twice has two places, and is one thread.
        pages, huge_pages, promised
            As ``pages_after``, ``huge_pages`` and ``promised`` of the receipt.
        notes
            What is to be said besides the notes of `seen`.
        """
        return cls(
            Binding((node,), (node,), MemPolicy.PREFERRED),
            seen.granted,
            seen.threads,
            {},
            pages or {},
            (*seen.notes, *notes),
            huge_pages or {},
            promised,
            team_of(threads, set(seen.threads)),
        )

    @property
    def observed_cpus(self) -> tuple[int, ...]:
        """The CPUs on which computing threads were seen."""
        return tuple(sorted({cpu for thread in self.threads for cpu in thread.seen}))

    def pages_per_node(self) -> Counter[int]:
        """Return the pages of all tensors together per node, after the measurement."""
        total: Counter[int] = Counter()
        for pages in self.pages_after.values():
            total.update(pages)
        return total

    def page_share(self, nodes: Collection[int]) -> float:
        """Return the share of all pages that lies on these nodes, 0 to 1."""
        pages = self.pages_per_node()
        return sum(pages[node] for node in nodes) / max(1, pages.total())

    def contradictions(self, cpus: Collection[int], cpu_nodes: Collection[int]) -> list[str]:
        """Return each way in which what was observed contradicts what was asked for, as a sentence.

        Parameters
        ----------
        cpus
            The CPUs that the requested binding allows.
        cpu_nodes
            Their nodes.
        """
        sentences = []
        if self.requested.cpu_nodes and self.effective.cpu_nodes != tuple(sorted(cpu_nodes)):
            sentences.append(
                f"CPUs of nodes {format_cpulist(cpu_nodes)} were requested, "
                f"and the kernel granted nodes {format_cpulist(self.effective.cpu_nodes)}."
            )
        asked = self.requested.asked_of_kernel
        if not asked.places_as(self.effective):
            sentences.append(
                f"Memory policy {asked.memory_words} was requested, and the kernel granted {self.effective.memory_words}."
            )
        if not self.threads:
            sentences.append("No thread was seen computing.")
        if self.team:
            sentences += self.team.contradictions()
        if outside := [thread for thread in self.threads if set(thread.seen) - set(cpus)]:
            subject = (
                f"Thread {outside[0].tid}" if len(outside) == 1 else f"{len(outside)} of {len(self.threads)} threads"
            )
            seen = {cpu for thread in outside for cpu in thread.seen} - set(cpus)
            sentences.append(
                f"{subject} computed on CPUs {format_cpulist(seen)}, outside the requested CPUs {format_cpulist(cpus)}."
            )
        return sentences + self._page_contradictions()

    def _page_contradictions(self) -> list[str]:
        sentences = []
        for name, before in self.pages_before.items():
            after = self.pages_after.get(name, {})
            if dict(before) != dict(after):
                sentences.append(
                    f"Pages of {name} moved during the measurement: {dict(before)} before, {dict(after)} after."
                )
        for name, pages in self.pages_after.items():
            if pages.get(-1):
                sentences.append(f"{pages[-1]} of {sum(pages.values())} pages of {name} were never touched.")
            # One thread touches K and V first; query and output are touched by those that compute, on any node.
            touched_first = self.requested.policy is MemPolicy.FIRST_TOUCH and name in ("key", "value")
            confined = self.requested.confines_memory or touched_first
            if nodes := self.promised or (self.requested.mem_nodes if confined else ()):
                elsewhere = {n: count for n, count in pages.items() if n >= 0 and n not in nodes}
                if elsewhere:
                    sentences.append(
                        f"{sum(elsewhere.values())} of {sum(pages.values())} pages of {name} lie on nodes "
                        f"{format_cpulist(elsewhere)} instead of {format_cpulist(nodes)}."
                    )
        return sentences

    def to_columns(self) -> dict[str, str]:
        """Return the three receipt columns of a row: two labels, and what was observed as JSON."""
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
        """Return the receipt that ``to_columns`` has written."""
        observed = json.loads(columns["observed"])
        before, after = (
            {name: {int(node): count for node, count in pages.items()} for name, pages in observed[key].items()}
            for key in ("pages_before", "pages_after")
        )
        threads = tuple(
            ThreadSeen(t["tid"], parse_cpulist(t["allowed"]), parse_cpulist(t["seen"])) for t in observed["threads"]
        )
        team = observed.get("team")
        return cls(
            Binding.parse(columns["requested"]),
            Binding.parse(columns["effective"]),
            threads,
            before,
            after,
            tuple(observed["notes"]),
            observed.get("huge_pages", {}),
            parse_cpulist(observed.get("promised", "")),
            Team(team["asked"], team["granted"], team["quota"] or math.inf) if team else None,
        )


def least_huge_pages(observed: Iterable[str]) -> float:
    """Return the least share of a tensor's memory on huge pages, over values of the column ``observed``; NaN where none tells."""
    shares = [share for text in set(observed) for share in json.loads(text).get("huge_pages", {}).values()]
    return min(shares, default=math.nan)
