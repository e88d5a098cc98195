"""The figures that notebooks and the report show; each takes tidy rows (or probes) and returns a ``Plot``.

A figure never fails for what was not measured: it then says what is missing, and its table is empty.
"""

from __future__ import annotations

import pandas as pd

from numa_lab.bandwidth.node_bandwidths import NodeProbes
from numa_lab.report.figures.backends import overhead_by_backend
from numa_lab.report.figures.certainty import cold_against_steady, run_order, spread
from numa_lab.report.figures.experiments import decode_runs, node_scaling, ranking
from numa_lab.report.figures.machine import bandwidth_heatmap, latency_heatmap
from numa_lab.report.figures.placement import overhead_heatmap, pages
from numa_lab.report.figures.prediction import against_prediction, prediction, prediction_sentence
from numa_lab.report.figures.scaling import batch_curve, kv_curve, limit_share, thread_scaling
from numa_lab.report.plots import Plot

__all__ = [
    "Plot",
    "against_prediction",
    "bandwidth_heatmap",
    "batch_curve",
    "cold_against_steady",
    "decode_runs",
    "kv_curve",
    "latency_heatmap",
    "limit_share",
    "machine_figures",
    "node_scaling",
    "overhead_by_backend",
    "overhead_heatmap",
    "pages",
    "prediction",
    "prediction_sentence",
    "ranking",
    "run_figures",
    "run_order",
    "spread",
    "thread_scaling",
]


def run_figures(rows: pd.DataFrame, predicted: pd.DataFrame) -> list[Plot]:
    """Return all figures of a run, in the order of the report; `predicted` is what ``results.load_prediction`` gives."""
    drawn = (
        overhead_heatmap, overhead_by_backend, spread, limit_share, thread_scaling, kv_curve, batch_curve, pages, run_order,
        cold_against_steady,
    )  # fmt: skip
    plots = [draw(rows) for draw in drawn]
    return [*plots[:3], prediction(rows, predicted), *plots[3:]]


def machine_figures(probes: NodeProbes) -> list[Plot]:
    """Return the figures of the machine's memory."""
    return [bandwidth_heatmap(probes), latency_heatmap(probes)]
