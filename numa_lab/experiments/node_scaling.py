"""How work grows with the nodes that share it: a batch of sequences by the thread pool, and one long sequence by shards.

The long sequence has as many tokens as the batch in all, so that both read the same bytes. Each is computed by one process
without any placement, and by one node, two and so on; these while the other nodes rest, and while they read their own memory as
fast as they can. Every arm is visited once per block in random order.

Beside it stands what bandwidths let expect (``numa_lab.bandwidth.roofline``). Under load the nodes at work get their part of what all nodes
together were measured to read.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from numa_lab.attention.gqa import gqa_attention
from numa_lab.attention.shapes import AttentionShape
from numa_lab.bandwidth.node_bandwidths import NodeBandwidths
from numa_lab.bandwidth.roofline import Roofline
from numa_lab.errors import InvalidInput, UntrustedResult
from numa_lab.experiments.node_load import NodeLoad
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement import timing
from numa_lab.measurement.blocks import randomized_blocks
from numa_lab.measurement.significance import ratio_of_medians
from numa_lab.nodes.kv_cache import NodeShardedKVCache
from numa_lab.nodes.thread_pool import NUMAThreadPool
from numa_lab.placement import page_location
from numa_lab.placement.receipt import Receipt

BATCH, SEQUENCE = "a batch", "one sequence"
ISOLATED, LOADED = "others at rest", "others under load"
ONE_PROCESS = 0  # in place of a number of nodes
MIN_BLOCKS = 5
VISIT_SECONDS = 0.05
LEAST_CALLS = 3


@dataclass(frozen=True)
class Arm:
    """One way to compute the work."""

    work: str
    nodes: int  # how many share it; 0: one process without placement
    load: str = ISOLATED


@dataclass(frozen=True)
class Visit:
    """An arm, set up: what is called, and what then says where it ran and lay."""

    call: Callable[[], object]
    contradictions: Callable[[], list[str]] = field(default=list)
    tokens: dict[int, int] = field(default_factory=dict)  # of each node


def measure(
    shape: AttentionShape, *, inputs_per_node: int = 4, seconds: float = 20.0, measured: NodeBandwidths | None = None
) -> pd.DataFrame:
    """Compute a batch of separate inputs, and one sequence of all their tokens, on 1, 2, ... all nodes.

    Parameters
    ----------
    shape
        Of each input of the batch, with one new token.
    inputs_per_node
        The batch is so many times as large as there are nodes, for every arm alike.
    seconds
        For all visits together; there are at least five of each arm.
    measured
        Bandwidths between the nodes, for a prediction.

    Returns
    -------
    DataFrame with a row per visit: `work`, `nodes` (0: one process, unbound), `load`, `block`, `seconds` (median of the calls),
    `bytes_per_s` of K and V, `predicted` (seconds; NaN where nothing is), and `wrong`, in which way threads or pages were not
    where they should be; empty where they were.

    Raises
    ------
    InvalidInput
        `inputs_per_node` or `seconds` is not positive, or the shape is no decode step of one sequence.
    NodeUnavailable
        A node has too little free memory.
    """
    timing.require_seconds(seconds)
    if inputs_per_node < 1:
        raise InvalidInput(f"inputs_per_node={inputs_per_node}: expected at least 1")
    if shape.phase != "decode" or shape.batch != 1:
        raise InvalidInput(
            f"batch={shape.batch}, q_len={shape.q_len}: expected 1 and 1, since inputs are counted apart"
        )
    topology = read_topology()
    all_nodes = topology.effective_nodes
    count = inputs_per_node * len(all_nodes)
    rows: list[dict[str, object]] = []
    with NUMAThreadPool() as pool, NodeLoad(topology, all_nodes) as load:
        work = _Work(shape, count, pool, topology)
        for block, arm in randomized_blocks(arms_of(len(all_nodes)), MIN_BLOCKS, seconds=seconds):
            used = all_nodes[: arm.nodes]
            visit = work.visit(arm.work, used)
            with load.on([node for node in all_nodes if node not in used] if arm.load == LOADED else []):
                taken = _seconds(visit.call)
                wrong = visit.contradictions()
            rows.append({
                "work": arm.work, "nodes": arm.nodes, "load": arm.load, "block": block, "seconds": taken,
                "bytes_per_s": count * shape.kv_bytes / taken,
                "predicted": work.predict(arm, visit.tokens, measured, len(all_nodes)), "wrong": " ".join(wrong),
            })  # fmt: skip
            del visit  # its memory goes before the next one takes some
    return pd.DataFrame(rows)


def arms_of(nodes: int) -> list[Arm]:
    """Return the arms on a machine of so many nodes: every number of them up to four, then powers of two, and all."""
    counts = sorted({*range(1, min(nodes, 4) + 1), *(1 << i for i in range(nodes.bit_length())), nodes})
    loads = {count: [ISOLATED, LOADED] if 0 < count < nodes else [ISOLATED] for count in (ONE_PROCESS, *counts)}
    return [Arm(work, count, load) for work in (BATCH, SEQUENCE) for count in loads for load in loads[count]]


def _seconds(call: Callable[[], object]) -> float:
    call()
    taken: list[float] = []
    while len(taken) < LEAST_CALLS or sum(taken) < VISIT_SECONDS:
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


class _Work:
    """The numbers that all arms compute with, and how each arm places them."""

    def __init__(self, shape: AttentionShape, count: int, pool: NUMAThreadPool, topology: Topology) -> None:
        self._shape, self._count, self._pool, self._topology = shape, count, pool, topology
        self._dtype = getattr(torch, shape.dtype)
        generator = torch.Generator().manual_seed(0)
        size = (count, 1, shape.kv_heads, shape.kv_len, shape.head_dim)
        self._queries = list(
            torch.randn(count, 1, shape.q_heads, 1, shape.head_dim, generator=generator).to(self._dtype)
        )
        self._keys, self._values = (list(torch.randn(size, generator=generator).to(self._dtype)) for _ in range(2))

    def visit(self, work: str, nodes: Sequence[int]) -> Visit:
        """Set an arm up on some nodes; on none for one process without placement."""
        if work == BATCH:
            return self._batch(nodes) if nodes else Visit(self._one_by_one)
        return self._sequence(nodes) if nodes else self._plain_sequence()

    def _one_by_one(self) -> None:
        for query, key, value in zip(self._queries, self._keys, self._values, strict=True):
            gqa_attention(query, key, value, enable_gqa=True)

    def _batch(self, nodes: Sequence[int]) -> Visit:
        keys, values = (self._pool.scatter(part, nodes) for part in (self._keys, self._values))

        def contradictions() -> list[str]:
            lie = {node: [page_location.home(key) for key in keys[at :: len(nodes)]] for at, node in enumerate(nodes)}
            misplaced = [
                f"an input for node {n} lies on node {home}." for n, homes in lie.items() for home in homes if home != n
            ]
            return misplaced + self._against(self._pool.receipts(), nodes)

        tokens = {node: len(keys[at :: len(nodes)]) for at, node in enumerate(nodes)}
        return Visit(lambda: self._pool.parallel_gqa_compute(self._queries, keys, values), contradictions, tokens)

    def _plain_sequence(self) -> Visit:
        query = self._queries[0]
        key, value = (torch.cat(part, dim=2) for part in (self._keys, self._values))
        return Visit(lambda: gqa_attention(query, key, value, enable_gqa=True))

    def _sequence(self, nodes: Sequence[int]) -> Visit:
        shape, query = self._shape, self._queries[0]
        tokens = self._count * shape.kv_len
        cache = NodeShardedKVCache(1, shape.kv_heads, shape.head_dim, capacity=tokens, dtype=self._dtype, nodes=nodes)
        for key, value in zip(self._keys, self._values, strict=True):
            cache.append(key, value)
        return Visit(lambda: cache.attend(query), lambda: self._against(cache.receipts(), nodes), cache.tokens_per_node)

    def _against(self, receipts: dict[int, Receipt], nodes: Sequence[int]) -> list[str]:
        """Return what receipts of nodes say against threads and pages there."""
        contradictions = []
        for node in nodes:
            contradictions += receipts[node].contradictions(self._topology.cpus_of([node]), [node])
            for name, pages in receipts[node].pages_after.items():
                contradictions += [
                    f"{count} pages of {name} lie on node {home} instead of {node}."
                    for home, count in pages.items()
                    if home != node
                ]
        return contradictions

    def predict(self, arm: Arm, shares: dict[int, int], measured: NodeBandwidths | None, all_nodes: int) -> float:
        """Return the seconds that bandwidths let expect for an arm; NaN where nothing is known, or nothing is placed."""
        if not measured or not shares:
            return math.nan
        if arm.work == BATCH:
            shape, kind = self._shape.replace(batch=self._count), "instances"
        else:
            shape, kind = self._shape.replace(kv_len=self._count * self._shape.kv_len), "sharded"
        try:
            alone = Roofline(measured, self._topology.node_sockets).split(shape, kind, shares).seconds
        except InvalidInput:  # these nodes were not measured
            return math.nan
        together = measured.all_nodes_bytes_per_s
        if arm.load == ISOLATED or not together:
            return alone
        return max(alone, shape.kv_bytes / (together * arm.nodes / all_nodes))


def sentence(rows: pd.DataFrame) -> str:
    """Return what came out, as sentences."""
    most = int(rows["nodes"].max())
    sentences = [] if most > 1 else ["One node: there is no scaling over nodes to show."]
    for work, visits in rows.groupby("work"):
        taken = {key: part["seconds"].to_numpy() for key, part in visits.groupby(["nodes", "load"])}
        everyone = f"{most} nodes" if most > 1 else "1 node"

        def ratio(slow: tuple[int, str], fast: tuple[int, str], taken: dict[Any, Any] = taken) -> str:
            return ratio_of_medians(taken[slow], taken[fast]).describe("the speed")

        sentences.append(
            f"{str(work).capitalize()} on {everyone} against one process: {ratio((ONE_PROCESS, ISOLATED), (most, ISOLATED))}."
        )
        if most > 1:
            sentences.append(
                f"On {everyone} against one of them: {ratio((1, ISOLATED), (most, ISOLATED))} (linear would be {most})."
            )
            sentences.append(f"One node while the others are under load: {ratio((1, ISOLATED), (1, LOADED))}.")
    return " ".join(sentences)


def prediction_sentence(rows: pd.DataFrame) -> str:
    """Return a sentence on how far what was measured lies from what bandwidths let expect."""
    placed = rows[rows["predicted"].notna()]
    if placed.empty:
        return "Nothing was predicted."
    ratios = placed.groupby(["work", "nodes", "load"])[["seconds", "predicted"]].median()
    low, middle, high = (ratios["seconds"] / ratios["predicted"]).quantile([0.0, 0.5, 1.0])
    return f"Over {len(ratios)} arms, measured times are {low:.2f} to {high:.2f} of those that bandwidths let expect (median {middle:.2f})."


def require_placed(rows: pd.DataFrame) -> str:
    """Say that all threads and pages were where they should be.

    Raises
    ------
    UntrustedResult
        Some were not.
    """
    if wrong := [*dict.fromkeys(rows.loc[rows["wrong"] != "", "wrong"])]:
        raise UntrustedResult(f"{(rows['wrong'] != '').sum()} of {len(rows)} visits can't be trusted. {wrong[0]}")
    placed = (rows["nodes"] > 0).sum()
    return f"{placed} visits: every thread ran, and every page of K and V lay, on the nodes that the arm names."
