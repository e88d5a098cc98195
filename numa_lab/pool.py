"""NUMAThreadPool: work over all nodes at once, each piece on the node where its memory lies.

Each node has a queue, which its leader threads serve (see ``numa_lab.queues``).

Limits: threads of one process share the interpreter lock. torch and the compiled kernels release it while they compute,
Python code between them does not: for long-running services take a process per node (``numactl``).
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from numa_lab import libnuma, memory, proof, recycled
from numa_lab.attention import addresses
from numa_lab.attention.autocast import Settings
from numa_lab.attention.gqa import gqa_attention
from numa_lab.attention.graphs import between_graphs
from numa_lab.binding import Binding, MemPolicy
from numa_lab.commands import to_paste
from numa_lab.errors import InvalidInput, NodeUnavailable
from numa_lab.limits import Limits
from numa_lab.measured import Measured, socket_groups
from numa_lab.node_team import NodeTeam
from numa_lab.placement import usable
from numa_lab.queues import NodeQueues
from numa_lab.receipt import Receipt, team_of
from numa_lab.stealing import Reads
from numa_lab.sysfs import format_cpulist
from numa_lab.topology import Topology, read_topology

T = TypeVar("T")
Homes = list[tuple[Tensor, int | None]]  # tensors, each with the node of most of its pages
ON_REMOTE = ("compute_there", "migrate", "ignore")


@dataclass(eq=False)
class _Input:
    """One of a batch."""

    query: Tensor
    key: Tensor
    value: Tensor
    homes: Homes  # of key and value
    node: int | None  # that computes it; None for the least busy one
    reads: Reads | None  # given where another node may take it


class NUMAThreadPool:
    """Leader threads on every effective node, each with an OpenMP team of its own, pinned to its share of the cores.

    Parameters
    ----------
    num_threads_per_node
        Leader threads per node: so many tasks run on a node at a time. The node's physical cores are divided among
        them, and each task computes with its leader's share. One leader with all cores suits attention on large inputs;
        several suit many small ones.
    on_remote
        Where ``parallel_gqa_compute`` computes an input. ``compute_there``: on the node where its K and V lie. ``migrate``: on
        the least busy node, to which their pages are moved before. ``ignore``: on the least busy node, which reads
        them over the link. ``receipt`` counts them.
    measured
        Bandwidths between the nodes, of ``probes.probe_nodes``, a run's probes.json or ``mlc.read_mlc``. With them a leader whose
        queue is empty takes an input that waits for another node, where ``numa_lab.stealing`` predicts that it saves time. Without
        them it takes none: memory that its own node already reads at full speed is not read faster by two. What
        ``submit`` is given is never taken, since it is not known what it reads.

    Raises
    ------
    InvalidInput
        A node has fewer cores than leaders, `on_remote` is none of these, or `measured` is of other nodes, or is given where no
        input has a node of its own that it waits for.
    NodeUnavailable
        This process may use no node's CPUs and memory together.

    Examples
    --------
    >>> import torch
    >>> queries = [torch.randn(1, 32, 1, 128) for _ in range(4)]
    >>> keys, values = ([torch.randn(1, 8, 64, 128) for _ in range(4)] for _ in range(2))
    >>> with NUMAThreadPool() as thread_pool:
    ...     outputs = thread_pool.parallel_gqa_compute(queries, keys, values)
    """

    def __init__(
        self, num_threads_per_node: int = 1, on_remote: str = "compute_there", measured: Measured | None = None
    ) -> None:
        if on_remote not in ON_REMOTE:
            raise InvalidInput(f"on_remote={on_remote!r}: expected one of {', '.join(ON_REMOTE)}")
        if measured is not None and on_remote != "compute_there":
            raise InvalidInput(
                f"measured with on_remote={on_remote!r}: expected on_remote='compute_there', since otherwise no input waits "
                "for a node of its own, from which another could take it; or leave measured out"
            )
        self._on_remote = on_remote
        self._topology = read_topology()
        self.nodes = self._topology.effective_nodes
        if not self.nodes:
            raise NodeUnavailable(
                f"no node has both CPUs and memory that this process may use: allowed are CPUs "
                f"{format_cpulist(self._topology.allowed_cpus) or 'none'} and memory of nodes "
                f"{format_cpulist(self._topology.allowed_nodes) or 'none'}"
            )
        limits = _limits(self._topology, self.nodes, measured) if measured is not None else None
        shares = {node: _shares(self._topology, node, num_threads_per_node) for node in self.nodes}
        self._teams = {
            node: [NodeTeam(node, cpus, f"numa-node-{node}-{number}") for number, cpus in enumerate(parts)]
            for node, parts in shares.items()
        }
        self._queues = NodeQueues(self._teams, limits)
        self._readable = frozenset(limits.measured.mem_nodes if limits else ())
        self._lock = threading.Lock()
        self._inputs: Counter[tuple[int, str]] = Counter()  # by node and by what was done with them

    def __enter__(self) -> NUMAThreadPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    @between_graphs
    def parallel_gqa_compute(
        self, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], num_runs: int = 1
    ) -> list[Tensor]:
        """Grouped-query attention of each input on the node where its K and V lie; the outputs in the inputs' order.

        Parameters
        ----------
        queries, keys, values
            For each input ``[batch, q_heads, q_len, head_dim]`` and twice ``[batch, kv_heads, kv_len, head_dim]``. Inputs
            that were all made by one thread usually lie on one node: ``scatter`` spreads them.
        num_runs
            How often each is computed, for timing.

        Raises
        ------
        InvalidInput
            The lists differ in length, or `num_runs` is not positive. An input that makes no sense raises what
            ``gqa_attention`` raises, after all others have been computed.
        """
        if not len(queries) == len(keys) == len(values):
            raise InvalidInput(
                f"{len(queries)} queries, {len(keys)} keys and {len(values)} values: expected as many of each"
            )
        if num_runs < 1:
            raise InvalidInput(f"num_runs={num_runs}: expected at least 1")

        if addresses.watched(
            *queries, *keys, *values
        ):  # by a mode or transform of this thread, which leaders know nothing of
            return [
                [gqa_attention(query, key, value, enable_gqa=True) for _ in range(num_runs)][-1]
                for query, key, value in zip(queries, keys, values, strict=True)
            ]
        inputs, lie = [], dict(_homes((*keys, *values)))
        for query, key, value in zip(queries, keys, values, strict=True):
            homes = [(tensor, lie[tensor]) for tensor in (key, value) if isinstance(tensor, Tensor) and tensor in lie]
            home = _most(homes) if self._on_remote == "compute_there" else None
            node = _nearest(home, self.nodes, self._topology)
            nbytes = sum(tensor.nbytes for tensor, _ in homes)
            reads = None if home is None or home not in self._readable else Reads(home, num_runs * nbytes)
            inputs.append(_Input(query, key, value, homes, node, reads))
        # Whether gradients are wanted and what autocast does are settings of this thread; leaders have their own.
        compute, parts = partial(self._compute, num_runs, Settings()), self._divided(inputs)
        tasks = [
            self._queues.submit(
                compute, ([inputs[at] for at in part],), node=inputs[part[0]].node, reads=inputs[part[0]].reads
            )
            for part in parts
        ]
        wait(tasks)
        found_at: dict[int, Tensor | Exception] = {}
        for part, task in zip(parts, tasks, strict=True):
            found_at.update(zip(part, task.result(), strict=True))
        outputs = []
        for _, output in sorted(found_at.items()):
            if isinstance(output, Exception):
                raise output
            outputs.append(output)
        return outputs

    def _divided(self, inputs: Sequence[_Input]) -> list[list[int]]:
        """Places of the inputs that are one task: those that a node's single leader computes one after the other anyway.

        Handing each over by itself takes a hundred microseconds beside attention, which leaves no line of code in the caches.
        """
        found: dict[object, list[int]] = defaultdict(list)
        for place, one in enumerate(inputs):
            alone = one.node is None or one.reads or len(self._teams[one.node]) > 1
            found[("alone", place) if alone else one.node].append(place)
        return list(found.values())

    def _compute(self, num_runs: int, settings: Settings, inputs: Sequence[_Input]) -> list[Tensor | Exception]:
        """On a leader: the output of each input, or what it raised, when all have been computed."""
        node = self._current_node()
        outputs: list[Tensor | Exception] = []
        done: Counter[tuple[int, str]] = Counter()
        with settings.applied():
            for one in inputs:
                try:
                    done.update((node, what) for what in self._prepare(one, node))
                    for _ in range(num_runs):
                        output = gqa_attention(one.query, one.key, one.value, enable_gqa=True)
                    outputs.append(output)
                except Exception as error:
                    outputs.append(error)
        with self._lock:
            self._inputs.update(done)
        return outputs

    def _prepare(self, one: _Input, node: int) -> list[str]:
        """On a leader of a node: move an input here where that is wanted, and say what became of it."""
        away = [tensor for tensor, home in one.homes if home not in (node, None)]
        if away and self._on_remote == "migrate":
            for tensor in away:
                memory.migrate(tensor, node)
        what = {"migrate": "migrated"}.get(self._on_remote, "read over a link") if away else "computed where they lay"
        return [what] if one.node in (node, None) else [what, f"taken from node {one.node}"]

    @between_graphs
    def submit(self, fn: Callable[..., T], *args: Any, numa_node: int | None = None, **kwargs: Any) -> Future[T]:
        """Run a function on a node; new tensors that it makes lie there (see ``numa_lab.recycled``).

        Parameters
        ----------
        fn, *args, **kwargs
            The call. It may not wait for another task of this pool.
        numa_node
            Where; None for the node on which most of the tensors among `args` lie, and else the least busy one.

        Raises
        ------
        NodeUnavailable
            The node does not exist, or is not effective.
        RuntimeError
            The pool was shut down.
        NumaLabError
            The process was forked since: threads stay with the parent.
        """
        if numa_node is not None:
            self._topology.require_effective(numa_node)
        node = node_of(args, self.nodes, self._topology) if numa_node is None else numa_node
        return self._queues.submit(self._call_on_new_memory, (fn, *args), kwargs, node=node)

    def _call_on_new_memory(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """On a leader: malloc gives back first what others may have touched and the function would get for its tensors."""
        recycled.give_back(self._current_node(), always=True)
        return fn(*args, **kwargs)

    def _current_node(self) -> int:
        """The node whose leader the calling thread is."""
        return next(node for node, teams in self._teams.items() if any(team.is_current() for team in teams))

    def execute_on_numa(self, fn: Callable[..., T], *args: Any, numa_node: int, **kwargs: Any) -> T:
        """Run a function on a node and wait for its result; what it raises is raised here."""
        return self.submit(fn, *args, numa_node=numa_node, **kwargs).result()

    def scatter(self, tensors: Sequence[Tensor], nodes: Sequence[int] | None = None) -> list[Tensor]:
        """Copies of tensors on `nodes` in turn (all where None is given), bound there: the first on the first, and so on.

        Scatter keys and values in the same order, so that both of an input lie on one node.

        Raises
        ------
        NodeUnavailable
            A node has too little free memory.
        """

        def copy(tensor: Tensor, node: int) -> Tensor:
            return memory.empty(tensor.shape, tensor.dtype, node).copy_(tensor)

        turns = itertools.cycle(nodes or self.nodes)
        futures = []
        for tensor, node in zip(tensors, turns, strict=False):
            self._topology.require_effective(node)
            futures.append(self._queues.submit(copy, (tensor, node), node=node))
        wait(futures)
        return [future.result() for future in futures]

    def receipt(self) -> dict[int, Receipt]:
        """For each node what its leaders and their teams are granted, and where they are, when their turn comes.

        Its notes count what became of the inputs of ``parallel_gqa_compute`` (see `on_remote`), and those that were taken from
        another node's queue. Where tensors lie it does not say (``numa_lab.memory.locate`` does). A leader is asked before
        it takes what waits.
        """
        looks = {node: self._queues.submit_to_each(node, proof.look, self._topology) for node in self.nodes}
        receipts = {}
        for node, futures in looks.items():
            granted, threads, notes = zip(*(future.result() for future in futures), strict=True)
            refusals = (team.refusal for team in self._teams[node] if team.refusal)
            with self._lock:
                told = [f"inputs {what}: {count}" for (at, what), count in sorted(self._inputs.items()) if at == node]
            found = tuple(itertools.chain.from_iterable(threads))
            receipts[node] = Receipt(
                Binding((node,), (node,), MemPolicy.PREFERRED), granted[0], found,
                {}, {}, tuple(dict.fromkeys((*itertools.chain.from_iterable(notes), *refusals, *told))),
                team=team_of(sum(len(team.cpus) for team in self._teams[node]), found),
            )  # fmt: skip
        return receipts

    def shutdown(self, wait: bool = True) -> None:
        """Finish what was submitted and end all threads; nothing can be submitted afterwards."""
        self._queues.shutdown(wait=wait)


def node_of(args: Sequence[Any], nodes: Sequence[int], topology: Topology) -> int | None:
    """Of `nodes` the one whose CPUs are nearest to most of the tensors among `args`; None where nothing tells."""
    return _nearest(_most(_homes(args)), nodes, topology)


def _homes(args: Sequence[Any]) -> Homes:
    """The tensors among `args` that lie in this machine's memory, each with its node."""
    tensors = [one for one in args if isinstance(one, Tensor) and addresses.as_stored(one) and one.nbytes]
    if not libnuma.available():  # then nothing tells
        return [(tensor, None) for tensor in tensors]
    return list(zip(tensors, memory.homes(tensors), strict=True))


def _most(homes: Homes) -> int | None:
    """The node on which most of the tensors lie; None where nothing tells."""
    weight: Counter[int] = Counter()
    for tensor, home in homes:
        if home is not None:
            weight[home] += tensor.nbytes
    return weight.most_common(1)[0][0] if weight else None


def _nearest(home: int | None, nodes: Sequence[int], topology: Topology) -> int | None:
    if home is None:
        return None
    return min(nodes, key=lambda node: (node != home, topology.distance(node, home) or 0))


def _limits(topology: Topology, nodes: Sequence[int], measured: Measured) -> Limits:
    """What the machine's memory allows, of what this process may use of it."""
    measured, socket_of, _ = usable(topology.to_json(), measured)
    if unknown := set(nodes) - set(measured.cpu_nodes):
        raise InvalidInput(
            f"measured has no bandwidth of the CPUs of node {format_cpulist(unknown)}, and this pool computes there: "
            f"measure this machine with `{to_paste('numa-lab', 'probe')}`"
        )
    return Limits(measured, socket_groups(measured, socket_of))


def _shares(topology: Topology, node: int, leaders: int) -> list[tuple[int, ...]]:
    """The node's physical cores divided among its leaders, neighbours together."""
    cores = topology.cpus_for([node])
    if not 1 <= leaders <= len(cores):
        raise InvalidInput(
            f"num_threads_per_node={leaders}: expected 1 to {len(cores)}, the physical cores of node {node}"
        )
    return [cores[len(cores) * i // leaders : len(cores) * (i + 1) // leaders] for i in range(leaders)]
