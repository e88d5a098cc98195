"""Attention over pieces of K and V that lie on several nodes, in one step of a team that has seats on all of them.

Each place's threads compute over what lies there, with the log-sum-exp, and whoever is done last merges the parts. What can be is
laid out once for many steps: where a step has just streamed K and V through the caches, each line of Python takes microseconds.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from numa_lab.attention import addresses, autocast, decode
from numa_lab.attention.kernel_plan import KV_LEN, OUT, QUERY, Arguments, Merge, Plan, make_plan
from numa_lab.attention.partial import merge, partial_attention
from numa_lab.machine.page_maps import PAGE_BYTES
from numa_lab.nodes.seats import Place, seats_of

MAX_PLANS = 1024
_FLOAT_BYTES = 4
_plans: dict[tuple[object, ...], Plan] = {}


class Piece(NamedTuple):
    """Neighbouring tokens of some sequences, in the memory of one node."""

    place: Place  # that reads it
    rows: slice  # the sequences; its start and stop are numbers
    slot: int  # of the partial result: each piece of a sequence has another
    key: Tensor  # [batch, kv_heads, room, head_dim], of all sequences
    value: Tensor
    first: int  # token
    last: int  # token + 1
    mask: Tensor | None = None  # [q_len, last - first]: True where a query may look

    def plan(self, query: Tensor, scale: float | None) -> Plan | None:
        """How the decode kernel computes this; None where it does not serve. The layers of a model ask alike."""
        signature = (
            type(query), query.dtype, query.shape, query.stride(), scale, len(self.place.cpus),
            self.rows.stop - self.rows.start, self.key.stride(), self.value.stride(), self.key.shape[1],
        )  # fmt: skip
        if self.mask is None and (known := _plans.get(signature)):
            return known
        query, key, value = query[self.rows], self.key[self.rows], self.value[self.rows]
        mask = None if self.mask is None else self.mask.expand(*query.shape[:-1], -1)
        if decode.refusal(query, key, value, mask, 0.0, scale):
            return None
        # All tensors are told their dtype and device: a program may have set other defaults.
        out = torch.empty(query.shape, dtype=query.dtype, device="cpu")
        plan = make_plan(query, key, value, mask, scale, out, len(self.place.cpus))
        if mask is None:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[signature] = plan
        return plan


def prepare(
    query: Tensor, pieces: Sequence[Piece], places: tuple[Place, ...], scale: float | None = None
) -> Step | None:
    """Lay out attention over all pieces together; None where torch has to compute it (``by_torch``).

    Parameters
    ----------
    query
        ``[batch, q_heads, q_len, head_dim]``.
    pieces
        At least one. What a sequence has in none is no part of it.
    places
        All that pieces have.
    scale
        Factor of the scores; 1 / sqrt(head_dim) where it is None.
    """
    if not addresses.readable(query) or query.dtype != pieces[0].key.dtype:
        return None
    query = query.detach()
    found = [plan for piece in pieces if (plan := piece.plan(query, scale))]
    return Step(query, pieces, found, places, scale) if len(found) == len(pieces) else None


class _Job(NamedTuple):
    """The kernel's work over one piece, and where its query and, in bytes behind that of all, its output begin."""

    arguments: Arguments
    plan: Plan
    query_begin: int
    out_begin: int


class Step:
    """Attention over pieces, laid out for the calling thread; also for other queries, and other numbers of tokens of the pieces."""

    def __init__(
        self,
        query: Tensor,
        pieces: Sequence[Piece],
        found: Sequence[Plan],
        places: tuple[Place, ...],
        scale: float | None,
    ) -> None:
        self._shape, self._dtype, self._scale, self._places = query.shape, query.dtype, scale, places
        self._same, self._seats, self._alive = addresses.guard(query), seats_of(places), pieces
        slots, rows = 1 + max(piece.slot for piece in pieces), query[..., 0].numel()
        sizes = [slots * query.nbytes, slots * rows * _FLOAT_BYTES]
        sizes += [len(piece.place.cpus) * plan.workspace_bytes for piece, plan in zip(pieces, found, strict=True)]
        *begins, end = accumulate((-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes), initial=0)
        self._room = self._seats.room.at_least(end)
        outputs, log_sum_exps, *workspaces = (self._room + begin for begin in begins)

        self._jobs = []
        for piece, plan, workspace in zip(pieces, found, workspaces, strict=True):
            start, arguments = piece.rows.start, Arguments()
            before = rows // len(query) * start  # rows of outputs in front of the first sequence's
            out_begin = before * query.size(-1) * query.element_size()
            plan.pack(
                arguments, workspace, 0,
                _at(piece.key, start, 0, piece.first), _at(piece.value, start, 0, piece.first),
                outputs + piece.slot * query.nbytes + out_begin,
                log_sum_exps + (piece.slot * rows + before) * _FLOAT_BYTES,
                0 if piece.mask is None else piece.mask.data_ptr(), piece.last - piece.first,
            )  # fmt: skip
            self._jobs.append(_Job(arguments, plan, _at(query, start) - query.data_ptr(), out_begin))
        self._of_places, table = [], list[int]()
        for place in places:
            own = [job.arguments.address for job, piece in zip(self._jobs, pieces, strict=True) if piece.place == place]
            self._of_places.append((ctypes.c_int64 * len(own))(*own))
            table += [ctypes.addressof(self._of_places[-1]), len(own)]
        self._table = (ctypes.c_int64 * len(table))(*table)
        self._table_address = ctypes.addressof(self._table)
        self._merge = Merge(query.dtype, query.size(-1), outputs, log_sum_exps, slots, rows) if slots > 1 else None
        # A sequence with fewer pieces than others has nothing in some slots, where weights of 0 then belong.
        full = sum(piece.rows.stop - piece.rows.start for piece in pieces) == slots * len(query)
        self._to_clear = None if full else (outputs, slots * query.nbytes, _floats(log_sum_exps, slots * rows))

    @property
    def count(self) -> int:
        """Of the pieces."""
        return len(self._jobs)

    def serves(self, query: Tensor, scale: float | None) -> bool:
        """Whether this thread may run it for a query."""
        return (
            type(query) is Tensor
            and (scale is None or type(scale) is float)
            and scale == self._scale
            and addresses.unwatched(query)
            and self._same(query)
            and autocast.dtype() in (None, self._dtype)
            and seats_of(self._places) is self._seats
            and self._seats.room.address == self._room
        )

    def run(self, query: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """Compute.

        Parameters
        ----------
        query
            As the one that it was laid out for.
        counts
            How many tokens each piece has now, all at least 1; as before where none are given.

        Returns
        -------
        Tensor
            ``[batch, q_heads, q_len, head_dim]``, of the query's dtype, without gradients.

        Warns
        -----
        RuntimeWarning
            As ``Seats.run``.
        """
        out = torch.empty(self._shape, dtype=self._dtype, device="cpu")
        query_at, out_at = query.data_ptr(), out.data_ptr()
        for job in self._jobs:
            job.arguments.words[QUERY] = query_at + job.query_begin
            if not self._merge:
                job.arguments.words[OUT] = out_at + job.out_begin
        for job, count in zip(self._jobs, counts, strict=False):
            job.arguments.words[KV_LEN] = count
        # What is less than a team is woken for is the calling thread's alone.
        tokens = sum(job.arguments.words[KV_LEN] for job in self._jobs)
        alone = tokens < min(job.plan.least_shared for job in self._jobs)
        if self._to_clear:
            address, nbytes, log_sum_exps = self._to_clear
            ctypes.memset(address, 0, nbytes)
            log_sum_exps.fill(-np.inf)
        if self._merge:
            self._merge.into(out_at)
            self._seats.run(self._table_address, self._merge.kernel, self._merge.address, alone=alone)
        else:
            self._seats.run(self._table_address, alone=alone)
        return out


def by_torch(query: Tensor, pieces: Sequence[Piece], scale: float | None) -> Tensor:
    """The same on the calling thread, by operators that torch can trace, transform and derive: none changes a tensor in place."""
    of_rows: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    if addresses.readable(query):  # nobody asks for derivatives of what the kernel could have been asked for
        query = query.detach()
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


def _floats(address: int, count: int) -> np.ndarray:
    """The float32 numbers at an address."""
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
