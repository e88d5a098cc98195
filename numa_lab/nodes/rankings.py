"""A ranking of nodes in words, and its copy on disk; see ``numa_lab.nodes.optimal_node`` for how one is made."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from numa_lab.errors import RunDirectoryError, UntrustedResult
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.measurement.results import read_json, write_json

COLUMNS = ("median_seconds", "ratio", "low", "high", "tie_group", "cause", "visits", "receipt")
_NUMBERS = list(COLUMNS[:4])


def render(ranking: pd.DataFrame) -> str:
    """A small table for a terminal."""
    lines = [f"{'node':>6}{'us per call':>14}{'to the best':>13}{'interval':>14}{'tie group':>11}  cause"]
    for node, row in ranking.iterrows():
        times = ["-"] * 3
        if math.isfinite(row["ratio"]):
            times = [f"{row['median_seconds'] * 1e6:.1f}", f"{row['ratio']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}"]
        cells = f"{node:>6}{times[0]:>14}{times[1]:>13}{times[2]:>14}{row['tie_group']:>11}"
        lines.append(f"{cells}  {row['cause']}".rstrip())
        lines += [f"        {row['receipt']}"] if row["receipt"] else []
    return "\n".join(lines)


def sentence(ranking: pd.DataFrame) -> str:
    """What a ranking says, in words."""
    best, slower = (ranking[ranking["tie_group"] == group] for group in (1, 2))
    if len(ranking) == 1:
        return f"One node, {ranking.index[0]}: nothing to compare."
    tie = format_cpulist(best.index)
    floor = ranking.attrs["noise_floor"]
    above = "" if math.isnan(floor) else f" above the noise floor of {floor:.1%}"
    if slower.empty:
        seen = [f" Node {node}: {cause}." for node, cause in best["cause"].items() if cause]
        return f"Nodes {tie} tie: no difference was shown{above}.{''.join(seen)}"
    told = [f"Nodes {tie} tie for the best." if len(best) > 1 else f"Node {tie} is the best."]
    for node, row in slower.iterrows():
        why = f" ({row['cause']})" if row["cause"] else " (no cause was seen)"
        by = f"slower by {row['low'] - 1:.0%} to {row['high'] - 1:.0%}" if math.isfinite(row["low"]) else "not usable"
        told.append(f"Node {node} is {by}{why}.")
    return " ".join(told)


def require_receipts(ranking: pd.DataFrame) -> str:
    """Say that no visit's receipt contradicts its node.

    Raises
    ------
    UntrustedResult
        One does.
    """
    if wrong := [told for told in ranking["receipt"] if told]:
        raise UntrustedResult(" ".join(wrong))
    visits = int(ranking["visits"].sum())
    return (
        f"{visits} visits: no receipt contradicts its node."
        if visits
        else "Nothing was measured, so nothing is claimed."
    )


def read(path: Path, nodes: tuple[int, ...]) -> pd.DataFrame | None:
    """A ranking that was kept; None where there is none, or none that can be read."""
    try:
        if not path.exists():
            return None
        kept: Mapping[str, Any] = read_json(path)
        ranking = pd.DataFrame(kept["rows"]).set_index("node")
        ranking[_NUMBERS] = ranking[["median_seconds", "ratio", "low", "high"]].astype(float)
        if set(ranking.index) != set(nodes) or list(ranking) != list(COLUMNS):
            return None
        ranking.attrs["noise_floor"] = math.nan if kept["noise_floor"] is None else float(kept["noise_floor"])
        return ranking
    except (KeyError, TypeError, ValueError, RunDirectoryError, OSError):
        return None  # it is only a copy of what can be measured again


def keep(path: Path, ranking: pd.DataFrame) -> None:
    """Write a ranking; a folder that can't be written is told in a warning, and is no error."""
    # Not by to_json, which makes a ValueError of whatever a signal's handler raises in it.
    records = ranking.reset_index().to_dict("records")
    rows = [{name: None if value != value else value for name, value in row.items()} for row in records]  # NaN
    floor = ranking.attrs["noise_floor"]
    try:
        write_json(path, {"noise_floor": floor if math.isfinite(floor) else None, "rows": rows})
    except (OSError, RunDirectoryError) as error:
        warnings.warn(f"the ranking of nodes could not be kept, and is measured again next time: {error}", stacklevel=3)
