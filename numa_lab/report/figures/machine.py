"""Figures of the machine's memory: what every node reads of every memory, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.colors import Normalize

from numa_lab.report.figures.placement import LARGEST_CELL_INCHES, heatmap
from numa_lab.report.plots import WIDTH_INCHES, Plot, canvas, drawn, listed, nothing, number


@drawn
def bandwidth_heatmap(probes: Mapping[str, Any]) -> Plot:
    """Read bandwidth of each CPU node from each memory node, one node reading at a time.

    Parameters
    ----------
    probes
        What ``numa-lab probe --json`` prints.
    """
    plot = _matrix(probes, "bandwidth", "Read bandwidth between nodes", "read_bytes_per_s", 1e-9, "GB/s", "cividis")
    together = probes.get("all_nodes_bytes_per_s")
    threads = listed(sorted({count for count in probes["threads"] if count}))
    note = f"One node reads at a time, with a thread on each of its physical cores ({threads})."
    if together:
        note += f" All nodes reading their own memory at once: {number(together / 1e9)} GB/s in all."
    return plot if plot.missing else replace(plot, note=note)


@drawn
def latency_heatmap(probes: Mapping[str, Any]) -> Plot:
    """Time of one load that waits for the load before it, from each CPU node to each memory node."""
    return _matrix(probes, "latency", "Memory latency between nodes", "latency_ns", 1, "ns", "cividis_r")


def _matrix(probes: Mapping[str, Any], name: str, title: str, key: str, scale: float, unit: str, cmap: str) -> Plot:
    nodes: Sequence[int] = probes["nodes"]
    matrix = pd.DataFrame(probes[key], index=nodes, columns=nodes, dtype=float) * scale
    cells = matrix.stack().dropna()
    if cells.empty:
        return nothing(name, title, "No pair of nodes could be measured.")
    cell = min(1.3 * LARGEST_CELL_INCHES, (WIDTH_INCHES - 0.8) / len(nodes))
    label = f"{title.removesuffix(' between nodes').lower()} ({unit})"
    figure, (ax,) = canvas(height=cell * len(nodes) + 1.35)
    texts = matrix.map(lambda value: "" if pd.isna(value) else f"{value:.0f}" if value >= 10 else f"{value:.1f}")
    heatmap(ax, matrix, texts, Normalize(cells.min(), max(cells.max(), 1.02 * cells.min())), cmap)
    ax.set(xlabel="memory node", ylabel="CPU node")
    if len(cells) > 1:
        bar = figure.colorbar(
            ax.collections[0], ax=ax, orientation="horizontal", location="top", aspect=35, label=label
        )
        bar.outline.set_visible(False)
    else:
        ax.set_title(label)
    words = f"Heatmap of {title[0].lower()}{title[1:]}, {len(cells)} of {matrix.size} pairs measured: "
    if len(cells) == 1:
        words += f"{number(cells.iloc[0])} {unit} on node {cells.index[0][0]}, and no other node to compare with."
    else:
        (low_cpu, low_memory), (high_cpu, high_memory) = cells.idxmin(), cells.idxmax()
        words += (
            f"from {number(cells.min())} {unit} (CPUs of node {low_cpu}, memory of node {low_memory}) "
            f"to {number(cells.max())} {unit} (CPUs of node {high_cpu}, memory of node {high_memory})."
        )
    table = matrix.rename_axis(index="CPU node").reset_index()
    table.columns = ["CPU node", *(f"memory node {node} ({unit})" for node in nodes)]
    return Plot(
        name,
        title,
        figure,
        words,
        table,
        "One pair of nodes at a time; a dash marks a pair that could not be measured.",
    )
