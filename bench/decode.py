"""How near decode attention comes to what memory and vector units allow: each backend, beside limits of the same run.

Every turn times each case, each backend and each limit once, in random order, so that all see the same machine; medians are
printed. The roofline is the smaller of two limits: the bytes per second that the same threads read, and those that one
multiply-add per query row and vector of K and of V would let through.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from numa_lab import openmp, reading, simd
from numa_lab.attention import decode
from numa_lab.attention.gqa import BACKENDS, gqa_attention
from numa_lab.attention.reference import attention as reference
from numa_lab.attention.shapes import AttentionShape
from numa_lab.report import plots
from numa_lab.sampling import KVPool

POOL_BYTES = 1 << 30
SAMPLE_SECONDS = 0.02  # of one timing, at least one call
LIMIT_BYTES = 128 << 20  # read in one timing
DRAWN = r"group"  # which cases the figure shows
LOOPS = 2_000_000  # of multiply-adds into every accumulator: some milliseconds


def shapes() -> dict[str, AttentionShape]:
    """The cases by name: one differs from the first in what its name says."""
    base = AttentionShape(1, 32, 8, 1, 32768, 128, "bfloat16")
    found = {
        "group 4": base,
        "group 1": base.replace(q_heads=8),
        "group 2": base.replace(q_heads=16),
        "group 7": base.replace(q_heads=28, kv_heads=4),
        "group 8": base.replace(q_heads=64),
        "group 32": base.replace(kv_heads=1),
        "batch 8, kv_len 4096": base.replace(batch=8, kv_len=4096),
        "kv_len 4096": base.replace(kv_len=4096),
        "kv_len 131072": base.replace(kv_len=131072, kv_heads=4, q_heads=16),
        **{f"head_dim {size}": base.replace(head_dim=size) for size in (64, 80, 96, 256)},
        "q_len 4": base.replace(q_len=4, q_heads=8),
    }
    more = {
        f"{name}, {dtype}": found[name].replace(dtype=dtype)
        for dtype in ("float32", "float16")
        for name in ("group 4", "group 1", "group 8", "batch 8, kv_len 4096")
    }
    return found | more


def vector_ceiling(threads: int) -> Callable[[], float]:
    """What measures bytes of float32 vectors that `threads` threads multiply and add per second, from registers."""
    vectors = simd.host()
    assert vectors is not None, "the decode kernel can't run here, so there is no ceiling of its instructions"
    type_ = simd.floats(vectors.lanes)

    @intrinsic
    def multiply_adds(_context: Any, loops: Any) -> Any:
        def generate(_c: Any, b: Any, _s: Any, arguments: Any) -> Any:
            cells = [cgutils.alloca_once_value(b, simd.constant(type_, i)) for i in range(vectors.accumulators)]
            for i, cell in enumerate(cells):
                b.store(simd.constant(type_, float(i)), cell)
            x = simd.splat(b, b.sitofp(simd.opaque(b, simd.I64(0)), simd.FLOAT), vectors.lanes)
            with cgutils.for_range(b, arguments[0]):
                for cell in cells:
                    b.store(simd.fma(b, x, x, b.load(cell, typ=type_)), cell)
            total = b.load(cells[0], typ=type_)
            for cell in cells[1:]:
                total = b.fadd(total, b.load(cell, typ=type_))
            return simd.sum_lanes(b, total)

        return types.float32(types.int64), generate

    @cfunc(types.void(types.CPointer(types.float32)))
    def body(out: Any) -> None:
        out[0] = multiply_adds(LOOPS)

    sink = np.zeros(1, np.float32)

    def measure() -> float:
        begin = time.perf_counter()
        openmp.run_on_team(body.address, sink.ctypes.data, threads)
        return threads * LOOPS * vectors.accumulators * vectors.bytes / (time.perf_counter() - begin)

    return measure


def read_limit(pool: KVPool, threads: int) -> Callable[[], float]:
    """What measures bytes that `threads` threads read per second, each time others."""
    parts = pool.block.split(LIMIT_BYTES)
    turn = iter(range(1 << 62))

    def measure() -> float:
        part = parts[next(turn) % len(parts)]
        begin = time.perf_counter()
        reading.read_once(part, threads)
        return part.nbytes / (time.perf_counter() - begin)

    return measure


def attention(shape: AttentionShape, pool: KVPool, backend: str) -> Callable[[], float]:
    """What measures bytes of K and V that a backend gets through per second, layer after layer."""
    layers = pool.layers(shape)
    query = torch.randn(shape.batch, shape.q_heads, shape.q_len, shape.head_dim).to(layers[0][0].dtype)
    turn = iter(range(1 << 62))

    def call() -> None:
        key, value = layers[next(turn) % len(layers)]
        BACKENDS[backend](query, key, value, None, 0.0, False, None, shape.group > 1)

    begin = time.perf_counter()
    call()
    call()
    calls = max(1, int(SAMPLE_SECONDS / (time.perf_counter() - begin) * 2))

    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return shape.kv_bytes * calls / (time.perf_counter() - begin)

    return measure


def error(shape: AttentionShape, backend: str) -> float:
    """Largest distance from float64, in units of the largest output; over one KV head and its query heads."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    query = torch.randn(1, shape.group, shape.q_len, shape.head_dim, generator=generator).to(dtype)
    key, value = torch.randn(2, 1, 1, shape.kv_len, shape.head_dim, generator=generator).to(dtype)
    expected, _ = reference(query, key, value, enable_gqa=True)
    output = gqa_attention(query, key, value, enable_gqa=shape.group > 1, backend=backend)
    return float((output - expected).abs().max() / expected.abs().max())


def measure(cases: dict[str, AttentionShape], backends: list[str], threads: int, turns: int) -> pd.DataFrame:
    """One row per case and backend: median bytes per second, the limits of the same run, and the error."""
    torch.set_num_threads(threads)
    pool = KVPool(POOL_BYTES)
    work: dict[tuple[str, str], Callable[[], float]] = {
        ("limit", "read"): read_limit(pool, threads),
        ("limit", "vector"): vector_ceiling(threads),
    }
    for name, shape in cases.items():
        work |= {(name, backend): attention(shape, pool, backend) for backend in backends}
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for _ in range(turns):
        for key in random.sample(list(work), len(work)):
            taken[key].append(work[key]())
    rates = {key: statistics.median(rates) for key, rates in taken.items()}
    read, vector = rates["limit", "read"], rates["limit", "vector"]
    vectors = simd.host()
    rows = []
    for name, shape in cases.items():
        pairs = shape.dtype == "bfloat16" and vectors is not None and vectors.pairs
        ceiling = vector / (shape.group * shape.q_len * (1 if shape.dtype == "float32" or pairs else 2))
        for backend in backends:
            rate = rates[name, backend]
            rows.append(
                {
                    "case": name, "threads": threads, "backend": backend, "dtype": shape.dtype,
                    "bytes_per_s": rate, "read_bytes_per_s": read, "ceiling_bytes_per_s": ceiling,
                    "share_of_limit": rate / read, "share_of_roofline": rate / min(read, ceiling),
                    "error": error(shape, backend),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def show(rows: pd.DataFrame) -> str:
    """The table as text: share of the read limit and of the roofline, GB/s, and error, for each backend."""
    shown = rows.assign(
        cell=[
            f"{row.share_of_limit:5.2f} {row.share_of_roofline:5.2f} {row.bytes_per_s / 1e9:6.1f} {row.error:8.1e}"
            for row in rows.itertuples()
        ]
    )
    return str(shown.pivot(index="case", columns="backend", values="cell").reindex(rows["case"].unique()).to_string())


@plots.drawn
def share_of_limit(rows: pd.DataFrame) -> plots.Plot:
    """Bars of the share of the read limit for some cases, with all threads that were measured."""
    rows = rows[(rows["threads"] == rows["threads"].max()) & rows["case"].str.match(DRAWN)]
    table = rows.pivot(index="case", columns="backend", values="share_of_limit").reindex(rows["case"].unique())
    figure, (ax,) = plots.canvas(height=0.14 * table.size + 1)
    height = 0.8 / len(table.columns)
    for i, backend in enumerate(table.columns):
        places = -np.arange(len(table)) - i * height
        ax.barh(places, 100 * table[backend], 0.9 * height, label=backend, color=plots.COLORS[i])
    ax.set_yticks(-np.arange(len(table)) - height * (len(table.columns) - 1) / 2, table.index)
    ax.set_xlabel("share of the memory read limit (%)")
    ax.margins(y=0.01)
    figure.legend(loc="outside lower center", ncols=len(table.columns))
    best = {backend: f"{100 * table[backend].max():.0f} %" for backend in table.columns}
    alt = f"Decode attention of {len(table)} cases; at best " + ", ".join(f"{b} {v}" for b, v in best.items())
    return plots.Plot("decode", "Share of the memory limit", figure, alt, table.reset_index(), "Medians of one run.")


def main() -> None:
    """Print a table per thread count; write all rows as Parquet, and a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--cases", default="", help="regular expression that a case's name has to match")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("figures/decode"), help="path without suffix")
    options = parser.parse_args()
    cases = {name: shape for name, shape in shapes().items() if re.search(options.cases, name)}
    if why := decode.unavailable():
        parser.error(f"the decode kernel can't run here: {why}")
    found = []
    for threads in options.threads:
        rows = measure(cases, options.backends, threads, options.turns)
        found.append(rows)
        read = rows["read_bytes_per_s"].iloc[0]
        print(
            f"\n{threads} threads, read limit {read / 1e9:.1f} GB/s; share of the limit, of the roofline, GB/s, error"
        )
        print(show(rows), flush=True)
    rows = pd.concat(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(options.out.with_suffix(".parquet"))
    if rows["case"].str.match(DRAWN).any():
        options.out.with_suffix(".png").write_bytes(share_of_limit(rows).png())


if __name__ == "__main__":
    main()
