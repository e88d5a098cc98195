"""The receipts of a run: what was requested, granted and seen, and the refusal of what contradicts it."""

from __future__ import annotations

import pandas as pd

from numa_lab.bandwidth.node_bandwidths import NodeProbes
from numa_lab.errors import UntrustedResult
from numa_lab.measurement.machine_facts import Machine
from numa_lab.measurement.receipts import contradictions
from numa_lab.placement.receipt import least_huge_pages


def receipts_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per label: what was requested, what the kernel granted, and what was seen."""

    def distinct(values: pd.Series[str]) -> str:
        return " | ".join(sorted(set(values)))

    return rows.groupby("label", as_index=False, sort=True).agg(
        executions=("execution_id", "nunique"),
        requested=("requested", distinct),
        effective=("effective", distinct),
        observed_cpus=("observed_cpus", distinct),
        least_local_pages=("local_page_share", "min"),
        least_huge_pages=("observed", least_huge_pages),
    )


def found_contradictions(rows: pd.DataFrame, machine: Machine) -> list[str]:
    """Return what the receipts of a run say against its labels, as sentences; its CPUs are those that it was allowed to use."""
    return contradictions(rows, machine.topology.allowed_node_cpus)


def require_receipts(rows: pd.DataFrame, machine: Machine) -> str:
    """Say that no receipt contradicts its binding.

    Raises
    ------
    UntrustedResult
        One does.
    """
    if wrong := found_contradictions(rows, machine):
        raise UntrustedResult(" ".join(wrong))
    return f"{len(rows)} rows of {rows['execution_id'].nunique()} executions: no receipt contradicts its binding."


def require_probes(probes: NodeProbes) -> str:
    """Say for how many pairs of nodes limits were measured.

    Raises
    ------
    UntrustedResult
        None could be measured; the message holds the probes' own notes.
    """
    measured = sum(value is not None for row in probes.read_bytes_per_s for value in row)
    if not measured:
        raise UntrustedResult(f"No node's memory could be measured. {' '.join(probes.notes)}")
    return f"Limits were measured for {measured} pair(s) of CPU node and memory node."
