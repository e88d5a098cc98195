"""Figures of what can be trusted: the spread between nodes, the run order, and the first call against the steady ones."""

from __future__ import annotations

import math

import pandas as pd

from numa_lab import stats
from numa_lab.report import cases
from numa_lab.report.guide import SOURCE_CLAIMS
from numa_lab.report.plots import BAND, COLORS, GREY, MARKERS, Plot, canvas, drawn, nothing, number

MOST_LABELS = 6  # more bindings share one colour: the order is what this figure is about


@drawn
def spread(rows: pd.DataFrame) -> Plot:
    """Slowest against fastest local node, with intervals, beside what the source guide reports and what chance gives.

    Limits: decode at the sizes that most kinds share; the source guide measured another machine.
    """
    name, title = "spread", "Spread between local nodes"
    decode = cases.base(cases.medians(rows))
    decode = decode[decode["phase"] == "decode"]
    if decode.empty:
        return nothing(name, title, "No decode was measured, so there is no spread between nodes to show.")
    found = stats.spread(rows).merge(decode[list(stats.CASE)].drop_duplicates())
    nodes = sum(stats.is_local(label) for label in set(rows["label"]) if not label.endswith(stats.AA_SUFFIX))
    floor = stats.noise_floor(stats.execution_medians(rows))
    table = pd.DataFrame(
        {
            "case": [f"{cases.KINDS[r.attention]} {r.dtype}" for r in found.itertuples()],
            "spread (%)": 100 * found["spread"],
            "low (%)": 100 * found["low"],
            "high (%)": 100 * found["high"],
            "by chance (%)": 100 * found["by_chance"],
            "source guide (%)": [100 * SOURCE_CLAIMS.get(kind, math.nan) for kind in found["attention"]],
        }
    )
    figure, (ax,) = canvas(height=1.6 + 0.4 * len(table))
    places = range(len(table))
    measured = table["spread (%)"].notna()
    for place, row in zip(places, table.itertuples(index=False), strict=True):
        if not math.isnan(row[2]):
            ax.plot([row[2], row[3]], [place, place], color=COLORS[0], linewidth=2.5)
    at = [place for place, shown in zip(places, measured, strict=True) if shown]
    if at:
        ax.plot(table["spread (%)"][measured], at, "o", color=COLORS[0], label="this machine, with interval")
        ax.plot(table["by chance (%)"][measured], at, "|", color=GREY, markersize=12, label="expected by chance")
    ax.plot(table["source guide (%)"], list(places), "D", color=COLORS[1], label="source guide (another machine)")
    if not math.isnan(floor):
        ax.axvspan(0, 100 * floor, color=BAND, label="noise floor (A/A pair)")
    ax.set_yticks(list(places), table["case"])
    ax.invert_yaxis()
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set(xlabel="slowest over fastest local node, less one (%)")
    ax.set_title("Decode" if nodes > 1 else "Decode: one node, nothing to compare")
    figure.legend(loc="outside lower center", ncols=1)
    if at:
        worst = table.loc[table["spread (%)"].idxmax()]
        said = (
            f"Over {nodes} local nodes the largest spread is {number(worst['spread (%)'])} % ({worst['case']}), "
            f"where chance alone gives {number(worst['by chance (%)'])} %."
        )
    else:
        said = "There is one node: nothing to compare, and no spread of this machine is drawn."
    floor_words = "unknown" if math.isnan(floor) else f"{number(100 * floor)} %"
    alt = f"{said} The source guide reports 17.07 % for GQA and 4.37 % for standard attention. Noise floor: {floor_words}."
    note = "Largest median over smallest of the local bindings, less one; intervals by resampling executions."
    return Plot(name, title, figure, alt, table, note)


@drawn
def run_order(rows: pd.DataFrame) -> Plot:
    """Each execution in run order, relative to the other executions of its label, over all its cases."""
    name, title = "order", "Run order"
    order = stats.run_order(rows)
    if len(order) < 2:
        return nothing(name, title, "Fewer than two executions: no order to show.")
    drift = stats.lag1_autocorrelation(order["relative"].tolist())
    floor = stats.noise_floor(stats.execution_medians(rows))
    figure, (ax,) = canvas(height=3.4)
    if not math.isnan(floor):
        low, high = 100 * (1 / (1 + floor) - 1), 100 * floor
        ax.axhspan(low, high, color=BAND, label="noise floor (A/A pair)")
    ax.axhline(0, color=GREY, linewidth=1)
    percent = 100 * (order["relative"] - 1)
    labels = sorted(set(order["label"]))
    ax.plot(order["order"], percent, color=GREY, linewidth=0.7)
    if len(labels) <= MOST_LABELS:
        for i, label in enumerate(labels):
            chosen = order["label"] == label
            ax.plot(order["order"][chosen], percent[chosen], MARKERS[i], color=COLORS[i], label=label)
    else:
        ax.plot(order["order"], percent, "o", color=COLORS[0], markersize=4, label=f"{len(labels)} labels")
    ax.set(xlabel="place in the run", ylabel="time against the label's median (%)")
    shown = "not enough executions" if math.isnan(drift) else f"{drift:.2f}"
    ax.set_title(f"Lag-1 autocorrelation: {shown}")
    figure.legend(loc="outside lower center", ncols=3)
    far = order.loc[(order["relative"] - 1).abs().idxmax()]
    alt = (
        f"Points of {len(order)} executions in run order. The one that is furthest from its label's median is number "
        f"{far['order']} ({far['label']}) with {100 * (far['relative'] - 1):+.1f} %; lag-1 autocorrelation: {shown}."
    )
    table = order.assign(percent=percent.round(2)).drop(columns="relative")
    note = (
        "Each point is the median over the cases of one execution, against the median of all executions of its label."
    )
    return Plot(name, title, figure, alt, table.rename(columns={"percent": "against its label (%)"}), note)


@drawn
def cold_against_steady(rows: pd.DataFrame) -> Plot:
    """How many times longer the first call takes than the steady state, for each kind, phase and dtype."""
    name, title = "cold", "First call against steady state"
    medians = cases.base(cases.medians(cases.without_twin(rows))).dropna(subset="cold_seconds")
    if medians.empty:
        return nothing(name, title, "No case has both a first call and steady samples.")
    medians = medians.assign(ratio=medians["cold_seconds"] / medians["seconds"])
    table = medians.groupby(["attention", "phase", "dtype"], as_index=False).agg(
        first_call_ms=("cold_seconds", lambda s: 1e3 * s.median()),
        steady_ms=("seconds", lambda s: 1e3 * s.median()),
        ratio=("ratio", "median"),
        lowest=("ratio", "min"),
        highest=("ratio", "max"),
    )
    names = [cases.case_name(r.attention, r.phase, r.dtype) for r in table.itertuples()]
    figure, (ax,) = canvas(height=1.2 + 0.28 * len(table))
    whiskers = [table["ratio"] - table["lowest"], table["highest"] - table["ratio"]]
    ax.barh(names, table["ratio"], xerr=whiskers, color=COLORS[0], height=0.7, ecolor=GREY, capsize=2)
    ax.axvline(1, color="black", linestyle="--", linewidth=1.2)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(xlabel="time of the first call over the steady median (times)")
    most = table.loc[table["ratio"].idxmax()]
    alt = (
        f"Bars of the first call's time over the steady median. The longest is {number(most['ratio'])} times "
        f"({cases.case_name(most['attention'], most['phase'], most['dtype'])}), "
        f"the shortest {number(table['ratio'].min())} times."
    )
    note = "Medians over executions, whiskers from the lowest to the highest; all threads of a binding."
    return Plot(name, title, figure, alt, table, note)
