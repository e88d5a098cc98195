"""Commands around a run: the notebooks, the sweep that measures with them, its verdict and its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from numa_lab.cli.group import INTERRUPTED, json_option, print_json
from numa_lab.errors import NumaLabError, UntrustedResult


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
def notebooks(folder: Path) -> None:
    """Copy the notebooks into a folder of your own, to open and to change them there."""
    from numa_lab.experiments import notebook_files

    for path in notebook_files.copy(folder):
        click.echo(str(path))
    click.echo(
        f"{folder} holds the notebooks; open them by: {shlex.join(['jupyter', 'lab', str(folder)])}\n"
        "numa-lab sweep measures with the copy of 02 in ./notebooks, where there is one, or with --notebook PATH.",
        err=True,
    )


@click.command()
@click.option("--profile", default="quick", show_default=True, help="How much: smoke, quick, standard or full.")
@click.option(
    "--bindings",
    help="local, matrix, all (besides the matrix: interleaved, by weight, touched first by one thread, unbound), "
    "or labels such as c0m0,c0m1,c0-1f0; the profile's own where not given.",
)
@click.option(
    "--executions", type=click.IntRange(min=1), help="Processes per binding; the profile's own where not given."
)
@click.option("--notebook", "notebook_path", metavar="PATH", help="Measured notebook, in place of the project's own.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Run directory; data/runs/<time> by default."
)
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="DIR", help="Finish what is missing in a run directory."
)
@click.option(
    "--no-probes", is_flag=True, help="Leave out notebook 01, which measures bandwidth and latency between nodes."
)
@click.option("--dry-run", is_flag=True, help="Print the plan and start nothing.")
@click.option("-p", "parameters", multiple=True, metavar="NAME=VALUE", help="Parameter of the measured notebook.")
def sweep(
    profile: str,
    bindings: str | None,
    executions: int | None,
    notebook_path: str | None,
    out: Path | None,
    resume: Path | None,
    no_probes: bool,
    dry_run: bool,
    parameters: Sequence[str],
) -> None:
    """Run the measured notebook under every binding, each execution in a process of its own.

    The path of the run directory is the last line on stdout.
    """
    from numa_lab.experiments import notebook_files, notebook_runner, sweep_resume
    from numa_lab.experiments import sweep as sweeps
    from numa_lab.experiments import sweep_plan as plans
    from numa_lab.machine.topology_reader import read_topology

    measured = notebook_files.find(notebook_path or sweeps.MEASURED_NOTEBOOK)
    machine = read_topology()
    if resume:
        plan, run_dir = plans.load_plan(resume), resume
        sweep_resume.check_resumable(plan, resume, machine, measured)
    else:
        plan, run_dir = plans.plan_run(
            profile=profile, bindings=bindings, executions=executions, notebook=notebook_path, parameters=parameters,
            out=out, measured=measured, topology=machine,
        )  # fmt: skip
    if dry_run:
        for command in plans.commands(plan, run_dir, measured):
            click.echo(command)
        click.echo(
            f"{len(plan.executions)} executions, about {plan.estimated_seconds:.0f} s; nothing was started", err=True
        )
        return
    for binding in {planned.binding for planned in plans.missing(plan, run_dir)}:
        notebook_runner.require_tools(binding)
    with sweeps.alone():
        if not resume:
            plans.prepare(plan, run_dir, machine)
        try:
            failed = _run(plan, run_dir, machine, measured, probes=not no_probes)
        except UntrustedResult:
            click.echo(str(run_dir))
            raise
    click.echo(str(run_dir))
    if failed:
        raise NumaLabError(
            f"{failed} of {len(plan.executions)} executions failed; the report lists them with their reasons, "
            f"and `{sweep_resume.resume_command(run_dir, machine)}` tries them again"
        )


def _run(plan: Any, run_dir: Path, machine: Any, measured: Path, *, probes: bool) -> int:
    """Run a plan with a progress bar; the number of executions that failed."""
    from tqdm import tqdm

    from numa_lab.bandwidth.node_bandwidths import PROBES
    from numa_lab.experiments import sweep as sweeps
    from numa_lab.experiments import sweep_plan as plans
    from numa_lab.experiments import sweep_resume
    from numa_lab.experiments.progress import ticking

    todo = plans.missing(plan, run_dir)
    failed = 0
    probes = probes and not (run_dir / PROBES).exists()
    with tqdm(total=len(todo) + probes, unit="execution", desc="measuring") as bar, ticking(bar):
        try:
            if probes:
                for reason in sweeps.measure_machine(run_dir):
                    bar.write(reason, file=sys.stderr)
                bar.update()
            for reason in sweeps.predict(plan, run_dir, measured, machine):
                bar.write(reason, file=sys.stderr)
            for planned, reasons in sweeps.run(plan, run_dir, machine, measured):
                failed += bool(reasons)
                if reasons:
                    place = f"{planned.label}, execution {planned.order + 1} of {len(plan.executions)}"
                    bar.write(f"{place} ({planned.execution_id}), failed: {' '.join(reasons)}", file=sys.stderr)
                bar.set_postfix_str(planned.label)
                bar.update()
        except KeyboardInterrupt:
            bar.close()
            click.echo(
                f"numa-lab: stopped; what has finished is usable, `{sweep_resume.resume_command(run_dir, machine)}` does the rest",
                err=True,
            )
            sys.exit(INTERRUPTED)
    return failed


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@json_option
def verdict(run_dir: Path, as_json: bool) -> None:
    """Which bindings differ, by how much, and how sure that is."""
    from numa_lab.measurement.comparison import compare
    from numa_lab.measurement.machine_facts import load_machine
    from numa_lab.measurement.results import load_run
    from numa_lab.report import verdicts

    rows = load_run(run_dir)
    compared = compare(rows)
    if as_json:
        print_json(compared.to_json())
    else:
        click.echo(verdicts.headline(rows, load_machine(run_dir), compared))
        for comparison in compared.comparisons:
            click.echo(f"  {comparison.sentence()}")


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
def report(run_dir: Path) -> None:
    """Write report.html into a run directory; prints its path and the verdict."""
    from numa_lab.report import collect

    written = collect.write(run_dir)
    for problem in written.problems:
        click.echo(f"numa-lab: {problem}", err=True)
    click.echo(str(written.path))
    click.echo(written.headline)
