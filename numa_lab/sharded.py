"""Attention over pieces of K and V that lie on several nodes: each node's team computes over its own, and the parts are merged.

The calling thread prepares all of it, so that compiled work alone is left to the teams (``node_team.run_compiled``): in front of a
step that streams K and V through the caches each line of Python takes microseconds, and there the nodes would wait for each
other.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from numa_lab.attention import addresses, decode
from numa_lab.attention.partial import merge, partial_attention
from numa_lab.attention.plans import Memory, Merge, Plan, make_plan
from numa_lab.handover import Job
from numa_lab.node_team import NodeTeam, run_compiled, run_on_leaders

MAX_PLANS = 1024
_plans: dict[tuple[object, ...], Plan] = {}


class Piece(NamedTuple):
    """Neighbouring tokens of some sequences, in the memory of one node."""

    team: NodeTeam  # that reads it
    rows: slice  # the sequences; its start and stop are numbers
    slot: int  # of the partial result: each piece of a sequence has another
    key: Tensor  # [batch, kv_heads, room, head_dim], of all sequences
    value: Tensor
    first: int  # token
    last: int  # token + 1
    mask: Tensor | None = None  # [q_len, last - first]: True where a query may look

    def plan(self, query: Tensor, outputs: Tensor, scale: float | None) -> Plan | None:
        """How the decode kernel computes this; None where it does not serve. The layers of a model ask alike."""
        signature = (
            type(query), query.dtype, query.shape, query.stride(), scale, len(self.team.cpus),
            self.rows.stop - self.rows.start, self.key.stride(), self.value.stride(), self.key.shape[1],
        )  # fmt: skip
        if self.mask is None and (known := _plans.get(signature)):
            return known
        query, key, value = query[self.rows], self.key[self.rows], self.value[self.rows]
        mask = None if self.mask is None else self.mask.expand(*query.shape[:-1], -1)
        if decode.refusal(query, key, value, mask, 0.0, scale):
            return None
        plan = make_plan(query, key, value, mask, scale, outputs[0, self.rows], len(self.team.cpus))
        if mask is None:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[signature] = plan
        return plan

    def job(self, plan: Plan, memory: Memory, query: Tensor, outputs: Tensor, log_sum_exps: Tensor) -> Job:
        """What the team runs."""
        start = self.rows.start
        return plan.job(
            memory, self.last - self.first, _at(query, start), _at(self.key, start, 0, self.first),
            _at(self.value, start, 0, self.first), _at(outputs, self.slot, start), _at(log_sum_exps, self.slot, start),
            0 if self.mask is None else self.mask.data_ptr(),
        )  # fmt: skip

    def compute(self, query: Tensor, outputs: Tensor, log_sum_exps: Tensor, scale: float | None) -> None:
        """The same by torch."""
        tokens = slice(self.first, self.last)
        key, value = self.key[self.rows, :, tokens], self.value[self.rows, :, tokens]
        output, log_sum_exp = partial_attention(query[self.rows], key, value, self.mask, scale)
        outputs[self.slot, self.rows], log_sum_exps[self.slot, self.rows] = output, log_sum_exp


def attend(query: Tensor, pieces: Sequence[Piece], scale: float | None = None) -> Tensor:
    """Attention over all pieces together.

    Parameters
    ----------
    query
        ``[batch, q_heads, q_len, head_dim]``.
    pieces
        At least one. What a sequence has in none is no part of it.
    scale
        Factor of the scores; 1 / sqrt(head_dim) where it is None.

    Returns
    -------
    Tensor
        ``[batch, q_heads, q_len, head_dim]``, of the query's dtype, without gradients. Where torch has to see the operators, as
        transforms (``vmap``, forward AD), tracers and dispatch modes want it, the calling thread computes by torch, and what
        they make of it comes out.

    Raises
    ------
    NumaLabError
        As ``node_team.run_compiled`` raises it.
    """
    if not addresses.readable(query) or query.dtype != pieces[0].key.dtype:
        return _here(query, pieces, scale)
    slots, query = 1 + max(piece.slot for piece in pieces), query.detach()
    # All tensors are told their dtype and device: a program may have set other defaults.
    outputs = torch.empty(slots, *query.shape, dtype=query.dtype, device="cpu")
    log_sum_exps = torch.empty(slots, *query.shape[:-1], dtype=torch.float32, device="cpu")
    plans = [piece.plan(query, outputs, scale) for piece in pieces]
    if None in plans:
        wide = torch.promote_types(query.dtype, torch.float32)
        outputs, log_sum_exps = outputs.to(wide), log_sum_exps.to(wide)
    if sum(piece.rows.stop - piece.rows.start for piece in pieces) < slots * len(query):  # some sequences have fewer
        outputs.zero_()
        log_sum_exps.fill_(-torch.inf)
    if None in plans:
        _by_torch(query, pieces, outputs, log_sum_exps, scale)
    else:
        work: dict[NodeTeam, list[Job]] = defaultdict(list)
        for piece, plan in zip(pieces, plans, strict=True):
            assert plan is not None
            memory = _memories.one(piece.team, len(work[piece.team]))
            work[piece.team].append(piece.job(plan, memory, query, outputs, log_sum_exps))
        run_compiled(work)
        if slots > 1:
            out = torch.empty(query.shape, dtype=query.dtype, device="cpu")
            _memories.merge(query.dtype, query.size(-1))(outputs, log_sum_exps, out)
            return out
    return (outputs[0] if slots == 1 else merge(outputs, log_sum_exps)).to(query.dtype)


def _by_torch(
    query: Tensor, pieces: Sequence[Piece], outputs: Tensor, log_sum_exps: Tensor, scale: float | None
) -> None:
    run_on_leaders([(piece.team, partial(piece.compute, query, outputs, log_sum_exps, scale)) for piece in pieces])


def _here(query: Tensor, pieces: Sequence[Piece], scale: float | None) -> Tensor:
    """The same on the calling thread, by operators that torch can trace, transform and derive: none changes a tensor in place."""
    of_rows: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    with torch.autocast("cpu", enabled=False):  # it casts products of float32, which the query was brought to
        for piece in pieces:
            tokens = slice(piece.first, piece.last)
            key, value = piece.key[piece.rows, :, tokens], piece.value[piece.rows, :, tokens]
            part = partial_attention(query[piece.rows], key, value, piece.mask, scale)
            of_rows[piece.rows.start, piece.rows.stop].append(part)
        merged = {}
        for rows, parts in of_rows.items():
            outputs, log_sum_exps = zip(*parts, strict=True)
            merged[rows] = merge(torch.stack(outputs), torch.stack(log_sum_exps))
        output = torch.cat([merged[rows] for rows in sorted(merged)])
    return output.to(query.dtype)


def _at(tensor: Tensor, *place: int) -> int:
    """Address of what begins at a place."""
    steps = zip(place, tensor.stride(), strict=False)
    return tensor.data_ptr() + tensor.element_size() * sum(index * stride for index, stride in steps)


class _Memories(threading.local):
    """What a calling thread keeps for the teams that it calls; each team touches its own workspace first."""

    def __init__(self) -> None:
        self._of_team: WeakKeyDictionary[NodeTeam, list[Memory]] = WeakKeyDictionary()
        self.merge = cache(Merge)

    def one(self, team: NodeTeam, number: int) -> Memory:
        """The memory of a team's first, second, ... job at once."""
        found = self._of_team.setdefault(team, [])
        while len(found) <= number:
            found.append(Memory())
        return found[number]


_memories = _Memories()
