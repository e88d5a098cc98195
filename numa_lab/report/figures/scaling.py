"""Figures of how attention scales with threads, cache length and batch, and how near it comes to the limit of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from numa_lab.report import cases
from numa_lab.report.plots import BAND, COLORS, GREY, MARKERS, Plot, canvas, drawn, listed, nothing, number
from numa_lab.measurement.comparison import CASE

MOST_LINES = 6  # more bindings are drawn as their median and range, which stays readable with any number of nodes
LIMIT: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}


@drawn
def thread_scaling(rows: pd.DataFrame) -> Plot:
    """Speed-up with the number of threads, beside the ideal and what memory would allow.

    Limits: local bindings alone; the decode case that was measured with most thread counts.
    """
    name, title = "threads", "Thread scaling"
    decode = _decode(rows)
    chosen = _varied(decode, "threads")
    if chosen["threads"].nunique() < 2:
        return nothing(name, title, _unvaried(decode, "threads"))
    fewest = int(chosen["threads"].min())
    first = chosen[chosen["threads"] == fewest].set_index("execution_id")["seconds"]
    chosen = chosen.assign(base=chosen["execution_id"].map(first)).dropna(subset="base")
    chosen["speedup"] = chosen["base"] / chosen["seconds"]
    chosen["limit"] = chosen["base"] * chosen["limit_bytes_per_s"] / chosen["kv_bytes"]
    figure, (ax,) = canvas(height=3.9)
    counts = sorted(set(chosen["threads"]))
    _lines(ax, chosen, "threads", "speedup")
    ax.plot(counts, [count / fewest for count in counts], color=GREY, linestyle=":", label="ideal")
    ax.plot(counts, chosen.groupby("threads")["limit"].median(), **LIMIT, label="memory read limit")
    _log_axis(ax, counts)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    ax.set(xlabel="threads", ylabel=f"speed-up over {_threads(fewest)} (times)", title=_case(chosen))
    figure.legend(loc="outside lower center", ncols=3)
    table = _summary(chosen, "threads", {"speedup": "speed-up", "limit": "speed-up at the memory limit"})
    at_most = table[table["threads"] == table["threads"].max()]
    best = table.loc[table["speed-up"].idxmax()]
    alt = (
        f"Lines of speed-up against threads for {_bindings(table)}, {_case(chosen)}. The greatest is {number(best['speed-up'])} times "
        f"with {_threads(best['threads'])} ({best['binding']}); with {_threads(at_most['threads'].iloc[0])} it is "
        f"{number(at_most['speed-up'].median())}, the ideal {number(counts[-1] / fewest)} and the memory limit "
        f"{number(at_most['speed-up at the memory limit'].median())}."
    )
    return Plot(name, title, figure, alt, table, _LINES_NOTE)


@drawn
def kv_curve(rows: pd.DataFrame) -> Plot:
    """Time of a decode step and the bandwidth that it reads at, against the number of cached tokens."""
    return _curve(rows, "kv_len", "cached tokens (kv_len)", "Cache length")


@drawn
def batch_curve(rows: pd.DataFrame) -> Plot:
    """Time of a decode step and the bandwidth that it reads at, against the number of sequences."""
    return _curve(rows, "batch", "sequences (batch)", "Batch")


def _curve(rows: pd.DataFrame, column: str, label: str, title: str) -> Plot:
    decode = cases.whole_bindings(_decode(rows))
    chosen = _varied(decode, column)
    if chosen[column].nunique() < 2:
        return nothing(column, title, _unvaried(decode, column))
    chosen = chosen.assign(
        milliseconds=1e3 * chosen["seconds"],
        limit_milliseconds=1e3 * chosen["kv_bytes"] / chosen["limit_bytes_per_s"],
        gigabytes_per_s=chosen["kv_bytes"] / chosen["seconds"] / 1e9,
        limit_gigabytes_per_s=chosen["limit_bytes_per_s"] / 1e9,
    )
    figure, axes = canvas(2, height=5.6, sharex=True)
    values = sorted(set(chosen[column]))
    for ax, measured, words in zip(
        axes, ("milliseconds", "gigabytes_per_s"), ("time per step (ms)", "read bandwidth (GB/s)"), strict=True
    ):
        _lines(ax, chosen, column, measured)
        ax.plot(values, chosen.groupby(column)[f"limit_{measured}"].median(), **LIMIT, label="memory read limit")
        ax.set_ylabel(words)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes[1].set_ylim(bottom=0)  # heights are then shares of the limit
    _log_axis(axes[1], values)
    axes[0].set_title(_case(chosen))
    axes[1].set_xlabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    table = _summary(
        chosen,
        column,
        {"milliseconds": "milliseconds", "gigabytes_per_s": "GB/s", "limit_gigabytes_per_s": "limit GB/s"},
    )
    ends = table.groupby(column)[["milliseconds", "GB/s", "limit GB/s"]].median()
    alt = (
        f"Lines of decode time and read bandwidth against {label} for {_bindings(table)}, {_case(chosen)}: "
        + "; ".join(
            f"at {value:,} {number(end['milliseconds'])} ms and {number(end['GB/s'])} GB/s of a limit of {number(end['limit GB/s'])} GB/s"
            for value, end in ends.iloc[[0, -1]].iterrows()
        )
    )
    return Plot(column, title, figure, f"{alt}.", table, _LINES_NOTE)


@drawn
def limit_share(rows: pd.DataFrame) -> Plot:
    """Share of the memory read limit that decode reaches (K and V counted once), and FLOP/s of prefill.

    Limits: local bindings, or where none was measured all; all threads of a binding.
    """
    name, title = "limit", "Share of the memory limit"
    base = cases.local(cases.base(cases.medians(cases.without_twin(rows))))
    if base.empty:
        return nothing(name, title, "No case has a steady sample.")
    base = base.assign(
        value=(100 * base["kv_bytes"] / base["seconds"] / base["limit_bytes_per_s"]).where(
            base["phase"] == "decode", base["flops"] / base["seconds"] / 1e9
        )
    )
    keys = ["phase", "attention", "dtype", "backend"]
    table = base.groupby(keys, as_index=False).agg(
        value=("value", "median"), lowest=("value", "min"), highest=("value", "max"), executions=("value", "size")
    )
    phases = [phase for phase in cases.PHASES if phase in set(table["phase"])]
    counts = [int((table["phase"] == phase).sum()) for phase in phases]
    figure, axes = canvas(len(phases), height=0.27 * sum(counts) + 1.1 * len(phases), height_ratios=counts)
    dtypes = sorted(set(table["dtype"]))
    for ax, phase in zip(axes, phases, strict=True):
        _bars(ax, table[table["phase"] == phase], dtypes)
        ax.set_title(f"{phase.capitalize()}, {_backends(table[table['phase'] == phase])}")
        ax.set_xlabel({"decode": "share of the memory read limit (%)"}.get(phase, "GFLOP/s"))
        if phase == "decode":
            ax.axvline(100, **LIMIT)
            ax.set_xlim(0, max(108, 1.15 * table.loc[table["phase"] == phase, "highest"].max()))
    reached = []
    for phase, unit in (("decode", "% of the memory read limit"), ("prefill", "GFLOP/s")):
        if phase in phases:
            shown = table[table["phase"] == phase]
            low, high = (shown.loc[index] for index in (shown["value"].idxmin(), shown["value"].idxmax()))
            reached.append(
                f"{phase} reaches from {number(low['value'])} ({_row_name(low)}) to {number(high['value'])} {unit} ({_row_name(high)})"
            )
    unit = table["phase"].map({"decode": "% of the memory read limit"}).fillna("GFLOP/s")
    note = "Medians over executions under local bindings, whiskers from the lowest to the highest. K and V are counted once for each step."
    return Plot(
        name,
        title,
        figure,
        f"Bars by attention kind, dtype and backend: {'; '.join(reached)}.",
        table.assign(unit=unit),
        note,
    )


def _bars(ax: Axes, table: pd.DataFrame, dtypes: Sequence[str]) -> None:
    table = table.iloc[::-1]
    several = table["backend"].nunique() > 1
    names = [_row_name(row) if several else _row_name(row).rpartition(",")[0] for _, row in table.iterrows()]
    colors = [COLORS[dtypes.index(dtype)] for dtype in table["dtype"]]
    whiskers = [table["value"] - table["lowest"], table["highest"] - table["value"]]
    ax.barh(names, table["value"], xerr=whiskers, color=colors, height=0.7, ecolor=GREY, capsize=2)
    for position, (value, high) in enumerate(zip(table["value"], table["highest"], strict=True)):
        ax.annotate(
            number(value),
            (high, position),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.15)


def _row_name(row: pd.Series) -> str:
    return f"{cases.KINDS.get(row['attention'], row['attention'])} {row['dtype']}, {row['backend']}"


def _backends(table: pd.DataFrame) -> str:
    backends = sorted(set(table["backend"]))
    return f"backend {backends[0]}" if len(backends) == 1 else f"{len(backends)} backends"


_LINES_NOTE = (
    "Local bindings with all threads that they allow unless threads vary; medians over executions, "
    "bars from the fastest to the slowest."
)


def _decode(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians of decode under local bindings."""
    medians = cases.medians(cases.without_twin(rows))
    return cases.local(medians[medians["phase"] == "decode"])


def _varied(decode: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the rows that differ in one column alone: of all other settings the one that was measured with most values of it."""
    others = [name for name in CASE if name not in (column, "threads")]
    if decode.empty:
        return decode
    variety = decode.groupby(others)[column].nunique()
    setting = variety[variety == variety.max()].index.max()
    return decode[(decode[others] == list(setting)).all(axis=1)]


def _lines(ax: Axes, chosen: pd.DataFrame, column: str, value: str) -> None:
    labels = sorted(set(chosen["label"]), key=lambda label: (len(label), label))
    if len(labels) <= MOST_LINES:
        for index, label in enumerate(labels):
            times = chosen[chosen["label"] == label].groupby(column)[value].agg(["median", "min", "max"])
            whiskers = [times["median"] - times["min"], times["max"] - times["median"]]
            ax.errorbar(
                times.index,
                times["median"],
                yerr=whiskers,
                color=COLORS[index],
                marker=MARKERS[index],
                capsize=2,
                label=label,
            )
        return
    times = chosen.groupby(column)[value].agg(["median", "min", "max"])
    ax.fill_between(times.index, times["min"], times["max"], color=BAND, label="range")
    ax.plot(
        times.index,
        times["median"],
        color=COLORS[0],
        marker=MARKERS[0],
        label=f"median of {len(labels)} local bindings",
    )


def _log_axis(ax: Axes, values: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(values))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _summary(chosen: pd.DataFrame, column: str, values: dict[str, str]) -> pd.DataFrame:
    """Medians over executions for each binding and value of the column that varies."""
    keys = ["label", "threads"] if column == "threads" else ["label", "threads", column]
    medians = chosen.groupby(keys, as_index=False).agg(
        executions=("seconds", "size"), **{name: (name, "median") for name in values}
    )
    return medians.rename(columns={"label": "binding", **values})


def _case(chosen: pd.DataFrame) -> str:
    """Return the settings that all rows share, for a title."""
    row = chosen.iloc[0]
    sizes = [f"{name} {row[name]:,}" for name in ("batch", "kv_len") if chosen[name].nunique() == 1]
    return f"{cases.case_name(row['attention'], row['phase'], row['dtype'])}, {', '.join(sizes)} ({row['backend']})"


def _bindings(table: pd.DataFrame) -> str:
    labels = sorted(set(table["binding"]))
    return labels[0] if len(labels) == 1 else f"{len(labels)} bindings"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _unvaried(decode: pd.DataFrame, column: str) -> str:
    """Why there is no curve over a column."""
    if decode.empty:
        return "No decode was measured."
    return f"Decode was measured with {column} {listed(sorted(set(decode[column])))} alone: no curve to show."
