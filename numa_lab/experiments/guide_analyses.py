"""The source guide's four analyses and its before-and-after, measured as this project measures.

The guide ran each configuration three times in fixed order. Here every configuration is visited in random order within
blocks, on memory bound to its node, by threads pinned to theirs, and each visit has its receipt.

Limits: the visits are those of one process; `numa-lab sweep` starts a process for each and is the stronger evidence.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from numa_lab.attention.gqa import gqa_attention
from numa_lab.attention.shapes import AttentionShape, fit, preset
from numa_lab.machine import libnuma
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement import comparison, timing
from numa_lab.measurement.blocks import randomized_blocks
from numa_lab.measurement.case_timing import KVPool, pool_bytes, sample_case
from numa_lab.measurement.machine_facts import describe_machine
from numa_lab.measurement.receipts import contradictions
from numa_lab.measurement.significance import Ratio, ratio_of_medians
from numa_lab.measurement.workloads import MEMORY_SHARE, Case
from numa_lab.nodes.one_node import NUMAOptimizedGQA
from numa_lab.placement import pinned_team
from numa_lab.placement.binding import Binding, MemPolicy, effective

SCHEMA_VERSION = 1
BLOCKS = 5
FEWEST_BLOCKS = 3  # with two, no spread can be told from chance
SMALL_BATCH = 8  # sequences where the guide's 512 are not asked for

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cell:
    """One configuration: which analysis it belongs to, what is computed, and where."""

    analysis: str
    compute_node: int
    memory_node: int
    case: Case

    @property
    def label(self) -> str:
        """As bindings are written: c0m1."""
        return f"c{self.compute_node}m{self.memory_node}"


def guide_shape(topology: Topology, *, full: bool = False) -> tuple[AttentionShape, str]:
    """Return the guide's attention, scaled to the memory of the smallest node, and a message that says how; '' if it was not.

    A batch of 512 where `full` is asked for, else of 8.
    """
    shape = preset("guide") if full else preset("guide", batch=SMALL_BATCH)
    nodes = topology.effective_nodes
    room = min((topology.available_bytes([node], len(nodes)) for node in nodes), default=0)
    # Standard attention has as many KV heads as query heads, and every node's memory is in use at once.
    return fit(shape, int(MEMORY_SHARE * room / shape.group))


def cells(topology: Topology, shape: AttentionShape) -> list[Cell]:
    """Return all configurations of the four analyses on this machine.

    Raises
    ------
    NodeUnavailable
        No node has both CPUs and memory that this process may use.
    """
    nodes = topology.require_effective_nodes()
    cores = {node: len(topology.cpus_for([node])) for node in nodes}
    standard = shape.replace(kv_heads=shape.q_heads)
    cells = []
    for node in nodes:
        cells += [Cell("memory_allocation", node, node, Case(part, cores[node])) for part in (shape, standard)]
        batches = sorted({max(1, shape.batch // divisor) for divisor in (1, 2, 4, 8)})
        cells += [Cell("batch_sizes", node, node, Case(shape.replace(batch=batch), cores[node])) for batch in batches]
        threads = sorted({1, max(1, cores[node] // 2), cores[node]})
        cells += [Cell("thread_affinity", node, node, Case(shape, count)) for count in threads]
        cells += [Cell("cross_numa", node, memory, Case(shape, cores[node])) for memory in nodes]
    return cells


def measure(
    topology: Topology, todo: Sequence[Cell], *, seconds: float, progress: Progress | None = None
) -> pd.DataFrame:
    """Visit each cell once per block, in random order; tidy rows with `analysis` added, one execution_id per visit.

    There are five blocks, and three at least where calls are so slow that the time is over before.

    Parameters
    ----------
    topology
        This machine.
    todo
        What ``cells`` gave, or some of it.
    seconds
        For all visits together; a visit whose call is slow takes what its fewest samples need.
    progress
        Called with visits done and in all.
    """
    timing.require_seconds(seconds)
    largest = max(cell.case.shape.kv_bytes for cell in todo)
    pools: dict[int, KVPool] = {}
    nodes = {cell.memory_node for cell in todo}
    for node in nodes:
        cpus = topology.cpus_for([node])
        with pinned_team.pinned_team(cpus):
            pools[node] = KVPool(pool_bytes(topology, cpus, largest, len(nodes)), node)
    rows: list[dict[str, object]] = []
    total = BLOCKS * len(todo)
    visits = enumerate(randomized_blocks(todo, FEWEST_BLOCKS, seconds=seconds, most=BLOCKS))
    for order, (block, cell) in visits:
        binding = Binding((cell.compute_node,), (cell.memory_node,), MemPolicy.BIND)
        cpus = topology.cpus_for([cell.compute_node], cell.case.threads)
        with pinned_team.pinned_team(cpus, (libnuma.MPOL_BIND, [cell.memory_node])):
            visit = sample_case(
                cell.case,
                pools[cell.memory_node],
                requested=binding,
                granted=effective(topology),
                topology=topology,
                backend="auto",
                seconds=seconds / total,
                identity={"label": cell.label, "execution_id": f"{order:05}", "block": block, "order": order},
                own_process=False,
            )
        rows += [{**row, "analysis": cell.analysis} for row in visit]
        if progress:
            progress(order + 1, total)
    return pd.DataFrame(rows)


def results(topology: Topology, rows: pd.DataFrame, message: str) -> dict[str, Any]:
    """Return what ``numa_attention_results.json`` holds: the guide's four tables, the two spreads, machine and receipts.

    Times are seconds per call; a visit counts as one measurement, by the median of its samples.
    """
    keys = ["analysis", "execution_id", "cpu_nodes", "mem_nodes", "attention", "batch", "threads"]
    visits = rows[~rows["cold"]].groupby(keys, as_index=False, sort=False)["seconds"].median()
    per_analysis = {str(name): table for name, table in visits.groupby("analysis")}
    allocation = {
        node: _allocation(group) for node, group in per_analysis["memory_allocation"].groupby("cpu_nodes", sort=True)
    }
    wrong = contradictions(rows, topology.allowed_node_cpus)
    return {
        "schema_version": SCHEMA_VERSION,
        "memory_allocation": allocation,
        "batch_sizes": _nested(per_analysis["batch_sizes"], "batch"),
        "thread_affinity": _nested(per_analysis["thread_affinity"], "threads"),
        "cross_numa": {
            f"mem_{memory}_compute_{compute}": {
                "memory_node": int(memory),
                "compute_node": int(compute),
                "avg_time": float(group["seconds"].mean()),
                "is_local": memory == compute,
            }
            for (memory, compute), group in per_analysis["cross_numa"].groupby(["mem_nodes", "cpu_nodes"])
        },
        **_spreads(rows[rows["analysis"] == "memory_allocation"]),
        "machine": describe_machine(topology).to_json(),
        "receipts": {
            "contradictions": wrong,
            "visits": rows.drop_duplicates("execution_id")[
                ["execution_id", "analysis", "requested", "effective", "observed"]
            ].to_dict("records"),
        },
        "message": message,
    }


def _allocation(visits: pd.DataFrame) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, chosen in (("gqa", visits["attention"] != "mha"), ("std", visits["attention"] == "mha")):
        times = [float(seconds) for seconds in visits.loc[chosen, "seconds"]]
        table |= {f"avg_time_{name}": statistics.mean(times), f"std_time_{name}": statistics.stdev(times)}
        table[f"times_{name}"] = times
    return {**table, "min_time_gqa": min(table["times_gqa"]), "max_time_gqa": max(table["times_gqa"])}


def _nested(visits: pd.DataFrame, column: str) -> dict[str, dict[str, float]]:
    return {
        str(value): {str(node): float(s) for node, s in group.groupby("cpu_nodes")["seconds"].median().items()}
        for value, group in visits.groupby(column)
    }


def _spreads(rows: pd.DataFrame) -> dict[str, float | None]:
    """By how many percent the slowest node is slower than the fastest, and what equal nodes would show; None: one node."""
    # Nodes with fewer cores compute with fewer threads, or by another backend, and are compared all the same.
    spreads = comparison.spread(rows.assign(threads=0, backend="auto"))
    percents: dict[str, float | None] = {}
    for name, chosen in (("gqa", spreads["attention"] != "mha"), ("std", spreads["attention"] == "mha")):
        for key, column in ((f"spread_{name}_percent", "spread"), (f"spread_{name}_by_chance_percent", "by_chance")):
            share = float(spreads.loc[chosen, column].iloc[0])
            percents[key] = None if math.isnan(share) else 100 * share
    return percents


def spread_sentence(measured: Mapping[str, Any], name: str) -> str:
    """Return a sentence on the spread of `gqa` or `std` in what ``results`` returned."""
    kind = {"gqa": "GQA", "std": "Standard attention"}[name]
    spread, by_chance = measured[f"spread_{name}_percent"], measured[f"spread_{name}_by_chance_percent"]
    if spread is None:
        return f"{kind}: one node, nothing to compare."
    return (
        f"{kind}: {spread:.2f} % from the best node to the worst; equal nodes would show {by_chance:.2f} % by chance."
    )


@dataclass(frozen=True)
class BeforeAndAfter:
    """Seconds per call of three arms, and their ratios: what the kernel gains, what the placement gains, and both."""

    seconds: dict[str, list[float]]  # of each visit
    kernel: Ratio  # torch's own over gqa_attention, both unplaced
    placement: Ratio  # gqa_attention unplaced over placed by the helper
    both: Ratio

    def sentences(self) -> list[str]:
        """Return one for each ratio, "no difference was shown" included."""
        named = {"The kernel": self.kernel, "The placement": self.placement, "Both together": self.both}
        return [f"{name}: {ratio.describe('as fast')}." for name, ratio in named.items()]


def before_and_after(helper: NUMAOptimizedGQA, shape: AttentionShape, *, seconds: float) -> BeforeAndAfter:
    """Time torch's own attention, ``gqa_attention``, and the helper's, in random order within blocks.

    Each visit makes its tensors anew: ordinary ones for the first two arms, ones of the node for the helper.

    Raises
    ------
    InvalidInput
        `seconds` is not positive.
    """
    timing.require_seconds(seconds)
    dtype = getattr(torch, shape.dtype)
    query = (shape.batch, shape.q_heads, shape.q_len, shape.head_dim)
    cache = (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)

    def plain() -> list[Tensor]:
        return [torch.randn(size, dtype=dtype) for size in (query, cache, cache)]

    def placed() -> list[Tensor]:
        return helper.create_tensors([query, cache, cache], dtype)

    arms: dict[str, tuple[Callable[[], list[Tensor]], Callable[..., Tensor]]] = {
        "torch": (plain, lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True)),
        "gqa_attention": (plain, lambda q, k, v: gqa_attention(q, k, v, enable_gqa=True)),
        "helper": (placed, helper.compute),
    }
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _, name in randomized_blocks(arms, BLOCKS, seconds=seconds):
        make, attend = arms[name]
        tensors = make()
        timed = timing.measure(_call(attend, tensors), seconds=min(1.0, seconds / (3 * BLOCKS)))
        taken[name].append(timed.median_seconds)
    return BeforeAndAfter(
        taken,
        ratio_of_medians(taken["torch"], taken["gqa_attention"]),
        ratio_of_medians(taken["gqa_attention"], taken["helper"]),
        ratio_of_medians(taken["torch"], taken["helper"]),
    )


def _call(attend: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Callable[[int], object]:
    return lambda _turn: attend(*tensors)


def this_machine(*, full: bool) -> tuple[Topology, AttentionShape, str]:
    """Return the machine, the guide's attention on it, and how that was scaled."""
    topology = read_topology()
    return (topology, *guide_shape(topology, full=full))
