"""Commands around a run: the notebooks, the sweep that measures with them, its verdict and its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from numa_lab.cli.group import INTERRUPTED, json_option, print_json
from numa_lab.errors import InvalidInput, NumaLabError, UntrustedResult
from numa_lab.machine.shell_commands import near, to_paste


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
    from numa_lab.experiments import notebook_files, notebook_runner
    from numa_lab.experiments import sweep as sweeps
    from numa_lab.experiments import sweep_plan as plans
    from numa_lab.machine.topology_reader import read_topology
    from numa_lab.measurement.workloads import PROFILES

    measured = notebook_files.find(notebook_path or sweeps.MEASURED_NOTEBOOK)
    machine = read_topology()
    if resume:
        plan, run_dir = plans.load_plan(resume), resume
        plans.check_resumable(plan, resume, machine, measured)
    else:
        if profile not in PROFILES:
            raise InvalidInput(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
        run_id = out.name if out else f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{profile}"
        run_dir = out or Path("data") / "runs" / run_id
        plan = plans.make_plan(
            profile=profile,
            bindings=plans.choose_bindings(bindings or PROFILES[profile].bindings, machine),
            topology=machine,
            measured=measured,
            parameters=notebook_runner.parse_parameters(measured, parameters),
            run_id=run_id,
            command=plans.typed(_typed(profile, bindings, executions, notebook_path, parameters), machine),
            executions=executions or 0,
        )
    if dry_run:
        places = {"notebooks": near(measured.parent), f"notebooks/{measured.name}": near(measured)}
        for planned in plans.missing(plan, run_dir):
            click.echo(to_paste(*(places.get(word, word) for word in shlex.split(planned.command))))
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
            f"and `{plans.resume_command(run_dir, machine)}` tries them again"
        )


def _typed(
    profile: str, bindings: str | None, executions: int | None, notebook_path: str | None, parameters: Sequence[str]
) -> list[str]:
    """The words that measure the same again."""
    words = ["numa-lab", "sweep", "--profile", profile]
    for option, value in (("--bindings", bindings), ("--executions", executions), ("--notebook", notebook_path)):
        words += [option, str(value)] if value else []
    return [*words, *(word for pair in parameters for word in ("-p", pair))]


def _run(plan: Any, run_dir: Path, machine: Any, measured: Path, *, probes: bool) -> int:
    """Run a plan with a progress bar; the number of executions that failed."""
    from tqdm import tqdm

    from numa_lab.bandwidth.node_bandwidths import PROBES
    from numa_lab.experiments import sweep as sweeps
    from numa_lab.experiments import sweep_plan as plans
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
                f"numa-lab: stopped; what has finished is usable, `{plans.resume_command(run_dir, machine)}` does the rest",
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
    found = compare(rows)
    if as_json:
        print_json(found.to_json())
    else:
        click.echo(verdicts.headline(rows, load_machine(run_dir), found))
        for comparison in found.comparisons:
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
