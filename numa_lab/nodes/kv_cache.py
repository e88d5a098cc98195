"""NodeShardedKVCache: one KV cache in the memory of all nodes, of which each node's threads read their own part.

This is what the field calls context-parallel or split-KV decoding, over the NUMA nodes of one machine. K and V of a sequence are split
by token range: blocks of tokens belong to nodes in turn, for good. A decode step runs on all nodes at once (``numa_lab.nodes.seats``),
on each over its own tokens, and the partial results are merged by their log-sum-exp. So one sequence is read with the bandwidth of all
nodes, for any number of KV heads.

Limits: one thread may use a cache at a time, and neither a signal's handler nor a finalizer may use a cache of a thread that it has
interrupted in a step. What the decode kernel does not serve, such as more than 16 queries of a sequence, torch computes, on whichever
CPUs its threads are. Tokens that are appended after a fork lie on base pages and not on huge ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from numa_lab.attention import autocast
from numa_lab.attention.checks import as_number, require_tensors
from numa_lab.attention.graphs import between_graphs
from numa_lab.errors import InvalidInput
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes import seats, sharded_attention
from numa_lab.nodes.kv_segments import ShardedMemory
from numa_lab.nodes.seats import Place
from numa_lab.nodes.sharded_attention import Step
from numa_lab.placement.pinned_team import TeamContext, TeamEntry
from numa_lab.placement.receipt import Receipt


class NodeCpus(Protocol):
    """Anything that has a node, and CPUs which read its memory, such as a ``Place`` or a ``NodeTeam``."""

    @property
    def node(self) -> int:
        """The node of the CPUs."""

    @property
    def cpus(self) -> tuple[int, ...]:
        """One thread computes on each."""


class NodeShardedKVCache(TeamContext["NodeShardedKVCache"]):
    """K and V of a batch of sequences, split over nodes by token range for context-parallel (split-KV) decoding.

    ``with cache:`` keeps the team on the cores of the cache's nodes for all steps in the block: those of this cache, and those of others
    on the same nodes, as the layers of a model have them. What torch computes there runs on the same cores, with as many threads. The
    calling thread may use its whole node, and threads and processes that it starts inherit that. Masks, memory policies and the thread
    count are given back at the end of the block, whatever ended it. The thread that entered the block has to leave it.

    Parameters
    ----------
    batch, kv_heads, head_dim
        The sizes of K and V, ``[batch, kv_heads, tokens, head_dim]``.
    capacity
        How many tokens each sequence may have. Their memory is checked and bound at once, and touched as it fills.
    dtype
        Of K, V and the queries: a floating-point type.
    nodes
        The nodes that hold K and V; all effective nodes where None is given. A node that has memory alone is read by the CPUs of the
        nearest node.
    teams
        For each node an object with a `node` and the `cpus` that read its memory, such as ``numa_lab.nodes.seats.Place``. Where None
        is given, these are all physical cores of the nodes (``numa_lab.nodes.seats.places``).
    block
        How many neighbouring tokens belong to one node.
    weights
        Each node's share of the blocks, in any unit, such as its measured read bandwidth where nodes are unequal. The shares are equal
        where None is given.

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
        *,
        capacity: int,
        dtype: torch.dtype,
        nodes: Sequence[int] | None = None,
        teams: Mapping[int, NodeCpus] | None = None,
        block: int = 256,
        weights: Mapping[int, float] | None = None,
    ) -> None:
        sizes = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "capacity": capacity, "block": block}
        for name, size in sizes.items():
            if size < 1:
                raise InvalidInput(f"{name}={size}: expected at least 1")
        if not dtype.is_floating_point:
            raise InvalidInput(f"dtype={dtype}: expected a floating-point dtype")
        team_of = seats.places(nodes) if teams is None else teams
        places = {node: Place(team.node, tuple(team.cpus)) for node, team in team_of.items()}
        self.nodes = tuple(places if nodes is None else nodes)
        missing = [node for node in self.nodes if node not in places or not places[node].cpus]
        if missing or not self.nodes or len(set(self.nodes)) < len(self.nodes):
            raise InvalidInput(
                f"nodes={self.nodes} with teams of {tuple(places)}: expected each node once, with a team that has CPUs"
            )
        self._places = {node: places[node] for node in self.nodes}
        shares = dict.fromkeys(self.nodes, 1.0) if weights is None else weights
        finite = all(0 <= share < math.inf for share in shares.values())
        if set(shares) != set(self.nodes) or not finite or not sum(shares.values()):
            raise InvalidInput(
                f"weights={weights}: expected one for each of nodes {self.nodes}, finite, none negative, not all 0"
            )
        self.batch, self.kv_heads, self.head_dim, self.dtype = batch, kv_heads, head_dim, dtype
        self.capacity = capacity
        self._all_places = tuple(dict.fromkeys(self._places.values()))
        with self:
            pass  # whatever stands against pinning is told now
        shares = {node: shares[node] for node in self.nodes}  # in the order of nodes, which decides between equals
        self._memory = ShardedMemory(batch, kv_heads, head_dim, capacity, dtype, shares, block)
        # The last step, for the next one, and the keys for which it was laid out.
        self._last_step: tuple[Step, Mapping[int, Tensor]] | None = None

    def _enter(self, entry: TeamEntry) -> NodeShardedKVCache:
        seats.enter(self._all_places, entry)
        return self

    def __len__(self) -> int:
        """Return the number of tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each sequence."""
        return self._memory.lengths

    @property
    def tokens_per_node(self) -> dict[int, int]:
        """The number of tokens of all sequences together that lie on each node: ``{node: tokens}``."""
        return {node: self._memory.count(node) for node in self.nodes}

    @between_graphs
    def append(self, key: Tensor, value: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Append tokens to the sequences: one, or those of a prompt.

        Parameters
        ----------
        key, value
            ``[batch, kv_heads, new, head_dim]``, of the cache's dtype, on the CPU.
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
        self._memory.append(key, value, counts)
        if self._last_step and self._last_step[1] is not self._memory.segments[-1].keys:
            self._last_step = None  # it holds memory that the cache may no longer have

    @between_graphs
    def attend(self, query: Tensor, *, scale: float | None = None) -> Tensor:
        """Compute the attention of each sequence's last q_len tokens, which have been appended already, to all tokens up to themselves.

        Parameters
        ----------
        query
            ``[batch, q_heads, q_len, head_dim]``, of the cache's dtype, on the CPU. Each query sees the tokens up to its own.
        scale
            A factor of the scores; 1 / sqrt(head_dim) where it is None.

        Returns
        -------
        Tensor
            ``[batch, q_heads, q_len, head_dim]``, of the query's dtype; under autocast of autocast's dtype, as from torch's own
            attention.

        Raises
        ------
        InvalidInput
            The query does not fit, or a sequence holds fewer than q_len tokens.
        WrongType
            The query is no tensor, or `scale` no number.
        """
        if (output := self._repeat_step(query, scale)) is not None:
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
        pieces = self._memory.pieces(self._places, query.size(2))
        if not pieces or not query.numel():
            return torch.zeros_like(query)
        step = sharded_attention.prepare(query, pieces, self._all_places, scale)
        if step is None:
            return sharded_attention.by_torch(query, pieces, scale)
        if query.size(2) == 1 and (keys := self._memory.single_keys()) is not None:
            self._last_step = step, keys
        return step.run(query)

    def _repeat_step(self, query: Tensor, scale: float | None) -> Tensor | None:
        """Run the last step again, for more or fewer tokens; return None where a step has to be laid out anew.

        Laying a step out takes some tens of microseconds, which is as long as reading a thousand tokens.
        """
        if self._last_step is None:
            return None
        step, keys = self._last_step
        if self._memory.single_keys() is not keys or not step.serves(query, scale):
            return None
        segment = self._memory.segments[0]
        counts = [count for node in self.nodes if (count := segment.layout.count(node, segment.lengths[0]))]
        return step.run(query, counts) if len(counts) == step.count else None

    def truncate(self, tokens: int | Sequence[int]) -> None:
        """Forget all but the first tokens of each sequence; a sequence that holds no more than these is left alone.

        Parameters
        ----------
        tokens
            How many tokens to keep: one number for all sequences, or one for each.

        Raises
        ------
        InvalidInput
            A number is negative, or there are not as many as sequences.
        """
        self._memory.truncate(self._per_sequence(tokens, 0, "tokens", 0, None))

    def fork(self) -> NodeShardedKVCache:
        """Return a cache that begins with the same tokens, as beam search needs it.

        The tokens are shared and not copied; what either cache appends or truncates from then on is its own.
        """
        twin = object.__new__(NodeShardedKVCache)
        twin.__dict__.update(self.__dict__)
        twin._memory = self._memory.fork()
        return twin

    def receipts(self) -> dict[int, Receipt]:
        """Return for each node what its team is granted, where its threads are, and where the pages of its K and V lie now.

        Returns
        -------
        dict
            ``{node: receipt}``. A receipt names the tensors ``key`` and ``value``, and those of further segments, which forks make,
            ``key1``, ``value1`` and so on.
        """
        seen_at = seats.look(self._all_places, read_topology())
        return {
            # The threads' node is another one where a node has memory alone.
            node: Receipt.of_team(
                place.node, len(place.cpus), seen_at[place], pages=self._memory.pages(node), promised=(node,)
            )
            for node, place in self._places.items()
        }

    receipt = receipts  # an older name

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
