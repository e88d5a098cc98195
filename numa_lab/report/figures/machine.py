"""Figures of the machine's memory: what every node reads of every memory, and how far it is."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
from matplotlib.colors import Normalize

from numa_lab.bandwidth.node_bandwidths import Matrix, NodeProbes
from numa_lab.report.figures.placement import LARGEST_CELL_INCHES, heatmap
from numa_lab.report.plots import WIDTH_INCHES, Plot, canvas, drawn, listed, nothing, number


@drawn
def bandwidth_heatmap(probes: NodeProbes) -> Plot:
    """Read bandwidth of each CPU node from each memory node, one node reading at a time.

    Parameters
    ----------
    probes
        Those of ``node_probes.probe_nodes``, or of a run, as ``load_probes`` reads them.
    """
    bandwidths = _scaled(probes, probes.read_bytes_per_s, 1e-9)
    plot = _heatmap(bandwidths, "bandwidth", "Read bandwidth between nodes", "GB/s", "cividis")
    together = probes.all_nodes_bytes_per_s
    threads = listed(sorted({count for count in probes.threads if count}))
    note = f"One node reads at a time, with a thread on each of its physical cores ({threads})."
    if together:
        note += f" All nodes reading their own memory at once: {number(together / 1e9)} GB/s in all."
    return plot if plot.missing else replace(plot, note=note)


@drawn
def latency_heatmap(probes: NodeProbes) -> Plot:
    """Time of one load that waits for the load before it, from each CPU node to each memory node."""
    latencies = _scaled(probes, probes.latency_ns, 1)
    return _heatmap(latencies, "latency", "Memory latency between nodes", "ns", "cividis_r")


def _scaled(probes: NodeProbes, matrix: Matrix, scale: float) -> pd.DataFrame:
    """Return a matrix with a row for each CPU node and a column for each memory node, NaN where nothing was measured."""
    nodes = list(probes.nodes)
    return pd.DataFrame(list(matrix), index=nodes, columns=nodes, dtype=float) * scale


def _heatmap(matrix: pd.DataFrame, name: str, title: str, unit: str, cmap: str) -> Plot:
    nodes = list(matrix.index)
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
    alt = f"Heatmap of {title[0].lower()}{title[1:]}, {len(cells)} of {matrix.size} pairs measured: "
    if len(cells) == 1:
        alt += f"{number(cells.iloc[0])} {unit} on node {cells.index[0][0]}, and no other node to compare with."
    else:
        (low_cpu, low_memory), (high_cpu, high_memory) = cells.idxmin(), cells.idxmax()
        alt += (
            f"from {number(cells.min())} {unit} (CPUs of node {low_cpu}, memory of node {low_memory}) "
            f"to {number(cells.max())} {unit} (CPUs of node {high_cpu}, memory of node {high_memory})."
        )
    table = matrix.rename_axis(index="CPU node").reset_index()
    table.columns = ["CPU node", *(f"memory node {node} ({unit})" for node in nodes)]
    return Plot(
        name,
        title,
        figure,
        alt,
        table,
        "One pair of nodes at a time; a dash marks a pair that could not be measured.",
    )
