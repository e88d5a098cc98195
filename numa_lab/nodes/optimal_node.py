"""Which node runs attention best: measured, with its certainty, and "tie" where it is one.

Each node is visited several times (see ``numa_lab.nodes.node_visits``), and the medians of the visits are compared as
``numa_lab.measurement.pairwise`` has it: the spread of the A/A pair is the noise floor that a difference has to clear.

Limits: the visits are those of one process, so what differs between processes is not seen: `numa-lab sweep` is the
stronger evidence. Other load is of the moment.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from numa_lab.attention.shapes import AttentionShape, preset
from numa_lab.errors import InvalidInput, NotPermitted
from numa_lab.machine import cache_folder, libnuma
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement import pairwise
from numa_lab.measurement.labels import AA_SUFFIX
from numa_lab.measurement.receipts import RECEIPT_COLUMNS, contradictions
from numa_lab.nodes import rankings
from numa_lab.nodes.node_visits import BLOCKS, Visits, label_of, visit_nodes
from numa_lab.nodes.rankings import FEWER_CORES, NEARLY_FULL, OTHER_LOAD, RankedNode, Ranking
from numa_lab.placement import pinned_team
from numa_lab.placement.binding import Binding, MemPolicy, effective
from numa_lab.placement.thread_watch import last_cpu

VISIT_SECONDS = 0.1
DEFAULT_SHAPE = preset("llama-3-8b", kv_len=1024)
BUSY_SHARE = 0.1  # of a visit's time that a thread waited for its CPU, from which on other load is named as a cause
NEARLY_FULL_SHARE = 0.1  # of a node's memory that is still available, below which it counts as nearly full
CACHE_VERSION = 1


def rank(shape: AttentionShape | str | None = None, *, seconds: float | None = None, refresh: bool = False) -> Ranking:
    """Rank the effective nodes by the time of a decode step, or read the ranking that was kept.

    ``numa_lab.rank_nodes`` is the same with a DataFrame as its result, and says what the arguments are, when a ranking is
    kept, when nothing is measured, and what is raised.
    """
    chosen = DEFAULT_SHAPE if shape is None else preset(shape) if isinstance(shape, str) else shape
    if seconds is not None and not seconds > 0:
        raise InvalidInput(f"seconds={seconds}: expected a positive time for all visits, or None")
    topology = read_topology()
    nodes = topology.require_effective_nodes()
    if len(nodes) == 1:
        return _unmeasured(topology)
    path = _cache_path(topology, chosen)
    if path and not refresh and (kept := rankings.read(path, nodes)) is not None:
        return kept
    visit_seconds = VISIT_SECONDS if seconds is None else seconds / (BLOCKS * (len(nodes) + 1))
    try:
        visits = visit_nodes(topology, chosen, visit_seconds)
    except NotPermitted as error:  # a sandbox that lets no thread be placed: no node is shown to be worse
        warnings.warn(f"nodes were not compared: {error}", RuntimeWarning, stacklevel=3)
        return _unmeasured(topology)
    ranking = rank_visits(visits, topology)
    if path and not any(row.of_the_moment for row in ranking.nodes):
        rankings.keep(path, ranking)
    return ranking


def rank_visits(visits: Visits, topology: Topology) -> Ranking:
    """Rank nodes by their visits: ``numa_lab.measurement.pairwise`` decides, and the causes that are seen are added."""
    seconds = {label: np.array([_median_seconds(rows) for rows in each]) for label, each in visits.rows.items()}
    # Nodes with fewer cores compute with fewer threads, or by another backend, and are compared all the same.
    compared = pairwise.compare([({}, seconds)])
    medians = {
        node: float(np.median(seconds[label_of(node)]))
        for node in topology.effective_nodes
        if label_of(node) in seconds
    }
    best = min(medians, key=medians.__getitem__)
    ranked = [RankedNode(node, cause=_causes(node, visits, topology)) for node in topology.effective_nodes]
    for place, row in enumerate(ranked):
        if row.node not in medians:
            continue
        low, high, verdict = _against(compared, label_of(row.node), label_of(best))
        slower = verdict == "slower" and low > 1 + pairwise.EQUIVALENCE_MARGIN
        ranked[place] = replace(
            row, median_seconds=medians[row.node], ratio=medians[row.node] / medians[best], low=low, high=high,
            tie_group=2 if slower else 1, visits=len(visits.rows[label_of(row.node)]),
            receipt=" ".join(_contradictions(visits, row.node, topology)),
        )  # fmt: skip
    ranked.sort(key=lambda row: (row.tie_group, row.visits == 0, row.median_seconds))
    return Ranking(tuple(ranked), compared.noise_floor)


def get_optimal_numa_node(shape: AttentionShape | str | None = None, *, refresh: bool = False) -> int:
    """Find the node that runs attention best; ``rank_nodes`` says how sure that is.

    Of nodes that tie it is one where no other load was seen: the one on which the calling thread runs now, so that the
    processes of a machine don't all gather on one, else the first of them.

    Parameters
    ----------
    shape
        What is computed: a shape, the name of a preset, or None for a decode step of llama-3-8b with 1024 tokens.
    refresh
        Measure although a ranking is kept.

    Returns
    -------
    The number of the node.

    Raises
    ------
    InvalidInput
        The preset is unknown.
    NodeUnavailable
        This process may use no node's CPUs and memory together, or no node has room for the tensors.
    """
    return choose(rank(shape, refresh=refresh))


def choose(ranking: Ranking) -> int:
    """Choose the node that ``get_optimal_numa_node`` takes from a ranking."""
    idle = [row.node for row in ranking.tied if OTHER_LOAD not in row.cause]
    best = idle or [row.node for row in ranking.tied]
    cpu = last_cpu(threading.get_native_id())
    here = read_topology().node_of_cpu(cpu) if cpu is not None else None
    return here if here in best else best[0]


def advice(ranking: Ranking) -> str:
    """Name the command that uses the chosen node, as Markdown."""
    node = choose(ranking)
    bound = " ".join(Binding((node,), (node,), MemPolicy.BIND).numactl(read_topology()))
    return f"Node {node}: `{bound} python ...`, or `NUMAOptimizedGQA({node})` in code."


def bind_to_numa_node(node: int) -> Binding:
    """Bind the calling thread, its OpenMP team and their new memory to a node, for good.

    The policy is *preferred*, since the kernel kills a bound process whose node is full. Threads of other teams stay where
    they are. ``NUMAOptimizedGQA`` does the same for a while.

    Parameters
    ----------
    node
        Number of the node.

    Returns
    -------
    The binding that the kernel granted.

    Raises
    ------
    NodeUnavailable
        The node does not exist, or this process may not use both its CPUs and its memory.
    NotPermitted
        A sandbox lets no thread be placed.
    """
    topology = read_topology()
    topology.require_effective(node)
    cpus = topology.cpus_for([node])
    pinned_team.PinnedTeam(cpus, (libnuma.MPOL_PREFERRED, [node]), topology.cpus_of([node])).enter()
    return effective(topology)


def _unmeasured(topology: Topology) -> Ranking:
    """The ranking where nothing was measured: no node is shown to be worse."""
    nodes = topology.effective_nodes
    return Ranking(tuple(RankedNode(node, tie_group=1, cause=_causes(node, Visits(), topology)) for node in nodes))


def _median_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(statistics.median(row["seconds"] for row in rows if not row["cold"]))


def _contradictions(visits: Visits, node: int, topology: Topology) -> list[str]:
    """What the receipts of all visits of a node say against it."""
    labels = (label_of(node), label_of(node) + AA_SUFFIX)
    rows = [row for label in labels for visit in visits.rows.get(label, ()) for row in visit]
    columns = {name: [row[name] for row in rows] for name in ("threads", *RECEIPT_COLUMNS)}
    return contradictions(columns, topology.allowed_node_cpus)


def _against(compared: pairwise.Comparisons, label: str, best: str) -> tuple[float, float, str]:
    """Interval of the time of one label over that of the best, and the verdict on it."""
    turned = {"faster": "slower", "slower": "faster"}
    for comparison in compared.comparisons:
        if (comparison.a, comparison.b) == (label, best):
            return comparison.low, comparison.high, comparison.verdict
        if (comparison.a, comparison.b) == (best, label):
            return 1 / comparison.high, 1 / comparison.low, turned.get(comparison.verdict, comparison.verdict)
    return 1.0, 1.0, "same"


def _causes(node: int, visits: Visits, topology: Topology) -> str:
    """Why a node may be slow, as far as that is seen; it is known of nodes without times, too."""
    causes = []
    if (waited := visits.waited.get(node)) and statistics.median_high(waited) > BUSY_SHARE:
        causes.append(OTHER_LOAD)
    memory = topology.node(node)
    if node in visits.too_small or memory.available_bytes < NEARLY_FULL_SHARE * memory.memory_bytes:
        causes.append(NEARLY_FULL)
    cores = {other: len(topology.cpus_for([other])) for other in topology.effective_nodes}
    if cores[node] < max(cores.values()):
        causes.append(FEWER_CORES)
    return "; ".join(causes)


def _cache_path(topology: Topology, shape: AttentionShape) -> Path | None:
    folder = cache_folder.path()
    depends_on = [
        CACHE_VERSION, topology.fingerprint(), topology.allowed_cpus, topology.allowed_nodes, torch.__version__,
        repr(shape),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    return folder / f"ranking-{key}.json" if folder else None
