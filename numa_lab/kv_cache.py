"""NodeShardedKVCache: one cache in the memory of all nodes, each node's threads reading their own.

K and V of a sequence are split by token range: blocks of tokens belong to nodes in turn, for good. A decode step runs on
all nodes at once, each over its own tokens, and the partial results are merged by their log-sum-exp. So one sequence is
read with the bandwidth of all nodes, for any number of KV heads.

Limits: one thread may use a cache at a time, and no leader of a team may. Handing a step to the nodes takes some tens of
microseconds: contexts of a few thousand tokens are faster on one node. What is appended after a fork has no huge pages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from numa_lab import memory, node_team, proof
from numa_lab.attention import addresses, autocast
from numa_lab.attention.checks import as_number, require_tensors
from numa_lab.attention.graphs import between_graphs
from numa_lab.binding import Binding, MemPolicy
from numa_lab.errors import InvalidInput
from numa_lab.kv_layout import Layout, Segment
from numa_lab.node_team import NodeTeam
from numa_lab.receipt import Receipt, team_of
from numa_lab.sharded import Piece, attend
from numa_lab.topology import read_topology


class NodeShardedKVCache:
    """K and V of a batch of sequences, split over nodes by token range.

    Parameters
    ----------
    batch, kv_heads, head_dim
        Of K and V.
    capacity
        Tokens that a sequence may grow to. Room for them is checked and bound at once, and touched as it fills.
    dtype
        Of K, V and the queries.
    nodes
        Where; all effective nodes where None is given. What lies on a node of memory alone is read by the nearest team.
    teams
        A ``NodeTeam`` for each node; the shared ones (``numa_lab.node_team.teams``) where None is given.
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
        teams: Mapping[int, NodeTeam] | None = None,
        block: int = 256,
        weights: Mapping[int, float] | None = None,
    ) -> None:
        sizes = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "capacity": capacity, "block": block}
        for name, size in sizes.items():
            if size < 1:
                raise InvalidInput(f"{name}={size}: expected at least 1")
        if not dtype.is_floating_point:
            raise InvalidInput(f"dtype={dtype}: expected a floating-point dtype")
        self._teams = dict(teams if teams is not None else node_team.teams(nodes))
        self.nodes = tuple(self._teams if nodes is None else nodes)
        missing = [node for node in self.nodes if node not in self._teams]
        if missing or not self.nodes or len(set(self.nodes)) < len(self.nodes):
            raise InvalidInput(
                f"nodes={self.nodes} with teams of {tuple(self._teams)}: expected each node once, with a team"
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
        self._segments = [self._new_segment(capacity)]

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
        segment = self._writable()
        copies: dict[int, list[Callable[[], object]]] = {node: [] for node in self.nodes}
        for rows, (old, count) in _runs(list(zip(segment.lengths, counts, strict=True))):
            for node, local, start, stop in segment.layout.pieces(old, old + count):
                for ours, new in ((segment.keys, key), (segment.values, value)):
                    target = ours[node][rows, :, local : local + stop - start]
                    copies[node].append(partial(target.copy_, new[rows, :, start - old : stop - old]))
        # Too little to hand over, or of a mode or transform of this thread, which leaders know nothing of.
        if max(counts) <= self._block or not addresses.readable(key, value):
            _call_all(itertools.chain.from_iterable(copies.values()))
        else:
            node_team.run_on_leaders(
                (self._teams[node], partial(_call_all, of_node)) for node, of_node in copies.items() if of_node
            )
        segment.lengths = [old + count for old, count in zip(segment.lengths, counts, strict=True)]

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
        return attend(query, pieces, scale) if pieces and query.numel() else torch.zeros_like(query)

    def truncate(self, tokens: int | Sequence[int]) -> None:
        """Forget all but the first tokens of each sequence; a sequence that holds no more is left alone.

        Raises
        ------
        InvalidInput
            A number is negative, or there are not as many as sequences.
        """
        left = self._per_sequence(tokens, 0, "tokens", 0, None)
        for segment in self._segments:
            kept = [min(own, keep) for own, keep in zip(segment.lengths, left, strict=True)]
            segment.truncate(kept)
            left = [keep - own for keep, own in zip(left, kept, strict=True)]
        while len(self._segments) > 1 and not any(self._segments[-1].lengths):
            self._segments.pop()

    def fork(self) -> NodeShardedKVCache:
        """A cache that begins with the same tokens, for beams: they are shared, not copied, and each side goes on alone."""
        twin = object.__new__(NodeShardedKVCache)
        twin.__dict__.update(self.__dict__)
        twin._segments = [segment.lent() for segment in self._segments]
        return twin

    def receipt(self) -> dict[int, Receipt]:
        """For each node what its team is granted and where it is, and where the pages of its K and V lie, as seen now."""
        found = {}
        topology = read_topology()
        looks = node_team.run_on_leaders((self._teams[node], partial(proof.look, topology)) for node in self.nodes)
        for node, (granted, threads, notes) in zip(self.nodes, looks, strict=True):
            pages: dict[str, dict[int, int]] = {}
            for number, segment in enumerate(self._segments):
                for name, tensor in (("key", segment.keys[node]), ("value", segment.values[node])):
                    if tensor.numel():
                        seen = memory.locate(tensor)
                        seen.pop(memory.UNTOUCHED, None)  # room for tokens to come
                        pages[f"{name}{number or ''}"] = seen
            by = self._teams[node].node  # another one where the node has memory alone
            requested = Binding((by,), (by,), MemPolicy.PREFERRED)
            refusal = self._teams[node].refusal
            notes = (*notes, refusal) if refusal else notes
            team = team_of(len(self._teams[node].cpus), threads)
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
        keys, values = (
            {node: memory.empty(size[node], self.dtype, node, huge_pages=huge_pages) for node in self.nodes}
            for _ in range(2)
        )
        return Segment(layout, keys, values, [0] * self.batch)

    def _writable(self) -> Segment:
        """The segment that takes new tokens: the last one, unless others read it beyond its end.

        A new one takes up what is short before it, so that beams which fork at each token are no chain of single tokens.
        """
        last = self._segments[-1]
        if last.own:
            return last
        short = max(last.lengths) <= self._block
        before = self._segments[:-1] if short else self._segments
        room = self.capacity - min(map(sum, zip(*(segment.lengths for segment in before), strict=True)), default=0)
        fresh = self._new_segment(room, huge_pages=False)  # few tokens of many heads would touch many huge pages
        if short:
            fresh.copy_from(last)
        self._segments = [*before, fresh]
        return fresh

    def _pieces(self, q_len: int) -> list[Piece]:
        """What each node holds of each sequence, apart where only some of q_len queries see it."""
        found = []
        for rows, lengths in _runs(list(zip(*(segment.lengths for segment in self._segments), strict=True))):
            slots, behind = itertools.count(), sum(lengths)  # behind: tokens of a segment and of those after it
            for segment, length in zip(self._segments, lengths, strict=True):
                by_all = min(length, max(0, behind - q_len + 1))  # so many of them does each query see
                for node in self.nodes:
                    first, last = segment.layout.count(node, by_all), segment.layout.count(node, length)
                    place = self._teams[node], rows
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


def _call_all(functions: Iterable[Callable[[], object]]) -> None:
    for function in functions:
        function()
