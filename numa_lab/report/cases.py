"""Which of the measured cases a figure shows: executions reduced to their medians, and the cases that stand for all."""

from __future__ import annotations

import pandas as pd

from numa_lab.measurement.comparison import CASE, execution_medians
from numa_lab.measurement.labels import AA_SUFFIX, is_local

KINDS = {"gqa": "GQA", "mha": "MHA", "mqa": "MQA"}
PHASES = ("decode", "prefill")
SIZES = ["batch", "q_len", "kv_len"]
_FACTS = ["cpu_nodes", "mem_nodes", "policy", "kv_bytes", "flops", "limit_bytes_per_s"]


def medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per execution and case: `seconds` as ``comparison.execution_medians`` has them, beside what figures need.

    `cold_seconds` is the first call. The halves of the A/A pair stay apart; cases without a steady sample are left out.
    """
    medians, keys = execution_medians(rows), ["execution_id", *CASE]
    if medians.empty:
        return medians.reindex(columns=[*medians.columns, *_FACTS, "cold_seconds"])
    facts = rows.groupby(keys)[_FACTS].first()
    cold = rows[rows["cold"]].groupby(keys)["seconds"].first().rename("cold_seconds")
    return medians.join(facts, on=keys).join(cold, on=keys)


def without_twin(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the second half of the A/A pair, which is there for the noise floor alone.

    The notebook of an execution of the twin holds nothing else, and then the twin stands for its binding.
    """
    twin = rows["label"].str.endswith(AA_SUFFIX)
    return rows.assign(label=rows["label"].str.removesuffix(AA_SUFFIX)) if twin.all() else rows[~twin]


def base(cases: pd.DataFrame) -> pd.DataFrame:
    """Of the medians those that stand for all: the sizes at which most kinds and dtypes were measured, all threads of a binding."""
    if cases.empty:
        return cases
    return whole_bindings(pd.concat([_most_measured(phase) for _, phase in cases.groupby("phase")]))


def whole_bindings(cases: pd.DataFrame) -> pd.DataFrame:
    """Rows with as many threads as their binding allows."""
    return cases[cases["threads"] == cases.groupby(["label", "phase"])["threads"].transform("max")]


def fastest_backend(cases: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the fastest backend for each kind, phase and dtype."""
    kind = ["phase", "attention", "dtype"]
    medians = cases.groupby([*kind, "backend"], as_index=False)["seconds"].median()
    fastest = medians.loc[medians.groupby(kind)["seconds"].idxmin(), [*kind, "backend"]]
    return cases.merge(fastest, on=[*kind, "backend"])


def _most_measured(phase: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one phase at the sizes that most combinations of kind, dtype and thread count share; the larger of equals."""
    variety = phase[[*SIZES, "attention", "dtype", "threads"]].drop_duplicates().value_counts(SIZES)
    size = variety[variety == variety.max()].index.max()
    return phase[(phase[SIZES] == list(size)).all(axis=1)]


def main_dtype(cases: pd.DataFrame) -> str:
    """Return the dtype in which most cases were measured; of equals the first in the alphabet: bfloat16."""
    variety = cases[list(CASE)].drop_duplicates().value_counts("dtype")
    return str(min(variety[variety == variety.max()].index))


def local(cases: pd.DataFrame) -> pd.DataFrame:
    """Rows of local bindings; where there are none, all."""
    chosen = cases[cases["label"].map(is_local).astype(bool)]
    return cases if chosen.empty else chosen


def case_name(attention: str, phase: str, dtype: str = "") -> str:
    """Return a case in a heading: "GQA decode, bfloat16"."""
    return f"{KINDS.get(attention, attention)} {phase}{f', {dtype}' if dtype else ''}"


def panels(cases: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the pairs of attention and phase that were measured, in the order in which figures show them."""
    measured = set(zip(cases["attention"], cases["phase"], strict=True))
    kinds = [*KINDS, *sorted({attention for attention, _ in measured} - set(KINDS))]
    return [(attention, phase) for attention in kinds for phase in PHASES if (attention, phase) in measured]
