"""Figures of the experiments that run in a notebook's own process: ranking of nodes, decode loop, batch over nodes."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.ticker import MaxNLocator

from numa_lab.report.plots import BAND, COLORS, GREY, MARKERS, Plot, canvas, drawn, listed, nothing


@drawn
def ranking(found: pd.DataFrame) -> Plot:
    """Time of each node relative to the best, with its interval; takes what ``rank_nodes`` gives."""
    name, title = "ranking", "Nodes against the best"
    measured = found[found["ratio"].notna()]
    if len(measured) < 2:
        return nothing(name, title, f"{'One node' if len(found) == 1 else 'One usable node'}: nothing to compare.")
    floor = found.attrs["noise_floor"]
    figure, (ax,) = canvas(height=0.32 * len(measured) + 1.6)
    places = list(range(len(measured), 0, -1))
    percents = 100 * (measured[["ratio", "low", "high"]] - 1)
    for group, marker, color in ((1, MARKERS[0], COLORS[0]), (2, MARKERS[1], COLORS[1])):
        of = (measured["tie_group"] == group).to_numpy()
        if of.any():
            part, at = percents[of], [place for place, here in zip(places, of, strict=True) if here]
            whiskers = [(part["ratio"] - part["low"]).clip(0), (part["high"] - part["ratio"]).clip(0)]
            label = "not shown to be slower" if group == 1 else "slower"
            ax.errorbar(part["ratio"], at, xerr=whiskers, fmt=marker, color=color, capsize=3, label=label)
    if math.isfinite(floor):
        ax.axvspan(0, 100 * floor, color=BAND, zorder=0, label=f"noise floor {floor:.1%}")
    ax.axvline(0, color=GREY, linewidth=1)
    causes = [f" ({cause})" if cause else "" for cause in measured["cause"]]
    ax.set_yticks(places, [f"node {node}{cause}" for node, cause in zip(measured.index, causes, strict=True)])
    ax.set_ylim(0.3, len(measured) + 0.7)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("slower than the best node (%)")
    figure.legend(loc="outside lower center", ncols=3)
    table = measured.reset_index()[["node", "median_seconds", "ratio", "low", "high", "tie_group", "cause", "visits"]]
    worst = measured["ratio"].idxmax()
    ties = listed([f"node {node}" for node in measured.index[measured["tie_group"] == 1]])
    alt = (
        f"{len(measured)} nodes with intervals. {ties[:1].upper()}{ties[1:]} not shown to be slower than the best; node "
        f"{worst} has the greatest ratio, {measured.loc[worst, 'ratio']:.3f}. Noise floor {floor:.1%}."
    )
    note = "Visits of one process, in random order within blocks; 95 % intervals."
    return Plot(name, title, figure, alt, table, note)


@drawn
def decode_runs(runs: pd.DataFrame) -> Plot:
    """Tokens per second of each run of a decode loop, with the helper and without; takes ``Comparison.runs``."""
    medians = runs.groupby("helper")["tokens_per_s"].median()
    figure, (ax,) = canvas(height=2.8)
    for name, marker, color in (("without", MARKERS[1], COLORS[1]), ("with", MARKERS[0], COLORS[0])):
        of = runs[runs["helper"] == name]
        ax.plot(of["block"] + 1, of["tokens_per_s"], marker, color=color, label=f"{name} the helper")
        ax.axhline(medians[name], color=color, linewidth=1)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("block")
    ax.set_ylabel("tokens per second")
    figure.legend(loc="outside lower center", ncols=2)
    alt = (
        f"{len(runs)} runs in {runs['block'].nunique()} blocks; medians {medians['with']:.1f} tokens per second with the "
        f"helper and {medians['without']:.1f} without."
    )
    return Plot("decode", "Tokens per second", figure, alt, runs, "Lines are medians; order within a block is random.")


@drawn
def batch_scaling(rows: pd.DataFrame) -> Plot:
    """Throughput of a batch by one process and by the pool over 1 to all nodes; takes ``numa_lab.batch_scaling.measure``."""
    table = rows.groupby(["nodes", "arm"], as_index=False)["sequences_per_s"].agg(["median", "min", "max"])
    figure, (ax,) = canvas(height=0.32 * len(table) + 1.4)
    places = list(range(len(table), 0, -1))
    whiskers = [table["median"] - table["min"], table["max"] - table["median"]]
    ax.barh(places, table["median"], color=COLORS[8], height=0.6)
    ax.errorbar(table["median"], places, xerr=whiskers, fmt="none", color=GREY, capsize=3)
    ax.set_yticks(places, table["arm"])
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("sequences per second")
    alt = (
        "Bars: "
        + listed([f"{row['arm']} {row['median']:.1f}" for _, row in table.iterrows()])
        + " sequences per second."
    )
    table = table.rename(columns={column: f"{column} (sequences/s)" for column in ("median", "min", "max")})
    return Plot(
        "batch-scaling", "A batch over the nodes", figure, alt, table, "Bars are medians, whiskers the extremes."
    )
