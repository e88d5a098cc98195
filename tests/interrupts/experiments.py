"""What measures: rank_nodes, the decode loop, node scaling; each as short as it can be."""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

from interrupts.aim import Target
from interrupts.cases import CPUS, NODE, case
from numa_lab import NUMAOptimizedGQA
from numa_lab.attention.shapes import preset
from numa_lab.experiments import decode_loop, node_scaling
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement import case_timing
from numa_lab.nodes import optimal_node
from numa_lab.placement import memory

SHAPE = preset("llama-3-8b", kv_len=16, dtype="float32")


@contextmanager
def two_nodes() -> Iterator[tuple[int, ...]]:
    """Nodes to rank: one alone passes for two, each with half of its cores. Caches count as small, as they do where emulated."""
    real = read_topology()
    if len(real.effective_nodes) > 1:
        yield real.effective_nodes
        return
    one = real.node(NODE)
    halves = {NODE: CPUS[: -(-len(CPUS) // 2)], NODE + 1: CPUS[len(CPUS) // 2 :]}
    topology = dataclasses.replace(
        real,
        nodes=tuple(dataclasses.replace(one, id=node, cpus=cpus) for node, cpus in halves.items()),
        cpus=tuple(dataclasses.replace(cpu, node=NODE if cpu.id in halves[NODE] else NODE + 1) for cpu in real.cpus),
        distances=None, allowed_nodes=tuple(halves), emulated=True,
    )  # fmt: skip

    def here(shape: Sequence[int], dtype: torch.dtype, node: int | None = None) -> torch.Tensor:
        return memory.empty(shape, dtype, None if node is None else NODE)

    with (
        mock.patch.object(optimal_node, "read_topology", return_value=topology),
        mock.patch.object(case_timing, "memory", mock.Mock(wraps=memory, empty=here)),
    ):
        yield tuple(halves)


@case("rank_nodes", share=0.05)
def rank() -> Iterator[Target]:
    with two_nodes() as nodes, tempfile.TemporaryDirectory() as folder:

        def right() -> None:
            ranking = optimal_node.rank(SHAPE, seconds=1e-3, refresh=True)
            assert sorted(row.node for row in ranking.nodes) == sorted(nodes)
            assert all(row.median_seconds > 0 for row in ranking.nodes)
            assert not any(name.suffix != ".json" for name in Path(folder).iterdir()), "a file is left over"

        with mock.patch.object(optimal_node, "cache_folder", mock.Mock(path=lambda: Path(folder))):
            yield Target(lambda: optimal_node.rank(SHAPE, seconds=1e-3, refresh=True), right)


@case("get_optimal_numa_node")
def best() -> Iterator[Target]:
    def right() -> None:
        assert optimal_node.get_optimal_numa_node() in read_topology().effective_nodes

    yield Target(optimal_node.get_optimal_numa_node, right)


@case("decode-loop", share=0.05)
def loop() -> Iterator[Target]:
    helper = NUMAOptimizedGQA(NODE)
    attend = decode_loop.helper_attention(helper)

    def compare() -> decode_loop.Comparison:
        return decode_loop.compare(helper, SHAPE, attend_with=attend, layers=1, tokens=2, seconds=1e-3, min_blocks=3)

    yield Target(compare, lambda: decode_loop.require_placed(compare(), helper))


@case("node-scaling", share=0.05)
def scaling() -> Iterator[Target]:
    """As many calls in a visit as there are at least."""

    def measure() -> pd.DataFrame:
        return node_scaling.measure(SHAPE, inputs_per_node=1, seconds=1e-3)

    with mock.patch.object(node_scaling, "VISIT_SECONDS", 0.0):
        yield Target(measure, lambda: node_scaling.require_placed(measure()))
