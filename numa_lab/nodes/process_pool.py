"""NUMAProcessPool: a process on each node, bound before its first instruction, and tensors that are passed without a copy.

Each process has its own interpreter, so that Python code of several nodes runs at once, which threads can't do.

Limits: processes are spawned, so the functions that they run have to be importable (from a module, and not from a notebook's cells),
and a script needs its ``if __name__ == "__main__":``. Starting takes as long as importing torch. A tensor that is passed is moved to
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
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes import shared_memory
from numa_lab.nodes.batch_attention import node_of
from numa_lab.placement import observation
from numa_lab.placement.binding import Binding, MemPolicy
from numa_lab.placement.receipt import Receipt

FILES = 16  # open files that a process needs in this one: for queues, their locks and what wakes them

T = TypeVar("T")


class NUMAProcessPool(Executor):
    """A process for each node, on its CPUs and preferring its memory, with a computing thread for each of its physical cores.

    Parameters
    ----------
    nodes
        All effective nodes where None is given.

    Raises
    ------
    NodeUnavailable
        A node does not exist, or may not be used; or there is none.

    Examples
    --------
    >>> import torch
    >>> with NUMAProcessPool() as pool:
    ...     key = pool.empty((1, 8, 4096, 128), torch.bfloat16, numa_node=pool.nodes[0])
    ...     total = pool.submit(torch.sum, key).result()  # on that node, where it lies
    """

    def __init__(self, nodes: Sequence[int] | None = None) -> None:
        self._topology = read_topology()
        self.nodes = self._topology.require_effective_nodes(nodes)
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
            The node. None means the node on which most of the tensors among `args` lie; without tensors, the least busy node.

        Returns
        -------
        Future
            Of what the function returns, tensors in shared memory.

        Raises
        ------
        NodeUnavailable
            The pool has no process on that node.
        LimitReached
            /dev/shm has no room for the tensors among the arguments, or too many files are open. The future raises it where the
            process finds no room for what the function returns.
        BrokenProcessPool
            The node's process has ended, as one does that is killed: ``restart`` starts another. The futures of what the process was
            doing raise the same.
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
        """Return a tensor of zeros in shared memory on a node; all processes see the same memory.

        Parameters
        ----------
        shape, dtype
            As for ``torch.zeros``.
        numa_node
            The node on which the memory lies.

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
        """Copy tensors to shared memory on nodes in turn: the first tensor to the first node, and so on.

        Parameters
        ----------
        tensors
            Of any shape and dtype.
        nodes
            All nodes of the pool where None is given.

        Returns
        -------
        list of Tensor
            The copies.

        Raises
        ------
        LimitReached
            /dev/shm has no room for them and for the tensors themselves, or too many files are open.
        """
        to_share = sum(tensor.nbytes for tensor in tensors if not tensor.is_shared())
        shared_memory.require(to_share + sum(tensor.nbytes for tensor in tensors), 2 * len(tensors))
        turns = itertools.cycle(nodes or self.nodes)
        futures = [self.submit(_copy, tensor, numa_node=node) for tensor, node in zip(tensors, turns, strict=False)]
        return [_mapped(future.result()) for future in futures]

    def restart(self, numa_node: int) -> None:
        """Start the process of a node anew; what it was doing, and was still to do, is lost.

        Raises
        ------
        NodeUnavailable
            The pool has no process on that node.
        """
        self._require(numa_node)
        self._processes[numa_node].shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._processes[numa_node] = self._start(numa_node)

    def receipts(self) -> dict[int, Receipt]:
        """Return for each node what its process is granted, and where its team is, when its turn comes.

        Returns
        -------
        dict
            ``{node: receipt}``.
        """
        looks = {node: self.submit(observation.look, self._topology, numa_node=node) for node in self.nodes}
        return {
            node: Receipt.of_team(
                node,
                len(self._topology.cpus_for([node])),
                look.result(),
                notes=(self._refusals[node],) if node in self._refusals else (),
            )
            for node, look in looks.items()
        }

    receipt = receipts  # an older name

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Finish what was submitted and end all processes; nothing can be submitted afterwards.

        Parameters
        ----------
        wait
            Whether to return only once the processes have ended.
        cancel_futures
            Whether to cancel what has not begun.
        """
        with self._lock:
            self._closed = True
        for process in self._processes.values():
            process.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _require(self, node: int) -> None:
        if node not in self.nodes:
            raise NodeUnavailable(f"node {node}: this pool has processes on nodes {format_cpulist(self.nodes)}")

    def _start(self, node: int) -> ProcessPoolExecutor:
        """Start a process under its binding, which it inherits from the calling thread and has from its first instruction on."""
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
            with Binding((node,)).bind(self._topology):  # without a policy its memory lies where it first touches it
                process.submit(int)
        return process

    def _done(self, node: int) -> None:
        with self._lock:
            self._busy[node] -= 1


def _call(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function, in the process of a node, and share what it returns while an error can still be reported."""
    result: T = shared_memory.share(fn(*args, **kwargs))
    return result


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _mapped(tensor: Tensor) -> Tensor:
    """Touch a tensor that another process has filled, so that ``page_location.locate`` sees its pages here too; return it."""
    if tensor.numel():
        tensor.view(-1).view(torch.uint8)[::PAGE_BYTES].sum()
    return tensor
