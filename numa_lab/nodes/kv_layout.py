"""Which token of a sharded cache lies where: blocks of tokens that belong to nodes in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Layout:
    """The owner of each block of tokens, and where a token lies in the memory of its owner.

    The tokens of a node are numbered from 0 in the order in which they come in the sequence, and lie in a row there.

    Attributes
    ----------
    block
        How many tokens a block has.
    owners
        The node of each block.
    earlier_blocks
        For each node how many of its blocks come before each block of the sequence.
    """

    block: int
    owners: tuple[int, ...]
    earlier_blocks: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, shares: Mapping[int, float], block: int, capacity: int) -> Layout:
        """Return a layout for so many tokens, in which each block goes to the node that is furthest behind its share."""
        total, given, owners = sum(shares.values()), dict.fromkeys(shares, 0), []
        for number in range(-(-capacity // block)):
            owner = max(shares, key=lambda node: shares[node] / total * (number + 1) - given[node])
            given[owner] += 1
            owners.append(owner)
        earlier_blocks = {
            node: tuple(itertools.accumulate((owner == node for owner in owners), initial=0)) for node in shares
        }
        return cls(block, tuple(owners), earlier_blocks)

    def count(self, node: int, tokens: int) -> int:
        """Return how many of a sequence's first `tokens` tokens lie on a node."""
        whole, rest = divmod(tokens, self.block)
        return self.earlier_blocks[node][whole] * self.block + (rest if rest and self.owners[whole] == node else 0)

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Split the tokens from `start` up to `stop` into ranges of one node each.

        Yields
        ------
        tuple
            The node, the number that the first token has there, the first token, and the last token + 1.
        """
        while start < stop:
            number = start // self.block
            node, end = self.owners[number], min(stop, (number + 1) * self.block)
            yield node, self.earlier_blocks[node][number] * self.block + start % self.block, start, end
            start = end

    def positions(self, node: int, first: int, last: int) -> NDArray[np.int64]:
        """Return the positions in the sequence of those tokens that have the numbers from `first` up to `last` on a node."""
        blocks = np.flatnonzero(np.equal(self.owners, node))
        numbers = np.arange(first, last)
        return np.asarray(blocks[numbers // self.block] * self.block + numbers % self.block)
