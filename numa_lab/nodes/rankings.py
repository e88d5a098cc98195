"""A ranking of nodes: its rows, what it says in words, and its copy on disk.

``numa_lab.nodes.optimal_node`` measures one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numa_lab.errors import RunDirectoryError, UntrustedResult
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.measurement.atomic_files import read_json, write_json

OTHER_LOAD = "other load"
NEARLY_FULL = "memory nearly full"
FEWER_CORES = "fewer cores"

_NUMBERS = ("median_seconds", "ratio", "low", "high")  # which may be NaN


@dataclass(frozen=True)
class RankedNode:
    """One node of a ranking. Its times are NaN where nothing was measured on it.

    Attributes
    ----------
    node
        Number of the node.
    median_seconds
        Seconds per call, the median of the visits' medians.
    ratio, low, high
        Time relative to the best node's, and its interval.
    tie_group
        1 for the nodes that were not shown to be slower than the best by 2 % or more, 2 for the others.
    cause
        Why the node may be slow, as far as that is seen: ``OTHER_LOAD``, ``NEARLY_FULL``, ``FEWER_CORES``, separated by
        semicolons.
    visits
        How many there were.
    receipt
        What contradicts the claim that threads and pages were on the node; empty where nothing does.
    """

    node: int
    median_seconds: float = math.nan
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    tie_group: int = 2
    cause: str = ""
    visits: int = 0
    receipt: str = ""

    @property
    def of_the_moment(self) -> bool:
        """Whether what was seen on the node may be gone soon: other load, full memory, threads or pages elsewhere."""
        return OTHER_LOAD in self.cause or NEARLY_FULL in self.cause or bool(self.receipt)


@dataclass(frozen=True)
class Ranking:
    """Nodes, the best first, and the noise floor that a difference between them had to clear (NaN: nothing was measured)."""

    nodes: tuple[RankedNode, ...]
    noise_floor: float = math.nan

    @property
    def tied(self) -> tuple[RankedNode, ...]:
        """The nodes that were not shown to be slower than the best."""
        return tuple(row for row in self.nodes if row.tie_group == 1)

    def render(self) -> str:
        """Lay the ranking out as a small table for a terminal."""
        lines = [f"{'node':>6}{'us per call':>14}{'to the best':>13}{'interval':>14}{'tie group':>11}  cause"]
        for row in self.nodes:
            times = ["-"] * 3
            if math.isfinite(row.ratio):
                times = [f"{row.median_seconds * 1e6:.1f}", f"{row.ratio:.3f}", f"{row.low:.3f}-{row.high:.3f}"]
            cells = f"{row.node:>6}{times[0]:>14}{times[1]:>13}{times[2]:>14}{row.tie_group:>11}"
            lines.append(f"{cells}  {row.cause}".rstrip())
            lines += [f"        {row.receipt}"] if row.receipt else []
        return "\n".join(lines)

    def sentence(self) -> str:
        """Say in words which nodes tie, which are slower, and why."""
        if len(self.nodes) == 1:
            return f"One node, {self.nodes[0].node}: nothing to compare."
        tied = self.tied
        tie = format_cpulist(row.node for row in tied)
        if len(tied) == len(self.nodes):
            above = "" if math.isnan(self.noise_floor) else f" above the noise floor of {self.noise_floor:.1%}"
            causes = [f" Node {row.node}: {row.cause}." for row in tied if row.cause]
            return f"Nodes {tie} tie: no difference was shown{above}.{''.join(causes)}"
        sentences = [f"Nodes {tie} tie for the best." if len(tied) > 1 else f"Node {tie} is the best."]
        for row in self.nodes:
            if row.tie_group == 1:
                continue
            by = f"slower by {row.low - 1:.0%} to {row.high - 1:.0%}" if math.isfinite(row.low) else "not usable"
            sentences.append(f"Node {row.node} is {by} ({row.cause or 'no cause was seen'}).")
        return " ".join(sentences)

    def require_receipts(self) -> str:
        """Say that no visit's receipt contradicts its node.

        Raises
        ------
        UntrustedResult
            A receipt does; the message is what the receipts say.
        """
        if contradictions := [row.receipt for row in self.nodes if row.receipt]:
            raise UntrustedResult(" ".join(contradictions))
        visits = sum(row.visits for row in self.nodes)
        return (
            f"{visits} visits: no receipt contradicts its node."
            if visits
            else "Nothing was measured, so nothing is claimed."
        )

    def to_json(self) -> dict[str, Any]:
        """Give plain JSON values; what is not a number becomes null."""
        return {
            "noise_floor": _or_null(self.noise_floor),
            "rows": [{name: _or_null(value) for name, value in asdict(row).items()} for row in self.nodes],
        }

    @classmethod
    def from_json(cls, stored: Any) -> Ranking:
        """Read back what ``to_json`` gave.

        Raises
        ------
        KeyError, TypeError, ValueError
            It is something else.
        """
        return cls(
            tuple(RankedNode(**(row | {name: _or_nan(row[name]) for name in _NUMBERS})) for row in stored["rows"]),
            _or_nan(stored["noise_floor"]),
        )


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def read(path: Path, nodes: Collection[int]) -> Ranking | None:
    """Read a ranking of these nodes that was kept; None where there is none, or none that can be read."""
    try:
        if not path.exists():
            return None
        ranking = Ranking.from_json(read_json(path))
    except (KeyError, TypeError, ValueError, RunDirectoryError, OSError):
        return None  # it is only a copy of what can be measured again
    return ranking if {row.node for row in ranking.nodes} == set(nodes) else None


def keep(path: Path, ranking: Ranking) -> None:
    """Write a ranking. Where the folder can't be written a warning says so, and no error is raised."""
    try:
        write_json(path, ranking.to_json())
    except (OSError, RunDirectoryError) as error:
        warnings.warn(f"the ranking of nodes could not be kept, and is measured again next time: {error}", stacklevel=4)
