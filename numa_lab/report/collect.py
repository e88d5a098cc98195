"""From a run directory to its report: execute the collecting notebooks, then write the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from numa_lab.experiments import notebook_files, notebook_runner
from numa_lab.measurement import comparison
from numa_lab.measurement.machine_facts import load_machine
from numa_lab.measurement.results import load_run
from numa_lab.report import verdicts
from numa_lab.report.html import write_report

COLLECTING_NOTEBOOKS = ("06_cross_node_overhead", "07_optimization_guide")


@dataclass(frozen=True)
class Written:
    """A report: where it lies, its verdict in one line, and what could not be attached to it."""

    path: Path
    headline: str
    problems: tuple[str, ...]


def write(run_dir: Path) -> Written:
    """Execute the collecting notebooks on a run directory and write its ``report.html``.

    Raises
    ------
    RunDirectoryError, MachineMismatch
        As ``numa_lab.measurement.results.load_run`` does.
    """
    rows, machine = load_run(run_dir), load_machine(run_dir)
    problems = tuple(problem for name in COLLECTING_NOTEBOOKS for problem in _execute(name, run_dir))
    path = write_report(run_dir)
    return Written(path, verdicts.headline(rows, machine, comparison.compare(rows)), problems)


def _execute(name: str, run_dir: Path) -> list[str]:
    source = notebook_files.find(name)
    output = run_dir.resolve() / "notebooks" / source.name
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.with_suffix(".log")
    outcome = notebook_runner.execute(source, output, {"run_dir": str(run_dir.resolve())}, log=log)
    return [f"{source.name}: {notebook_runner.failure(outcome, log)}"] if outcome.exit_status != 0 else []
