"""All figures by name: each takes tidy rows (or the probes) and gives a ``Plot``."""

from numa_lab.report.figures_machine import bandwidth_heatmap, latency_heatmap
from numa_lab.report.figures_placement import overhead_heatmap, pages
from numa_lab.report.figures_scaling import batch_curve, kv_curve, limit_share, thread_scaling
from numa_lab.report.figures_trust import cold_against_steady, run_order, spread

__all__ = [
    "bandwidth_heatmap",
    "batch_curve",
    "cold_against_steady",
    "kv_curve",
    "latency_heatmap",
    "limit_share",
    "overhead_heatmap",
    "pages",
    "run_order",
    "spread",
    "thread_scaling",
]
