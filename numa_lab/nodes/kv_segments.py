"""The memory of a sharded cache: segments of K and V, which forked caches share, and the pieces of them that a step reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from numa_lab.nodes.kv_layout import Layout
from numa_lab.nodes.seats import Place
from numa_lab.nodes.sharded_attention import Piece
from numa_lab.placement import memory, page_location


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of all sequences of a cache, with their memory on each node.

    A segment never changes. Whatever happens to a cache makes new segments, and the cache takes them all at once: so an interrupt
    leaves the cache either as it was or as it shall be.

    Attributes
    ----------
    layout
        Which of the tokens lie on which node.
    keys, values
        For each node ``[batch, kv_heads, room, head_dim]``.
    lengths
        How many tokens of each sequence the segment holds.
    own
        Whether its cache may add tokens behind them.
    lent_lengths
        How many tokens of each sequence forked caches read; empty where none does.
    """

    layout: Layout
    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    lengths: tuple[int, ...]
    own: bool = True
    lent_lengths: tuple[int, ...] = ()

    @classmethod
    def allocate(
        cls, layout: Layout, shapes: Mapping[int, tuple[int, int, int, int]], dtype: torch.dtype, *, huge_pages: bool
    ) -> Segment:
        """Return an empty segment, with K and V of a shape on each node, bound there.

        Raises
        ------
        NodeUnavailable
            A node has too little free memory.
        """
        with torch.inference_mode(False):  # made inside of it they could not be written to outside
            keys, values = (
                {node: memory.empty(shape, dtype, node, huge_pages=huge_pages) for node, shape in shapes.items()}
                for _ in range(2)
            )
        batch = next(iter(shapes.values()))[0]
        return cls(layout, keys, values, (0,) * batch)

    def append(self, key: Tensor, value: Tensor, counts: Sequence[int]) -> Segment:
        """Copy the first of some new tokens behind those of each sequence; return the longer segment.

        Parameters
        ----------
        key, value
            ``[batch, kv_heads, new, head_dim]``.
        counts
            How many of the `new` tokens each sequence takes.
        """
        for rows, (length, count) in equal_runs(list(zip(self.lengths, counts, strict=True))):
            for node, number, start, stop in self.layout.ranges(length, length + count):
                for memories, new in ((self.keys, key), (self.values, value)):
                    # Whichever thread copies, the pages lie on their node: they are bound to it.
                    memories[node][rows, :, number : number + stop - start] = new[
                        rows, :, start - length : stop - length
                    ]
        return replace(self, lengths=tuple(length + count for length, count in zip(self.lengths, counts, strict=True)))

    def lent(self) -> Segment:
        """Return the same segment for its own cache, noting that a forked cache reads the tokens that are there."""
        lent_lengths = tuple(map(max, zip(self.lengths, self.lent_lengths or self.lengths, strict=True)))
        return replace(self, lent_lengths=lent_lengths)

    def borrowed(self) -> Segment:
        """Return the same tokens for a forked cache, which may add none to this segment."""
        return replace(self, own=False, lent_lengths=())

    def copy_from(self, other: Segment) -> Segment:
        """Copy all tokens of another segment, whose blocks belong to the same nodes; return the filled segment."""
        for node in self.keys:
            count = other.layout.count(node, max(other.lengths))
            for memories, others in ((self.keys, other.keys), (self.values, other.values)):
                memories[node][:, :, :count] = others[node][:, :, :count]
        return replace(self, lengths=other.lengths)

    def truncate(self, lengths: tuple[int, ...]) -> Segment:
        """Return the first tokens alone; where a forked cache still reads those behind them, none may be written over."""
        cut = any(kept < lent for kept, lent in zip(lengths, self.lent_lengths, strict=False))
        return replace(self, lengths=lengths, own=self.own and not cut)


class ShardedMemory:
    """K and V of a batch of sequences on several nodes, in one segment, or in several where caches were forked.

    Parameters
    ----------
    batch, kv_heads, head_dim
        The sizes of K and V.
    capacity
        How many tokens each sequence may have.
    dtype
        Of K and V.
    shares
        Each node's share of the blocks, in any unit.
    block
        How many neighbouring tokens belong to one node.

    Raises
    ------
    NodeUnavailable
        A node has too little free memory for its share.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype,
        shares: Mapping[int, float], block: int,
    ) -> None:  # fmt: skip
        self._batch, self._kv_heads, self._head_dim, self._dtype = batch, kv_heads, head_dim, dtype
        self._capacity, self._shares, self._block = capacity, shares, block
        self.segments: tuple[Segment, ...] = (self._new_segment(capacity),)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each sequence."""
        return tuple(map(sum, zip(*(segment.lengths for segment in self.segments), strict=True)))

    def count(self, node: int) -> int:
        """Return how many tokens of all sequences together lie on a node."""
        return sum(segment.layout.count(node, length) for segment in self.segments for length in segment.lengths)

    def single_keys(self) -> Mapping[int, Tensor] | None:
        """Return the keys of the only segment, where all sequences are equally long and not empty; else None.

        A step then has at most one piece on each node, and the next step differs from it in the number of tokens alone.
        """
        segment = self.segments[0]
        single = len(self.segments) == 1 and segment.lengths.count(segment.lengths[0]) == self._batch
        return segment.keys if single and segment.lengths[0] else None

    def append(self, key: Tensor, value: Tensor, counts: Sequence[int]) -> None:
        """Append the first of some new tokens to each sequence; see ``Segment.append``."""
        earlier, last = self._writable()
        self.segments = (*earlier, last.append(key, value, counts))

    def truncate(self, tokens: Sequence[int]) -> None:
        """Keep so many tokens of each sequence, and of a shorter one all."""
        segments, left = [], list(tokens)
        for segment in self.segments:
            kept = tuple(min(length, keep) for length, keep in zip(segment.lengths, left, strict=True))
            segments.append(segment.truncate(kept))
            left = [keep - length for keep, length in zip(left, kept, strict=True)]
        while len(segments) > 1 and not any(segments[-1].lengths):
            segments.pop()
        self.segments = tuple(segments)

    def fork(self) -> ShardedMemory:
        """Return a memory that begins with the same tokens, which both share."""
        twin = copy(self)
        twin.segments = tuple(segment.borrowed() for segment in self.segments)
        self.segments = tuple(segment.lent() for segment in self.segments)
        return twin

    def pages(self, node: int) -> dict[str, dict[int, int]]:
        """Return where the touched pages of a node's tensors lie: ``{name: {node: pages}}``."""
        pages = {}
        for number, segment in enumerate(self.segments):
            for name, tensor in (("key", segment.keys[node]), ("value", segment.values[node])):
                if tensor.numel():
                    located = page_location.locate(tensor)
                    located.pop(page_location.UNTOUCHED, None)  # room for tokens to come
                    pages[f"{name}{number or ''}"] = located
        return pages

    def pieces(self, places: Mapping[int, Place], q_len: int) -> list[Piece]:
        """Return what a step over the last `q_len` tokens reads: for each node its tokens of each sequence and segment.

        The tokens that all queries see make one piece, and the last ones, which only some of the queries see, make another with a mask.

        Parameters
        ----------
        places
            For each node the place whose threads read it.
        q_len
            How many queries each sequence has.
        """
        pieces = []
        for rows, lengths in equal_runs(list(zip(*(segment.lengths for segment in self.segments), strict=True))):
            slots, behind = itertools.count(), sum(lengths)  # behind: tokens of a segment and of those after it
            for segment, length in zip(self.segments, lengths, strict=True):
                seen_by_all = min(length, max(0, behind - q_len + 1))
                for node, place in places.items():
                    first, last = segment.layout.count(node, seen_by_all), segment.layout.count(node, length)
                    tensors = segment.keys[node], segment.values[node]
                    if first:
                        pieces.append(Piece(place, rows, next(slots), *tensors, 0, first))
                    if last > first:
                        positions = torch.from_numpy(segment.layout.positions(node, first, last))
                        mask = positions <= behind - q_len + torch.arange(q_len, device="cpu").unsqueeze(1)
                        pieces.append(Piece(place, rows, next(slots), *tensors, first, last, mask))
                behind -= length
        return pieces

    def _new_segment(self, capacity: int, *, huge_pages: bool = True) -> Segment:
        layout = Layout.of(self._shares, self._block, capacity)
        shapes = {
            node: (self._batch, self._kv_heads, layout.count(node, capacity), self._head_dim) for node in self._shares
        }
        return Segment.allocate(layout, shapes, self._dtype, huge_pages=huge_pages)

    def _writable(self) -> tuple[tuple[Segment, ...], Segment]:
        """Return the segments that stay as they are, and the one behind them that takes new tokens.

        The latter is the last segment, unless that one is borrowed, or lends tokens beyond its end. Then it is a new segment, which takes
        the place of a last one of at most a block, with its tokens: otherwise beams that fork at each token would be chains of segments
        of a single token.
        """
        *_, last = self.segments
        if last.own:
            return self.segments[:-1], last
        short = max(last.lengths) <= self._block
        earlier = self.segments[:-1] if short else self.segments
        room = self._capacity - min(map(sum, zip(*(segment.lengths for segment in earlier), strict=True)), default=0)
        new = self._new_segment(room, huge_pages=False)  # few tokens of many heads would touch many huge pages
        return earlier, new.copy_from(last) if short else new


def equal_runs(items: Sequence[tuple[int, ...]]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Group neighbouring sequences of a batch whose items are equal; yield the slice of each group, and its item."""
    start = 0
    for item, group in itertools.groupby(items):
        stop = start + len(list(group))
        yield slice(start, stop), item
        start = stop
