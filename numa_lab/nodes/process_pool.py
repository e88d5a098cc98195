"""NUMAProcessPool: a process on each node, bound before its first instruction, and tensors that are passed without a copy.

Each process has its own interpreter, so that Python code of several nodes runs at once, which threads can't do.

Limits: processes are spawned, so what is run has to be importable (a function of a module, not one of a notebook's cells), and a
script needs its ``if __name__ == "__main__":``. Starting takes as long as importing torch. A tensor that is passed moves to
shared memory, once; one from ``empty`` or ``scatter`` lies there from the start.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
import torch.multiprocessing  # teaches pickle to pass tensors by shared memory
from torch import Tensor

from numa_lab.errors import MissingDependency, NodeUnavailable, NotPermitted
from numa_lab.machine import open_files
from numa_lab.machine.page_maps import PAGE_BYTES
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import read_topology
from numa_lab.nodes import shared_memory
from numa_lab.nodes.batch_attention import node_of
from numa_lab.placement import observation
from numa_lab.placement.binding import Binding, MemPolicy
from numa_lab.placement.receipt import Receipt, team_of

FILES = 16  # that a process needs in this one: queues, their locks and what wakes them

T = TypeVar("T")


class NUMAProcessPool(Executor):
    """A process per node, on its CPUs and preferring its memory, with a computing thread for each of its physical cores.

    Parameters
    ----------
    nodes
        All effective nodes where None is given.

    Raises
    ------
    NodeUnavailable
        A node does not exist, or may not be used.

    Examples
    --------
    >>> import torch
    >>> with NUMAProcessPool() as pool:
    ...     key = pool.empty((1, 8, 4096, 128), torch.bfloat16, numa_node=pool.nodes[0])
    ...     total = pool.submit(torch.sum, key).result()  # on that node, where it lies
    """

    def __init__(self, nodes: Sequence[int] | None = None) -> None:
        self._topology = read_topology()
        self.nodes = tuple(self._topology.effective_nodes if nodes is None else nodes)
        if not self.nodes:
            raise NodeUnavailable(
                f"no node has both CPUs and memory that this process may use: allowed are CPUs "
                f"{format_cpulist(self._topology.allowed_cpus) or 'none'}"
            )
        for node in self.nodes:
            self._topology.require_effective(node)
        self._lock = threading.Lock()
        self._busy: Counter[int] = Counter()
        self._refusals: dict[int, str] = {}
        self._closed = False
        self._processes = {node: self._start(node) for node in self.nodes}

    def submit(self, fn: Callable[..., T], /, *args: Any, numa_node: int | None = None, **kwargs: Any) -> Future[T]:  # type: ignore[override]
        """Run a function in the process of a node.

        Parameters
        ----------
        fn, *args, **kwargs
            The call; everything is pickled, tensors as handles of shared memory.
        numa_node
            Where; None for the node on which most of the tensors among `args` lie, and else the least busy one.

        Raises
        ------
        NodeUnavailable
            The pool has no process on that node.
        LimitReached
            /dev/shm has no room for the tensors among the arguments, or too many files are open. The future raises it where the
            process finds no room for what the function returns.
        BrokenProcessPool
            The node's process has ended, as one does that is killed: ``restart`` starts another. So do the futures of what it was
            about.
        RuntimeError
            The pool was shut down.
        """
        if numa_node is not None:
            self._require(numa_node)
        shared_memory.require_for(args, kwargs)
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            node = node_of(args, self.nodes, self._topology) if numa_node is None else numa_node
            node = min(self.nodes, key=self._busy.__getitem__) if node is None else node
            future = self._processes[node].submit(_call, fn, *args, **kwargs)
            self._busy[node] += 1
        future.add_done_callback(lambda _future: self._done(node))
        return future

    def empty(self, shape: Sequence[int], dtype: torch.dtype, numa_node: int) -> Tensor:
        """A tensor of zeros in shared memory of a node: every process sees the same.

        Raises
        ------
        NodeUnavailable
            The pool has no process on that node.
        LimitReached
            /dev/shm has no room for it, or too many files are open.
        """
        shared_memory.require(math.prod(shape) * dtype.itemsize, 1)
        return _mapped(self.submit(_zeros, tuple(shape), dtype, numa_node=numa_node).result())

    def scatter(self, tensors: Sequence[Tensor], nodes: Sequence[int] | None = None) -> list[Tensor]:
        """Copies of tensors in shared memory of `nodes` in turn (all where None is given).

        Raises
        ------
        LimitReached
            /dev/shm has no room for them and for the tensors themselves, or too many files are open.
        """
        given = sum(tensor.nbytes for tensor in tensors if not tensor.is_shared())
        shared_memory.require(given + sum(tensor.nbytes for tensor in tensors), 2 * len(tensors))
        turns = itertools.cycle(nodes or self.nodes)
        futures = [self.submit(_copy, tensor, numa_node=node) for tensor, node in zip(tensors, turns, strict=False)]
        return [_mapped(future.result()) for future in futures]

    def restart(self, numa_node: int) -> None:
        """Start the process of a node anew; what it was about is lost.

        Raises
        ------
        NodeUnavailable
            The pool has no process on that node.
        """
        self._require(numa_node)
        self._processes[numa_node].shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._processes[numa_node] = self._start(numa_node)

    def receipt(self) -> dict[int, Receipt]:
        """For each node what its process is granted, and where its team is, when its turn comes."""
        looks = {node: self.submit(observation.look, self._topology, numa_node=node) for node in self.nodes}
        receipts = {}
        for node, look in looks.items():
            granted, threads, notes = look.result()
            refusal = (self._refusals[node],) if node in self._refusals else ()
            requested = Binding((node,), (node,), MemPolicy.PREFERRED)
            team = team_of(len(self._topology.cpus_for([node])), threads)
            receipts[node] = Receipt(requested, granted, threads, {}, {}, (*notes, *refusal), team=team)
        return receipts

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Finish what was submitted and end all processes; nothing can be submitted afterwards."""
        with self._lock:
            self._closed = True
        for process in self._processes.values():
            process.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _require(self, node: int) -> None:
        if node not in self.nodes:
            raise NodeUnavailable(f"node {node}: this pool has processes on nodes {format_cpulist(self.nodes)}")

    def _start(self, node: int) -> ProcessPoolExecutor:
        """Start a process under its binding: what it inherits from the thread that starts it holds from its first instruction."""
        threads = len(self._topology.cpus_for([node]))
        shared_memory.require(PAGE_BYTES, 0)  # for the locks of its queues
        open_files.require(FILES, f"a process on node {node}")
        resource_tracker.ensure_running()  # or it would be bound, too
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,))
        binding = Binding((node,), (node,), MemPolicy.PREFERRED)
        try:
            with binding.bind(self._topology):
                process.submit(int)
        except (NotPermitted, MissingDependency) as error:
            self._refusals[node] = str(error)
            with Binding((node,)).bind(self._topology):  # its memory is then where it first touches it
                process.submit(int)
        return process

    def _done(self, node: int) -> None:
        with self._lock:
            self._busy[node] -= 1


def _call(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """In the process: call a function, and share what it returns while an error can still be told."""
    result: T = shared_memory.share(fn(*args, **kwargs))
    return result


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _mapped(tensor: Tensor) -> Tensor:
    """Touch a tensor that another process has filled, so that ``memory.locate`` sees its pages from here."""
    if tensor.numel():
        tensor.view(-1).view(torch.uint8)[::PAGE_BYTES].sum()
    return tensor
