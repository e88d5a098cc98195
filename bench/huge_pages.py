"""What huge pages under K and V change: rates on 4 KiB pages beside those on 2 MiB pages, as ratios of one run."""

from __future__ import annotations

from collections.abc import Callable

import common
import pandas as pd
import torch

from numa_lab.attention.shapes import AttentionShape
from numa_lab.placement import memory, page_location

SHAPES = {
    dtype: AttentionShape(1, 32, 8, 1, 131072, 128, dtype) for dtype in ("bfloat16", "float32")
}  # 512 MiB and 1 GiB of K and V


def measure(names: list[str], turns: int) -> tuple[pd.DataFrame, dict[bool, float]]:
    """Bytes per second with and without huge pages, by contender and dtype; and the shares of huge pages seen."""
    threads = torch.get_num_threads()
    blocks = {huge: memory.empty((1 << 30,), torch.uint8, huge_pages=huge) for huge in (True, False)}
    numbers = torch.randn(1 << 29).to(torch.bfloat16)
    work: dict[tuple[str, bool], Callable[[], float]] = {}
    for huge, block in blocks.items():
        block.view(torch.bfloat16).copy_(numbers)
        work["read", huge] = common.read_limit(block, threads)
        for dtype, shape in SHAPES.items():
            size = (2, shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
            key, value = block[: shape.kv_bytes].view(getattr(torch, dtype)).view(size)
            for name in names:
                seconds = common.seconds_of(common.contender(name, shape, [(key, value)], common.query_of(shape)), 1)
                work[f"{name}, {dtype}", huge] = lambda seconds=seconds, shape=shape: shape.kv_bytes / seconds()
    rates = pd.Series(common.medians(work, turns)).unstack()
    return rates, {huge: page_location.huge_page_share(block) for huge, block in blocks.items()}


def main() -> None:
    """Print a table per thread count."""
    options = common.parser(__doc__, turns=9, backends=["numba", "torch"]).parse_args()
    for threads in options.threads:
        rates, shares = common.in_own_process(threads, measure, options.backends, options.turns)
        table = (rates / 1e9).round(1).rename(columns={True: "huge, GB/s", False: "small, GB/s"})
        table["small / huge"] = (rates[False] / rates[True]).round(2)
        print(f"\n{threads} threads; share of huge pages seen: {shares[True]:.2f} and {shares[False]:.2f}")
        print(table.to_string(), flush=True)


if __name__ == "__main__":
    main()
