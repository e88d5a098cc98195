"""The ranking of nodes as a table, for notebooks and for analysis."""

from __future__ import annotations

from dataclasses import asdict

import pandas as pd

from numa_lab.attention.shapes import AttentionShape
from numa_lab.nodes import optimal_node
from numa_lab.nodes.rankings import Ranking


def rank_nodes(
    shape: AttentionShape | str | None = None, *, seconds: float | None = None, refresh: bool = False
) -> pd.DataFrame:
    """Rank the effective nodes by the time of a decode step.

    The ranking is kept in the user's cache folder for this machine and this set of allowed CPUs and nodes, unless other
    load, nearly full memory or a receipt that contradicts was seen: those are of the moment. On a machine with one node
    nothing is measured. Where a sandbox lets no thread be pinned nothing is measured either, and a warning says so.

    Parameters
    ----------
    shape
        What is computed: a shape, the name of a preset, or None for a decode step of llama-3-8b with 1024 tokens.
    seconds
        Time for all visits together; by default it takes about a second for each node.
    refresh
        Measure although a ranking is kept.

    Returns
    -------
    DataFrame, the best node first; index `node`, and the columns

    - `median_seconds`: seconds per call, the median of the visits' medians; NaN where nothing was measured
    - `ratio`, `low`, `high`: time relative to the best node's, and its interval
    - `tie_group`: 1 for the nodes that were not shown to be slower than the best by 2 % or more, 2 for the others
    - `cause`: why a node may be slow, as far as it is seen: other load, memory nearly full, fewer cores
    - `visits`: how many there were
    - `receipt`: what contradicts the claim that threads and pages were there; empty where nothing does

    and `attrs["noise_floor"]`, a share: 0.01 stands for 1 %.

    Raises
    ------
    InvalidInput
        The preset is unknown, or the time is not positive.
    NodeUnavailable
        This process may use no node's CPUs and memory together, or no node has room for the tensors.
    """
    return table(optimal_node.rank(shape, seconds=seconds, refresh=refresh))


def table(ranking: Ranking) -> pd.DataFrame:
    """Make of a ranking the DataFrame that ``rank_nodes`` returns."""
    frame = pd.DataFrame([asdict(row) for row in ranking.nodes]).set_index("node")
    frame.attrs["noise_floor"] = ranking.noise_floor
    return frame
