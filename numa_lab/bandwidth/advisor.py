"""Advises where decode attention should run: on one node, on one socket, on all nodes together, or as an instance on each.

The times are predicted from measured bandwidths, as ``numa_lab.bandwidth.roofline`` says, so nothing is run. `numa-lab sweep` measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numa_lab.attention.shapes import AttentionShape
from numa_lab.bandwidth.node_bandwidths import PROBES, Groups, NodeBandwidths, load_probes
from numa_lab.bandwidth.roofline import Roofline, Strategy
from numa_lab.errors import InvalidInput, RunDirectoryError
from numa_lab.machine.shell_commands import to_paste
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.measurement.machine_facts import load_machine
from numa_lab.measurement.significance import LARGEST_TIE
from numa_lab.placement.binding import Binding, MemPolicy

MOST_REMOTE = 12  # rows of remote strategies that a table shows; of more the fastest and the slowest
NAMED_IN_TIE = 5
WAKING_SECONDS = 1e-5  # below this, starting and ending teams of threads takes as long as what is predicted

_SIMPLEST = ("single", "instances", "sharded", "remote")  # instances need no merge, and no kernel that shards


@dataclass(frozen=True)
class Advice:
    """Predicted placements of one shape, the fastest first.

    Attributes
    ----------
    shape
        The decode step.
    measured
        The bandwidths that it rests on: those of nodes that the process may use.
    sockets
        The nodes of each socket.
    strategies
        All placements, the fastest first.
    interleaved
        ``numactl --interleave``, to compare with; None with a single memory node.
    notes
        Sentences on what was not known or does not count.
    """

    shape: AttentionShape
    measured: NodeBandwidths
    sockets: Groups
    strategies: tuple[Strategy, ...]
    interleaved: Strategy | None
    notes: tuple[str, ...]

    @property
    def best(self) -> Strategy:
        """The fastest for which K and V fit."""
        return next(strategy for strategy in self.strategies if strategy.fits)

    @property
    def tied(self) -> tuple[Strategy, ...]:
        """The best, and those that fit and are predicted less than ``significance.LARGEST_TIE`` slower."""
        most = self.best.seconds * (1 + LARGEST_TIE)
        return tuple(strategy for strategy in self.strategies if strategy.fits and strategy.seconds < most)

    @property
    def choice(self) -> Strategy:
        """The simplest of those that tie: fewest nodes first, instances before shards, own memory before remote."""
        return min(self.tied, key=lambda tied: (len(tied.nodes), _SIMPLEST.index(tied.kind), tied.nodes))

    def sentence(self) -> str:
        """Return the advice as a sentence."""
        choice = self.choice
        time = f"{choice.seconds * 1e3:.3g} ms" if choice.seconds >= 1e-4 else f"{choice.seconds * 1e6:.3g} us"
        if len(self.strategies) == 1:
            return f"One node: nothing to choose. {choice.label} is predicted to take {time}."
        if len(self.tied) > 1:
            labels = [choice.label, *(strategy.label for strategy in self.tied if strategy is not choice)]
            more = f" and {len(labels) - NAMED_IN_TIE} more" if len(labels) > NAMED_IN_TIE else ""
            verdict = f"A tie within {LARGEST_TIE:.0%}: {', '.join(labels[:NAMED_IN_TIE])}{more}. "
            verdict += f"Take {choice.label}, the simplest: {time}"
        else:
            verdict = f"{choice.label} is predicted fastest: {time}"
        single = [strategy for strategy in self.strategies if strategy.kind == "single" and strategy.fits]
        compared = [(single[0], "one node")] if single and choice.kind != "single" else []
        compared += [(self.interleaved, f"interleaving ({self.interleaved.label})")] if self.interleaved else []
        gains = [_gain(other.seconds / choice.seconds, name) for other, name in compared]
        return ", ".join([verdict, *gains]) + "."

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
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


def _gain(ratio: float, name: str) -> str:
    """How much faster the choice is than another strategy, whose time is `ratio` times as long."""
    tie = 1 / (1 + LARGEST_TIE) < ratio < 1 + LARGEST_TIE
    return f"as fast as {name}" if tie else f"{ratio:.3g} times as fast as {name}"


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
        It is a ``Topology``, or one as JSON. Where None is given, sockets are inferred from latencies, and everything fits.
    measured
        Its bandwidths and latencies, from ``node_probes.probe_nodes`` or ``mlc.read_mlc``.

    Returns
    -------
    The placements with their predicted times, and which of them to take.

    Raises
    ------
    InvalidInput
        The nodes are not those of the topology, nothing was measured, K and V fit nowhere, or the shape is no decode step.
    """
    if isinstance(topology, Mapping):
        topology = Topology.from_json(topology)
    roofline = Roofline.of_topology(topology, measured) if topology else Roofline(measured)
    strategies = tuple(roofline.strategies(shape))
    if not any(strategy.fits for strategy in strategies):
        group_bytes = roofline.limit_bytes
        limited = f", and a control group lets this process hold {group_bytes / 1e9:.1f}" * math.isfinite(group_bytes)
        raise InvalidInput(
            f"K and V of {shape.kv_bytes / 1e9:.1f} GB fit nowhere, since the nodes hold "
            f"{', '.join(f'{count / 1e9:.1f}' for count in roofline.memory_bytes.values())} GB{limited}: "
            "choose a smaller batch or kv_len"
        )
    notes = _notes(roofline, emulated=topology is not None and topology.emulated)
    several = len(roofline.bandwidths.mem_nodes) > 1
    if several and strategies[0].seconds < WAKING_SECONDS:
        notes.append("Waking threads takes microseconds, which are not counted: for steps as short as this, measure.")
    return Advice(
        shape,
        roofline.bandwidths,
        roofline.contention.groups,
        strategies,
        roofline.interleaved(shape) if several else None,
        tuple(notes),
    )


def predict_bindings(
    steps: Iterable[tuple[Binding, AttentionShape]],
    topology: Topology,
    measured: NodeBandwidths,
    weights: Mapping[int, int] | None = None,
) -> list[Strategy | None]:
    """Predict decode steps under bindings.

    Parameters
    ----------
    steps
        Each binding with the shape that is computed under it.
    topology, measured
        As ``plan_placement`` takes them.
    weights
        How many pages in turn each node gets under weighted interleaving, where that is known.

    Returns
    -------
    A strategy for each step, in their order. It is None where it can't be said on which nodes the pages lie: where the first of
    several nodes has them, where CPUs of several nodes touch them, and where they go by weights that are not given. That K and V
    don't fit is said by the strategy, and is no error.

    Raises
    ------
    InvalidInput
        The nodes are not those of the topology, nothing was measured, or a shape is no decode step.
    """
    roofline = Roofline.of_topology(topology, measured)
    strategies: list[Strategy | None] = []
    for binding, shape in steps:
        mem_nodes = binding.mem_nodes or binding.cpu_nodes
        by_weight = weights if binding.policy is MemPolicy.WEIGHTED_INTERLEAVE else None
        in_turn = binding.policy is MemPolicy.INTERLEAVE or bool(by_weight)
        if binding.policy is MemPolicy.UNKNOWN or not mem_nodes or (len(mem_nodes) > 1 and not in_turn):
            strategies.append(None)
            continue
        cpu_nodes = binding.cpu_nodes or roofline.bandwidths.cpu_nodes
        strategies.append(roofline.binding(shape, cpu_nodes, mem_nodes, by_weight))
    return strategies


def _notes(roofline: Roofline, *, emulated: bool) -> list[str]:
    """What a reader has to know of the bandwidths, as sentences."""
    bandwidths, notes = roofline.bandwidths, []
    if emulated:
        notes.append("The machine is emulated: its bandwidths, and these times, mean nothing.")
    if len(bandwidths.nodes) > 1 and roofline.socket_of is None:
        how = "inferred from latencies" if bandwidths.latency_ns else "not known, so each node counts as one"
        notes.append(f"Sockets are {how}.")
    if without_cpus := set(bandwidths.mem_nodes) - set(bandwidths.cpu_nodes):
        notes.append(f"No CPUs read from node {format_cpulist(without_cpus)}: its memory alone counts.")
    if bandwidths.gaps:
        pairs = ", ".join(f"c{cpu}m{mem}" for cpu, mem in bandwidths.gaps)
        notes.append(f"Not measured: {pairs}; the median of alike pairs stands in.")
    if bandwidths.all_nodes_bytes_per_s is None and len(bandwidths.cpu_nodes) > 1:
        notes.append("All nodes reading at once were not measured: together they count as fast as each alone.")
    return notes


def read_run(run_dir: Path) -> tuple[Topology, NodeBandwidths]:
    """Return the topology of a run's machine, and the bandwidths that notebook 01 measured there.

    Raises
    ------
    RunDirectoryError
        The folder is no run directory, is damaged, or was measured without probes.
    """
    topology = load_machine(run_dir).topology
    if (probes := load_probes(run_dir)) is None:
        raise RunDirectoryError(
            f"{run_dir} has no {PROBES}, which `numa-lab sweep --no-probes` leaves out: "
            f"add it with `{to_paste('numa-lab', 'sweep', '--resume', run_dir)}` on that machine"
        )
    return topology, probes


def render(advice: Advice, source: str) -> str:
    """Write advice as a table for a terminal, the fastest placement first; `source` names what was measured."""
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
