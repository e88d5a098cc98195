"""The memory of a sharded cache: segments of K and V, which forked caches share, and the pieces of them that a step reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from numa_lab.nodes.kv_layout import Layout
from numa_lab.nodes.seats import Place
from numa_lab.nodes.sharded_attention import Piece
from numa_lab.placement import memory


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


def pieces(segments: Sequence[Segment], places: Mapping[int, Place], q_len: int) -> list[Piece]:
    """Return what a step over the last `q_len` tokens reads: for each node its tokens of each sequence and segment.

    The tokens that all queries see make one piece, and the last ones, which only some of the queries see, make another with a mask.

    Parameters
    ----------
    segments
        Those of a cache, in order.
    places
        For each node of the cache the place whose threads read it.
    q_len
        How many queries each sequence has.
    """
    all_pieces = []
    for rows, lengths in equal_runs(list(zip(*(segment.lengths for segment in segments), strict=True))):
        slots, behind = itertools.count(), sum(lengths)  # behind: tokens of a segment and of those after it
        for segment, length in zip(segments, lengths, strict=True):
            seen_by_all = min(length, max(0, behind - q_len + 1))
            for node, place in places.items():
                first, last = segment.layout.count(node, seen_by_all), segment.layout.count(node, length)
                tensors = segment.keys[node], segment.values[node]
                if first:
                    all_pieces.append(Piece(place, rows, next(slots), *tensors, 0, first))
                if last > first:
                    positions = torch.from_numpy(segment.layout.positions(node, first, last))
                    mask = positions <= behind - q_len + torch.arange(q_len, device="cpu").unsqueeze(1)
                    all_pieces.append(Piece(place, rows, next(slots), *tensors, first, last, mask))
            behind -= length
    return all_pieces


def equal_runs(items: Sequence[tuple[int, ...]]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Group neighbouring sequences of a batch whose items are equal; yield the slice of each group, and its item."""
    start = 0
    for item, group in itertools.groupby(items):
        stop = start + len(list(group))
        yield slice(start, stop), item
        start = stop
