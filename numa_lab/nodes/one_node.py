"""NUMAOptimizedGQA: attention on one node, with its threads and its memory there; the source guide's helper.

Inside its ``with`` block the calling thread, the OpenMP workers that torch computes on, those that exist already
included, and the memory that they touch first are on the node. Afterwards all is as it was.

New tensors lie on the node too, whatever the process did before: on entering, malloc gives the memory back that it would hand
out again (see ``numa_lab.placement.recycled_memory``), and ``compute`` moves what it is given, and what it makes, if that lies
elsewhere all the same.

Limits: a tensor that was touched on another node and is freed inside the block leaves its memory to the next one of its size;
until ``compute`` is given that, it lies elsewhere. Tensors of ``empty``, ``create_tensors`` and ``memory_pool`` never do, and
``receipt`` tells where any lies.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from numa_lab.attention import addresses
from numa_lab.attention.checks import require_tensors
from numa_lab.attention.gqa import gqa_attention
from numa_lab.attention.graphs import between_graphs
from numa_lab.errors import InvalidInput, NodeUnavailable
from numa_lab.machine import gpus, libnuma
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology, read_topology
from numa_lab.nodes.optimal_node import get_optimal_numa_node
from numa_lab.placement import memory, observation, recycled_memory, team_replacement
from numa_lab.placement.binding import Binding, MemPolicy
from numa_lab.placement.interrupt_safe import Exit, Ticket, end, entered
from numa_lab.placement.pinned_team import Before, Block, Placement, placed
from numa_lab.placement.receipt import Receipt, team_of

Shape = Sequence[int]


class _Own(threading.local):
    """What one thread holds of a helper: its memory pool, the tensors that its receipt speaks of, and those that were moved."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}
        self.seen: dict[str, weakref.ref[Tensor]] = {}
        self.settled = recycled_memory.Settled()


class NUMAOptimizedGQA(Block["NUMAOptimizedGQA"]):
    """Place threads and memory of attention on one NUMA node.

    One object can be entered again inside itself, inside others, and by several threads at once; each thread that
    enters it has its own OpenMP team there. Entering and leaving costs some tens of microseconds where the thread
    computes with as many threads outside as inside (see ``numa_lab.placement.pinned_team``); on a machine with several nodes
    giving free memory back comes to that, 5 to 40 us where little is free (see ``numa_lab.placement.recycled_memory``).

    Ctrl-C, or whatever else a signal's handler raises, leaves nothing behind: masks, memory policies and thread counts are as before at
    the latest when the thread enters or leaves the next placement (see ``numa_lab.placement.interrupt_safe``).

    The memory policy inside is *preferred*: a bound process whose node is full gets killed. ``empty`` and its kin bind,
    after they have looked whether there is room.

    Parameters
    ----------
    numa_node
        The node. It wins over `near_gpu` and `auto_detect`.
    auto_detect
        Take the node that ``get_optimal_numa_node`` finds; the first time on a machine that takes some seconds.
    threads
        Computing threads; one for each physical core of the node where None is given.
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
        # Inside a helper the thread's mask is that of one node; what it may use is what the outermost one saw.
        inside = _helpers()
        topology = inside[-1]._topology if inside else read_topology()
        if numa_node is not None:
            node = numa_node
        elif near_gpu is not None:
            node = gpus.nearest_node(topology, near_gpu)
        elif auto_detect:
            node = get_optimal_numa_node()
        else:
            raise InvalidInput("numa_node=None with auto_detect=False: name a node, or leave auto_detect=True")
        topology.require_effective(node)
        self.node = node
        self.cpus = topology.cpus_for([node], threads)
        self._topology: Topology = topology
        self._placement = Placement(self.cpus, (libnuma.MPOL_PREFERRED, [node]), topology.cpus_of([node]))
        self._own = _Own()
        self._warned = False

    def __repr__(self) -> str:
        return f"NUMAOptimizedGQA(numa_node={self.node}, threads={self.threads})"

    @property
    def threads(self) -> int:
        """How many threads compute inside, the calling one included."""
        return len(self.cpus)

    __enter__ = between_graphs(Block.__enter__)

    @Exit
    @between_graphs
    def __exit__(self, ticket: Ticket, *_exception: object) -> None:
        end(self, ticket)
        if inside := _helpers():
            recycled_memory.give_back(inside[0].node)

    def _enter(self, before: Before) -> NUMAOptimizedGQA:
        if self._go_there(before, keep_inner=False):
            recycled_memory.give_back(self.node)
        return self

    def _placed(self) -> _Placed:
        """The block without what is done for new tensors of the caller, who makes none in it."""
        return _Placed(self)

    def _came_here(self) -> Before | None:
        """How the calling thread came here, if it is inside, and inside of no other helper since."""
        for one in entered():
            if isinstance(one, Before) and isinstance(one.owner, NUMAOptimizedGQA):
                if one.owner is not self:
                    return None
                if one.exchange:
                    return one
        return None

    def _go_there(self, before: Before, *, keep_inner: bool = True) -> bool:
        """Whether the thread was elsewhere. To `keep_inner` placements, those that the caller has entered inside of this count as here."""
        came = self._came_here()
        if came and (keep_inner or placed()[0] is came):
            self._hold(came)
            before.begin()
            return False
        try:
            before.go(self._placement)
        except NodeUnavailable:  # the cpuset was rewritten since
            old = self._placement
            self._move_to(team_replacement.anew(old, self.node))
            before.go(self._placement)
            warnings.warn(
                f"CPUs {format_cpulist(old.cpus)} of node {self.node} may no longer be used by this process, as where a cpuset is "
                f"rewritten: threads are placed on CPUs {format_cpulist(self.cpus)}",
                RuntimeWarning,
                stacklevel=5,
            )
        return True

    def _hold(self, came: Before) -> None:
        """Place the team again where the kernel has moved it since it was placed."""
        # How many threads compute inside is the caller's to say, and on which node was promised.
        placement = came.placement
        _, told = team_replacement.hold(came, self.node, count=False, elsewhere=False)
        if came.placement and came.placement is not placement:
            self._move_to(came.placement)
        if told:
            warnings.warn(told, RuntimeWarning, stacklevel=6)

    def _move_to(self, placement: Placement) -> None:
        self._placement, self.cpus = placement, placement.cpus

    @between_graphs
    def compute(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attention on the node, entered for the call where the caller is outside.

        Parameters
        ----------
        query, key, value
            ``[batch, q_heads, q_len, head_dim]`` and twice ``[batch, kv_heads, kv_len, head_dim]``. Inside the block they are
            moved to the node the first time that they come from elsewhere, unless their memory has a policy of its own
            (``numa_lab.placement.memory``); a call from outside reads them where they lie.
        **options
            As ``scaled_dot_product_attention_gqa``: attn_mask, dropout_p, enable_gqa, is_causal, output_tensor, scale.

        Returns
        -------
        Tensor
            ``[batch, q_heads, q_len, head_dim]``.

        Warns
        -----
        RuntimeWarning
            Once: a tensor lies elsewhere and can't be moved; the message names the way out.
        """
        inside = self._came_here()
        with self._placed():
            if inside:
                self._settle(query=query, key=key, value=value)
            output = scaled_dot_product_attention_gqa(query, key, value, **options)
            self._settle(output=output)  # which was made inside in any case
        self._remember(query=query, key=key, value=value, output=output)
        return output

    def _settle(self, **tensors: Tensor) -> None:
        """Have these tensors on the node; those that were looked at before are not looked at again."""
        for name, tensor in tensors.items():
            why = self._own.settled.settle(tensor, self.node) if addresses.readable(tensor) else ""
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
        """A tensor of zeros on pages of its own, bound to the node and huge where the kernel grants it.

        The pages come when they are first written; `dtype` is torch's default where None is given.

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
        """Tensors on the node, filled with standard normal numbers: a dict for named shapes, else a list.

        Raises
        ------
        NodeUnavailable
            The node has too little free memory.
        """
        if isinstance(shapes, Mapping):
            named = {name: self._normal(shape, dtype) for name, shape in shapes.items()}
            self._remember(**named)
            return named
        return [self._normal(shape, dtype) for shape in shapes]

    create_tensors_on_numa = create_tensors  # its name in the source guide

    def memory_pool(self, shapes: Mapping[str, Shape], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Named tensors in memory of the node that is touched already, and handed out again for the same name.

        A name whose memory is too small for its new shape gets new memory. Contents are what was left there: a tensor
        that was handed out before shares its memory with its successor. Each thread has its own pool.

        Raises
        ------
        NodeUnavailable
            The node has too little free memory.
        """
        dtype = dtype or torch.get_default_dtype()
        pool = {}
        for name, shape in shapes.items():
            nbytes = math.prod(shape) * dtype.itemsize
            block = self._own.blocks.get(name)
            if block is None or block.nbytes < nbytes:
                with self._placed():
                    block = self._own.blocks[name] = memory.empty((nbytes,), torch.uint8, self.node).zero_()
            pool[name] = block[:nbytes].view(dtype).view(tuple(shape))
        self._remember(**pool)
        return pool

    def receipt(self, tensors: Mapping[str, Tensor] | None = None) -> Receipt:
        """Where the calling thread's team is inside the block, and where its tensors lie, as the kernel tells it now.

        It speaks of `tensors` by the names that they are given here; else of those of this thread's last ``compute``,
        ``create_tensors`` (named ones) and ``memory_pool`` that are still alive. Their pages are looked
        at now; that they have not moved meanwhile it does not prove.
        """
        with self._placed():
            granted, threads, lost = observation.look(self._topology)
            came = self._came_here()
        alive = tensors or {name: tensor for name, ref in self._own.seen.items() if (tensor := ref()) is not None}
        seen = libnuma.available()  # else a note of `lost` says so
        pages = {name: memory.locate(one) for name, one in alive.items() if seen and addresses.as_stored(one)}
        notes = [*lost, *([came.refusal] if came and came.refusal else [])]
        for name, found in pages.items():
            away = sum(count for node, count in found.items() if node not in (self.node, memory.UNTOUCHED))
            if away:
                notes.append(f"{away} of {sum(found.values())} pages of {name} lie on other nodes than {self.node}")
        requested = Binding((self.node,), (self.node,), MemPolicy.PREFERRED)
        shares = {name: memory.huge_page_share(alive[name]) for name in pages}
        huge = {name: share for name, share in shares.items() if not math.isnan(share)}
        team = team_of(self.threads, threads)
        return Receipt(requested, granted, threads, {}, pages, tuple(notes), huge, promised=(self.node,), team=team)

    def _normal(self, shape: Shape, dtype: torch.dtype | None) -> Tensor:
        with self._placed():
            return self.empty(shape, dtype).normal_()

    def _remember(self, **tensors: Tensor) -> None:
        # A subclass of Tensor may give something else.
        self._own.seen.update({name: weakref.ref(one) for name, one in tensors.items() if isinstance(one, Tensor)})


class _Placed(Block[None]):
    """A block on a helper's node, in which the caller makes no tensors."""

    def __init__(self, helper: NUMAOptimizedGQA) -> None:
        self._helper = helper

    def _enter(self, before: Before) -> None:
        before.owner = self._helper
        self._helper._go_there(before)


def _helpers() -> list[NUMAOptimizedGQA]:
    """The helpers that the calling thread is inside of, the innermost first."""
    return [one.owner for one in entered() if isinstance(one.owner, NUMAOptimizedGQA)]


def scaled_dot_product_attention_gqa(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = True,
    is_causal: bool = False,
    output_tensor: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Grouped-query attention by the source guide's signature; on ``gqa_attention``, which says what each argument means.

    Parameters
    ----------
    query_states
        ``[..., q_heads, q_len, head_dim]``.
    key_states, value_states
        ``[..., kv_heads, kv_len, head_dim]``.
    output_tensor
        Written and returned where it is given; of the output's shape, dtype and device, with any strides.

    Raises
    ------
    InvalidInput, WrongType
        As ``gqa_attention``, or an `output_tensor` that does not fit.
    """
    output = gqa_attention(
        query_states, key_states, value_states, attn_mask, dropout_p, is_causal, scale, enable_gqa=enable_gqa
    )
    if output_tensor is None:
        return output
    require_tensors(output_tensor=output_tensor)
    fits = (output_tensor.shape, output_tensor.dtype, output_tensor.device) == (
        output.shape, output.dtype, output.device
    )  # fmt: skip
    if not fits or any(not stride and size > 1 for size, stride in _dimensions(output_tensor)):
        raise InvalidInput(
            f"output_tensor {tuple(output_tensor.shape)} with strides {output_tensor.stride()} of {output_tensor.dtype} "
            f"on {output_tensor.device}: expected {tuple(output.shape)} of {output.dtype} on {output.device}, "
            "not expanded; take torch.empty_like(query_states)"
        )
    return output_tensor.copy_(output)


def _dimensions(tensor: Tensor) -> Iterable[tuple[int, int]]:
    return zip(tensor.shape, tensor.stride(), strict=True)
