"""What a report carries inside itself for download: rows, facts and executed notebooks, as ``data:`` links."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from nbconvert import HTMLExporter

from numa_lab.report import cases

TEMPLATES = Path(__file__).with_name("templates")
MOST_URI_BYTES = 2_000_000  # browsers of the Chromium family do not save longer data: links
COMPRESS_BYTES = 200_000
RECEIPT_COLUMNS = ["requested", "effective", "observed"]  # by far the most of a row, and told by the receipts table


@dataclass(frozen=True)
class Attachment:
    """A file inside the page: the name under which it is saved, what it is, and its ``data:`` address."""

    name: str
    description: str
    uri: str
    file_bytes: int

    @property
    def size(self) -> str:
        """The file's size in words."""
        return f"{self.file_bytes / 1e6:.1f} MB" if self.file_bytes >= 1e6 else f"{self.file_bytes / 1e3:.1f} kB"


def attach(name: str, description: str, content: bytes, media_type: str) -> Attachment:
    """Wrap a file, compressed where it is large."""
    if len(content) > COMPRESS_BYTES:
        name, content, media_type = f"{name}.gz", gzip.compress(content, mtime=0), "application/gzip"
    return Attachment(name, description, data_uri(content, media_type), len(content))


def data_uri(content: bytes, media_type: str) -> str:
    """Return a ``data:`` address that holds the content."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def rows_csv(rows: pd.DataFrame) -> Attachment:
    """Return all samples as CSV, without the receipts' columns."""
    table = rows.drop(columns=RECEIPT_COLUMNS)
    description = f"the {len(rows)} samples, one row each; the receipts' JSON is in the run directory's Parquet files"
    return attach("rows.csv", description, _csv(table), "text/csv")


def medians_csv(rows: pd.DataFrame) -> Attachment:
    """Return one row per execution and case as CSV, for runs whose samples are too many."""
    table = cases.medians(rows)
    return attach("medians.csv", f"{len(table)} medians, one row per execution and case", _csv(table), "text/csv")


def _csv(table: pd.DataFrame) -> bytes:
    return str(table.to_csv(index=False, float_format="%.6g")).encode()


def notebooks(run_dir: Path, css: str) -> Iterator[Attachment | str]:
    """Return the executed notebooks of a run as pages of their own; a sentence for each that can't be attached."""
    for path in sorted((run_dir / "notebooks").glob("*.ipynb")):
        try:
            page = notebook_page(path, css)
        except (OSError, ValueError) as error:
            yield f"{path.name} can't be attached: {type(error).__name__}, {error}."
            continue
        yield attach(f"{path.stem}.html", f"the executed notebook {path.name}", page.encode(), "text/html")


def notebook_page(path: Path, css: str) -> str:
    """Return an executed notebook as one HTML page without scripts, outside requests, or images without alternative text.

    Raises
    ------
    ValueError
        It is no notebook.
    """
    exporter = HTMLExporter(
        template_name="notebook", extra_template_basedirs=[str(TEMPLATES)], exclude_anchor_links=True
    )
    notebook = nbformat.read(path, as_version=4)
    resources: dict[str, Any] = {"css": css, "metadata": {"name": path.stem}}
    page, _ = exporter.from_notebook_node(notebook, resources)
    # The corner above a DataFrame's index is a header cell that heads nothing.
    return str(page).replace("<th></th>", "<td></td>")
