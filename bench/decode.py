"""How near decode attention comes to what memory and vector units allow: each backend and peer, beside limits of the same run.

The roofline is the smaller of two limits: the bytes per second that the same threads read, and those that one multiply-add per
query row and vector of K and of V would let through. At its defaults it measures what the README's figure shows, in less than five
minutes.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import pandas as pd
import torch

from numa_lab.attention.shapes import AttentionShape
from numa_lab.measurement.case_timing import KVPool
from numa_lab.report import plots

POOL_BYTES = 1 << 30
DRAWN = r"group"  # which cases the figure shows
SECONDS = 270.0  # for all, but at --full
READY = 0.6  # of them, for making contenders ready
SLOW_TO_MAKE = ("flex",)  # by a C++ compiler, case by case


@dataclass(frozen=True)
class Case:
    """A shape, and whether K and V lie as ``[batch, kv_len, kv_heads, head_dim]``."""

    shape: AttentionShape
    strided: bool = False


def cases() -> dict[str, Case]:
    """The cases by name: one differs from the first in what its name says."""
    base = AttentionShape(1, 32, 8, 1, 32768, 128, "bfloat16")
    named = {
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
        "q_len 4, group 1": base.replace(q_len=4, q_heads=8),
        "q_len 16, group 4": base.replace(q_len=16),
    }
    more = {
        f"{name}, {dtype}": named[name].replace(dtype=dtype)
        for dtype in ("float32", "float16")
        for name in ("group 4", "group 1", "group 7", "group 8", "group 32", "batch 8, kv_len 4096", "head_dim 80")
    }
    strided = {f"{name}, [B, S, H, D]": Case(named[name], strided=True) for name in ("group 4", "batch 8, kv_len 4096")}
    return {name: Case(shape) for name, shape in (named | more).items()} | strided


def rate(case: Case, pool: KVPool, name: str) -> Callable[[], float]:
    """What measures bytes of K and V that a contender gets through per second, layer after layer."""
    shape = case.shape
    layers = pool.layers(shape)
    if case.strided:
        size = (shape.batch, shape.kv_len, shape.kv_heads, shape.head_dim)
        layers = [(key.view(size).transpose(1, 2), value.view(size).transpose(1, 2)) for key, value in layers]
    seconds = common.seconds_of(common.contender(name, shape, layers, common.query_of(shape)), len(layers))
    return lambda: shape.kv_bytes / seconds()


def measure(wanted: dict[str, Case], names: list[str], turns: int, until: float) -> pd.DataFrame:
    """One row per case and contender: median bytes per second, the limits of the same run, and the error.

    It ends at `until` of ``time.monotonic``, which is the same in all processes: contenders that are not ready when READY of
    the time is over are left out, and so are turns that would take longer.
    """
    ready = time.monotonic() + READY * (until - time.monotonic())
    threads = torch.get_num_threads()
    pool = KVPool(POOL_BYTES)
    work: dict[tuple[str, str], Callable[[], float]] = {
        ("limit", "read"): common.read_limit(pool.buffer, threads),
        ("limit", "vector"): common.vector_ceiling(threads),
    }
    errors: dict[tuple[str, str], float] = {}
    refused: dict[tuple[str, str], list[str]] = {}
    pairs = [(case_name, name) for name in sorted(names, key=SLOW_TO_MAKE.count) for case_name in wanted]
    for done, (case_name, name) in enumerate(pairs):
        common.tell(done, (turns + 1) * len(pairs), f"makes ready {case_name}, {name}")
        try:
            if errors and time.monotonic() > ready:
                raise common.Unsupported("no time for it; --full takes as long as all needs")
            error = common.error(name, wanted[case_name].shape)
            work[case_name, name] = rate(wanted[case_name], pool, name)
            errors[case_name, name] = error
        except common.Unsupported as why:
            refused.setdefault((name, str(why)), []).append(case_name)
    common.print_refusals(refused)
    samples = common.samples(work, turns, before=len(pairs), until=until)
    rates = {key: taken.median for key, taken in samples.items()}
    read, vector = rates["limit", "read"], rates["limit", "vector"]
    rows = []
    for case_name, name in errors:
        case, bytes_per_s = wanted[case_name], rates[case_name, name]
        ceiling = vector / common.multiply_adds_per_vector(case.shape)
        rows.append(
            {
                "case": case_name, "threads": threads, "backend": name, "dtype": case.shape.dtype,
                "bytes_per_s": bytes_per_s, "read_bytes_per_s": read, "ceiling_bytes_per_s": ceiling,
                "share_of_limit": bytes_per_s / read, "share_of_roofline": bytes_per_s / min(read, ceiling),
                "error": errors[case_name, name], "turns": len(samples[case_name, name]),
                "disturbed": sum(samples[case_name, name].disturbed), "read_disturbed": sum(samples["limit", "read"].disturbed),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def show(rows: pd.DataFrame) -> str:
    """The table as text: share of the read limit and of the roofline, GB/s, error, and samples left out, for each contender."""
    shown = rows.assign(
        cell=[
            f"{row.share_of_limit:5.2f} {row.share_of_roofline:5.2f} {row.bytes_per_s / 1e9:6.1f} {row.error:8.1e} "
            + f"{row.disturbed if row.disturbed < row.turns else 'none':>4}"
            for row in rows.itertuples()
        ]
    )
    table = shown.pivot(index="case", columns="backend", values="cell").reindex(
        index=rows["case"].unique(), columns=rows["backend"].unique()
    )
    return str(table.fillna("").to_string())


def left_out(rows: pd.DataFrame) -> str:
    """How many samples were disturbed because others had a core, those of the limit and those of contenders."""
    limit, turns = rows["read_disturbed"].iloc[0], rows["turns"].iloc[0]
    said = f"others had a core in {rows['disturbed'].sum()} of {rows['turns'].sum()} samples, and in {limit} of {turns} of the limit"
    return said + (", which count because there is no other" if limit == turns else ", which are left out")


@plots.drawn
def share_of_limit(rows: pd.DataFrame) -> plots.Plot:
    """The share of the read limit for some cases, a mark for each contender, with all threads that were measured."""
    rows = rows[(rows["threads"] == rows["threads"].max()) & rows["case"].str.match(DRAWN)]
    table = rows.pivot(index="case", columns="backend", values="share_of_limit").reindex(
        index=rows["case"].unique(), columns=rows["backend"].unique()
    )
    figure, (ax,) = plots.canvas(height=0.28 * len(table) + 1.2)
    places = -np.arange(len(table))
    ax.hlines(places, 0, 100, color="0.9", linewidth=1, zorder=0)
    for i, backend in enumerate(table.columns):
        ax.scatter(100 * table[backend], places, 30, plots.COLORS[i], marker=plots.MARKERS[i], label=backend)
    ax.set_yticks(places, table.index)
    ax.set_xlabel("share of the memory read limit (%)")
    ax.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=3)
    best = {backend: f"{100 * table[backend].max():.0f} %" for backend in table.columns}
    alt = f"Decode attention of {len(table)} cases; at best " + ", ".join(f"{b} {v}" for b, v in best.items())
    return plots.Plot("decode", "Share of the memory limit", figure, alt, table.reset_index(), "Medians of one run.")


def main() -> None:
    """Print a table per thread count; write all rows as Parquet, and a figure."""
    begin = time.monotonic()
    parser = common.parser(__doc__, turns=9, backends=common.EVERYTHING)
    parser.add_argument("--out", type=Path, default=Path("figures/decode"), help="path without suffix")
    parser.add_argument(
        "--full", action="store_true",
        help="all cases, with one thread too, and all turns, however long that takes; cases and threads that are named count",
    )  # fmt: skip
    parser.set_defaults(cases=None, threads=None)
    options = parser.parse_args()
    pattern = options.cases or ("" if options.full else f"^{DRAWN}")
    wanted = {name: case for name, case in cases().items() if re.search(pattern, name)}
    cores = len(common.cores_here())
    counts = options.threads or (sorted({1, cores}) if options.full else [cores])
    tables = []
    for number, threads in enumerate(counts):
        now = time.monotonic()
        seconds = math.inf if options.full else (begin + SECONDS - now) / (len(counts) - number)
        arguments = wanted, options.backends, options.turns, now + seconds
        rows = common.in_own_process(threads, measure, *arguments, seconds=seconds)
        tables.append(rows)
        read, turns = rows["read_bytes_per_s"].iloc[0] / 1e9, rows["turns"].iloc[0]
        print(
            f"\n{threads} threads, read limit {read:.1f} GB/s, medians of {turns} turns; {left_out(rows)}\n"
            "share of the limit, of the roofline, GB/s, error, samples left out (none: all are disturbed)"
        )
        print(show(rows), flush=True)
    rows = pd.concat(tables)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(options.out.with_suffix(".parquet"))
    if rows["case"].str.match(DRAWN).any():
        options.out.with_suffix(".png").write_bytes(share_of_limit(rows).png())


if __name__ == "__main__":
    main()
