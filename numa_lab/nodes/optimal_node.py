"""Which node runs attention best: measured, with its certainty, and "tie" where it is one.

Each node is visited several times, in random order within blocks: its team is placed, K and V lie in its memory, decode
steps are timed, and a receipt is taken. One node is visited twice per block under two labels, and the spread of that pair
is the noise floor that a difference has to clear.

Limits: the visits are those of one process, so what differs between processes is not seen: `numa-lab sweep` is the
stronger evidence. Other load is of the moment.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from numa_lab.attention.shapes import AttentionShape, preset
from numa_lab.errors import InvalidInput, NodeUnavailable, NotPermitted
from numa_lab.machine import cache_folder, libnuma
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology, read_topology
from numa_lab.measurement import comparison
from numa_lab.measurement.case_timing import KVPool, pool_bytes, sample_case
from numa_lab.measurement.workloads import Case
from numa_lab.nodes import rankings
from numa_lab.nodes.rankings import COLUMNS
from numa_lab.placement import openmp, pinned_team
from numa_lab.placement.binding import Binding, MemPolicy, effective
from numa_lab.placement.receipt import contradictions
from numa_lab.placement.thread_watch import last_cpu, schedstat

BLOCKS = 8
NEW_MEMORY_BLOCKS = 2  # after so many blocks K and V move to other pages: how pages lie in a node is chance
VISIT_SECONDS = 0.1
DEFAULT_SHAPE = preset("llama-3-8b", kv_len=1024)
BUSY_SHARE = 0.1  # of a visit's time that a thread waited for its CPU, from which on other load is named as a cause
NEARLY_FULL = 0.1  # of a node's memory that is still available
CACHE_VERSION = 1


@dataclass
class Visits:
    """What was measured: tidy rows, and for each visit of a node the share of time that a thread waited for a CPU."""

    rows: list[dict[str, object]] = field(default_factory=list)
    waited: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    too_small: dict[int, str] = field(default_factory=dict)  # nodes without room, and the reason


def rank_nodes(
    shape: AttentionShape | str | None = None, *, seconds: float | None = None, refresh: bool = False
) -> pd.DataFrame:
    """Rank the effective nodes by the time of a decode step.

    The ranking is kept in the user's cache folder for this machine and this set of allowed CPUs and nodes, unless other
    load, nearly full memory or a receipt that contradicts was seen: those are of the moment. One node: nothing is
    measured. Where a sandbox lets no thread be pinned nothing is measured either, and a warning says so.

    Parameters
    ----------
    shape
        What is computed: a shape, the name of a preset, or None for a decode step of llama-3-8b with 1024 tokens.
    seconds
        Time for all visits; about a second for each node by default.
    refresh
        Measure although a ranking is kept.

    Returns
    -------
    DataFrame, the best node first; index `node`, and the columns

    - `median_seconds`: of the visits' medians; NaN where nothing was measured
    - `ratio`, `low`, `high`: time relative to the best node's, and its interval
    - `tie_group`: 1 for the nodes that were not shown to be slower than the best by 2 % or more, 2 for the others
    - `cause`: why a node may be slow, as far as it is seen: other load, memory nearly full, fewer cores
    - `visits`: how many there were
    - `receipt`: what contradicts the claim that threads and pages were there; empty where nothing does

    and `attrs["noise_floor"]`.

    Raises
    ------
    InvalidInput
        An unknown preset, or no positive time.
    NodeUnavailable
        This process may use no node's CPUs and memory together.
    """
    chosen = DEFAULT_SHAPE if shape is None else preset(shape) if isinstance(shape, str) else shape
    if seconds is not None and not seconds > 0:
        raise InvalidInput(f"seconds={seconds}: expected a positive time for all visits, or None")
    topology = read_topology()
    nodes = topology.effective_nodes
    if not nodes:
        raise NodeUnavailable(
            "no node has both CPUs and memory that this process may use: allowed are CPUs "
            f"{format_cpulist(topology.allowed_cpus) or 'none'} and memory of nodes "
            f"{format_cpulist(topology.allowed_nodes) or 'none'}"
        )
    if len(nodes) == 1:
        return _rank(Visits(), topology)
    path = _cache_path(topology, chosen)
    if path and not refresh and (kept := rankings.read(path, nodes)) is not None:
        return kept
    visit_seconds = VISIT_SECONDS if seconds is None else seconds / (BLOCKS * (len(nodes) + 1))
    try:
        visits = _visit(topology, chosen, visit_seconds)
    except NotPermitted as error:  # a sandbox that lets no thread be placed: no node is shown to be worse
        warnings.warn(f"nodes were not compared: {error}", RuntimeWarning, stacklevel=2)
        return _rank(Visits(), topology).assign(tie_group=1)
    ranking = _rank(visits, topology)
    if path and not (ranking["cause"].str.contains("other load|memory").any() or ranking["receipt"].any()):
        rankings.keep(path, ranking)
    return ranking


def get_optimal_numa_node(shape: AttentionShape | str | None = None, *, refresh: bool = False) -> int:
    """The node that runs attention best; see ``rank_nodes``, which says how sure that is.

    Of nodes that tie it is one where no other load was seen: the one on which the calling thread runs now, so that the
    processes of a machine don't all gather on one, else the first of them.
    """
    return choose(rank_nodes(shape, refresh=refresh))


def choose(ranking: pd.DataFrame) -> int:
    """The node that ``get_optimal_numa_node`` takes from a ranking."""
    tied = ranking[ranking["tie_group"] == 1]
    idle = tied[~tied["cause"].str.contains("other load")]
    best = [int(node) for node in (tied if idle.empty else idle).index]
    cpu = last_cpu(threading.get_native_id())
    here = read_topology().node_of_cpu(cpu) if cpu is not None else None
    return here if here in best else best[0]


def advice(ranking: pd.DataFrame) -> str:
    """The command that uses the chosen node, as Markdown."""
    node = choose(ranking)
    bound = " ".join(Binding((node,), (node,), MemPolicy.BIND).numactl(read_topology()))
    return f"Node {node}: `{bound} python ...`, or `NUMAOptimizedGQA({node})` in code."


def bind_to_numa_node(node: int) -> Binding:
    """Bind the calling thread, its OpenMP team and their new memory to a node, for good; what the kernel granted.

    The policy is *preferred*: a bound process whose node is full gets killed. Threads of other teams stay where they are.
    ``NUMAOptimizedGQA`` does the same for a while.

    Raises
    ------
    NodeUnavailable
        The node does not exist, or is not effective.
    """
    topology = read_topology()
    topology.require_effective(node)
    cpus = topology.cpus_for([node])
    pinned_team.PinnedTeam(cpus, (libnuma.MPOL_PREFERRED, [node]), topology.cpus_of([node])).enter()
    return effective(topology)


def _visit(topology: Topology, shape: AttentionShape, seconds: float) -> Visits:
    """Visit every effective node once per block, in random order, and the first of them twice."""
    visits = Visits()
    cpus = {node: topology.cpus_for([node]) for node in topology.effective_nodes}
    size = max(pool_bytes(topology, of, shape.kv_bytes, len(cpus) + 1) for of in cpus.values())  # one node has two
    order = random.Random(time.time_ns())
    pools: dict[str, tuple[int, KVPool]] = {}
    for block in range(BLOCKS):
        if block % NEW_MEMORY_BLOCKS == 0:
            pools.clear()  # before new ones are taken
            pools |= _pools(cpus, size, visits)
        for label in order.sample(list(pools), len(pools)):
            node, pool = pools[label]
            binding = Binding((node,), (node,), MemPolicy.BIND)
            with pinned_team.pinned_team(cpus[node], (libnuma.MPOL_BIND, [node])), _waiting(visits.waited[node]):
                visits.rows += sample_case(
                    Case(shape, len(cpus[node])),
                    pool,
                    requested=binding,
                    granted=effective(topology),
                    topology=topology,
                    backend="auto",
                    seconds=seconds,
                    identity={"label": label, "execution_id": f"{block:04}-{label}", "block": block, "order": block},
                    own_process=False,
                )
    return visits


def _pools(cpus: Mapping[int, Sequence[int]], size: int, visits: Visits) -> dict[str, tuple[int, KVPool]]:
    """Each label's node and memory: the pair of one node has two memories, so that its noise is also that of memory."""
    pools: dict[str, tuple[int, KVPool]] = {}

    def add(label: str, node: int) -> None:
        try:
            with pinned_team.pinned_team(cpus[node]):
                pools[label] = node, KVPool(size, node)
        except NodeUnavailable as error:
            visits.too_small[node] = str(error)

    for node in cpus:
        add(f"c{node}m{node}", node)
    if not pools:
        raise NodeUnavailable("no node has room for the tensors: " + "; ".join(visits.too_small.values()))
    first = next(iter(pools))  # of those with room: without its twin there is no noise floor, and no claim
    add(first + comparison.AA_SUFFIX, pools[first][0])
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


def _rank(visits: Visits, topology: Topology) -> pd.DataFrame:
    """Let ``numa_lab.measurement.comparison`` decide, and add the causes that are seen."""
    nodes = topology.effective_nodes
    found = {node: _unmeasured(node, visits, topology) for node in nodes}
    floor = math.nan
    if visits.rows:
        rows = pd.DataFrame(visits.rows)
        # Nodes with fewer cores compute with fewer threads, or by another backend, and are compared all the same.
        rows[["threads", "backend"]] = 0, "auto"
        medians = comparison.execution_medians(rows)
        by_label = medians.groupby("label")["seconds"]
        compared = comparison.compare(rows)
        floor = compared.noise_floor
        seconds = {int(label[1:].partition("m")[0]): s for label, s in by_label.median().items() if "~" not in label}
        best = min(seconds, key=seconds.__getitem__)
        for node, median in seconds.items():
            low, high, verdict = _against(compared, f"c{node}m{node}", f"c{best}m{best}")
            slower = verdict == "slower" and low > 1 + comparison.EQUIVALENCE_MARGIN
            label_rows = rows[rows["label"].str.removesuffix(comparison.AA_SUFFIX) == f"c{node}m{node}"]
            found[node] |= {
                "median_seconds": median, "ratio": median / seconds[best], "low": low, "high": high,
                "tie_group": 2 if slower else 1, "visits": int(by_label.size()[f"c{node}m{node}"]),
                "receipt": " ".join(contradictions(label_rows, topology.allowed_node_cpus)),
            }  # fmt: skip
    elif len(nodes) == 1:
        found[nodes[0]]["tie_group"] = 1
    ranking = pd.DataFrame.from_dict(found, orient="index", columns=list(COLUMNS)).rename_axis("node")
    ranking = ranking.sort_values(["tie_group", "median_seconds"], kind="stable")
    ranking.attrs["noise_floor"] = floor
    return ranking


def _against(compared: comparison.Comparisons, label: str, best: str) -> tuple[float, float, str]:
    """Interval of the time of one label over that of the best, and the verdict on it."""
    turned = {"faster": "slower", "slower": "faster"}
    for one in compared.comparisons:
        if (one.a, one.b) == (label, best):
            return one.low, one.high, one.verdict
        if (one.a, one.b) == (best, label):
            return 1 / one.high, 1 / one.low, turned.get(one.verdict, one.verdict)
    return 1.0, 1.0, "same"


def _unmeasured(node: int, visits: Visits, topology: Topology) -> dict[str, Any]:
    """The row of a node without times: its causes are known all the same."""
    causes = []
    shares = sorted(visits.waited.get(node, ()))
    if shares and shares[len(shares) // 2] > BUSY_SHARE:
        causes.append("other load")
    memory = topology.node(node)
    if node in visits.too_small or memory.available_bytes < NEARLY_FULL * memory.memory_bytes:
        causes.append("memory nearly full")
    cores = {other: len(topology.cpus_for([other])) for other in topology.effective_nodes}
    if cores[node] < max(cores.values()):
        causes.append("fewer cores")
    nothing = dict.fromkeys(("median_seconds", "ratio", "low", "high"), math.nan)
    return {**nothing, "tie_group": 2, "cause": "; ".join(causes), "visits": 0, "receipt": ""}


def _cache_path(topology: Topology, shape: AttentionShape) -> Path | None:
    folder = cache_folder.path()
    seen = [
        CACHE_VERSION, topology.fingerprint(), topology.allowed_cpus, topology.allowed_nodes, torch.__version__,
        repr(shape),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
    return folder / f"ranking-{key}.json" if folder else None
