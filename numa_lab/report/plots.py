"""A figure together with what stands for it where it can't be seen: alternative text and its table.

Figures are made by matplotlib's object interface alone, so that none stays open in pyplot. They are as wide as a phone
can show with letters of 9 points, and grow downwards.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import Any, ParamSpec

import matplotlib as mpl
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

_Arguments = ParamSpec("_Arguments")

WIDTH_INCHES = 5.2  # 9 points stay above 9 pixels where a page of 390 pixels shrinks it
DPI = 144
COLORS = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9", "#d55e00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")  # colours are never alone in telling series apart
GREY, BAND = "#595959", "#d9d9d9"
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "figure.constrained_layout.w_pad": 0.08,  # inches; the default lets long labels touch the edge
    "figure.facecolor": "white",
    "figure.titlesize": 10.5,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures look alike everywhere
    "font.size": 9.5,
    "grid.color": "#e6e6e6",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.title_fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "numa_lab",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@dataclass(frozen=True)
class Plot:
    """A figure, what it shows in words, and the numbers behind it.

    Parameters
    ----------
    name
        Short name, fit for an anchor or a file.
    title
        What the figure shows, as its heading.
    figure
        The drawing; not known to pyplot.
    alt
        What is to be seen, computed from the data: extremes with units.
    table
        The numbers, with units in the column names. Empty where there was nothing to draw.
    note
        How the figure was made: which cases, which rows. Where nothing could be drawn, what is missing.
    missing
        Whether there was nothing to draw.
    """

    name: str
    title: str
    figure: Figure
    alt: str
    table: pd.DataFrame
    note: str
    missing: bool = False

    def png(self, dpi: float = DPI) -> bytes:
        """Return the figure as a PNG of at most 256 colours, which halves its size and can't be seen."""
        drawn, packed = io.BytesIO(), io.BytesIO()
        with mpl.rc_context(_STYLE):
            self.figure.savefig(drawn, format="png", dpi=dpi)
        with Image.open(drawn) as image:
            colours = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        colours.save(packed, format="png", optimize=True)
        return packed.getvalue()

    def svg(self) -> bytes:
        """Return the figure as SVG with its letters as text; the same bytes for the same data."""
        drawn = io.BytesIO()
        with mpl.rc_context(_STYLE):
            self.figure.savefig(drawn, format="svg", metadata={"Date": None})
        return drawn.getvalue()

    def show(self) -> None:
        """Display the figure once, with its alternative text as image metadata, then its table: in a notebook."""
        from IPython.display import Image as Displayed  # of a notebook's kernel, which the report is not
        from IPython.display import display

        display(Displayed(data=self.png(), format="png", width=round(self.figure.get_figwidth() * 96), alt=self.alt))
        if not self.table.empty:
            summary = f"<summary>{escape(self.title)}: the numbers</summary>"
            markup = f"<details>{summary}{table_markup(self.table)}</details>"
            display({"text/html": markup, "text/plain": self.table.to_string(index=False)}, raw=True)


def table_markup(table: pd.DataFrame) -> str:
    """Return a table as HTML without an index, whose cells are escaped."""
    markup: str = table.to_html(index=False, border=0, na_rep="–", justify="left", float_format=number)
    return markup


def number(value: float) -> str:
    """Three digits that count, in plain notation: 0.0123, 1.23, 12.3, 1,230."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def drawn(function: Callable[_Arguments, Plot]) -> Callable[_Arguments, Plot]:
    """Give a function that draws the style of all figures, and leave matplotlib's settings as they were."""

    @wraps(function)
    def styled(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Plot:
        with mpl.rc_context(_STYLE):
            return function(*args, **kwargs)

    return styled


def canvas(rows: int = 1, columns: int = 1, *, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of the common width and of `height` inches, and its axes row by row."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [ax for row in axes for ax in row]


def nothing(name: str, title: str, missing: str) -> Plot:
    """A plot whose figure says what is missing, with an empty table."""
    figure, (ax,) = canvas(height=0.9)
    ax.set_axis_off()
    ax.text(0.5, 0.5, missing, ha="center", va="center", wrap=True, color=GREY)
    return Plot(name, title, figure, f"Nothing to draw: {missing}", pd.DataFrame(), missing, missing=True)


def listed(items: Sequence[object]) -> str:
    """Items in a sentence: "a, b and c"."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
