"""Attention of a batch over nodes: which node computes which input, and what is done with inputs that lie elsewhere."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor

from numa_lab.attention import addresses
from numa_lab.attention.autocast import Settings
from numa_lab.attention.gqa import gqa_attention
from numa_lab.machine import libnuma
from numa_lab.machine.topology import Topology
from numa_lab.nodes.node_threads import NodeTeam, least_busy, run_each
from numa_lab.placement import page_location

ON_REMOTE = ("compute_there", "migrate", "ignore")
Homes = list[tuple[Tensor, int | None]]  # tensors, each with the node on which most of its pages lie


@dataclass(frozen=True, eq=False)
class _Input:
    """One input of a batch."""

    query: Tensor
    key: Tensor
    value: Tensor
    homes: Homes  # of key and value


class Tally:
    """A count of the inputs that each node has computed, by what was done with them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer that runs while it is held may compute a batch itself
        self._counts: Counter[tuple[int, str]] = Counter()

    def add(self, node: int, what: str) -> None:
        """Count an input that a node computes, by what was done with it."""
        with self._lock:
            self._counts[node, what] += 1

    def notes(self, node: int) -> list[str]:
        """Return the counts of a node, as notes for a receipt."""
        with self._lock:
            counts = sorted(self._counts.items())
        return [f"inputs {what}: {count}" for (counted, what), count in counts if counted == node]


def compute(
    teams: Mapping[int, NodeTeam],
    topology: Topology,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    num_runs: int,
    on_remote: str,
    tally: Tally,
) -> list[Tensor]:
    """Compute the attention of each input; see ``NUMAThreadPool.parallel_gqa_compute``.

    What the calling thread has set (gradients, inference mode, autocast) holds on the nodes too.

    Parameters
    ----------
    teams
        That of each node.
    topology
        Of this machine.
    queries, keys, values
        Equally many of each.
    num_runs
        How often each input is computed.
    on_remote
        One of ``ON_REMOTE``.
    tally
        Counts what is done with each input.

    Returns
    -------
    list of Tensor
        The outputs, in the inputs' order.

    Raises
    ------
    Exception
        The first that an input raises, once all have been computed.
    """
    home_of = dict(homes((*keys, *values)))
    inputs: list[_Input] = []
    parts = defaultdict[tuple[int | None, int | None], list[int]](list)  # numbers of the inputs that are one task
    for number, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
        key_value = [
            (tensor, home_of[tensor]) for tensor in (key, value) if isinstance(tensor, Tensor) and tensor in home_of
        ]
        inputs.append(_Input(query, key, value, key_value))
        node = _nearest(_most(key_value), tuple(teams), topology) if on_remote == "compute_there" else None
        # Inputs that a node's single leader computes one after the other anyway are one task: handing each over by itself takes a
        # hundred microseconds beside attention, which leaves no line of code in the caches.
        alone = node is None or teams[node].leaders > 1
        parts[node, number if alone else None].append(number)
    run = partial(_run, Settings(), num_runs, on_remote, tally)
    calls = (
        (team := least_busy(teams.values()) if node is None else teams[node],
         partial(run, team.node, [inputs[number] for number in numbers]))
        for (node, _), numbers in parts.items()
    )  # fmt: skip
    computed: dict[int, Tensor | Exception] = {}
    for numbers, outputs in zip(parts.values(), run_each(calls), strict=True):
        computed.update(zip(numbers, outputs, strict=True))
    in_order = [computed[number] for number in range(len(inputs))]
    for output in in_order:
        if isinstance(output, Exception):
            raise output
    return cast(list[Tensor], in_order)


def _run(
    settings: Settings, num_runs: int, on_remote: str, tally: Tally, node: int, inputs: Sequence[_Input]
) -> list[Tensor | Exception]:
    """Compute inputs on a leader of a node; return for each its output, or the exception that it raised."""
    outputs: list[Tensor | Exception] = []
    with settings.applied():
        for item in inputs:
            try:
                tally.add(node, _bring(item, node, on_remote))
                for _ in range(num_runs):
                    output = gqa_attention(item.query, item.key, item.value, enable_gqa=True)
                outputs.append(output)
            except Exception as error:
                outputs.append(error)
    return outputs


def _bring(item: _Input, node: int, on_remote: str) -> str:
    """Move an input to the node that computes it, where `on_remote` says so; return what was done with it."""
    away = [tensor for tensor, home in item.homes if home not in (node, None)]
    if not away:
        return "computed where they lay"
    if on_remote != "migrate":
        return "read over a link"
    for tensor in away:
        page_location.migrate(tensor, node)
    return "migrated"


def node_of(args: Sequence[Any], nodes: Sequence[int], topology: Topology) -> int | None:
    """Return that one of `nodes` whose CPUs are nearest to most of the tensors among `args`; None where that is not known."""
    return _nearest(_most(homes(args)), nodes, topology)


def homes(args: Sequence[Any]) -> Homes:
    """Return the tensors among `args` that lie in this machine's memory, each with its node."""
    tensors = [arg for arg in args if isinstance(arg, Tensor) and addresses.as_stored(arg) and arg.nbytes]
    if not libnuma.available():  # then nobody knows
        return [(tensor, None) for tensor in tensors]
    return list(zip(tensors, page_location.homes(tensors), strict=True))


def _most(homes: Homes) -> int | None:
    """Return the node on which most bytes of the tensors lie; None where that is not known."""
    weight: Counter[int] = Counter()
    for tensor, home in homes:
        if home is not None:
            weight[home] += tensor.nbytes
    return weight.most_common(1)[0][0] if weight else None


def _nearest(home: int | None, nodes: Sequence[int], topology: Topology) -> int | None:
    if home is None:
        return None
    return min(nodes, key=lambda node: (node != home, topology.distance(node, home) or 0))
