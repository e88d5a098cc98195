"""NodeShardedKVCache: one cache in the memory of all nodes, each node's threads reading their own.

K and V of a sequence are split by token range: blocks of tokens belong to nodes in turn, for good. A decode step runs on
all nodes at once (``numa_lab.nodes.seats``), each over its own tokens, and the partial results are merged by their log-sum-exp. So one
sequence is read with the bandwidth of all nodes, for any number of KV heads.

Limits: one thread may use a cache at a time, and a signal's handler or a finalizer none of a thread that it has interrupted in a step.
What the decode kernel does not serve, as more than 16 queries of a sequence, is computed by torch where its threads happen to be. What is
appended after a fork has no huge pages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from numa_lab.attention import autocast
from numa_lab.attention.checks import as_number, require_tensors
from numa_lab.attention.graphs import between_graphs
from numa_lab.errors import InvalidInput
from numa_lab.machine.topology import read_topology
from numa_lab.nodes import seats, sharded_attention
from numa_lab.nodes.kv_layout import Layout, Segment
from numa_lab.nodes.seats import Place
from numa_lab.nodes.sharded_attention import Piece, Step
from numa_lab.placement import memory
from numa_lab.placement.binding import Binding, MemPolicy
from numa_lab.placement.pinned_team import Before, Block
from numa_lab.placement.receipt import Receipt, team_of


class _Placed(Protocol):
    """What has a node and CPUs, as a ``Place`` and a ``NodeTeam``."""

    @property
    def node(self) -> int: ...
    @property
    def cpus(self) -> tuple[int, ...]: ...


class NodeShardedKVCache(Block["NodeShardedKVCache"]):
    """K and V of a batch of sequences, split over nodes by token range.

    ``with cache:`` takes the seats of its nodes for all steps in the block, of this cache and of others on the same nodes, as those of
    a model's layers: what torch computes there runs on the same cores, with as many threads. The calling thread may use its whole node,
    and threads and processes that it starts inherit that. Masks, policies and the thread count are given back at its end, whatever ended
    it; a block is left by the thread that entered it.

    Parameters
    ----------
    batch, kv_heads, head_dim
        Of K and V.
    capacity
        Tokens that a sequence may grow to. Room for them is checked and bound at once, and touched as it fills.
    dtype
        Of K, V and the queries.
    nodes
        Where; all effective nodes where None is given. What lies on a node of memory alone is read by the nearest node's CPUs.
    teams
        For each node what has a `node` and `cpus` that read its memory, as ``numa_lab.nodes.seats.Place``; all physical cores of the
        nodes (``numa_lab.nodes.seats.places``) where None is given.
    block
        Tokens in a row that belong to one node.
    weights
        A node's share of the blocks, in any unit: its measured read bandwidth where nodes are unequal. Equal where None is given.

    Raises
    ------
    InvalidInput
        A size is not positive, or nodes, teams and weights don't agree.
    NodeUnavailable
        A node may not be used, or has too little free memory for its share of `capacity`.
    NotPermitted
        Threads can't be pinned, as ``sched_setaffinity`` is refused.

    Examples
    --------
    >>> import torch
    >>> cache = NodeShardedKVCache(1, 8, 128, capacity=1024, dtype=torch.bfloat16)
    >>> cache.append(*torch.randn(2, 1, 8, 600, 128).to(torch.bfloat16))
    >>> output = cache.attend(torch.randn(1, 32, 1, 128).to(torch.bfloat16))
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        nodes: Sequence[int] | None = None,
        teams: Mapping[int, _Placed] | None = None,
        block: int = 256,
        weights: Mapping[int, float] | None = None,
    ) -> None:
        sizes = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "capacity": capacity, "block": block}
        for name, size in sizes.items():
            if size < 1:
                raise InvalidInput(f"{name}={size}: expected at least 1")
        if not dtype.is_floating_point:
            raise InvalidInput(f"dtype={dtype}: expected a floating-point dtype")
        placed = seats.places(nodes) if teams is None else teams
        self._places = {node: Place(one.node, tuple(one.cpus)) for node, one in placed.items()}
        self.nodes = tuple(self._places if nodes is None else nodes)
        missing = [node for node in self.nodes if node not in self._places or not self._places[node].cpus]
        if missing or not self.nodes or len(set(self.nodes)) < len(self.nodes):
            raise InvalidInput(
                f"nodes={self.nodes} with teams of {tuple(self._places)}: expected each node once, with a team that has CPUs"
            )
        given = dict.fromkeys(self.nodes, 1.0) if weights is None else weights
        finite = all(0 <= share < math.inf for share in given.values())
        if set(given) != set(self.nodes) or not finite or not sum(given.values()):
            raise InvalidInput(
                f"weights={weights}: expected one for each of nodes {self.nodes}, finite, none negative, not all 0"
            )
        shares = {node: given[node] for node in self.nodes}
        self.batch, self.kv_heads, self.head_dim, self.dtype = batch, kv_heads, head_dim, dtype
        self.capacity, self._block, self._shares = capacity, block, shares
        self._all_places = tuple(dict.fromkeys(self._places[node] for node in self.nodes))
        with self:
            pass  # whatever stands against pinning is told now
        self._segments: tuple[Segment, ...] = (self._new_segment(capacity),)
        self._ready: tuple[Step, Mapping[int, Tensor]] | None = (
            None  # of the last step: for the next one, while the keys are the same
        )

    def _enter(self, before: Before) -> NodeShardedKVCache:
        seats.enter(self._all_places, before)
        return self

    def __len__(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(map(sum, zip(*(segment.lengths for segment in self._segments), strict=True)))

    @property
    def tokens_per_node(self) -> dict[int, int]:
        """Tokens of all sequences together that lie on each node."""
        return {
            node: sum(segment.layout.count(node, length) for segment in self._segments for length in segment.lengths)
            for node in self.nodes
        }

    @between_graphs
    def append(self, key: Tensor, value: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Add tokens: one, or those of a prompt.

        Parameters
        ----------
        key, value
            ``[batch, kv_heads, new, head_dim]``.
        lengths
            How many of the `new` tokens each sequence takes, from the first on; all where None is given.

        Raises
        ------
        InvalidInput
            Shapes or dtypes don't fit, or a sequence would grow beyond the capacity; nothing is added then.
        WrongType
            `key` or `value` is no tensor.
        """
        require_tensors(key=key, value=value)
        expected = (self.batch, self.kv_heads, key.size(2) if key.dim() == 4 else "new", self.head_dim)
        for name, tensor in {"key": key, "value": value}.items():
            if (tuple(tensor.shape), tensor.dtype, tensor.is_cpu) != (expected, self.dtype, True):
                raise InvalidInput(
                    f"{name} {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}: expected {expected} of {self.dtype} "
                    "on the CPU"
                )
        key, value = key.detach(), value.detach()
        counts = self._per_sequence(lengths, key.size(2), "lengths", 0, key.size(2))
        before = self.lengths
        after = [old + count for old, count in zip(before, counts, strict=True)]
        if max(after) > self.capacity:
            full = int(np.argmax(after))
            raise InvalidInput(
                f"sequence {full} holds {before[full]} tokens and would hold {after[full]}: the capacity is {self.capacity}; "
                "make the cache larger, or truncate it"
            )
        earlier, segment = self._writable()
        for rows, (old, count) in _runs(list(zip(segment.lengths, counts, strict=True))):
            for node, local, start, stop in segment.layout.pieces(old, old + count):
                for ours, new in ((segment.keys, key), (segment.values, value)):
                    # Whoever copies, the pages lie on their node: they are bound to it.
                    ours[node][rows, :, local : local + stop - start] = new[rows, :, start - old : stop - old]
        lengths = tuple(old + count for old, count in zip(segment.lengths, counts, strict=True))
        self._segments = (*earlier, replace(segment, lengths=lengths))
        if self._ready and self._ready[1] is not segment.keys:
            self._ready = None  # it holds memory that the cache may no longer have

    @between_graphs
    def attend(self, query: Tensor, *, scale: float | None = None) -> Tensor:
        """Attention of each sequence's last q_len tokens, which were appended before, to themselves and all before them.

        Parameters
        ----------
        query
            ``[batch, q_heads, q_len, head_dim]``; query i sees the tokens up to its own.
        scale
            Factor of the scores; 1 / sqrt(head_dim) where it is None.

        Returns
        -------
        Tensor
            ``[batch, q_heads, q_len, head_dim]``, of the query's dtype; under autocast of its dtype, as torch's own.

        Raises
        ------
        InvalidInput
            The query does not fit, or a sequence holds fewer than q_len tokens.
        WrongType
            The query is no tensor, or `scale` no number.
        """
        if (output := self._again(query, scale)) is not None:
            return output
        require_tensors(query=query)
        scale = as_number("scale", scale)
        query, dtype = autocast.cast(query), autocast.result(self.dtype)
        expected = self.batch, self.head_dim, dtype, True
        fits = query.dim() == 4 and (query.size(0), query.size(3), query.dtype, query.is_cpu) == expected
        if not fits or not query.size(1) or query.size(1) % self.kv_heads:
            raise InvalidInput(
                f"query {tuple(query.shape)} of {query.dtype} on {query.device}: expected ({self.batch}, a multiple of "
                f"{self.kv_heads}, q_len, {self.head_dim}) of {dtype} on the CPU"
            )
        if min(self.lengths) < query.size(2):
            raise InvalidInput(
                f"q_len {query.size(2)} with sequences of {self.lengths} tokens: append the keys and values of the queries first"
            )
        pieces = self._pieces(query.size(2))
        if not pieces or not query.numel():
            return torch.zeros_like(query)
        step = sharded_attention.prepare(query, pieces, self._all_places, scale)
        if step is None:
            return sharded_attention.by_torch(query, pieces, scale)
        if query.size(2) == 1 and (keys := self._simple()) is not None:
            self._ready = step, keys
        return step.run(query)

    def _again(self, query: Tensor, scale: float | None) -> Tensor | None:
        """A step like the last one, with more or fewer tokens; None where it has to be laid out anew.

        Laying out takes some tens of microseconds, as long as reading a thousand tokens.
        """
        if self._ready is None:
            return None
        step, keys = self._ready
        if self._simple() is not keys or not step.serves(query, scale):
            return None
        segment = self._segments[0]
        counts = [count for node in self.nodes if (count := segment.layout.count(node, segment.lengths[0]))]
        return step.run(query, counts) if len(counts) == step.count else None

    def _simple(self) -> Mapping[int, Tensor] | None:
        """The keys, where there is one segment and all sequences are as long: then each node has one piece of them, or none."""
        segment = self._segments[0]
        alike = len(self._segments) == 1 and segment.lengths.count(segment.lengths[0]) == self.batch
        return segment.keys if alike and segment.lengths[0] else None

    def truncate(self, tokens: int | Sequence[int]) -> None:
        """Forget all but the first tokens of each sequence; a sequence that holds no more is left alone.

        Raises
        ------
        InvalidInput
            A number is negative, or there are not as many as sequences.
        """
        left = self._per_sequence(tokens, 0, "tokens", 0, None)
        segments = []
        for segment in self._segments:
            kept = tuple(min(own, keep) for own, keep in zip(segment.lengths, left, strict=True))
            segments.append(segment.truncate(kept))
            left = [keep - own for keep, own in zip(left, kept, strict=True)]
        while len(segments) > 1 and not any(segments[-1].lengths):
            segments.pop()
        self._segments = tuple(segments)

    def fork(self) -> NodeShardedKVCache:
        """A cache that begins with the same tokens, for beams: they are shared, not copied, and each side goes on alone."""
        twin = object.__new__(NodeShardedKVCache)
        twin.__dict__.update(self.__dict__)
        twin._segments = tuple(segment.borrowed() for segment in self._segments)
        self._segments = tuple(segment.lent() for segment in self._segments)
        return twin

    def receipt(self) -> dict[int, Receipt]:
        """For each node what its team is granted and where it is, and where the pages of its K and V lie, as seen now."""
        topology, found = read_topology(), {}
        looks = seats.look(self._all_places, topology)
        for node in self.nodes:
            granted, threads, notes = looks[self._places[node]]
            pages: dict[str, dict[int, int]] = {}
            for number, segment in enumerate(self._segments):
                for name, tensor in (("key", segment.keys[node]), ("value", segment.values[node])):
                    if tensor.numel():
                        seen = memory.locate(tensor)
                        seen.pop(memory.UNTOUCHED, None)  # room for tokens to come
                        pages[f"{name}{number or ''}"] = seen
            by = self._places[node].node  # another one where the node has memory alone
            requested = Binding((by,), (by,), MemPolicy.PREFERRED)
            team = team_of(len(self._places[node].cpus), set(threads))
            found[node] = Receipt(requested, granted, threads, {}, pages, notes, promised=(node,), team=team)
        return found

    def _per_sequence(
        self, given: int | Sequence[int] | None, default: int, name: str, least: int, most: int | None
    ) -> list[int]:
        numbers = (
            [default] * self.batch if given is None else [given] * self.batch if isinstance(given, int) else list(given)
        )
        if len(numbers) != self.batch or min(numbers) < least or (most is not None and max(numbers) > most):
            room = f"{least} to {most}" if most is not None else f"at least {least}"
            raise InvalidInput(f"{name}={given}: expected {self.batch} numbers, {room}")
        return numbers

    def _new_segment(self, capacity: int, *, huge_pages: bool = True) -> Segment:
        layout = Layout.of(self._shares, self._block, capacity)
        size = {node: (self.batch, self.kv_heads, layout.count(node, capacity), self.head_dim) for node in self.nodes}
        with torch.inference_mode(False):  # made inside of it they could not be written to outside
            keys, values = (
                {node: memory.empty(size[node], self.dtype, node, huge_pages=huge_pages) for node in self.nodes}
                for _ in range(2)
            )
        return Segment(layout, keys, values, (0,) * self.batch)

    def _writable(self) -> tuple[tuple[Segment, ...], Segment]:
        """The segment that takes new tokens, and those before it: the last one, unless others read it beyond its end.

        A new one takes up what is short before it, so that beams which fork at each token are no chain of single tokens.
        """
        *_, last = self._segments
        if last.own:
            return self._segments[:-1], last
        short = max(last.lengths) <= self._block
        before = self._segments[:-1] if short else self._segments
        room = self.capacity - min(map(sum, zip(*(segment.lengths for segment in before), strict=True)), default=0)
        fresh = self._new_segment(room, huge_pages=False)  # few tokens of many heads would touch many huge pages
        return before, fresh.copy_from(last) if short else fresh

    def _pieces(self, q_len: int) -> list[Piece]:
        """What each node holds of each sequence, apart where only some of q_len queries see it."""
        found = []
        for rows, lengths in _runs(list(zip(*(segment.lengths for segment in self._segments), strict=True))):
            slots, behind = itertools.count(), sum(lengths)  # behind: tokens of a segment and of those after it
            for segment, length in zip(self._segments, lengths, strict=True):
                by_all = min(length, max(0, behind - q_len + 1))  # so many of them does each query see
                for node in self.nodes:
                    first, last = segment.layout.count(node, by_all), segment.layout.count(node, length)
                    place = self._places[node], rows
                    memory = segment.keys[node], segment.values[node]
                    if first:
                        found.append(Piece(*place, next(slots), *memory, 0, first))
                    if last > first:
                        own = torch.from_numpy(segment.layout.positions(node, first, last))
                        mask = own <= behind - q_len + torch.arange(q_len, device="cpu").unsqueeze(1)
                        found.append(Piece(*place, next(slots), *memory, first, last, mask))
                behind -= length
        return found


def _runs(items: Sequence[tuple[int, ...]]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Neighbouring sequences that are alike, as slices of the batch."""
    start = 0
    for item, run in itertools.groupby(items):
        stop = start + len(list(run))
        yield slice(start, stop), item
        start = stop
