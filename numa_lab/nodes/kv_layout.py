"""Where the tokens of a sharded cache lie: which node owns which block, and runs of tokens with their memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which token lies where: block by block, each of one node, numbered there from 0."""

    block: int
    owners: tuple[int, ...]
    before: Mapping[int, tuple[int, ...]]  # blocks of a node in front of each block

    @classmethod
    def of(cls, shares: Mapping[int, float], block: int, capacity: int) -> Layout:
        """Give each block to the node that is furthest behind its share."""
        total, given, owners = sum(shares.values()), dict.fromkeys(shares, 0), []
        for number in range(-(-capacity // block)):
            owner = max(shares, key=lambda node: shares[node] / total * (number + 1) - given[node])
            given[owner] += 1
            owners.append(owner)
        before = {node: tuple(itertools.accumulate((owner == node for owner in owners), initial=0)) for node in shares}
        return cls(block, tuple(owners), before)

    def count(self, node: int, tokens: int) -> int:
        """How many of the first tokens of a sequence lie on a node."""
        whole, rest = divmod(tokens, self.block)
        return self.before[node][whole] * self.block + (rest if rest and self.owners[whole] == node else 0)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """For a range of tokens the node, the first place there, and the first and the last + 1 of each piece."""
        while start < stop:
            number = start // self.block
            node, end = self.owners[number], min(stop, (number + 1) * self.block)
            yield node, self.before[node][number] * self.block + start % self.block, start, end
            start = end

    def positions(self, node: int, first: int, last: int) -> NDArray[np.int64]:
        """The tokens at some places of a node."""
        blocks = np.flatnonzero(np.equal(self.owners, node))
        places = np.arange(first, last)
        return np.asarray(blocks[places // self.block] * self.block + places % self.block)


@dataclass(frozen=True)
class Segment:
    """Tokens in a row of all sequences, with their memory, which caches that were forked share.

    What happens to a cache makes new segments, which it takes all at once: so an interrupt leaves it as it was, or as it shall be.
    """

    layout: Layout
    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    lengths: tuple[int, ...]
    own: bool = True  # whether tokens may be added behind them
    lent_lengths: tuple[int, ...] = ()

    def lent(self) -> Segment:
        """The same, of which others read the tokens that are there."""
        lent = tuple(map(max, zip(self.lengths, self.lent_lengths or self.lengths, strict=True)))
        return replace(self, lent_lengths=lent)

    def borrowed(self) -> Segment:
        """The same tokens for another cache, which may add none here."""
        return replace(self, own=False, lent_lengths=())

    def copy_from(self, other: Segment) -> Segment:
        """Begin with the tokens of a segment with the same blocks of the same nodes."""
        for node in self.keys:
            count = other.layout.count(node, max(other.lengths))
            for ours, others in ((self.keys, other.keys), (self.values, other.values)):
                ours[node][:, :, :count] = others[node][:, :, :count]
        return replace(self, lengths=other.lengths)

    def truncate(self, lengths: tuple[int, ...]) -> Segment:
        """The first tokens; where others still read those behind, they may not be written over."""
        cut = any(own < lent for own, lent in zip(lengths, self.lent_lengths, strict=False))
        return replace(self, lengths=lengths, own=self.own and not cut)
