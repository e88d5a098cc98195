"""Commands that look at this machine, measure its memory and predict from it; none needs the notebook suite."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from numa_lab.cli.group import json_option, print_json
from numa_lab.errors import InvalidInput

_root = click.option(
    "--root", default="/", show_default=True, metavar="DIR", help="Read sysfs and procfs below this folder."
)


@click.command()
@json_option
@_root
def topology(as_json: bool, root: str) -> None:
    """Nodes, CPUs, memory, distances, caches and GPUs, and what this process may use."""
    from numa_lab.machine.overview import overview
    from numa_lab.machine.topology_reader import read_topology

    machine = read_topology(root)
    if as_json:
        print_json(machine.to_json())
    else:
        click.echo(overview(machine))


@click.command()
@json_option
@_root
def doctor(as_json: bool, root: str) -> None:
    """What on this machine spoils NUMA performance, and the exact fix; by --root on a captured one."""
    from numa_lab.machine import doctor as checks

    findings = checks.examine(root)
    if as_json:
        print_json(checks.to_json(findings))
    else:
        click.echo(checks.render(findings))


@click.command()
@json_option
@click.option("--seconds", default=20.0, show_default=True, help="Time for all cells together.")
def probe(as_json: bool, seconds: float) -> None:
    """Read bandwidth and latency between all nodes."""
    from numa_lab.bandwidth import node_probes
    from numa_lab.machine.topology_reader import read_topology

    silent = not sys.stderr.isatty()
    with click.progressbar(length=1, label="probing", item_show_func=str, file=sys.stderr, hidden=silent) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.length = total
            bar.update(done - bar.pos, what)

        probes = node_probes.probe_nodes(read_topology(), seconds=seconds, progress=progress)
    if as_json:
        print_json(probes.to_json())
    else:
        click.echo(node_probes.render(probes))


@click.command()
@json_option
@click.option("--preset", metavar="NAME", help="Attention of this model, such as llama-3-8b or gemma-2-9b.")
@click.option("--shape", metavar="NAME", hidden=True)  # as --preset was named before
@click.option("--refresh", is_flag=True, help="Measure anew, although a ranking is kept.")
def detect(as_json: bool, preset: str | None, shape: str | None, refresh: bool) -> None:
    """Which node runs attention best, and how sure that is."""
    from numa_lab.nodes import optimal_node

    ranking = optimal_node.rank(preset or shape, refresh=refresh)
    if as_json:
        optimal, nodes = optimal_node.choose(ranking), ranking.to_json()["rows"]
        print_json({"optimal_node": optimal, "sentence": ranking.sentence(), "nodes": nodes})
    else:
        click.echo(ranking.render())
        click.echo(ranking.sentence())
        click.echo(optimal_node.advice(ranking).replace("`", ""))


@click.command()
@json_option
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
    topology = None
    if run_dir is not None:
        source, (topology, measured) = str(run_dir), advisor.read_run(run_dir)
    elif mlc is not None:
        source, measured = mlc, mlc_output.read_mlc(mlc)
    else:
        source, measured = f"{machine}, {mlc_output.SOURCE}", mlc_output.published(str(machine))
    advice = advisor.plan_placement(shape, topology, measured)
    if as_json:
        print_json({"source": source, **advice.to_json()})
    else:
        click.echo(advisor.render(advice, source))
