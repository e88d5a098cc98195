"""Which placement to choose for decode attention: one node, one socket, all nodes together, or an instance on each.

It is predicted from measured bandwidths, as ``numa_lab.bandwidth.roofline`` says, so it costs no run. `numa-lab sweep` measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numa_lab.attention.shapes import AttentionShape
from numa_lab.bandwidth.contention import Contention
from numa_lab.bandwidth.node_bandwidths import PROBES, Groups, NodeBandwidths, socket_groups
from numa_lab.bandwidth.roofline import Strategy, predict, predict_binding, predict_interleaved
from numa_lab.errors import InvalidInput, RunDirectoryError
from numa_lab.machine.shell_commands import to_paste
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.measurement.atomic_files import read_json
from numa_lab.measurement.machine_facts import load_machine
from numa_lab.measurement.significance import LARGEST_TIE
from numa_lab.placement.binding import Binding, MemPolicy

MOST_REMOTE = 12  # rows of remote strategies that a table shows; of more the fastest and the slowest
NAMED_IN_TIE = 5
WAKING_SECONDS = 1e-5  # below this, starting and ending teams of threads takes as long as what is predicted

_SIMPLEST = ("single", "instances", "sharded", "remote")  # instances need no merge, and no kernel that shards


@dataclass(frozen=True)
class Advice:
    """Predicted placements of one shape, the fastest first."""

    shape: AttentionShape
    measured: NodeBandwidths
    sockets: Groups
    strategies: tuple[Strategy, ...]
    interleaved: Strategy | None  # to compare with; None with a single memory node
    notes: tuple[str, ...]

    @property
    def best(self) -> Strategy:
        """The fastest for which K and V fit."""
        return next(strategy for strategy in self.strategies if strategy.fits)

    @property
    def tied(self) -> tuple[Strategy, ...]:
        """Those that fit and are predicted less than ``ratios.LARGEST_TIE`` slower than the best, and the best."""
        most = self.best.seconds * (1 + LARGEST_TIE)
        return tuple(strategy for strategy in self.strategies if strategy.fits and strategy.seconds < most)

    @property
    def choice(self) -> Strategy:
        """The simplest of those that tie: fewest nodes first, instances before shards, own memory before remote."""
        return min(self.tied, key=lambda one: (len(one.nodes), _SIMPLEST.index(one.kind), one.nodes))

    def sentence(self) -> str:
        """What is advised, in words."""
        one = self.choice
        time = f"{one.seconds * 1e3:.3g} ms" if one.seconds >= 1e-4 else f"{one.seconds * 1e6:.3g} us"
        if len(self.strategies) == 1:
            return f"One node: nothing to choose. {one.label} is predicted to take {time}."
        if len(self.tied) > 1:
            labels = [one.label, *(strategy.label for strategy in self.tied if strategy is not one)]
            more = f" and {len(labels) - NAMED_IN_TIE} more" if len(labels) > NAMED_IN_TIE else ""
            told = f"A tie within {LARGEST_TIE:.0%}: {', '.join(labels[:NAMED_IN_TIE])}{more}. "
            told += f"Take {one.label}, the simplest: {time}"
        else:
            told = f"{one.label} is predicted fastest: {time}"
        single = [strategy for strategy in self.strategies if strategy.kind == "single" and strategy.fits]
        compared = [(single[0], "one node")] if single and one.kind != "single" else []
        compared += [(self.interleaved, f"interleaving ({self.interleaved.label})")] if self.interleaved else []
        return ", ".join([told, *(_times(other.seconds / one.seconds, name) for other, name in compared)]) + "."

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "shape": asdict(self.shape),
            "kv_bytes": self.shape.kv_bytes,
            "nodes": list(self.measured.nodes),
            "sockets": [list(group) for group in self.sockets],
            "read_bytes_per_s": [list(row) for row in self.measured.read_bytes_per_s],
            "latency_ns": None if self.measured.latency_ns is None else [list(row) for row in self.measured.latency_ns],
            "all_nodes_bytes_per_s": self.measured.all_nodes_bytes_per_s,
            "strategies": [_plain(strategy) for strategy in self.strategies],
            "best": _plain(self.best),
            "tied": [strategy.label for strategy in self.tied],
            "choice": self.choice.label,
            "interleaved": _plain(self.interleaved) if self.interleaved else None,
            "sentence": self.sentence(),
            "notes": list(self.notes),
        }


def _times(ratio: float, name: str) -> str:
    within = 1 / (1 + LARGEST_TIE) < ratio < 1 + LARGEST_TIE
    return f"as fast as {name}" if within else f"{ratio:.3g} times as fast as {name}"


def _plain(strategy: Strategy) -> dict[str, Any]:
    return asdict(strategy) | {"nodes": list(strategy.nodes), "parts": list(strategy.parts)}


def plan_placement(
    shape: AttentionShape, topology: Topology | Mapping[str, Any] | None, measured: NodeBandwidths
) -> Advice:
    """Choose where a decode step runs.

    Limits: those of ``numa_lab.bandwidth.roofline``. K and V are those of one layer; a model needs room for all of them.

    Parameters
    ----------
    shape
        One attention call with one new token per sequence.
    topology
        The machine that was measured: which nodes share a socket, what a node can hold, and what this process may use.
        As ``Topology``, or as its JSON. None: sockets are inferred from latencies, and everything fits.
    measured
        Its bandwidths and latencies: of ``probes.probe_nodes``, or of ``mlc.read_mlc``.

    Raises
    ------
    InvalidInput
        The nodes are not those of the topology, nothing was measured, K and V fit nowhere, or the shape is no decode step.
    """
    facts = topology.to_json() if isinstance(topology, Topology) else topology
    measured, socket_of, memory_bytes = usable(facts, measured)
    limit_bytes = _limit_bytes(facts)
    known: dict[str, Any] = {"socket_of": socket_of, "memory_bytes": memory_bytes, "limit_bytes": limit_bytes}
    strategies = tuple(predict(shape, measured, **known))
    if not any(strategy.fits for strategy in strategies):
        limited = f", and a control group lets this process hold {limit_bytes / 1e9:.1f}" * math.isfinite(limit_bytes)
        raise InvalidInput(
            f"K and V of {shape.kv_bytes / 1e9:.1f} GB fit nowhere, since the nodes hold "
            f"{', '.join(f'{count / 1e9:.1f}' for count in memory_bytes.values())} GB{limited}: "
            "choose a smaller batch or kv_len"
        )
    several, notes = len(measured.mem_nodes) > 1, _notes(measured, facts, told=socket_of is not None)
    if several and strategies[0].seconds < WAKING_SECONDS:
        notes.append("Waking threads takes microseconds, which are not counted: for steps as short as this, measure.")
    interleaved = predict_interleaved(shape, measured, **known)
    return Advice(
        shape,
        measured,
        socket_groups(measured, socket_of),
        strategies,
        interleaved if several else None,
        tuple(notes),
    )


def predict_bindings(
    wanted: Iterable[tuple[Binding, AttentionShape]],
    topology: Topology | Mapping[str, Any],
    measured: NodeBandwidths,
    weights: Mapping[int, int] | None = None,
) -> list[Strategy | None]:
    """Predict decode steps under bindings, in their order; None for a binding of which it can't be said where its pages lie.

    That is so where pages go to the first of several nodes, where CPUs of several nodes touch them, and where they go by weights
    that are not given. Parameters and errors are those of ``plan_placement``; that K and V don't fit is no error here.
    """
    facts = topology.to_json() if isinstance(topology, Topology) else topology
    measured, socket_of, memory_bytes = usable(facts, measured)
    contention, limit_bytes = Contention(measured, socket_groups(measured, socket_of)), _limit_bytes(facts)
    found: list[Strategy | None] = []
    for binding, shape in wanted:
        mems = binding.mem_nodes or binding.cpu_nodes
        by_weight = weights if binding.policy is MemPolicy.WEIGHTED_INTERLEAVE else None
        known = binding.policy is not MemPolicy.UNKNOWN
        if not known or not mems or (len(mems) > 1 and binding.policy is not MemPolicy.INTERLEAVE and not by_weight):
            found.append(None)
            continue
        cpus = binding.cpu_nodes or measured.cpu_nodes
        found.append(
            predict_binding(
                shape,
                measured,
                cpus,
                mems,
                memory_bytes=memory_bytes,
                limit_bytes=limit_bytes,
                weights=by_weight,
                contention=contention,
            )
        )
    return found


def usable(
    facts: Mapping[str, Any] | None, measured: NodeBandwidths
) -> tuple[NodeBandwidths, dict[int, int] | None, dict[int, int]]:
    """What was measured of nodes that this process may use, the socket of each node if it is told, and the bytes that it holds.

    Raises
    ------
    InvalidInput
        The nodes are not those of the topology, which is given as its JSON.
    """
    if not facts:
        return measured, None, {}
    ids = {node["id"] for node in facts["nodes"]}
    if ids != set(measured.nodes):
        raise InvalidInput(
            f"measured were nodes {format_cpulist(measured.nodes)}, and the machine has {format_cpulist(ids)}: "
            f"measure this machine with `{to_paste('numa-lab', 'probe')}`"
        )
    allowed = set(facts["allowed_cpus"])
    cpus = allowed - set(facts.get("isolated_cpus", ())) or allowed
    cpu_nodes = {cpu["node"] for cpu in facts["cpus"] if cpu["id"] in cpus}
    memory_bytes = {node["id"]: node["memory_bytes"] for node in facts["nodes"]}
    return measured.only(cpu_nodes, facts["allowed_nodes"]), sockets_told(facts["cpus"]), memory_bytes


def _limit_bytes(facts: Mapping[str, Any] | None) -> float:
    """What a process may hold on all nodes together; runs of before it was looked at do not tell."""
    return min((limit["limit_bytes"] for limit in (facts or {}).get("memory_limits", ())), default=math.inf)


def sockets_told(cpus: list[dict[str, Any]]) -> dict[int, int] | None:
    """The socket of each node; None where the kernel does not tell one, or a node spans several."""
    found = {(cpu["node"], cpu["socket"]) for cpu in cpus}
    nodes = dict(found)
    return None if len(nodes) < len(found) or -1 in nodes.values() else nodes


def _notes(measured: NodeBandwidths, facts: Mapping[str, Any] | None, *, told: bool) -> list[str]:
    notes = []
    if facts and facts["emulated"]:
        notes.append("The machine is emulated: its bandwidths, and these times, mean nothing.")
    if len(measured.nodes) > 1 and not told:
        how = "inferred from latencies" if measured.latency_ns else "not known, so each node counts as one"
        notes.append(f"Sockets are {how}.")
    if without := set(measured.mem_nodes) - set(measured.cpu_nodes):
        notes.append(f"No CPUs read from node {format_cpulist(without)}: its memory alone counts.")
    if measured.gaps:
        pairs = ", ".join(f"c{cpu}m{mem}" for cpu, mem in measured.gaps)
        notes.append(f"Not measured: {pairs}; the median of alike pairs stands in.")
    if measured.all_nodes_bytes_per_s is None and len(measured.cpu_nodes) > 1:
        notes.append("All nodes reading at once were not measured: together they count as fast as each alone.")
    return notes


def read_run(run_dir: Path) -> tuple[Topology, NodeBandwidths]:
    """The topology of a run's machine, and what notebook 01 measured there.

    Raises
    ------
    RunDirectoryError
        It is no run directory, is damaged, or was measured without probes.
    """
    topology = load_machine(run_dir).topology
    if not (run_dir / PROBES).exists():
        raise RunDirectoryError(
            f"{run_dir} has no {PROBES}, which `numa-lab sweep --no-probes` leaves out: "
            f"add it with `{to_paste('numa-lab', 'sweep', '--resume', run_dir)}` on that machine"
        )
    try:
        return topology, NodeBandwidths.from_json(read_json(run_dir / PROBES))
    except InvalidInput as error:
        raise RunDirectoryError(f"{run_dir / PROBES} is damaged, {error}: measure again") from error


def render(advice: Advice, source: str) -> str:
    """A table for a terminal, the fastest first, and what it says; `source` names what was measured."""
    shape, best = advice.shape, advice.best.seconds
    rows = [strategy for strategy in (*advice.strategies, advice.interleaved) if strategy]
    remote = [strategy for strategy in advice.strategies if strategy.kind == "remote"]
    left_out = remote[1:-1] if len(remote) > MOST_REMOTE else []
    shown = sorted((row for row in rows if row not in left_out), key=lambda row: row.seconds)
    width = max(len(row.label) for row in shown)
    groups = "; ".join(format_cpulist(group) for group in advice.sockets)
    lines = [
        f"measured: {source}",
        f"one decode step of one layer: batch {shape.batch}, {shape.q_heads} query and {shape.kv_heads} KV heads, "
        f"{shape.kv_len} tokens, {shape.dtype}",
        f"K and V: {shape.kv_bytes / 1e6:.1f} MB; nodes of each socket: {groups}",
        "",
        f"{'placement':<{width}}  {'ms':>9}  {'to best':>7}  bounded by",
        *(f"{row.label:<{width}}  {row.seconds * 1e3:>9.4g}  {row.seconds / best:>7.2f}  {row.limit}" for row in shown),
    ]
    lines += [f"and {len(left_out)} remote placements between these; --json has all"] if left_out else []
    return "\n".join([*lines, "", advice.sentence(), *advice.notes])
