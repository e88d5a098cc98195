"""The tables of the report's page: comparisons, the machine, and how each execution ended."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from numa_lab.machine.sysfs import format_cpulist
from numa_lab.measurement.atomic_files import read_json
from numa_lab.measurement.comparison import CASE
from numa_lab.measurement.machine_facts import Machine
from numa_lab.measurement.pairwise import Comparison, Comparisons
from numa_lab.measurement.results import EXECUTIONS
from numa_lab.measurement.significance import CONFIDENCE
from numa_lab.report import cases
from numa_lab.report.receipts import found_contradictions, receipts_table

_DIFFERENT = ("slower", "faster")


def comparisons(compared: Comparisons) -> pd.DataFrame:
    """Every comparison with the slower binding named first: differences before the rest, and the greatest of them on top."""
    ordered = sorted(compared.comparisons, key=lambda c: (c.verdict not in _DIFFERENT, -abs(math.log(c.ratio))))
    return pd.DataFrame([_comparison(c) for c in ordered])


def _comparison(c: Comparison) -> dict[str, object]:
    slower, faster, ratio, low, high = c.slower_first()
    return {
        "case": cases.case_name(c.case["attention"], c.case["phase"], c.case["dtype"]),
        "batch": c.case["batch"],
        "kv_len": c.case["kv_len"],
        "threads": c.case["threads"],
        "binding a": slower,
        "binding b": faster,
        "time of a over b": f"{ratio:.3f}",
        f"{CONFIDENCE:.0%} interval": "too few executions" if math.isnan(c.low) else f"{low:.3f} to {high:.3f}",
        "executions": c.executions,
        "verdict": "a is slower" if c.verdict in _DIFFERENT else c.verdict,
    }


def verdict_counts(compared: Comparisons) -> str:
    """Return how many comparisons came out how, in a sentence."""
    counts = Counter("a difference" if c.verdict in _DIFFERENT else c.verdict for c in compared.comparisons)
    verbs = {"a difference": "show a difference", "same": "are ties", "unclear": "stay unclear"}
    parts = ", ".join(f"{counts[verdict]} {words}" for verdict, words in verbs.items())
    return f"Of {len(compared.comparisons)} comparisons {parts}; Holm's correction holds over all of them."


def identity(machine: Machine) -> pd.DataFrame:
    """Return what must agree before rows of two runs may be mixed, and what stands beside it."""
    topology = machine.topology
    facts = {
        "fingerprint": machine.fingerprint,
        **machine.identity,
        "Python": machine.python,
        "numa_lab": machine.numa_lab,
        "hypervisor": topology.hypervisor or "none seen",
        "CPUs of this process": format_cpulist(topology.allowed_cpus),
        "memory nodes of this process": format_cpulist(topology.allowed_nodes),
    }
    return pd.DataFrame({"fact": list(facts), "value": list(facts.values())})


def nodes(machine: Machine) -> pd.DataFrame:
    """CPUs and memory of each node."""
    return pd.DataFrame(
        [
            {
                "node": node.id,
                "CPUs": format_cpulist(node.cpus) or "none",
                "memory (GiB)": round(node.memory_bytes / 2**30, 1),
                "free (GiB)": round(node.free_bytes / 2**30, 1),
                "usable by this process": "yes" if node.effective else "no",
            }
            for node in machine.topology.nodes
        ]
    )


def distances(machine: Machine) -> pd.DataFrame | None:
    """Return the firmware's distances between nodes; None with one node, or where it tells none."""
    ids = machine.topology.node_ids
    if not machine.topology.distances or len(ids) < 2:
        return None
    table = pd.DataFrame(machine.topology.distances, columns=[f"to node {node}" for node in ids])
    table.insert(0, "from node", ids)
    return table


def gpus(machine: Machine) -> pd.DataFrame:
    """PCI address and node of each GPU."""
    gpus = [{"GPU": gpu.pci, "node": "not told" if gpu.node is None else gpu.node} for gpu in machine.topology.gpus]
    return pd.DataFrame(gpus)


def receipts(rows: pd.DataFrame, machine: Machine) -> pd.DataFrame:
    """Return one row per label: binding requested, granted and seen, with the number of contradictions."""
    counts = {label: len(found_contradictions(group, machine)) for label, group in rows.groupby("label")}
    table = receipts_table(rows)
    shares = {
        "least_local_pages": "local pages, at least (%)",
        "least_huge_pages": "huge pages of K and V, at least (%)",
    }
    table[list(shares)] *= 100
    names = {"label": "binding", "observed_cpus": "CPUs seen", **shares}
    return table.assign(contradictions=table["label"].map(counts)).rename(columns=names)


def receipt_notes(rows: pd.DataFrame) -> list[str]:
    """Return what receipts say could not be seen or is doubtful, each with how often it was said."""
    seen = rows.drop_duplicates(["execution_id", *CASE])
    counts = Counter(note for observed in seen["observed"] for note in json.loads(observed)["notes"])
    return [f"In {count} of {len(seen)} measured cases: {note}." for note, count in counts.most_common()]


@dataclass(frozen=True)
class Executions:
    """How the executions of a plan ended: `refused` holds those that failed or never ran, with reasons."""

    planned: int
    ok: int
    refused: pd.DataFrame
    plan: pd.DataFrame

    @property
    def sentence(self) -> str:
        """The counts in a sentence."""
        if self.refused.empty:
            return f"All {self.planned} planned executions ran and passed the gate."
        return f"{self.ok} of {self.planned} planned executions passed the gate; {len(self.refused)} did not."


def executions(run_dir: Path, plan: Mapping[str, Any]) -> Executions:
    """Read how each execution of a run ended.

    Raises
    ------
    RunDirectoryError
        A file is damaged.
    """
    folder = run_dir / EXECUTIONS
    outcomes = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    passed = {path.stem for path in folder.glob("*.parquet")}
    refused = []
    for key, outcome in outcomes.items():
        if key not in passed:
            kept = (run_dir / "rejected" / f"{key}.parquet").exists()
            reasons = " ".join(outcome["reasons"]) + (f" Its rows are kept in rejected/{key}.parquet." if kept else "")
            status = "none (killed)" if outcome["exit_status"] is None else outcome["exit_status"]
            refused.append((outcome["order"], key, outcome["label"], "failed", status, outcome["seconds"], reasons))
    for planned in plan["executions"]:
        key = planned["execution_id"]
        if key not in passed and key not in outcomes:
            why = "The sweep was stopped before it."
            refused.append((planned["order"], key, planned["label"], "not run", "none", math.nan, why))
    columns = ["place", "execution", "binding", "status", "exit status", "seconds", "reasons"]
    table = pd.DataFrame(sorted(refused), columns=columns).assign(place=lambda frame: frame["place"] + 1)
    every = [
        {"place": p["order"] + 1, "execution": p["execution_id"], "binding": p["label"], "command": p["command"]}
        for p in plan["executions"]
    ]
    return Executions(len(passed) + len(table), len(passed), table, pd.DataFrame(every))
