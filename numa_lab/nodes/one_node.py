"""NUMAOptimizedGQA: attention on one node, with its threads and its memory there; the source guide's helper.

Inside its ``with`` block the calling thread and the OpenMP workers that torch computes on, also those that exist already, run on the
node, and memory that they touch first lies there. Afterwards everything is as it was before.

New tensors lie on the node too, whatever the process did before: on entering, malloc gives back the memory that it would hand
out again (see ``numa_lab.placement.recycled_memory``), and ``compute`` moves what it is given, and what it makes, if that lies
elsewhere all the same.

Limits: a tensor that was touched on another node and is freed inside the block leaves its memory to the next tensor of its size.
That one lies elsewhere until it is given to ``compute``. Tensors of ``empty``, ``create_tensors`` and ``memory_pool`` never do, and
``receipt`` tells where each tensor lies.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from numa_lab.attention import addresses
from numa_lab.attention.graphs import between_graphs
from numa_lab.attention.scaled_dot_product import scaled_dot_product_attention_gqa
from numa_lab.errors import InvalidInput
from numa_lab.machine import gpus, libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.node_context import NodeContext, entered_contexts
from numa_lab.nodes.optimal_node import get_optimal_numa_node
from numa_lab.placement import memory, observation, page_location, recycled_memory
from numa_lab.placement.pinned_team import TeamEntry
from numa_lab.placement.receipt import Receipt

Shape = Sequence[int]


class _ThreadTensors(threading.local):
    """What one thread holds of a helper: its memory pool, the tensors of which its receipt tells, and those that were settled."""

    def __init__(self) -> None:
        self.pool: dict[str, Tensor] = {}
        self.named: dict[str, weakref.ref[Tensor]] = {}
        self.settled = recycled_memory.Settled()

    def remember(self, **tensors: Tensor) -> None:
        """Keep the names of tensors, without keeping the tensors alive."""
        # A subclass of Tensor may give something else.
        self.named.update({name: weakref.ref(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)})

    def alive(self) -> dict[str, Tensor]:
        """Return those remembered tensors that are still alive."""
        return {name: tensor for name, ref in self.named.items() if (tensor := ref()) is not None}


class NUMAOptimizedGQA(NodeContext["NUMAOptimizedGQA"]):
    """Place the threads and the memory of attention on one NUMA node.

    One object can be entered again inside itself, inside others, and by several threads at once; each thread that
    enters it has its own OpenMP team there. Entering and leaving costs some tens of microseconds where the thread
    computes with as many threads outside as inside (see ``numa_lab.placement.pinned_team``). On a machine with several nodes
    giving free memory back is added to that, 5 to 40 us where little is free (see ``numa_lab.placement.recycled_memory``).

    Ctrl-C, or whatever else a signal's handler raises, leaves nothing behind: masks, memory policies and thread counts are as before, at
    the latest when the thread enters or leaves the next context of this kind (see ``numa_lab.placement.interrupt_safe``).

    The memory policy inside is *preferred*, because a process that is bound to a node gets killed when the node is full. ``empty``,
    ``create_tensors`` and ``memory_pool`` bind their tensors, after they have looked whether there is room.

    Parameters
    ----------
    numa_node
        The node. It wins over `near_gpu` and `auto_detect`.
    auto_detect
        Take the node that ``get_optimal_numa_node`` finds; the first time on a machine this takes some seconds.
    threads
        How many threads compute; one for each physical core of the node where None is given.
    near_gpu
        Take the node next to this GPU: its number as CUDA counts them, or its PCI address. It wins over `auto_detect`.

    Raises
    ------
    NodeUnavailable
        The node does not exist, or its CPUs or memory may not be used; the message names those that may.
    InvalidInput
        No node is named and none may be detected, there is no such GPU, or the node has fewer CPUs than `threads`.

    Examples
    --------
    >>> numa_gqa = NUMAOptimizedGQA(numa_node=0)
    >>> with numa_gqa:
    ...     query, key, value = numa_gqa.create_tensors([(1, 32, 1, 128), (1, 8, 64, 128), (1, 8, 64, 128)])
    ...     output = numa_gqa.compute(query, key, value)
    """

    def __init__(
        self,
        numa_node: int | None = None,
        auto_detect: bool = True,
        *,
        threads: int | None = None,
        near_gpu: int | str | None = None,
    ) -> None:
        # Inside of a helper the thread's mask is that of one node; what it may use is what the outermost one saw.
        around = entered_contexts()
        topology = around[-1]._topology if around else read_topology()
        if numa_node is not None:
            node = numa_node
        elif near_gpu is not None:
            node = gpus.nearest_node(topology, near_gpu)
        elif auto_detect:
            node = get_optimal_numa_node()
        else:
            raise InvalidInput("numa_node=None with auto_detect=False: name a node, or leave auto_detect=True")
        topology.require_effective(node)
        super().__init__(node, threads, topology)
        self._of_thread = _ThreadTensors()
        self._warned = False

    def __repr__(self) -> str:
        return f"NUMAOptimizedGQA(numa_node={self.node}, threads={self.threads})"

    def _enter(self, entry: TeamEntry) -> NUMAOptimizedGQA:
        if self._go_to_node(entry, keep_inner=False):
            recycled_memory.give_back(self.node)
        return self

    @between_graphs
    def compute(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Compute attention on the node, which is entered for the call where the caller is outside.

        Parameters
        ----------
        query, key, value
            ``[batch, q_heads, q_len, head_dim]`` and twice ``[batch, kv_heads, kv_len, head_dim]``. Inside the block a tensor that
            lies elsewhere is moved to the node the first time that it is given, unless its memory has a policy of its own
            (``numa_lab.placement.memory``). A call from outside the block reads tensors where they lie.
        **options
            Those of ``scaled_dot_product_attention_gqa``: attn_mask, dropout_p, enable_gqa, is_causal, output_tensor, scale.

        Returns
        -------
        Tensor
            ``[batch, q_heads, q_len, head_dim]``, of the query's dtype.

        Warns
        -----
        RuntimeWarning
            A tensor lies elsewhere and can't be moved; the message says what to do. An object warns once.
        """
        inside = self._current_entry()
        with self._on_node():
            if inside:
                self._settle(query=query, key=key, value=value)
            output = scaled_dot_product_attention_gqa(query, key, value, **options)
            self._settle(output=output)  # which was made inside in any case
        self._of_thread.remember(query=query, key=key, value=value, output=output)
        return output

    def _settle(self, **tensors: Tensor) -> None:
        """Move these tensors to the node if they lie elsewhere; those that were looked at before are not looked at again."""
        for name, tensor in tensors.items():
            why = self._of_thread.settled.settle(tensor, self.node) if addresses.readable(tensor) else ""
            if why and not self._warned:
                self._warned = True
                warnings.warn(
                    f"{name} lies on other nodes than {self.node}, or shares mappings with what does: {why}. It is read over "
                    "the link. Make such tensors by numa_gqa.empty or create_tensors, or start the program by "
                    f"numactl --cpunodebind={self.node} --membind={self.node}; receipt() tells where all lie",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def empty(self, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of zeros on pages of its own, which are bound to the node, and huge where the kernel grants it.

        The pages come when they are first written.

        Parameters
        ----------
        shape
            As for ``torch.empty``.
        dtype
            torch's default where None is given.

        Raises
        ------
        NodeUnavailable
            The node has too little free memory.
        """
        return memory.empty(shape, dtype or torch.get_default_dtype(), self.node)

    @overload
    def create_tensors(self, shapes: Mapping[str, Shape], dtype: torch.dtype | None = None) -> dict[str, Tensor]: ...
    @overload
    def create_tensors(self, shapes: Sequence[Shape], dtype: torch.dtype | None = None) -> list[Tensor]: ...
    def create_tensors(
        self, shapes: Mapping[str, Shape] | Sequence[Shape], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor] | list[Tensor]:
        """Return tensors on the node, filled with standard normal numbers.

        Parameters
        ----------
        shapes
            By name, or in a sequence.
        dtype
            torch's default where None is given.

        Returns
        -------
        dict or list
            The tensors by name where `shapes` has names, else in order.

        Raises
        ------
        NodeUnavailable
            The node has too little free memory.
        """
        if isinstance(shapes, Mapping):
            named = {name: self._normal(shape, dtype) for name, shape in shapes.items()}
            self._of_thread.remember(**named)
            return named
        return [self._normal(shape, dtype) for shape in shapes]

    create_tensors_on_numa = create_tensors  # its name in the source guide

    def memory_pool(self, shapes: Mapping[str, Shape], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return named tensors in memory of the node that is touched already, and is handed out again for the same name.

        A name whose memory is too small for its new shape gets new memory. The tensors contain what was left there: a tensor
        that was handed out before shares its memory with its successor. Each thread has its own pool.

        Parameters
        ----------
        shapes
            The shape of each tensor, by name.
        dtype
            Of all tensors; torch's default where None is given.

        Returns
        -------
        dict
            ``{name: tensor}``.

        Raises
        ------
        NodeUnavailable
            The node has too little free memory.
        """
        dtype = dtype or torch.get_default_dtype()
        pool = {}
        for name, shape in shapes.items():
            nbytes = math.prod(shape) * dtype.itemsize
            buffer = self._of_thread.pool.get(name)
            if buffer is None or buffer.nbytes < nbytes:
                with self._on_node():
                    buffer = memory.empty((nbytes,), torch.uint8, self.node).zero_()
                    self._of_thread.pool[name] = buffer
            pool[name] = buffer[:nbytes].view(dtype).view(tuple(shape))
        self._of_thread.remember(**pool)
        return pool

    def receipt(self, tensors: Mapping[str, Tensor] | None = None) -> Receipt:
        """Return where the calling thread's team is inside the block, and where its tensors lie, as the kernel tells it now.

        The receipt proves nothing about where the pages were before.

        Parameters
        ----------
        tensors
            Those of which it tells, by name. Where None are given, these are the tensors of this thread's last ``compute``,
            ``create_tensors`` (with names) and ``memory_pool`` that are still alive.
        """
        with self._on_node():
            seen = observation.look(self._topology)
            entry = self._current_entry()
        named = tensors or self._of_thread.alive()
        visible = libnuma.available()  # else a note of `seen` says so
        pages = {
            name: page_location.locate(tensor)
            for name, tensor in named.items()
            if visible and addresses.as_stored(tensor)
        }
        shares = {name: page_location.huge_page_share(named[name]) for name in pages}
        notes = [entry.refusal] if entry and entry.refusal else []
        for name, counts in pages.items():
            away = sum(count for node, count in counts.items() if node not in (self.node, page_location.UNTOUCHED))
            if away:
                notes.append(f"{away} of {sum(counts.values())} pages of {name} lie on other nodes than {self.node}")
        return Receipt.of_team(
            self.node,
            self.threads,
            seen,
            pages=pages,
            notes=notes,
            huge_pages={name: share for name, share in shares.items() if not math.isnan(share)},
            promised=(self.node,),
        )

    def receipts(self, tensors: Mapping[str, Tensor] | None = None) -> dict[int, Receipt]:
        """Return ``{node: receipt}``, as the pools and the sharded cache do; here with the ``receipt`` of the one node."""
        return {self.node: self.receipt(tensors)}

    def _normal(self, shape: Shape, dtype: torch.dtype | None) -> Tensor:
        with self._on_node():
            return self.empty(shape, dtype).normal_()
