"""A Numba intrinsic for one step of the online softmax, over a block of a panel's scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numa_lab.attention import compiler, simd
from numa_lab.attention.panels import Panel
from numa_lab.attention.simd import I16, I64
from numa_lab.attention.tiles import HEADROOM, Intrinsic
from numa_lab.attention.vectors import Kind

# The degree of the polynomial of ``simd.exp2`` for each kind: its error is small beside what rounding to the kind costs, which is 2e-3 for
# weights that become bfloat16 pairs and 6e-8 for float32.
_DEGREES = {Kind.BFLOAT16_PAIRS: 3, Kind.BFLOAT16: 4, Kind.FLOAT16: 4, Kind.FLOAT32: 5}


def softmax_step(panel: Panel) -> Intrinsic:
    """Make ``softmax_step(scores, vectors, factor, reference, total, rescale)``, which returns 1 if a reference moved, else 0.

    Each score becomes the weight 2**(factor * score - reference) in its place, for the first `vectors` vectors of scores of each vector of
    query rows. The weights of each lane are added to `total`. Where a score exceeds the reference of its query row by more than
    ``HEADROOM``, the reference becomes the greatest score of the row, and what was summed before has to be multiplied by what
    `rescale` then holds. So most steps neither compare lanes with each other nor rescale anything. Where pairs are multiplied, the weights
    are written as bfloat16, rounded as torch rounds them, with those of two KV rows side by side.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), with a reference that moves late.
    """
    lanes, per_vector, size = panel.rows.vectors.lanes, panel.tile.per_vector, panel.rows.vectors.bytes
    type_, group, degree = simd.floats(lanes), panel.softmax_vectors, _DEGREES[panel.rows.kind]
    bits = ir.IntType(lanes)

    def emit(b: Any, scores: Any, vectors: Any, factor: Any, reference: Any, total: Any, rescale: Any) -> Any:
        factor = simd.splat(b, factor, lanes)
        moved = compiler.alloca_once(b, I64)
        b.store(I64(0), moved)
        for v in range(panel.vectors):
            row = b.add(scores, I64(v * panel.pitch))
            at_reference, at_total, at_rescale = (simd.at(b, x, v * size) for x in (reference, total, rescale))
            old = b.load(at_reference, typ=type_, align=4)
            top, current = compiler.alloca_once(b, type_), compiler.alloca_once(b, type_)
            b.store(simd.constant(type_, float("-inf")), top)
            b.store(old, current)
            b.store(simd.constant(type_, 1.0), at_rescale, align=4)
            with compiler.for_range_slice(b, I64(0), vectors, I64(group)) as (i, _):
                scaled = [b.fmul(x, factor) for x in _load(b, row, i, group, type_)]
                b.store(simd.greater(b, _pairwise(b, scaled, simd.greater), b.load(top, typ=type_)), top)
            high = b.load(top, typ=type_)
            above = b.fcmp_ordered(">", high, b.fadd(old, simd.constant(type_, HEADROOM)))
            with b.if_then(b.icmp_unsigned("!=", b.bitcast(above, bits), bits(0)), likely=False):
                new = _of_each_row(b, high, per_vector)
                new = b.select(b.fcmp_ordered(">", new, b.fadd(old, simd.constant(type_, HEADROOM))), new, old)
                alpha = simd.exp2(b, b.fsub(old, new), 5)
                b.store(I64(1), moved)
                b.store(new, current)
                b.store(new, at_reference, align=4)
                b.store(alpha, at_rescale, align=4)
                b.store(b.fmul(b.load(at_total, typ=type_, align=4), alpha), at_total, align=4)
            minus = b.fneg(b.load(current, typ=type_))
            sums = compiler.alloca_once(b, type_)
            b.store(b.load(at_total, typ=type_, align=4), sums)
            with compiler.for_range_slice(b, I64(0), vectors, I64(group)) as (i, _):
                weights = [simd.exp2(b, simd.fma(b, x, factor, minus), degree) for x in _load(b, row, i, group, type_)]
                b.store(b.fadd(b.load(sums, typ=type_), _pairwise(b, weights, type(b).fadd)), sums)
                _store(b, panel, weights, row, i)
            b.store(b.load(sums, typ=type_), at_total, align=4)
        return b.load(moved, typ=I64)

    @intrinsic
    def step(_context, scores, vectors, factor, reference, total, rescale):  # type: ignore[no-untyped-def]
        parameters = (types.int64, types.int64, types.float32, types.int64, types.int64, types.int64)
        return types.int64(*parameters), lambda _c, b, _s, values: emit(b, *values)

    return step


def _load(b: Any, row: Any, first: Any, count: int, type_: Any) -> list[Any]:
    """Return `count` vectors of scores from the vector with number `first` on."""
    size = 4 * type_.count
    at = b.add(row, b.mul(first, I64(size)))
    return [b.load(simd.at(b, at, n * size), typ=type_, align=4) for n in range(count)]


def _pairwise(b: Any, vectors: list[Any], merge: Callable[[Any, Any, Any], Any]) -> Any:
    """Return all vectors merged into one, by a tree of merges, so that as few as possible wait for each other."""
    while len(vectors) > 1:
        vectors = [
            merge(b, *vectors[n : n + 2]) if n + 1 < len(vectors) else vectors[n] for n in range(0, len(vectors), 2)
        ]
    return vectors[0]


def _of_each_row(b: Any, x: Any, per_vector: int) -> Any:
    """Return a vector in which every lane has the greatest number of its query row."""
    apart = x.type.count // 2
    while apart >= per_vector:
        x = simd.greater(b, x, simd.shuffle(b, x, x, [lane ^ apart for lane in range(x.type.count)]))
        apart //= 2
    return x


def _store(b: Any, panel: Panel, weights: list[Any], row: Any, first: Any) -> None:
    """Write weights over the scores that they came from; those of pairs take half of the bytes."""
    lanes, per_vector, size = panel.rows.vectors.lanes, panel.tile.per_vector, panel.rows.vectors.bytes
    if not panel.pairs:
        at = b.add(row, b.mul(first, I64(size)))
        for n, x in enumerate(weights):
            b.store(x, simd.at(b, at, n * size), align=4)
        return
    at = b.add(row, b.mul(first, I64(size // 2)))
    order = [
        (kv_row + side) * per_vector + i
        for kv_row in range(0, 2 * panel.spread, 2)
        for i in range(per_vector)
        for side in (0, 1)
    ]
    for n in range(0, len(weights), 2):
        both = simd.shuffle(b, weights[n], weights[n + 1], range(2 * lanes))
        both = b.bitcast(b.fptrunc(both, ir.VectorType(compiler.BFLOAT, 2 * lanes)), ir.VectorType(I16, 2 * lanes))
        b.store(simd.shuffle(b, both, both, order), simd.at(b, at, n * size // 2), align=4)
