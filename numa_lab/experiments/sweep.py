"""A sweep: run the executions of a plan one at a time, and let only trustworthy ones through.

Each execution is the measured notebook in a process of its own under numactl.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from numa_lab.bandwidth.advisor import predict_bindings
from numa_lab.bandwidth.node_bandwidths import PROBES, load_probes
from numa_lab.errors import InvalidInput, NumaLabError, RunDirectoryError, UntrustedResult
from numa_lab.experiments import notebook_files, notebook_runner
from numa_lab.experiments.sweep_lock import alone as alone
from numa_lab.experiments.sweep_plan import Planned, SweepPlan, expected_cases, missing
from numa_lab.experiments.sweep_resume import resume_command
from numa_lab.machine.libnuma import interleave_weights
from numa_lab.machine.shell_commands import to_paste
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.measurement.atomic_files import write_json
from numa_lab.measurement.labels import AA_SUFFIX
from numa_lab.measurement.machine_facts import SCHEMA_VERSION, describe_machine
from numa_lab.measurement.receipts import contradictions
from numa_lab.measurement.results import EXECUTIONS, PREDICTION, read_rows
from numa_lab.measurement.timing import MIN_SAMPLES
from numa_lab.measurement.workloads import CASE_KEY, Case, case_key, case_words
from numa_lab.placement.binding import Binding, MemPolicy

MEASURED_NOTEBOOK = "02_attention_under_binding"
MACHINE_NOTEBOOK = "01_machine"
MOST_TOLD = 3  # contradictions of one execution
HOPELESS = 3  # first executions that fail alike: the others would, too


def execute(plan: SweepPlan, planned: Planned, run_dir: Path, measured: Path, topology: Topology) -> list[str]:
    """Run one execution and pass it through the gate; the reasons for which it was refused, none for a good one.

    Rows that were refused stay under ``rejected/``, and are not used.
    """
    folder, key = (run_dir / EXECUTIONS).resolve(), planned.execution_id
    pending = folder.parent / "pending" / f"{key}.parquet"
    for stale in (pending, folder.parent / "rejected" / f"{key}.parquet"):
        stale.unlink(missing_ok=True)
    identity = {
        "run_id": plan.run_id, "execution_id": key, "block": planned.block, "order": planned.order,
        "label": planned.label, "binding": str(planned.binding), "result": str(pending),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    outcome = notebook_runner.execute(
        measured,
        folder / f"{key}.ipynb",
        {**plan.parameters, "execution": identity},
        log=folder / f"{key}.log",
        binding=planned.binding,
        topology=topology,
    )
    reasons = gate(
        outcome,
        pending,
        planned,
        topology,
        folder / f"{key}.log",
        expected_cases(notebook_runner.defaults(measured) | dict(plan.parameters), planned.binding, topology),
    )
    if pending.exists():
        destination = folder if not reasons else folder.parent / "rejected"
        destination.mkdir(exist_ok=True)
        os.replace(pending, destination / pending.name)
        pending.parent.rmdir()
    write_json(
        folder / f"{key}.json",
        {
            "execution_id": key, "label": planned.label, "block": planned.block, "order": planned.order,
            "status": "failed" if reasons else "ok", "reasons": reasons,
            "exit_status": outcome.exit_status, "seconds": round(outcome.seconds, 2),
        },
    )  # fmt: skip
    return reasons


def gate(
    outcome: notebook_runner.Outcome,
    rows_path: Path,
    planned: Planned,
    topology: Topology,
    log: Path,
    expected: Sequence[Case],
) -> list[str]:
    """Why the rows of an execution can't be used, as sentences; none where they can."""
    reasons = [notebook_runner.failure(outcome, log)] if outcome.exit_status != 0 else []
    if not rows_path.exists():
        remedy = "" if reasons else " Its last cell must call `finish` with all rows."
        return [*reasons, f"The notebook wrote no result file.{remedy}"]
    try:
        rows, fingerprint = read_rows(rows_path)
    except NumaLabError as error:
        return [*reasons, str(error)]
    if fingerprint != describe_machine(topology).fingerprint:
        reasons.append(
            "The rows carry the fingerprint of another machine: a CPU went on or off line, or the notebook's kernel has another "
            "torch or Numba than the sweep. Start a new sweep."
        )
    return reasons + _wrong_rows(rows, planned, topology, expected) + _misplaced(rows, planned, topology)


def _misplaced(rows: pd.DataFrame, planned: Planned, topology: Topology) -> list[str]:
    """Return what the receipts contradict, and what to do about it."""
    contradicted = contradictions(rows, topology.allowed_node_cpus)
    if not contradicted:
        return []
    more = [f"And {len(contradicted) - MOST_TOLD} more of this kind."] if len(contradicted) > MOST_TOLD else []
    allowed = format_cpulist(topology.allowed_cpus)
    return [
        *contradicted[:MOST_TOLD],
        *more,
        f"So this was not {planned.binding} within the CPUs {allowed} that this sweep may use: "
        f"`{to_paste('numa-lab', 'doctor')}` looks for what moves threads and pages.",
    ]


def _wrong_rows(rows: pd.DataFrame, planned: Planned, topology: Topology, expected: Sequence[Case]) -> list[str]:
    if rows.empty:
        return ["The result file holds no rows."]
    wrong = []
    for column, wanted in (
        ("label", planned.label),
        ("execution_id", planned.execution_id),
        ("requested", str(planned.binding)),
    ):
        if set(rows[column]) != {wanted}:
            wrong.append(
                f"Rows have {column} {', '.join(sorted(set(rows[column])))}, expected {wanted}: the notebook must hand its "
                "parameter `execution` on as it is."
            )
    if not (rows["seconds"] > 0).all() or not (rows["limit_bytes_per_s"] > 0).all():
        wrong.append("Some times or memory limits are not positive.")
    samples_of = {key: sum(~group["cold"]) for key, group in rows.groupby(list(CASE_KEY))}
    absent = [key for case in expected if (key := case_key(case)) not in samples_of]
    if absent:
        wrong.append(
            f"{len(absent)} of {len(expected)} cases were not measured, the first of them {case_words(absent[0])}."
            + _why_absent(max(key[-1] for key in samples_of), max(case.threads for case in expected), planned, topology)
        )
    if few := [key for key, samples in samples_of.items() if samples < MIN_SAMPLES]:
        wrong.append(
            f"{len(few)} cases have fewer than {MIN_SAMPLES} steady samples, the first of them {case_words(few[0])}: a notebook "
            "must hand on all of them."
        )
    return wrong


def _why_absent(computed: int, expected: int, planned: Planned, topology: Topology) -> str:
    """Return a sentence on the threads that an execution had, where they were others than its CPUs let expect."""
    if computed == expected:
        return ""
    cpus = format_cpulist(topology.cpus_of(planned.binding.cpu_nodes or topology.node_ids))
    return (
        f" It computed with up to {computed} threads, and the CPUs {cpus} that this sweep may use for {planned.binding} have "
        f"{expected} physical cores: were its CPUs changed meanwhile (taskset, cpuset, hotplug)? Start a new sweep."
    )


def measure_machine(run_dir: Path) -> list[str]:
    """Execute notebook 01, which writes ``probes.json``; why it failed, as sentences."""
    source = notebook_files.find(MACHINE_NOTEBOOK)
    output = run_dir.resolve() / "notebooks" / source.name
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.with_suffix(".log")
    outcome = notebook_runner.execute(source, output, {"result": str(run_dir.resolve() / PROBES)}, log=log)
    return [f"{source.name}: {notebook_runner.failure(outcome, log)}"] if outcome.exit_status != 0 else []


def predict(plan: SweepPlan, run_dir: Path, measured: Path, topology: Topology) -> list[str]:
    """Store what memory allows for each decode case under each binding, before any is measured; why not, as sentences.

    It follows from ``probes.json``, and without that there is no prediction.
    """
    if (run_dir / PREDICTION).exists():
        return []
    parameters = notebook_runner.defaults(measured) | dict(plan.parameters)
    bindings = [Binding.parse(label) for label in plan.bindings if not label.endswith(AA_SUFFIX)]
    cases = [
        (binding, case)
        for binding in bindings
        for cases in [expected_cases(parameters, binding, topology)]
        for case in cases
        if case.shape.phase == "decode" and case.threads == max(case.threads for case in cases)
    ]
    try:
        if (probes := load_probes(run_dir)) is None:
            return []
        by_weight = {
            node
            for binding in bindings
            if binding.policy is MemPolicy.WEIGHTED_INTERLEAVE
            for node in binding.mem_nodes
        }
        weights = interleave_weights(by_weight) if by_weight else None
        predictions = predict_bindings([(binding, case.shape) for binding, case in cases], topology, probes, weights)
    except (InvalidInput, RunDirectoryError) as error:
        return [f"Nothing was predicted: {error}"]
    rows = [
        {"label": str(binding), "attention": case.shape.kind, "threads": case.threads, **asdict(case.shape),
         "seconds": strategy.seconds, "limit": strategy.limit}
        for (binding, case), strategy in zip(cases, predictions, strict=True)
        if strategy
    ]  # fmt: skip
    write_json(run_dir / PREDICTION, {"schema_version": SCHEMA_VERSION, "rows": rows})
    return []


def run(plan: SweepPlan, run_dir: Path, topology: Topology, measured: Path) -> Iterator[tuple[Planned, list[str]]]:
    """Run what is missing, one execution at a time; yields each with the reasons for which the gate refused it.

    Raises
    ------
    UntrustedResult
        No execution of the run has passed the gate, and the first ``HOPELESS`` all failed for the same cause.
    """
    todo = missing(plan, run_dir)
    hopeful = len(todo) < len(plan.executions)
    causes: list[str] = []
    for planned in todo:
        reasons = execute(plan, planned, run_dir, measured, topology)
        yield planned, reasons
        hopeful = hopeful or not reasons
        causes.append(_cause(reasons))
        if not hopeful and len(causes) == HOPELESS and len(set(causes)) == 1:
            raise UntrustedResult(
                f"the first {HOPELESS} executions all failed alike, so the sweep has stopped. {' '.join(reasons)} When that is "
                f"mended, `{resume_command(run_dir, topology)}` goes on"
            )


def _cause(reasons: Sequence[str]) -> str:
    """Return the first reason without what differs between executions: keys, labels and numbers."""
    return re.sub(r"\b[0-9a-f]{12}\b|\bc[\d*][\d,*-]*[A-Za-z][\d,*-]+(~aa)?|\d[\d.,:-]*", "#", "".join(reasons[:1]))
