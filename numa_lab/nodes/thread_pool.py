"""NUMAThreadPool: work over all nodes at once, each piece of it on the node where its memory lies.

Each node has a queue, and leader threads that take tasks from it (see ``numa_lab.nodes.node_threads``).

Limits: threads of one process share the interpreter lock. torch and the compiled kernels release it while they compute,
and Python code between them does not: for long-running services take a process per node (``numactl``).

Ctrl-C, or another signal whose handler raises, may come in any call, and the pool goes on to serve. Tasks that run for that call run to
their end, and hold what they use; tasks of it that have not begun are not run. A function that was given to ``submit`` runs as long as
its future is not cancelled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from numa_lab.attention import addresses
from numa_lab.attention.gqa import gqa_attention
from numa_lab.attention.graphs import between_graphs
from numa_lab.errors import InvalidInput
from numa_lab.nodes import batch_attention
from numa_lab.nodes.batch_attention import ON_REMOTE, Tally, node_of
from numa_lab.nodes.node_threads import NodeTeam, least_busy, run_each
from numa_lab.placement import memory, recycled_memory
from numa_lab.placement.pinned_team import topology_outside
from numa_lab.placement.receipt import Receipt

T = TypeVar("T")


class NUMAThreadPool:
    """Leader threads on every effective node, each with an OpenMP team of its own, pinned to its share of the cores.

    Parameters
    ----------
    num_threads_per_node
        How many leader threads each node has, and thus how many tasks run there at a time. The node's physical cores are divided
        among them, and each task computes with its leader's share. One leader with all cores suits attention on large inputs;
        several leaders suit many small ones.
    on_remote
        Where ``parallel_gqa_compute`` computes an input. ``compute_there``: on the node where its K and V lie. ``migrate``: on
        the least busy node, to which their pages are moved before. ``ignore``: on the least busy node, which reads
        them over the link. The notes of ``receipts`` count the inputs of each kind.

    Raises
    ------
    InvalidInput
        A node has fewer cores than leaders, or `on_remote` is none of these.
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

    def __init__(self, num_threads_per_node: int = 1, on_remote: str = "compute_there") -> None:
        if on_remote not in ON_REMOTE:
            raise InvalidInput(f"on_remote={on_remote!r}: expected one of {', '.join(ON_REMOTE)}")
        self._on_remote = on_remote
        self._topology = topology_outside()
        self.nodes = self._topology.require_effective_nodes()
        cores = {node: self._topology.cpus_for([node]) for node in self.nodes}
        for node, cpus in cores.items():
            if not 1 <= num_threads_per_node <= len(cpus):
                raise InvalidInput(
                    f"num_threads_per_node={num_threads_per_node}: expected 1 to {len(cpus)}, the physical cores of node {node}"
                )
        self._teams: dict[int, NodeTeam] = {}
        try:
            for node, cpus in cores.items():
                self._teams[node] = NodeTeam(node, cpus, leaders=num_threads_per_node, topology=self._topology)
        except BaseException:  # an interrupt, whose traceback may be kept, and by it this pool
            self.shutdown(wait=False)
            raise
        self._tally = Tally()

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
        """Compute grouped-query attention of each input, on the node that `on_remote` says.

        Parameters
        ----------
        queries, keys, values
            For each input ``[batch, q_heads, q_len, head_dim]`` and twice ``[batch, kv_heads, kv_len, head_dim]``. Inputs
            that were all made by one thread usually lie on one node: ``scatter`` spreads them.
        num_runs
            How often each input is computed, for timing.

        Returns
        -------
        list of Tensor
            For each input ``[batch, q_heads, q_len, head_dim]``, in the inputs' order.

        Raises
        ------
        InvalidInput
            The lists differ in length, or `num_runs` is not positive. For an input that makes no sense this raises what
            ``gqa_attention`` raises, after all others have been computed.
        """
        if not len(queries) == len(keys) == len(values):
            raise InvalidInput(
                f"{len(queries)} queries, {len(keys)} keys and {len(values)} values: expected as many of each"
            )
        if num_runs < 1:
            raise InvalidInput(f"num_runs={num_runs}: expected at least 1")

        # A mode or transform of this thread would not see what leaders compute.
        if addresses.watched(*queries, *keys, *values):
            return [
                [gqa_attention(query, key, value, enable_gqa=True) for _ in range(num_runs)][-1]
                for query, key, value in zip(queries, keys, values, strict=True)
            ]
        return batch_attention.compute(
            self._teams, self._topology, queries, keys, values,
            num_runs=num_runs, on_remote=self._on_remote, tally=self._tally,
        )  # fmt: skip

    @between_graphs
    def submit(self, fn: Callable[..., T], *args: Any, numa_node: int | None = None, **kwargs: Any) -> Future[T]:
        """Run a function on a node; new tensors that it makes lie there (see ``numa_lab.placement.recycled_memory``).

        Parameters
        ----------
        fn, *args, **kwargs
            The call. The function may not wait for another task of this pool.
        numa_node
            The node. None means the node on which most of the tensors among `args` lie; without tensors, the least busy node.

        Returns
        -------
        Future
            Its methods survive interrupts. To wait for several, ask one after the other for its ``result``: an interrupt of
            ``concurrent.futures.wait`` or ``as_completed`` may leave locks held on which the pool waits (see
            ``numa_lab.nodes.futures``). Where ``submit`` itself is interrupted there is no future, and the function may run or not.

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
        team = least_busy(self._teams.values()) if node is None else self._teams[node]
        return team.submit(_call_on_new_memory, team.node, fn, *args, **kwargs)

    def execute_on_numa(self, fn: Callable[..., T], *args: Any, numa_node: int, **kwargs: Any) -> T:
        """Run a function on a node, as ``submit``, wait for it, and return its result; what it raises is raised here."""
        future = self.submit(fn, *args, numa_node=numa_node, **kwargs)
        try:
            return future.result()
        finally:
            future.cancel()  # where an interrupt came before it began
            del future  # which the traceback of an error would hold, and the error it

    def scatter(self, tensors: Sequence[Tensor], nodes: Sequence[int] | None = None) -> list[Tensor]:
        """Copy tensors to nodes in turn: the first tensor to the first node, and so on.

        Scatter keys and values in the same order, so that both of an input lie on one node.

        Parameters
        ----------
        tensors
            Of any shape and dtype.
        nodes
            All nodes of the pool where None is given.

        Returns
        -------
        list of Tensor
            The copies, each in memory that is bound to its node.

        Raises
        ------
        NodeUnavailable
            A node has too little free memory.
        """

        def copy(tensor: Tensor, node: int) -> Tensor:
            return memory.empty(tensor.shape, tensor.dtype, node).copy_(tensor)

        targets = list(itertools.islice(itertools.cycle(nodes or self.nodes), len(tensors)))
        for node in targets:
            self._topology.require_effective(node)
        return run_each(
            (self._teams[node], partial(copy, tensor, node)) for tensor, node in zip(tensors, targets, strict=True)
        )

    def receipts(self) -> dict[int, Receipt]:
        """Return for each node what its leaders and their teams are granted, and where they are now; no task is waited for.

        The notes count what became of the inputs of ``parallel_gqa_compute`` (see `on_remote`). Where tensors lie the receipts don't
        say; ``numa_lab.placement.page_location.locate`` does. The memory policy is the one that was granted when the leaders entered
        their teams.

        Returns
        -------
        dict
            ``{node: receipt}``.
        """
        return {
            node: Receipt.of_team(
                node, len(team.cpus), team.look(), notes=(*filter(None, [team.refusal]), *self._tally.notes(node))
            )
            for node, team in self._teams.items()
        }

    receipt = receipts  # an older name

    def shutdown(self, wait: bool = True) -> None:
        """Finish what was submitted and end all threads, with `wait` before returning; nothing can be submitted afterwards."""
        for team in self._teams.values():
            team.shutdown(wait=False)
        for team in self._teams.values() if wait else ():
            team.shutdown()


def _call_on_new_memory(node: int, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Call a function on a leader of a node, after malloc has given back its free memory.

    Other threads may have touched that memory on another node, and the function would get it for its tensors.
    """
    recycled_memory.give_back(node, always=True)
    return fn(*args, **kwargs)
