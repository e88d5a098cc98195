"""Comparison of executions from tidy rows: see ``numa_lab.measurement.pairwise`` for what is claimed, and when.

Samples inside one execution are nested: they are reduced to their median first, and never pooled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from numa_lab.measurement import pairwise
from numa_lab.measurement.labels import AA_SUFFIX, is_local
from numa_lab.measurement.pairwise import Comparisons
from numa_lab.measurement.significance import spread_of_medians

CASE = (  # what tells one measured case from another
    "attention", "phase", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "dtype", "backend", "threads",
)  # fmt: skip


def execution_medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Reduce tidy rows to one row per execution and case, whose `seconds` is the median of its steady samples."""
    keys = ["execution_id", "block", "order", "label", *CASE]
    return rows[~rows["cold"]].groupby(keys, as_index=False, sort=False)["seconds"].median()


def _cases(medians: pd.DataFrame) -> Iterator[tuple[dict[str, Any], dict[str, NDArray[np.float64]]]]:
    """Return each case of ``execution_medians``: the values of ``CASE``, and the seconds of each label's executions."""
    for values, case in medians.groupby(list(CASE), sort=False):
        samples = {str(label): group["seconds"].to_numpy() for label, group in case.groupby("label")}
        yield {name: _plain(value) for name, value in zip(CASE, values, strict=True)}, samples


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def noise_floor(medians: pd.DataFrame) -> float:
    """``numa_lab.measurement.pairwise.noise_floor`` over the cases of ``execution_medians``."""
    return pairwise.noise_floor(samples for _, samples in _cases(medians))


def compare(rows: pd.DataFrame) -> Comparisons:
    """Compare the bindings of a run in every case; see ``numa_lab.measurement.pairwise.compare``.

    Parameters
    ----------
    rows
        Tidy rows, as ``numa_lab.load_run`` gives them.

    Returns
    -------
    All comparisons, by case and then by label, and the noise floor.
    """
    return pairwise.compare(_cases(execution_medians(rows)))


def spread(rows: pd.DataFrame) -> pd.DataFrame:
    """Return how much slower the slowest local binding is than the fastest, for each case of tidy rows.

    The largest of several medians over the smallest is above 1 by chance alone, so `by_chance` gives the spread that is
    to be expected where all bindings are equal: the median over shuffled labels.

    Returns
    -------
    DataFrame with the columns of ``CASE``, the labels `best` and `worst`, and the shares `spread`, `low` and `high` (its
    interval) and `by_chance`: 0.17 stands for 17 %. The last three are NaN where there are too few executions, and all
    four where there is a single local binding.
    """
    medians = execution_medians(rows)
    medians = medians[~medians["label"].str.endswith(AA_SUFFIX) & medians["label"].map(is_local).astype(bool)]
    spreads = []
    for case, samples in _cases(medians):
        centre = {label: float(np.median(seconds)) for label, seconds in samples.items()}
        best, worst = min(centre, key=centre.__getitem__), max(centre, key=centre.__getitem__)
        measured = centre[worst] / centre[best] - 1 if len(samples) > 1 else math.nan
        low, high, chance = spread_of_medians(list(samples.values())) if len(samples) > 1 else (math.nan,) * 3
        spreads.append((*case.values(), best, worst, measured, low, high, chance))
    return pd.DataFrame(spreads, columns=[*CASE, "best", "worst", "spread", "low", "high", "by_chance"])


def run_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Put each execution of tidy rows in run order, beside how its time compares with the other executions of its label.

    Returns
    -------
    DataFrame with the columns `order`, `execution_id`, `label` and `relative`: the execution's time over the median of its
    label's executions, as the median over its cases.
    """
    medians = execution_medians(rows)
    usual = medians.groupby([*CASE, "label"], sort=False)["seconds"].transform("median")
    relative = medians.assign(relative=medians["seconds"] / usual)
    return (
        relative.groupby(["order", "execution_id", "label"], as_index=False)["relative"].median().sort_values("order")
    )


def lag1_autocorrelation(values: Sequence[float]) -> float:
    """Correlation of each value with the one before it, between -1 and 1: far from 0 where the machine drifts.

    It is NaN for fewer than 3 values, and where all are equal.
    """
    series = np.asarray(values, float)
    if len(series) < 3 or np.ptp(series[:-1]) == 0 or np.ptp(series[1:]) == 0:
        return math.nan
    return float(np.corrcoef(series[:-1], series[1:])[0, 1])
