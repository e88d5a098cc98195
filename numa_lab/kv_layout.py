"""Where the tokens of a sharded cache lie: which node owns which block, and runs of tokens with their memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which token lies where: block by block, each of one node, numbered there from 0."""

    block: int
    owners: tuple[int, ...]
    before: Mapping[int, NDArray[np.int64]]  # blocks of a node in front of each block

    @classmethod
    def of(cls, shares: Mapping[int, float], block: int, capacity: int) -> Layout:
        """Give each block to the node that is furthest behind its share."""
        total, given, owners = sum(shares.values()), dict.fromkeys(shares, 0), []
        for number in range(-(-capacity // block)):
            owner = max(shares, key=lambda node: shares[node] / total * (number + 1) - given[node])
            given[owner] += 1
            owners.append(owner)
        before = {node: np.cumsum([0, *(owner == node for owner in owners)]) for node in shares}
        return cls(block, tuple(owners), before)

    def count(self, node: int, tokens: int) -> int:
        """How many of the first tokens of a sequence lie on a node."""
        whole, rest = divmod(tokens, self.block)
        return int(self.before[node][whole]) * self.block + (rest if rest and self.owners[whole] == node else 0)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """For a range of tokens the node, the first place there, and the first and the last + 1 of each piece."""
        while start < stop:
            number = start // self.block
            node, end = self.owners[number], min(stop, (number + 1) * self.block)
            yield node, int(self.before[node][number]) * self.block + start % self.block, start, end
            start = end

    def positions(self, node: int, first: int, last: int) -> NDArray[np.int64]:
        """The tokens at some places of a node."""
        blocks = np.flatnonzero(np.equal(self.owners, node))
        places = np.arange(first, last)
        return np.asarray(blocks[places // self.block] * self.block + places % self.block)


@dataclass
class Segment:
    """Tokens in a row of all sequences, with their memory, which caches that were forked share."""

    layout: Layout
    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    lengths: list[int]
    own: bool = True  # whether tokens may be added behind them
    lent_lengths: tuple[int, ...] = ()

    def lent(self) -> Segment:
        """The same tokens for another cache, which may add none here."""
        self.lent_lengths = tuple(map(max, zip(self.lengths, self.lent_lengths or self.lengths, strict=True)))
        return Segment(self.layout, self.keys, self.values, list(self.lengths), own=False)

    def copy_from(self, other: Segment) -> None:
        """Begin with the tokens of a segment with the same blocks of the same nodes."""
        self.lengths = list(other.lengths)
        for node in self.keys:
            count = other.layout.count(node, max(other.lengths))
            for ours, others in ((self.keys, other.keys), (self.values, other.values)):
                ours[node][:, :, :count] = others[node][:, :, :count]

    def truncate(self, lengths: list[int]) -> None:
        """Forget tokens; where others still read them, they may not be written over."""
        self.lengths = lengths
        if any(own < lent for own, lent in zip(lengths, self.lent_lengths, strict=False)):
            self.own = False
