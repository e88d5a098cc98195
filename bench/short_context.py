"""Microseconds of one decode step over a short context: ours beside the best other.

Layer after layer, as a model asks: between two steps its weights pass through the caches, so K and V come from memory, or from
the last cache where so many layers as are taken fit there.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import common
import pandas as pd

from numa_lab.attention.shapes import AttentionShape
from numa_lab.measurement.case_timing import KVPool

OURS = "numba"
POOL_BYTES = 256 << 20
MAX_LAYERS = 512


def cases() -> dict[str, AttentionShape]:
    """The shapes by name."""
    base = AttentionShape(1, 32, 8, 1, 1, 128, "bfloat16")
    return {
        f"{dtype}, {q_heads}/8 heads, kv_len {kv_len}": base.replace(dtype=dtype, q_heads=q_heads, kv_len=kv_len)
        for dtype in ("bfloat16", "float32")
        for q_heads in (8, 32)
        for kv_len in (1, 16, 128, 512, 2048)
    }


def measure(wanted: dict[str, AttentionShape], names: list[str], turns: int) -> pd.DataFrame:
    """Median seconds per call: a row for each case, a column for each contender that serves it."""
    pool = KVPool(POOL_BYTES)
    work: dict[tuple[str, str], Callable[[], float]] = {}
    refused: dict[tuple[str, str], list[str]] = {}
    steps = len(wanted) * len(names)
    for case, shape in wanted.items():
        layers = pool.layers(shape)[:MAX_LAYERS]
        for name in names:
            common.tell(len(work), steps * (turns + 1), f"makes ready {case}, {name}")
            try:
                call = common.contender(name, shape, layers, common.query_of(shape))
                work[case, name] = common.seconds_of(call, len(layers))
            except common.Unsupported as why:
                refused.setdefault((name, str(why)), []).append(case)
    common.print_refusals(refused)
    return pd.Series(common.medians(work, turns, before=len(work))).unstack().reindex(index=list(wanted), columns=names)


def main() -> None:
    """Print a table per thread count."""
    options = common.parser(__doc__, turns=15, backends=common.EVERYTHING).parse_args()
    wanted = {name: case for name, case in cases().items() if re.search(options.cases, name)}
    for threads in options.threads:
        seconds = common.in_own_process(threads, measure, wanted, options.backends, options.turns)
        others = seconds.drop(columns=OURS)
        table = (1e6 * seconds).round(1).assign(best=others.idxmin(axis=1))
        table["ours / best"] = (seconds[OURS] / others.min(axis=1)).round(2)
        print(f"\n{threads} threads, us per call\n{table.to_string(na_rep='')}", flush=True)


if __name__ == "__main__":
    main()
