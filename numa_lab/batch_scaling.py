"""A batch by the thread pool against one process: how throughput grows with the nodes that share the work.

Every arm is visited once per block in random order. The pool's inputs are scattered over the nodes that it may use, those
of the single process are ordinary tensors that its own threads made.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from numa_lab import memory
from numa_lab.attention.gqa import gqa_attention
from numa_lab.attention.shapes import AttentionShape
from numa_lab.errors import InvalidInput, UntrustedResult
from numa_lab.pool import NUMAThreadPool
from numa_lab.ratios import ratio_of_medians

ONE_PROCESS = "one process"
MIN_BLOCKS = 5


def measure(shape: AttentionShape, *, inputs_per_node: int = 4, seconds: float = 10.0) -> pd.DataFrame:
    """Compute a batch of separate inputs by one process and by the pool over 1, 2, ... all nodes.

    Parameters
    ----------
    shape
        Of each input.
    inputs_per_node
        The batch is so many times as large as there are nodes, for every arm alike.
    seconds
        For all visits together; there are at least five of each arm.

    Returns
    -------
    DataFrame with a row per visit: `arm`, `nodes` (how many; 0: one process, unbound), `block`, `sequences_per_s`, and
    `misplaced`, the inputs whose K did not lie on a node that the arm uses.
    """
    if inputs_per_node < 1:
        raise InvalidInput(f"inputs_per_node={inputs_per_node}: expected at least 1")
    dtype = getattr(torch, shape.dtype)
    cache = (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
    rows: list[dict[str, object]] = []
    with NUMAThreadPool() as pool:
        count = inputs_per_node * len(pool.nodes)
        queries = list(torch.randn(count, shape.batch, shape.q_heads, shape.q_len, shape.head_dim, dtype=dtype))
        plain = [[torch.randn(cache, dtype=dtype) for _ in range(count)] for _ in range(2)]
        arms = range(len(pool.nodes) + 1)
        end, block = time.perf_counter() + seconds, 0
        while block < MIN_BLOCKS or time.perf_counter() < end:
            for nodes in random.sample(arms, len(arms)):
                used = pool.nodes[:nodes] or pool.nodes
                keys, values = (pool.scatter(part, used) for part in plain) if nodes else plain
                once, taken = (_together if nodes else _one_by_one), []
                for _ in range(3):  # the first warms up
                    start = time.perf_counter()
                    once(pool, queries, keys, values)
                    taken.append(time.perf_counter() - start)
                rows.append({
                    "arm": f"pool, {nodes} node{'s' if nodes > 1 else ''}" if nodes else ONE_PROCESS,
                    "nodes": nodes, "block": block, "sequences_per_s": shape.batch * count / min(taken[1:]),
                    "misplaced": sum(memory.home(key) not in used for key in keys) if nodes else 0,
                })  # fmt: skip
            block += 1
    return pd.DataFrame(rows)


def _together(
    pool: NUMAThreadPool, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    pool.parallel_gqa_compute(queries, keys, values)


def _one_by_one(
    _pool: NUMAThreadPool, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    for query, key, value in zip(queries, keys, values, strict=True):
        gqa_attention(query, key, value, enable_gqa=True)


def sentence(rows: pd.DataFrame) -> str:
    """What came out, in words."""
    per_arm = {int(nodes): 1 / of["sequences_per_s"].to_numpy() for nodes, of in rows.groupby("nodes")}
    most = max(per_arm)
    told = []
    for name, slow, fast in [("one process", 0, most), ("one node of the pool", 1, most)]:
        if slow == fast:
            told.append("One node: there is no scaling over nodes to show.")
            continue
        ratio = ratio_of_medians(per_arm[slow], per_arm[fast])
        linear = f" (linear would be {most})" if slow else ""
        what = f"The pool over {most} node{'s' if most > 1 else ''} against {name}"
        told.append(f"{what}: {ratio.describe('the throughput')}{linear}.")
    return " ".join(told)


def require_placed(rows: pd.DataFrame) -> str:
    """Say that every input of the pool lay on the nodes that computed it.

    Raises
    ------
    UntrustedResult
        One did not.
    """
    if misplaced := int(rows["misplaced"].sum()):
        raise UntrustedResult(f"{misplaced} inputs did not lie on the nodes that computed them.")
    return f"{len(rows)} visits: every input of the pool lay on the nodes that computed it."
