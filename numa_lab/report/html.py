"""The report: one HTML file that holds all it shows, asks for nothing outside, and runs no script.

It works under the content security policy ``default-src 'none'`` with inline styles and data images. Executed
notebooks are attached through a template of ours, since nbconvert's own loads scripts from outside.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import nbconvert
import pandas as pd
from markupsafe import Markup

from numa_lab import notebook, stats
from numa_lab.report import figures, guide, receipts, verdicts
from numa_lab.report.plots import Plot, table_markup
from numa_lab.results import EXECUTIONS, load_machine, load_run, read_json

REPORT = "report.html"
LARGEST_BYTES = 5_000_000
SMALLER_DPI = 80  # of the images of a report that would be larger than that
_TEMPLATES = Path(__file__).parent / "templates"
_FIGURES: tuple[tuple[str, str, tuple[Callable[[pd.DataFrame], Plot], ...]], ...] = (
    ("overhead", "Cross-node overhead", (figures.overhead_heatmap, figures.spread)),
    ("limits", "Nearness to the memory limit", (figures.limit_share,)),
    ("scaling", "Threads, cache length and batch", (figures.thread_scaling, figures.kv_curve, figures.batch_curve)),
    ("trust", "Can it be trusted", (figures.run_order, figures.pages, figures.cold_against_steady)),
)


@dataclass(frozen=True)
class Attachment:
    """A file in the page, for download."""

    name: str
    what: str
    media_type: str
    content: bytes

    @property
    def uri(self) -> str:
        """The file as a data URI."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.content).decode()}"


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory; the path of it.

    Raises
    ------
    RunDirectoryError, MachineMismatch
        As ``numa_lab.results.load_run`` does.
    """
    run_dir = Path(run_dir)
    rows, machine = load_run(run_dir), load_machine(run_dir)
    plan = read_json(run_dir / "plan.json")
    probes = read_json(run_dir / "probes.json") if (run_dir / "probes.json").exists() else None
    context = _context(rows, machine, plan, probes, run_dir)
    page = _render(context, Plot.png)
    if len(page) > LARGEST_BYTES:
        context["shrunk"] = "Images are smaller and notebooks are left out, to keep this page below 5 MB."
        context["attachments"] = [a for a in context["attachments"] if not a.name.endswith(".html")]
        page = _render(context, lambda plot: plot.png(SMALLER_DPI))
    path = run_dir / REPORT
    with_name = path.with_name(f".{REPORT}")
    with_name.write_bytes(page)
    with_name.replace(path)
    return path


def _context(
    rows: pd.DataFrame, machine: dict[str, Any], plan: dict[str, Any], probes: dict[str, Any] | None, run_dir: Path
) -> dict[str, Any]:
    compared = stats.compare(rows)
    outcomes = [read_json(file) for file in sorted((run_dir / EXECUTIONS).glob("*.json"))]
    sections = [(anchor, title, [draw(rows) for draw in draws]) for anchor, title, draws in _FIGURES]
    if probes:
        limits = [figures.bandwidth_heatmap(probes), figures.latency_heatmap(probes)]
        sections.insert(1, ("machine-limits", "What the machine can do", limits))
    return {
        "machine": machine,
        "plan": plan,
        "headline": verdicts.headline(rows, machine, compared),
        "trust": verdicts.noise_sentence(rows, compared),
        "placement": verdicts.placement_sentence(rows),
        "claims": [c for c in compared.comparisons if c.verdict in ("slower", "faster")],
        "comparisons": _comparisons_table(compared),
        "receipts": receipts.receipts_table(rows),
        "contradictions": receipts.found_contradictions(rows, machine),
        "failed": [outcome for outcome in outcomes if outcome["status"] != "ok"],
        "finished": sum(outcome["status"] == "ok" for outcome in outcomes),
        "sections": sections,
        "guide": {language: guide.sections(rows, machine, compared, language) for language in ("en", "zh")},
        "commands": verdicts.commands(rows, machine, compared),
        "attachments": list(_attachments(rows, run_dir)),
        "shrunk": "",
    }


def _comparisons_table(compared: stats.Comparisons) -> pd.DataFrame:
    """Every comparison, claims first, in few columns."""
    order = {"slower": 0, "faster": 0, "same": 1, "unclear": 2}
    return pd.DataFrame(
        [
            {
                "case": f"{str(c.case['attention']).upper()} {c.case['phase']}",
                "dtype": c.case["dtype"],
                "batch": c.case["batch"],
                "kv_len": c.case["kv_len"],
                "threads": c.case["threads"],
                "a": c.a,
                "b": c.b,
                "time a / time b": c.ratio,
                "low": c.low,
                "high": c.high,
                "a is": c.verdict,
            }
            for c in sorted(compared.comparisons, key=lambda c: (order[c.verdict], -abs(c.ratio - 1)))
        ]
    )


def _attachments(rows: pd.DataFrame, run_dir: Path) -> Iterator[Attachment]:
    csv = gzip.compress(rows.drop(columns="observed").to_csv(index=False).encode(), mtime=0)
    yield Attachment(
        "rows.csv.gz", "every sample (the receipts' thread lists are in the Parquet files)", "application/gzip", csv
    )
    for name in ("machine.json", "plan.json", "probes.json"):
        if (run_dir / name).exists():
            yield Attachment(name, "as the run directory holds it", "application/json", (run_dir / name).read_bytes())
    for executed in sorted((run_dir / "notebooks").glob("*.ipynb")):
        yield Attachment(f"{executed.stem}.html", "executed notebook", "text/html", notebook_page(executed).encode())


def notebook_page(executed: Path) -> str:
    """An executed notebook as one HTML page that asks for nothing outside."""
    exporter = nbconvert.HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(_TEMPLATES)],
        extra_template_paths=[str(_TEMPLATES)],  # the style sheet, which both templates share
        embed_images=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    page, _ = exporter.from_notebook_node(notebook.read(executed))
    return str(page)


def _render(context: dict[str, Any], draw: Callable[[Plot], bytes]) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["table"] = lambda table: Markup(table_markup(table))
    environment.filters["image"] = lambda plot: "data:image/png;base64," + base64.b64encode(draw(plot)).decode()
    environment.filters["json"] = lambda value: json.dumps(value, indent=1)
    return environment.get_template("report.html.j2").render(context).encode()
