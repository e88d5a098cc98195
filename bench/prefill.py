"""Attention of a prompt, and of a piece of one behind a cache: what `auto` chooses beside torch's own and the other ways."""

from __future__ import annotations

import re

import common
import pandas as pd
import torch

from numa_lab.attention.gqa import choose_backend
from numa_lab.attention.shapes import AttentionShape


def cases() -> dict[str, tuple[AttentionShape, bool]]:
    """The shapes by name, and whether they are causal: a whole prompt is, a piece behind a cache sees all of it."""
    base = AttentionShape(1, 32, 8, 1, 1, 128, "bfloat16")
    named = {}
    for dtype in ("bfloat16", "float32", "float16"):
        for q_heads in (8, 32, 64):
            for q_len, kv_len in ((16, 16), (64, 64), (512, 512), (2048, 2048), (17, 4096), (64, 4096), (512, 4096)):
                causal = q_len == kv_len
                name = f"{dtype}, {q_heads}/8 heads, {'causal ' if causal else ''}{q_len} on {kv_len}"
                named[name] = base.replace(dtype=dtype, q_heads=q_heads, q_len=q_len, kv_len=kv_len), causal
    return named


def measure(wanted: dict[str, tuple[AttentionShape, bool]], names: list[str], turns: int) -> pd.DataFrame:
    """Seconds of each backend by case, in units of torch's own, and what `auto` chooses."""
    rows = {}
    for number, (case, (shape, causal)) in enumerate(wanted.items()):
        query = common.query_of(shape)
        key, value = torch.randn(2, shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim).to(query.dtype)
        chosen = choose_backend(query, key, value, is_causal=causal, enable_gqa=shape.group > 1)
        work = {
            name: common.seconds_of(common.contender(name, shape, [(key, value)], query, is_causal=causal), 1)
            for name in dict.fromkeys([*names, chosen])
        }
        done, left = (turns * len(work) * count for count in (number, len(wanted) - number - 1))
        seconds = pd.Series(common.medians(work, turns, done, left))
        ratios = (seconds / seconds["torch"]).round(2)
        rows[case] = {
            "torch, ms": round(1e3 * seconds["torch"], 2), **ratios, "auto": chosen, "auto / torch": ratios[chosen]
        }  # fmt: skip
    return pd.DataFrame(rows).T


def main() -> None:
    """Print a table per thread count: times in units of torch's own."""
    options = common.parser(__doc__, turns=5, backends=["torch", "torch-folded"]).parse_args()
    names = list(dict.fromkeys(["torch", *options.backends]))
    wanted = {name: case for name, case in cases().items() if re.search(options.cases, name)}
    for threads in options.threads:
        table = common.in_own_process(threads, measure, wanted, names, options.turns)
        print(f"\n{threads} threads, time in units of torch's own\n{table.to_string(na_rep='')}", flush=True)


if __name__ == "__main__":
    main()
