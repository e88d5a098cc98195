"""The command line. Each command imports what it needs inside itself, so that those without torch start at once."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from numa_lab import __version__
from numa_lab.errors import InvalidInput, NumaLabError, UntrustedResult
from numa_lab.machine.shell_commands import near, to_paste

INTERRUPTED = 130  # 128 + SIGINT, as shells say it: click's own 1 is that of a sweep some of whose executions failed


class _Group(click.Group):
    """Prints the project's own errors as one message on stderr, without a traceback, and says where Ctrl-C ended it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("numa-lab: stopped", err=True)
            sys.exit(INTERRUPTED)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except NumaLabError as error:
            click.echo(f"numa-lab: {error}", err=True)
            sys.exit(error.exit_status)
        except OSError as error:
            click.echo(f"numa-lab: {error}", err=True)
            sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Measure what NUMA placement does to attention on this machine, prove it, and say what to do."""


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON only.")


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=1, allow_nan=False))


_root = click.option(
    "--root", default="/", show_default=True, metavar="DIR", help="Read sysfs and procfs below this folder."
)


@main.command()
@_as_json
@_root
def topology(as_json: bool, root: str) -> None:
    """Nodes, CPUs, memory, distances, caches and GPUs, and what this process may use."""
    from numa_lab.machine.overview import overview
    from numa_lab.machine.topology import read_topology

    found = read_topology(root)
    if as_json:
        _print_json(found.to_json())
    else:
        click.echo(overview(found))


@main.command()
@_as_json
@_root
def doctor(as_json: bool, root: str) -> None:
    """What on this machine spoils NUMA performance, and the exact fix; by --root on a captured one."""
    from numa_lab.machine import doctor as checks

    findings = checks.examine(root)
    if as_json:
        _print_json(checks.to_json(findings))
    else:
        click.echo(checks.render(findings))


@main.command()
@_as_json
@click.option("--seconds", default=20.0, show_default=True, help="Time for all cells together.")
def probe(as_json: bool, seconds: float) -> None:
    """Read bandwidth and latency between all nodes."""
    from tqdm import tqdm

    from numa_lab.bandwidth import node_probes
    from numa_lab.machine.topology import read_topology

    with tqdm(total=1, desc="probing", unit="cell", disable=None, leave=False) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(what)

        found = node_probes.probe_nodes(read_topology(), seconds=seconds, progress=progress)
    if as_json:
        _print_json(found.to_json())
    else:
        click.echo(node_probes.render(found))


@main.command()
@_as_json
@click.option("--shape", metavar="NAME", help="Attention of this model, such as llama-3-8b or gemma-2-9b.")
@click.option("--refresh", is_flag=True, help="Measure anew, although a ranking is kept.")
def detect(as_json: bool, shape: str | None, refresh: bool) -> None:
    """Which node runs attention best, and how sure that is."""
    from numa_lab.nodes import optimal_node

    ranking = optimal_node.rank(shape, refresh=refresh)
    if as_json:
        optimal, nodes = optimal_node.choose(ranking), ranking.to_json()["rows"]
        _print_json({"optimal_node": optimal, "sentence": ranking.sentence(), "nodes": nodes})
    else:
        click.echo(ranking.render())
        click.echo(ranking.sentence())
        click.echo(optimal_node.advice(ranking).replace("`", ""))


@main.command()
@_as_json
@click.option("--mlc", metavar="FILE", help="Output of Intel Memory Latency Checker (x86 only), versions 3.1 to 3.11.")
@click.option(
    "--run", "run_dir", type=click.Path(path_type=Path), metavar="DIR", help="Run directory; its probes are taken."
)
@click.option("--machine", metavar="NAME", help="Published: broadwell, cascadelake, icelake or sapphirerapids.")
@click.option("--preset", "model", default="llama-3-8b", show_default=True, metavar="NAME", help="Model's attention.")
@click.option("--kv-len", type=int, metavar="N", help="Tokens in the cache; the preset's own where not given.")
@click.option("--batch", type=int, metavar="N", help="Sequences; the preset's own where not given.")
@click.option("--dtype", metavar="D", help="float32, bfloat16 or float16; the preset's own where not given.")
def predict(
    as_json: bool,
    mlc: str | None,
    run_dir: Path | None,
    machine: str | None,
    model: str,
    kv_len: int | None,
    batch: int | None,
    dtype: str | None,
) -> None:
    """Predict decode attention for every placement: one node, a socket, all nodes, an instance on each.

    Exactly one of --mlc, --run and --machine says what memory was measured. Nothing is run.
    """
    from numa_lab.attention.shapes import preset
    from numa_lab.bandwidth import advisor
    from numa_lab.bandwidth import mlc as mlc_output

    if sum(given is not None for given in (mlc, run_dir, machine)) != 1:
        raise InvalidInput("expected exactly one of --mlc FILE, --run DIR and --machine NAME")
    sizes = {"kv_len": kv_len, "batch": batch, "dtype": dtype}
    shape = preset(model, **{name: value for name, value in sizes.items() if value is not None})
    facts = None
    if run_dir is not None:
        source, (facts, measured) = str(run_dir), advisor.read_run(run_dir)
    elif mlc is not None:
        source, measured = mlc, mlc_output.read_mlc(mlc)
    else:
        source, measured = f"{machine}, {mlc_output.SOURCE}", mlc_output.published(str(machine))
    plan = advisor.plan_placement(shape, facts, measured)
    if as_json:
        _print_json({"source": source, **plan.to_json()})
    else:
        click.echo(advisor.render(plan, source))


@main.command()
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
    from numa_lab.experiments import notebook_runner
    from numa_lab.experiments import sweep as sweeps
    from numa_lab.experiments import sweep_plan as plans
    from numa_lab.machine.topology import read_topology
    from numa_lab.measurement.workloads import PROFILES

    measured = notebook_runner.find(notebook_path or sweeps.MEASURED_NOTEBOOK)
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


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@_as_json
def verdict(run_dir: Path, as_json: bool) -> None:
    """Which bindings differ, by how much, and how sure that is."""
    from numa_lab.measurement.comparison import compare
    from numa_lab.measurement.machine_facts import load_machine
    from numa_lab.measurement.results import load_run
    from numa_lab.report import verdicts

    rows = load_run(run_dir)
    found = compare(rows)
    if as_json:
        _print_json(found.to_json())
    else:
        click.echo(verdicts.headline(rows, load_machine(run_dir), found))
        for comparison in found.comparisons:
            click.echo(f"  {comparison.sentence()}")


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
def report(run_dir: Path) -> None:
    """Write report.html into a run directory; prints its path and the verdict."""
    from numa_lab.report import collect

    written = collect.write(run_dir)
    for problem in written.problems:
        click.echo(f"numa-lab: {problem}", err=True)
    click.echo(str(written.path))
    click.echo(written.headline)
