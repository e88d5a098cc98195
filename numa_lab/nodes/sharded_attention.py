"""Attention over pieces of K and V that lie on several nodes, in one step of a team that has seats on all of them.

This is context-parallel (split-KV) decoding: the threads of each place compute over what lies there, with the log-sum-exp, and the
thread that is done last merges the parts. Whatever does not change between steps is laid out once for many of them, because each line
of Python takes microseconds where a step has just streamed K and V through the caches.
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
from numa_lab.attention.call import AttentionCall
from numa_lab.attention.kernel_plan import KV_LEN, OUT, QUERY, KernelArguments, KernelPlan, Merge
from numa_lab.attention.partial import merge, partial_attention
from numa_lab.errors import CompilerUnusable
from numa_lab.machine.page_maps import PAGE_BYTES
from numa_lab.nodes.seats import Place, seats_of

MAX_PLANS = 1024
_FLOAT_BYTES = 4
_plans: dict[tuple[object, ...], KernelPlan] = {}


class Piece(NamedTuple):
    """Neighbouring tokens of some sequences, in the memory of one node."""

    place: Place  # whose threads read it
    rows: slice  # of the batch; its start and stop are numbers
    slot: int  # where the partial result goes: each piece of a sequence has another slot
    key: Tensor  # [batch, kv_heads, room, head_dim], of all sequences
    value: Tensor  # of the same shape
    first: int  # the first token's number in `key`
    last: int  # the last token's number + 1
    mask: Tensor | None = None  # [q_len, last - first]: True where a query sees a token

    def plan(self, query: Tensor, scale: float | None) -> KernelPlan | None:
        """Return how the decode kernel computes this piece; None where it does not serve. A model's layers share a plan."""
        signature = (
            type(query), query.dtype, query.shape, query.stride(), scale, len(self.place.cpus),
            self.rows.stop - self.rows.start, self.key.stride(), self.value.stride(), self.key.shape[1],
        )  # fmt: skip
        if self.mask is None and (known := _plans.get(signature)):
            return known
        query, tokens = query[self.rows], slice(self.first, self.last)
        key, value = self.key[self.rows, :, tokens], self.value[self.rows, :, tokens]
        # All tensors are told their dtype and device: a program may have set other defaults.
        out = torch.empty(query.shape, dtype=query.dtype, device="cpu")
        call = AttentionCall(query, key, value, self.mask, scale=scale, enable_gqa=True)
        plan = decode.plan_for(call, out, threads=len(self.place.cpus))
        if isinstance(plan, str):
            return None
        if self.mask is None:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[signature] = plan
        return plan


def prepare(
    query: Tensor, pieces: Sequence[Piece], places: tuple[Place, ...], scale: float | None = None
) -> Step | None:
    """Lay attention over all pieces out; return None where torch has to compute it (``by_torch``).

    Parameters
    ----------
    query
        ``[batch, q_heads, q_len, head_dim]``.
    pieces
        At least one. A sequence consists of the tokens that it has in the pieces.
    places
        All places of the pieces, and maybe others.
    scale
        A factor of the scores; 1 / sqrt(head_dim) where it is None.
    """
    if not addresses.readable(query) or query.dtype != pieces[0].key.dtype:
        return None
    query = query.detach()
    plans = [plan for piece in pieces if (plan := piece.plan(query, scale))]
    if len(plans) < len(pieces):
        return None
    try:
        return Step(query, pieces, plans, places, scale)
    except CompilerUnusable as error:
        _plans.clear()  # one whose kernel can't be compiled is not tried again
        decode.warn_once(str(error))
        return None


class _Job(NamedTuple):
    """The kernel's work over one piece."""

    arguments: KernelArguments
    plan: KernelPlan
    query_begin: int  # bytes from the beginning of all queries to that of its first sequence
    out_begin: int  # the same of the outputs


class Step:
    """Attention over pieces, laid out for the calling thread, for any query of this layout and any number of tokens in the pieces."""

    def __init__(
        self,
        query: Tensor,
        pieces: Sequence[Piece],
        plans: Sequence[KernelPlan],
        places: tuple[Place, ...],
        scale: float | None,
    ) -> None:
        self._shape, self._dtype, self._scale, self._places = query.shape, query.dtype, scale, places
        self._same, self._seats, self._alive = addresses.guard(query), seats_of(places), pieces
        slots, rows = 1 + max(piece.slot for piece in pieces), query[..., 0].numel()
        sizes = [slots * query.nbytes, slots * rows * _FLOAT_BYTES]
        sizes += [len(piece.place.cpus) * plan.workspace_bytes for piece, plan in zip(pieces, plans, strict=True)]
        *begins, end = accumulate((-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes), initial=0)
        self._workspace = self._seats.workspace.at_least(end)
        outputs, lse, *workspaces = (self._workspace + begin for begin in begins)

        self._jobs = []
        for piece, plan, workspace in zip(pieces, plans, workspaces, strict=True):
            start, arguments = piece.rows.start, KernelArguments()
            earlier_rows = rows // len(query) * start  # rows of outputs in front of the first sequence's
            out_begin = earlier_rows * query.size(-1) * query.element_size()
            plan.pack(
                arguments, workspace, 0,
                _at(piece.key, start, 0, piece.first), _at(piece.value, start, 0, piece.first),
                outputs + piece.slot * query.nbytes + out_begin,
                lse + (piece.slot * rows + earlier_rows) * _FLOAT_BYTES,
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
        self._merge = Merge(query.dtype, query.size(-1), outputs, lse, slots, rows) if slots > 1 else None
        # A sequence with fewer pieces than others has nothing in some slots, where weights of 0 then belong.
        full = sum(piece.rows.stop - piece.rows.start for piece in pieces) == slots * len(query)
        self._to_clear = None if full else (outputs, slots * query.nbytes, _floats(lse, slots * rows))

    @property
    def count(self) -> int:
        """The number of pieces."""
        return len(self._jobs)

    def serves(self, query: Tensor, scale: float | None) -> bool:
        """Return whether the calling thread may run this step for a query."""
        return (
            type(query) is Tensor
            and (scale is None or type(scale) is float)
            and scale == self._scale
            and addresses.unwatched(query)
            and self._same(query)
            and autocast.dtype() in (None, self._dtype)
            and seats_of(self._places) is self._seats
            and self._seats.workspace.address == self._workspace
        )

    def run(self, query: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """Compute the step.

        Parameters
        ----------
        query
            Of the same shape, dtype and strides as the one for which the step was laid out.
        counts
            How many tokens each piece has now, at least 1 in each; as many as before where none are given.

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
            job.arguments.fields[QUERY] = query_at + job.query_begin
            if not self._merge:
                job.arguments.fields[OUT] = out_at + job.out_begin
        for job, count in zip(self._jobs, counts, strict=False):
            job.arguments.fields[KV_LEN] = count
        # Where there is less to compute than a team is worth waking for, the calling thread computes alone.
        tokens = sum(job.arguments.fields[KV_LEN] for job in self._jobs)
        alone = tokens < min(job.plan.least_shared for job in self._jobs)
        if self._to_clear:
            address, nbytes, lse = self._to_clear
            ctypes.memset(address, 0, nbytes)
            lse.fill(-np.inf)
        if self._merge:
            self._merge.into(out_at)
            self._seats.run(self._table_address, self._merge.kernel, self._merge.address, alone=alone)
        else:
            self._seats.run(self._table_address, alone=alone)
        return out


def by_torch(query: Tensor, pieces: Sequence[Piece], scale: float | None) -> Tensor:
    """Compute attention over pieces by operators that torch can trace, transform and derive: none changes a tensor in place.

    Parameters and output are those of ``prepare`` and ``Step.run``.
    """
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
            outputs, lse = zip(*parts, strict=True)
            merged[rows] = merge(torch.stack(outputs), torch.stack(lse))
        output = torch.cat([merged[rows] for rows in sorted(merged)])
    return output.to(query.dtype)


def _at(tensor: Tensor, *indices: int) -> int:
    """Return the address of the element of a tensor with these first indices."""
    steps = zip(indices, tensor.stride(), strict=False)
    return tensor.data_ptr() + tensor.element_size() * sum(index * stride for index, stride in steps)


def _floats(address: int, count: int) -> np.ndarray:
    """Return the float32 numbers at an address, without a copy."""
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
