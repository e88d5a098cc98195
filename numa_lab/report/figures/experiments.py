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
        in_group = (measured["tie_group"] == group).to_numpy()
        if in_group.any():
            part, at = percents[in_group], [place for place, here in zip(places, in_group, strict=True) if here]
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
        helper_runs = runs[runs["helper"] == name]
        ax.plot(helper_runs["block"] + 1, helper_runs["tokens_per_s"], marker, color=color, label=f"{name} the helper")
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
def node_scaling(rows: pd.DataFrame) -> Plot:
    """How fast K and V are read by more and more nodes, and what bandwidths let expect; takes ``numa_lab.experiments.node_scaling.measure``."""
    speeds = rows.assign(speed=rows["bytes_per_s"] / 1e9)
    speeds["expected"] = speeds["speed"] * speeds["seconds"] / speeds["predicted"]
    keys = ["work", "nodes", "load"]
    table = speeds.groupby(keys, as_index=False).agg(
        median=("speed", "median"), least=("speed", "min"), most=("speed", "max"), predicted=("expected", "median")
    )
    works = list(dict.fromkeys(table["work"]))
    figure, axes = canvas(1, len(works), height=3.0, sharey=True)
    for ax, work in zip(axes, works, strict=True):
        visits = table[table["work"] == work]
        plain, placed = visits[visits["nodes"] == 0], visits[visits["nodes"] > 0]
        ax.axhline(float(plain["median"].iloc[0]), color=GREY, linestyle=":", label="one process, measured")
        for number, (load, part) in enumerate(placed.groupby("load")):
            whiskers = [part["median"] - part["least"], part["most"] - part["median"]]
            ax.errorbar(
                part["nodes"], part["median"], yerr=whiskers, fmt=MARKERS[number], color=COLORS[number], capsize=3,
                label=f"{load}, measured",
            )  # fmt: skip
            if part["predicted"].notna().any():
                ax.plot(
                    part["nodes"],
                    part["predicted"],
                    "--",
                    color=COLORS[number],
                    marker="_",
                    markersize=14,
                    label=f"{load}, predicted",
                )
        ax.set_title(work)
        ax.set_xlabel("nodes at work")
        ax.set_xlim(0.5, placed["nodes"].max() + 0.5)
        ax.set_xticks(sorted(placed["nodes"].unique()))
    axes[0].set_ylim(bottom=0)  # of both, when both are drawn: the top is then where it has to be
    axes[0].set_ylabel("K and V read (GB/s)")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2)
    speeds = [
        f"{row.work} on {row.nodes or 'no particular'} nodes, {row.load}, {row.median:.1f}"
        + ("" if math.isnan(row.predicted) else f" (predicted {row.predicted:.1f})")
        for row in table.itertuples()
    ]
    alt = f"Points by number of nodes, GB/s: {listed(speeds)}."
    table = table.rename(columns={column: f"{column} (GB/s)" for column in ("median", "least", "most", "predicted")})
    note = (
        "Medians over visits, whiskers the extremes; dashes are what the measured bandwidths of the nodes let expect."
    )
    return Plot("node-scaling", "Work over the nodes", figure, alt, table, note)
