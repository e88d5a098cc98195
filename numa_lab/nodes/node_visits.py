"""Visits of nodes: decode steps timed on each node in turn, with a receipt and the wait for CPUs.

A visit places a team on a node, where K and V lie already, and times decode steps. The order is that of randomised
blocks (see ``numa_lab.measurement.blocks``). One node is visited twice per block under two labels: the A/A pair.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from numa_lab.attention.shapes import AttentionShape
from numa_lab.errors import NodeUnavailable
from numa_lab.machine import libnuma
from numa_lab.machine.topology import Topology
from numa_lab.measurement.blocks import randomized_blocks
from numa_lab.measurement.case_timing import KVPool, pool_bytes, sample_case
from numa_lab.measurement.labels import AA_SUFFIX
from numa_lab.measurement.workloads import Case
from numa_lab.placement import openmp, pinned_team
from numa_lab.placement.binding import Binding, MemPolicy, effective
from numa_lab.placement.thread_watch import schedstat

BLOCKS = 8
NEW_MEMORY_BLOCKS = 2  # after so many blocks K and V move to other pages: how pages lie in a node is chance


@dataclass
class Visits:
    """What was measured.

    Labels are those of bindings, c1m1 for node 1, and of the twin of one of them, c0m0~aa.
    """

    rows: dict[str, list[list[dict[str, Any]]]] = field(default_factory=lambda: defaultdict(list))
    """The tidy rows of each visit, by label."""
    waited: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """The share of the time that a thread waited for a CPU, for each visit of a node."""
    too_small: dict[int, str] = field(default_factory=dict)
    """Nodes without room for K and V, and the reason."""


def label_of(node: int) -> str:
    """The label of a node's visits: c1m1 for node 1, whose CPUs compute with its memory."""
    return f"c{node}m{node}"


def visit_nodes(topology: Topology, shape: AttentionShape, seconds: float) -> Visits:
    """Visit every effective node once per block, in random order, and the first of them with room twice.

    Parameters
    ----------
    topology
        This machine.
    shape
        What is computed.
    seconds
        Of one visit.

    Raises
    ------
    NodeUnavailable
        No node has room for the tensors.
    NotPermitted
        A sandbox lets no thread be placed.
    """
    visits = Visits()
    node_cpus = {node: topology.cpus_for([node]) for node in topology.effective_nodes}
    pool_count = len(node_cpus) + 1  # one node has two
    size = max(pool_bytes(topology, cpus, shape.kv_bytes, pool_count) for cpus in node_cpus.values())
    pools: dict[str, tuple[int, KVPool]] = {}
    for first_block in range(0, BLOCKS, NEW_MEMORY_BLOCKS):
        pools.clear()  # before new ones are taken
        pools |= _pools(node_cpus, size, visits)
        for further_blocks, label in randomized_blocks(pools, NEW_MEMORY_BLOCKS):
            node, pool = pools[label]
            cpus, block = node_cpus[node], first_block + further_blocks
            with pinned_team.pinned_team(cpus, (libnuma.MPOL_BIND, [node])), _waiting(visits.waited[node]):
                rows = sample_case(
                    Case(shape, len(cpus)),
                    pool,
                    requested=Binding((node,), (node,), MemPolicy.BIND),
                    granted=effective(topology),
                    topology=topology,
                    backend="auto",
                    seconds=seconds,
                    identity={"label": label, "execution_id": f"{block:04}-{label}", "block": block, "order": block},
                    own_process=False,
                )
            visits.rows[label].append(rows)
    return visits


def _pools(node_cpus: Mapping[int, Sequence[int]], size: int, visits: Visits) -> dict[str, tuple[int, KVPool]]:
    """Give each label its node and memory: the pair of one node has two memories, so that its noise is also that of memory."""
    pools: dict[str, tuple[int, KVPool]] = {}

    def add(label: str, node: int) -> None:
        try:
            with pinned_team.pinned_team(node_cpus[node]):
                pools[label] = node, KVPool(size, node)
        except NodeUnavailable as error:
            visits.too_small[node] = str(error)

    for node in node_cpus:
        add(label_of(node), node)
    if not pools:
        raise NodeUnavailable("no node has room for the tensors: " + "; ".join(visits.too_small.values()))
    first = next(iter(pools))  # of those with room: without its twin there is no noise floor, and no claim
    add(first + AA_SUFFIX, pools[first][0])
    return pools


@contextmanager
def _waiting(shares: list[float]) -> Iterator[None]:
    """Add the share of the time that the most delayed thread of the team waits for a CPU that another thread has.

    Not their mean: the others wait for the delayed one, and one busy core of many slows the whole team.
    """
    tids = [thread.tid for thread in openmp.team()] if openmp.runtime() else [threading.get_native_id()]
    start, before = time.perf_counter_ns(), [schedstat(tid)[1] for tid in tids]
    yield
    waited = max(schedstat(tid)[1] - earlier for tid, earlier in zip(tids, before, strict=True))
    shares.append(waited / (time.perf_counter_ns() - start))
