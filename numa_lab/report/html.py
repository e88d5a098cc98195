"""One self-contained HTML page for a run: the verdict first, then what it rests on.

The page loads nothing from elsewhere, holds no scripts, and stays below ``MOST_BYTES``: where a run is too large, the page
holds less of it and says so.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from pandas.api.types import is_numeric_dtype

from numa_lab.bandwidth.node_bandwidths import PROBES, load_probes
from numa_lab.experiments.sweep_plan import load_plan
from numa_lab.machine.shell_commands import to_paste
from numa_lab.measurement import comparison
from numa_lab.measurement.atomic_files import atomic_file, read_json
from numa_lab.measurement.machine_facts import MACHINE, Machine, load_machine
from numa_lab.measurement.pairwise import Comparisons
from numa_lab.measurement.results import load_prediction, load_run
from numa_lab.report import figures, guide, receipts, tables, verdicts
from numa_lab.report.attachments import (
    MOST_URI_BYTES,
    TEMPLATES,
    Attachment,
    attach,
    data_uri,
    medians_csv,
    notebooks,
    rows_csv,
)
from numa_lab.report.plots import DPI, Plot, number

MOST_BYTES = 5_000_000
MOST_ROWS = 60  # of a table on the page; the attached data hold the rest
TALL_INCHES = 7.0  # a figure beside which two others fit
COARSE_DPI = 80
REPORT, SAMPLE = "report.html", "sample"
TITLES = {
    "certainty": "How sure it is",
    "comparisons": "Comparisons",
    "figures": "Figures",
    "guide": "What to do here · 优化指南",
    "commands": "Commands",
    "machine": "The machine",
    "receipts": "Receipts",
    "executions": "Executions, failed ones among them",
    "data": "Data and notebooks",
}


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run directory, whole or not at all, and return its path.

    Raises
    ------
    RunDirectoryError, MachineMismatch
        As ``numa_lab.measurement.results.load_run`` does, and where the page can't be written.
    """
    folder = Path(run_dir)
    page = render(folder)
    with atomic_file(folder / REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / REPORT


def render(run_dir: Path) -> str:
    """Return the page of a run, with as much of it as ``MOST_BYTES`` allow."""
    rows, machine, plan = load_run(run_dir), load_machine(run_dir), asdict(load_plan(run_dir))
    compared, css = comparison.compare(rows), (TEMPLATES / "report.css").read_text(encoding="utf-8")
    probes = load_probes(run_dir)
    facts = _facts(run_dir, rows, machine, plan, compared) | {"css": Markup(css)}
    plots, machine_plots = (
        figures.run_figures(rows, load_prediction(run_dir)),
        figures.machine_figures(probes) if probes else [],
    )
    files = [
        _json_file(
            "comparisons.json", "every comparison, as `numa-lab verdict --json` prints them", compared.to_json()
        ),
        _json_file(
            "machine.json",
            "the facts of the machine and the findings of `numa-lab doctor`",
            read_json(run_dir / MACHINE),
        ),
        _json_file("plan.json", "every planned execution with its command", plan),
    ]
    files += [_json_file(PROBES, "bandwidth and latency between nodes", read_json(run_dir / PROBES))] if probes else []
    template = _environment().get_template("report.html.j2")
    page = ""
    for attachments, dpi, left_out in _variants(rows, files, list(notebooks(run_dir, css))):
        page = template.render(
            **facts,
            attachments=attachments,
            left_out=left_out,
            plots=[_shown(plot, dpi) for plot in plots],
            machine_plots=[_shown(plot, dpi) for plot in machine_plots],
        )
        if len(page.encode()) <= MOST_BYTES:
            break
    return page


def _variants(
    rows: pd.DataFrame, files: list[Attachment], found: Sequence[Attachment | str]
) -> Iterator[tuple[list[Attachment], float, list[str]]]:
    """Return what the page may hold, each time less: attachments, pixels per inch of the figures, and what was left out."""
    left_out = [notebook for notebook in found if isinstance(notebook, str)]
    pages = []
    for page in found:
        if isinstance(page, Attachment) and len(page.uri) <= MOST_URI_BYTES:
            pages.append(page)
        elif isinstance(page, Attachment):
            left_out.append(
                f"{page.name} is too large to attach ({page.size}): open it in the folder notebooks of the run."
            )
    samples = rows_csv(rows)
    if len(samples.uri) <= MOST_URI_BYTES:
        yield [samples, *files, *pages], DPI, left_out
    left_out = [*left_out, f"{len(rows)} samples are too many for this page ({samples.size}): medians stand for them."]
    medians = [medians_csv(rows), *files]
    yield [*medians, *pages], DPI, left_out
    left_out = [*left_out, "Figures have fewer pixels than usual, to keep this page small."]
    yield [*medians, *pages], COARSE_DPI, left_out
    left_out = [*left_out, "Executed notebooks are not attached, to keep this page small: see the run directory."]
    yield medians, COARSE_DPI, left_out


def _facts(
    run_dir: Path,
    rows: pd.DataFrame,
    machine: Machine,
    plan: Mapping[str, Any],
    compared: Comparisons,
) -> dict[str, Any]:
    """Return all of the page but figures and attachments."""
    notices = []
    if run_dir.resolve().name == SAMPLE:
        notices.append(
            "**Sample data** that comes with numa_lab: it says nothing of your machine. Run `make report` there."
        )
    if machine.topology.emulated:
        notices.append(
            "**Emulated machine**: software runs its instructions. Its times mean nothing; its placement does."
        )
    return {
        "machine_name": machine.topology.model_name or "an unnamed processor",
        "plan": plan,
        "run_name": run_dir.resolve().name,
        "measured_with": machine.numa_lab,
        "row_count": f"{len(rows):,}",
        "notices": notices,
        "headline": verdicts.headline(rows, machine, compared),
        "titles": TITLES,
        "contents": list(TITLES.items()),
        "most_rows": MOST_ROWS,
        "noise": verdicts.noise_sentence(rows, compared),
        "comparisons": tables.comparisons(compared),
        "verdict_counts": tables.verdict_counts(compared),
        "guides": {
            code: guide.sections(rows, machine, compared, name) for code, name in (("en", "en"), ("zh-Hans", "zh"))
        },
        "commands": verdicts.commands(rows, machine, compared),
        "again": to_paste("numa-lab", "report", run_dir),
        "measure_again": to_paste(*shlex.split(plan.get("command", ""))),
        "identity": tables.identity(machine),
        "nodes": tables.nodes(machine),
        "distances": tables.distances(machine),
        "gpus": tables.gpus(machine),
        "findings": machine.findings or [],
        "no_findings": "Nothing was found." if machine.findings is not None else "`numa-lab doctor` did not look.",
        "receipts": tables.receipts(rows, machine),
        "receipt_notes": tables.receipt_notes(rows),
        "contradictions": _contradictions(rows, machine),
        "executions": tables.executions(run_dir, plan),
    }


def _contradictions(rows: pd.DataFrame, machine: Machine) -> list[str]:
    """Return what receipts say against their labels: as many sentences as a reader looks at, and how many there are beyond."""
    contradictions = receipts.found_contradictions(rows, machine)
    more = len(contradictions) - MOST_ROWS
    rest = [f"And {more} more."] if more > 0 else []
    return [*contradictions[:MOST_ROWS], *rest] or ["No receipt contradicts its binding."]


def _shown(plot: Plot, dpi: float) -> dict[str, Any]:
    """Return a figure as the template takes it; where there is nothing to draw, its note alone."""
    width, height = plot.figure.get_size_inches()
    return {
        "name": plot.name,
        "title": plot.title,
        "alt": plot.alt,
        "note": plot.note,
        "table": None if plot.table.empty else plot.table,
        "image": "" if plot.missing else data_uri(plot.png(dpi), "image/png"),
        "width": round(96 * width),
        "height": round(96 * height),
        "tall": height > TALL_INCHES,
    }


def _json_file(name: str, description: str, value: object) -> Attachment:
    return attach(name, description, json.dumps(value, indent=1).encode(), "application/json")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"cell": _cell, "prose": _prose}
    environment.tests["numeric"] = is_numeric_dtype
    return environment


def _cell(value: object) -> str:
    """Return a value in a table: three digits that count, and a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return number(float(value)) if isinstance(value, float | np.floating) else str(value)


def _prose(sentence: str) -> Markup:
    """Return a sentence in which `code` and **strong words** are marked as in Markdown; all else is text."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(sentence)))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked))
