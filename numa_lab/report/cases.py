"""Which of the measured cases a figure shows: executions reduced to their medians, and the cases that stand for all."""

from __future__ import annotations

import pandas as pd

from numa_lab.binding import Binding
from numa_lab.results import CASE
from numa_lab.stats import AA_SUFFIX

KINDS = {"gqa": "GQA", "mha": "MHA", "mqa": "MQA"}
PHASES = ("decode", "prefill")
SIZES = ["batch", "q_len", "kv_len"]
_EXECUTION = ["execution_id", "order", "label", "cpu_nodes", "mem_nodes", "policy"]
_SHARED = ["kv_bytes", "flops", "limit_bytes_per_s"]


def medians(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per execution and case, with the median of its steady samples as `seconds` and the first as `cold_seconds`.

    Limits: the halves of the A/A pair stay apart. Cases without a steady sample are left out.
    """
    keys = [*_EXECUTION, *CASE]
    steady = rows[~rows["cold"]].groupby(keys, sort=False).agg(
        seconds=("seconds", "median"), **{name: (name, "first") for name in _SHARED}
    )  # fmt: skip
    cold = rows[rows["cold"]].groupby(keys, sort=False)["seconds"].first().rename("cold_seconds")
    return steady.join(cold).reset_index()


def without_twin(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the second half of the A/A pair, which is there for the noise floor alone."""
    return rows[~rows["label"].str.endswith(AA_SUFFIX)]


def base(cases: pd.DataFrame) -> pd.DataFrame:
    """Of the medians those that stand for all: the sizes at which most kinds and dtypes were measured, all threads of a binding."""
    if cases.empty:
        return cases
    return whole_bindings(pd.concat([_most_measured(phase) for _, phase in cases.groupby("phase")]))


def whole_bindings(cases: pd.DataFrame) -> pd.DataFrame:
    """Rows with as many threads as their binding allows."""
    return cases[cases["threads"] == cases.groupby(["label", "phase"])["threads"].transform("max")]


def fastest_backend(cases: pd.DataFrame) -> pd.DataFrame:
    """Where several backends were measured, the rows of the fastest for each kind, phase and dtype."""
    kind = ["phase", "attention", "dtype"]
    medians = cases.groupby([*kind, "backend"], as_index=False)["seconds"].median()
    fastest = medians.loc[medians.groupby(kind)["seconds"].idxmin(), [*kind, "backend"]]
    return cases.merge(fastest, on=[*kind, "backend"])


def _most_measured(phase: pd.DataFrame) -> pd.DataFrame:
    """The rows of one phase at the sizes that most combinations of kind, dtype and thread count share; the larger of equals."""
    variety = phase[[*SIZES, "attention", "dtype", "threads"]].drop_duplicates().value_counts(SIZES)
    size = variety[variety == variety.max()].index.max()
    return phase[(phase[SIZES] == list(size)).all(axis=1)]


def main_dtype(cases: pd.DataFrame) -> str:
    """The dtype in which most cases were measured; of equals the first in the alphabet: bfloat16."""
    variety = cases[list(CASE)].drop_duplicates().value_counts("dtype")
    return str(min(variety[variety == variety.max()].index))


def is_local(label: str) -> bool:
    """Whether a label, also that of the A/A twin, binds the memory to the one node of its CPUs."""
    return Binding.parse(label.removesuffix(AA_SUFFIX)).is_local


def local(cases: pd.DataFrame) -> pd.DataFrame:
    """Rows of local bindings; where there are none, all."""
    chosen = cases[cases["label"].map(is_local).astype(bool)]
    return cases if chosen.empty else chosen


def case_name(attention: str, phase: str, dtype: str = "") -> str:
    """A case in a heading: "GQA decode, bfloat16"."""
    return f"{KINDS.get(attention, attention)} {phase}{f', {dtype}' if dtype else ''}"


def panels(cases: pd.DataFrame) -> list[tuple[str, str]]:
    """The pairs of attention and phase that were measured, in the order in which figures show them."""
    found = set(zip(cases["attention"], cases["phase"], strict=True))
    kinds = [*KINDS, *sorted({attention for attention, _ in found} - set(KINDS))]
    return [(attention, phase) for attention in kinds for phase in PHASES if (attention, phase) in found]
