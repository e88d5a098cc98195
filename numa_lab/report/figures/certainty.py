"""Figures of how sure a difference is: the spread between nodes, drift over the run, the first call against steady ones."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from numa_lab.measurement import comparison
from numa_lab.measurement.labels import AA_SUFFIX, is_local
from numa_lab.report import cases, verdicts
from numa_lab.report.guide import SOURCE_CLAIMS
from numa_lab.report.plots import BAND, COLORS, GREY, MARKERS, Plot, canvas, drawn, nothing, number

MOST_LABELS = 6  # more bindings are told apart by kind alone
CROWD = 60  # more executions get smaller marks
_KIND = ["attention", "phase", "dtype", "backend"]


@drawn
def spread(rows: pd.DataFrame) -> Plot:
    """How much slower the slowest local binding is than the fastest, beside the A/A pair and the source guide's numbers.

    Limits: the case that stands for each attention kind, phase and dtype (``cases.base``).
    """
    base = cases.base(cases.medians(cases.without_twin(rows)))
    spreads = comparison.spread(rows).merge(base[list(comparison.CASE)].drop_duplicates()).dropna(subset="spread")
    spreads = spreads.sort_values(_KIND, ignore_index=True)
    names = [cases.case_name(row["attention"], row["phase"], row["dtype"]) for _, row in spreads.iterrows()]
    percents = spreads[["spread", "low", "high", "by_chance"]].mul(100)
    floor = 100 * comparison.noise_floor(comparison.execution_medians(rows))
    figure, (ax,) = canvas(height=0.27 * len(spreads) + 2.5)
    places = range(len(spreads), 0, -1)
    local = {label for label in verdicts.bindings(rows) if is_local(label)}
    if spreads.empty:
        missing = "One node: nothing to compare" if len(local) == 1 else "No two local bindings: nothing to compare"
        ax.text(0.5, 0.2, missing, transform=ax.transAxes, ha="center", va="center", fontsize=10.5, zorder=3,
                bbox={"facecolor": "white", "edgecolor": "none"})  # fmt: skip
    else:
        whiskers = [(percents["spread"] - percents["low"]).clip(0), (percents["high"] - percents["spread"]).clip(0)]
        ax.errorbar(
            percents["spread"], places, xerr=whiskers, fmt=MARKERS[0], color=COLORS[0], capsize=3,
            label="this machine, with 95 % interval",
        )  # fmt: skip
        ax.plot(
            percents["by_chance"], places, "|", color=GREY, markersize=11, markeredgewidth=2,
            label="expected by chance where all nodes are equal",
        )  # fmt: skip
    if not math.isnan(floor):
        ax.axvspan(
            0,
            floor,
            color=BAND,
            zorder=0,
            label=f"noise floor: nine tenths of the A/A pairs differ by less than {floor:.1f} %",
        )
    _source_marks(ax, len(spreads) + 1)
    ax.set_yticks(places, names)
    ax.set_ylim(0.3, len(spreads) + 2.2)
    ends = [20.0, *1.08 * percents[["spread", "high"]].max(), 1.08 * floor]
    ax.set_xlim(0, max(end for end in ends if not math.isnan(end)))
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("slowest against fastest local binding (%)")
    if ax.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center")
    table = pd.concat([spreads[[*_KIND, "best", "worst"]], percents.add_suffix(" (%)")], axis=1)
    return Plot("spread", "Spread between local nodes", figure, _spread_words(table, floor), table, _SPREAD_NOTE)


_SPREAD_NOTE = (
    "95 % intervals for all pairs of nodes together; grey marks are the spread that shuffled labels give. The numbers of the "
    "source guide come from another machine."
)


def _source_marks(ax: Axes, place: float) -> None:
    """The source guide's two numbers as labelled lines, one label to the left of its line and one to the right."""
    for kind, side, above in (("gqa", "right", 0.0), ("mha", "left", 0.6)):
        claim = 100 * SOURCE_CLAIMS[kind]
        ax.axvline(claim, color=COLORS[9], linestyle="--", linewidth=1.2)
        ax.annotate(
            f"source guide, {cases.KINDS[kind]}: {claim:.2f} %", (claim, place + above), (-4 if side == "right" else 4, 0),
            textcoords="offset points", ha=side, va="center", fontsize=9, color=_SOURCE_INK,
        )  # fmt: skip


_SOURCE_NAMES = {"gqa": "GQA", "mha": "standard attention (MHA)"}
_SOURCE_INK = "#a84300"


def _spread_words(table: pd.DataFrame, floor: float) -> str:
    source = " and ".join(f"{100 * claim:.2f} % for {_SOURCE_NAMES[kind]}" for kind, claim in SOURCE_CLAIMS.items())
    pair = (
        "There is no A/A pair"
        if math.isnan(floor)
        else f"In nine tenths of the cases the A/A pair differs by less than {floor:.1f} %"
    )
    alt = f"{pair}. Dashed lines mark what the source guide found on another machine: {source}."
    if table.empty:
        return f"There are no two local bindings to compare. {alt}"
    worst = table.loc[table["spread (%)"].idxmax()]
    return (
        f"Points with intervals for {len(table)} cases. The greatest spread between local bindings is "
        f"{worst['spread (%)']:.1f} %, {worst['worst']} against {worst['best']} in "
        f"{cases.case_name(worst['attention'], worst['phase'], worst['dtype'])}; the median is "
        f"{table['spread (%)'].median():.1f} %. {alt}"
    )


@drawn
def run_order(rows: pd.DataFrame) -> Plot:
    """Each execution in the order of the run, relative to the other executions of its binding; median over its cases."""
    name, title = "order", "Run order"
    table = comparison.run_order(rows)
    if not table["label"].duplicated().any():
        return nothing(name, title, "Every binding ran once: a drift over the run can't be told from the bindings.")
    table = table.assign(percent=100 * (table["relative"] - 1))
    drift = comparison.lag1_autocorrelation(table["relative"].tolist())
    floor = 100 * comparison.noise_floor(comparison.execution_medians(rows))
    figure, (ax,) = canvas(height=3.9)
    if not math.isnan(floor):
        ax.axhspan(-floor, floor, color=BAND, zorder=0, label=f"noise floor ({floor:.1f} %)")
    ax.plot(table["order"] + 1, table["percent"], color=GREY, linewidth=0.5, zorder=1)
    groups = table["label"] if table["label"].nunique() <= MOST_LABELS else table["label"].map(_kind)
    for index, group in enumerate(sorted(set(groups))):
        shown = table[groups == group]
        ax.plot(
            shown["order"] + 1, shown["percent"], linestyle="", marker=MARKERS[index], color=COLORS[index], label=group,
            markersize=6 if len(table) <= CROWD else 4,
        )  # fmt: skip
    ax.set(xlabel="place in the run", ylabel="time against the binding's usual (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    drift_words = "too few executions for an autocorrelation" if math.isnan(drift) else f"lag-1 autocorrelation {drift:.2f}"
    ax.set_title(f"{len(table)} executions, {drift_words}")
    figure.legend(loc="outside lower center", ncols=3)
    fast, slow = (table.loc[index] for index in (table["percent"].idxmin(), table["percent"].idxmax()))
    alt = (
        f"Points of {len(table)} executions in run order: from {fast['percent']:+.1f} % ({fast['label']}, place {fast['order'] + 1}) "
        f"to {slow['percent']:+.1f} % ({slow['label']}, place {slow['order'] + 1}) of the usual time of their binding; {drift_words}."
    )
    columns = {"order": "place", "execution_id": "execution", "label": "binding", "percent": "against the usual (%)"}
    table = table.assign(order=table["order"] + 1)[list(columns)].rename(columns=columns)
    note = (
        "Each point is one process: the median over its cases, each relative to the median of the same case and "
        "binding. ~aa is the A/A twin."
    )
    return Plot(name, title, figure, alt, table, note)


def _kind(label: str) -> str:
    if label.endswith(AA_SUFFIX):
        return "A/A twin"
    return "local" if is_local(label) else "other bindings"


@drawn
def cold_against_steady(rows: pd.DataFrame) -> Plot:
    """Time of the first call after the tensors were placed, beside the steady state, for each kind, phase and dtype."""
    name, title = "cold", "First call and steady state"
    base = cases.local(cases.base(cases.medians(cases.without_twin(rows)))).dropna(subset="cold_seconds")
    if base.empty:
        return nothing(name, title, "No case has both a first call and steady samples.")
    keys = ["attention", "phase", "dtype", "backend"]
    table = base.groupby(keys, as_index=False).agg(
        first=("cold_seconds", "median"), steady=("seconds", "median"), executions=("seconds", "size")
    )
    table = table.assign(
        first=1e3 * table["first"], steady=1e3 * table["steady"], ratio=table["first"] / table["steady"]
    )
    figure, (ax,) = canvas(height=0.27 * len(table) + 1.4)
    places = range(len(table), 0, -1)
    several = table.duplicated(keys[:-1], keep=False)
    names = [
        cases.case_name(row["attention"], row["phase"], row["dtype"]) + (f", {row['backend']}" if more else "")
        for (_, row), more in zip(table.iterrows(), several, strict=True)
    ]
    ax.hlines(places, table["steady"], table["first"], color=GREY, linewidth=1)
    ax.plot(table["steady"], places, linestyle="", marker=MARKERS[0], color=COLORS[0], label="steady state")
    ax.plot(table["first"], places, linestyle="", marker=MARKERS[1], color=COLORS[1], label="first call")
    for place, (_, row) in zip(places, table.iterrows(), strict=True):
        ax.annotate(
            f"{row['ratio']:.1f}×", (max(row["first"], row["steady"]), place), (7, 0), textcoords="offset points",
            va="center", fontsize=9,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    ax.margins(x=0.16)
    ax.set_yticks(places, names)
    ax.set_ylim(0.4, len(table) + 0.6)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("time per call (ms)")
    figure.legend(loc="outside lower center", ncols=2)
    worst, least = (table.loc[index] for index in (table["ratio"].idxmax(), table["ratio"].idxmin()))
    alt = "Pairs of points, first call and steady state: the first call takes from " + " to ".join(
        f"{row['ratio']:.1f} times ({cases.case_name(row['attention'], row['phase'], row['dtype'])}, "
        f"{number(row['first'])} against {number(row['steady'])} ms)"
        for row in (least, worst)
    )
    note = f"Medians over executions under local bindings. {_winners(base)}"
    table = table.rename(columns={"first": "first call (ms)", "steady": "steady (ms)", "ratio": "first over steady"})
    return Plot(name, title, figure, f"{alt}.", table, note)


def _winners(base: pd.DataFrame) -> str:
    """Return whether the fastest local binding is the same for first calls and in the steady state."""
    if base["label"].nunique() < 2:
        return "One local binding: which is the fastest is no question."
    flips, compared = [], base.groupby(["attention", "phase", "dtype"])
    for case, group in compared:
        cold, steady = (group.groupby("label")[column].median().idxmin() for column in ("cold_seconds", "seconds"))
        if cold != steady:
            flips.append(f"{cases.case_name(*case)}: {cold} at first, {steady} when steady")
    if not flips:
        return "The binding that is fastest at the first call is so in the steady state too."
    return (
        f"In {len(flips)} of {compared.ngroups} cases another binding is the fastest at the first call than in the "
        f"steady state ({flips[0]}); below the noise floor neither means anything."
    )
