"""The inner loops of the decode kernel: products, softmax, weighted sums and output, as Numba intrinsics for one kind of row.

Each function here makes an intrinsic whose loops over a row are unrolled. A *tile* is some query rows against some KV rows
whose sums all stay in registers. Addresses are int64, strides between rows of K and V are in bytes, scores and sums are
float32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from numa_lab.attention import simd
from numa_lab.attention.simd import FLOAT, I8, I16, I32, I64, Kind, Rows

HEADROOM = 8.0  # binary orders by which weights may exceed 1: the reference of a softmax moves only when they would
LOWEST = -3.4028234663852886e38  # the reference before the first score; -inf - -inf would be no number

Intrinsic = Any


def tile_width(rows: Rows, query_rows: int) -> int:
    """KV rows of a tile of scores: a power of two, so that the sums of a query row are neighbours."""
    width = 1
    while 2 * width <= rows.vectors.streams and 2 * width * query_rows <= rows.vectors.accumulators:
        width *= 2
    return width


def scores(rows: Rows, query_rows: int, pitch: int, chances: int) -> Intrinsic:
    """Make ``scores(query, key, key_stride, last, ahead, nearer, out)``.

    It writes query[i] . key[min(j, last)] for a tile, so that nothing is read behind the last row; rows of scores are `pitch`
    bytes apart. Each line of the tile's K is asked for `ahead` bytes further on, and ``chances - 1`` times more, each time
    `nearer` bytes nearer: a core drops prefetches that find its queue of misses full.
    """
    lanes, wide = rows.vectors.lanes, tile_width(rows, query_rows)
    pairs = rows.kind is Kind.BFLOAT16_PAIRS

    def emit(b: Any, query: Any, key: Any, stride: Any, last: Any, ahead: Any, nearer: Any, out: Any) -> None:
        zero = ir.Constant(simd.floats(lanes), None)
        sums = [[zero] * wide for _ in range(query_rows)]
        rows_at, distances = _tile_rows(b, key, stride, last, wide), _distances(b, ahead, nearer, chances)
        query = simd.opaque(b, query)
        for chunk in range(rows.chunks):
            queries = [_packed_chunk(b, rows, query, i, chunk) for i in range(query_rows)]
            for j in range(wide):
                _ask(b, rows, rows_at[j], distances, chunk)
                keys = _key_chunk(b, rows, rows_at[j], chunk)
                for i in range(query_rows):
                    for x, y in zip(queries[i], keys, strict=True):
                        sums[i][j] = _multiply_add(b, pairs, x, y, sums[i][j])
        flat = [x for row_sums in sums for x in row_sums]
        flat += [zero] * (-len(flat) % lanes)
        summed = [simd.sum_each(b, flat[first : first + lanes]) for first in range(0, len(flat), lanes)]
        for i in range(query_rows):
            for first in range(0, wide, min(wide, lanes)):
                place = i * wide + first
                x = summed[place // lanes]
                if wide < lanes:
                    x = simd.shuffle(b, x, x, range(place % lanes, place % lanes + wide))
                b.store(x, simd.at(b, out, i * pitch + first * 4), align=4)

    @intrinsic
    def tile(_context, query, key, key_stride, last, ahead, nearer, out):  # type: ignore[no-untyped-def]
        return _void([types.int64] * 7, emit)

    return tile


def _packed_chunk(b: Any, rows: Rows, query: Any, row: int, chunk: int) -> list[Any]:
    parts = rows.query_bytes // rows.chunks // rows.vectors.bytes
    offset = row * rows.query_bytes + chunk * parts * rows.vectors.bytes
    found = []
    for part in range(parts):
        x = b.load(simd.at(b, query, offset + part * rows.vectors.bytes), typ=simd.floats(rows.vectors.lanes), align=4)
        found.append(_as_pairs(b, x) if rows.kind is Kind.BFLOAT16_PAIRS else x)
    return found


def _key_chunk(b: Any, rows: Rows, row: Any, chunk: int) -> list[Any]:
    raw = simd.load_raw(b, rows, row, rows.offset(chunk), chunk)
    return [_as_pairs(b, raw)] if rows.kind is Kind.BFLOAT16_PAIRS else simd.widen(b, rows, raw)


def _as_pairs(b: Any, x: Any) -> Any:
    return b.bitcast(x, ir.VectorType(simd.BFLOAT, 32))


def _multiply_add(b: Any, pairs: bool, x: Any, y: Any, total: Any) -> Any:
    if pairs:
        return simd.call(b, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, x, y)
    return simd.fma(b, x, y, total)


def weighted_sum(rows: Rows, query_rows: int, pitch: int, chances: int) -> Intrinsic:
    """Make ``weighted_sum(weights, value, value_stride, count, ahead, nearer, out)``.

    out[i] += sum over j < count of weights[i, j] * value[j], two KV rows at a time; where the second is missing its weight has
    to be 0. Rows of weights are `pitch` bytes apart. V is taken in *stripes* as wide as the sums that registers hold, so that
    the loop reads nothing but V and weights. Prefetches as ``scores`` does, each stripe for its own lines.
    """
    pairs, type_ = rows.kind is Kind.BFLOAT16_PAIRS, simd.floats(rows.vectors.lanes)
    per_stripe = max(1, rows.vectors.accumulators // (query_rows * rows.per_chunk))

    def emit(b: Any, weights: Any, value: Any, stride: Any, count: Any, ahead: Any, nearer: Any, out: Any) -> None:
        distances = _distances(b, ahead, nearer, chances)
        for first in range(0, rows.chunks, per_stripe):
            chunks = range(first, min(first + per_stripe, rows.chunks))
            vectors = range(chunks.start * rows.per_chunk, chunks.stop * rows.per_chunk)
            offsets = [[i * rows.sum_bytes + n * rows.vectors.bytes for n in vectors] for i in range(query_rows)]
            sums = [
                [cgutils.alloca_once_value(b, b.load(simd.at(b, out, offset), typ=type_, align=4)) for offset in row]
                for row in offsets
            ]
            with cgutils.for_range_slice(b, I64(0), count, I64(2)) as (j, _):
                row = b.add(value, b.mul(j, stride))
                second = b.select(b.icmp_signed("<", b.add(j, I64(1)), count), b.add(row, stride), row)
                loaded = [_stripe(b, rows, at, chunks, distances) for at in (row, second)]
                if pairs:
                    values = [[x for both in zip(*loaded, strict=True) for x in _pair_up(b, *both)]]
                else:
                    values = [[x for raw in stripe for x in simd.widen(b, rows, raw)] for stripe in loaded]
                at_weights = b.add(weights, b.mul(j, I64(2 if pairs else 4)))
                for step, parts in enumerate(values):
                    for i in range(query_rows):
                        weight = _weight(b, rows, at_weights, i * pitch + 4 * step)
                        for cell, x in zip(sums[i], parts, strict=True):
                            b.store(_multiply_add(b, pairs, weight, x, b.load(cell, typ=type_)), cell)
            for row_offsets, cells in zip(offsets, sums, strict=True):
                for offset, cell in zip(row_offsets, cells, strict=True):
                    b.store(b.load(cell, typ=type_), simd.at(b, out, offset), align=4)

    @intrinsic
    def tile(_context, weights, value, value_stride, count, ahead, nearer, out):  # type: ignore[no-untyped-def]
        return _void([types.int64] * 7, emit)

    return tile


def _stripe(b: Any, rows: Rows, row: Any, chunks: range, distances: list[Any]) -> list[Any]:
    """Some chunks of a row as they lie in memory; what comes later is asked for."""
    loaded = []
    for chunk in chunks:
        _ask(b, rows, row, distances, chunk)
        loaded.append(simd.load_raw(b, rows, row, rows.offset(chunk), chunk))
    return loaded


def _tile_rows(b: Any, first: Any, stride: Any, last: Any, wide: int) -> list[Any]:
    """Addresses of a tile's KV rows; behind the last existing one, that one again."""
    found = []
    for j in range(wide):
        row = b.select(b.icmp_signed("<", last, I64(j)), last, I64(j))
        found.append(simd.opaque(b, b.add(first, b.mul(row, stride))))
    return found


def _distances(b: Any, ahead: Any, nearer: Any, chances: int) -> list[Any]:
    """How far on each chance of a prefetch lies."""
    return [simd.opaque(b, b.sub(ahead, b.mul(nearer, I64(c)))) for c in range(chances)]


def _ask(b: Any, rows: Rows, row: Any, distances: list[Any], chunk: int) -> None:
    """Prefetch for the line that a chunk begins."""
    if rows.offset(chunk) % simd.LINE_BYTES < min(simd.LINE_BYTES, rows.offset(1)):
        for distance in distances:
            simd.prefetch(b, rows.vectors, row, distance, rows.offset(chunk))


def _weight(b: Any, rows: Rows, weights: Any, offset: int) -> Any:
    """The weight of a KV row, or of a pair of them, in every lane."""
    pairs = rows.kind is Kind.BFLOAT16_PAIRS
    number = b.load(simd.at(b, weights, offset), typ=I32 if pairs else FLOAT, align=4)
    x = simd.splat(b, number, rows.vectors.lanes)
    return _as_pairs(b, x) if pairs else x


def _pair_up(b: Any, x: Any, y: Any) -> list[Any]:
    """The even elements of two rows as pairs, and the odd ones."""
    even, odd = ([lane + half for i in range(16) for lane in (2 * i, 2 * i + 32)] for half in (0, 1))
    return [_as_pairs(b, simd.shuffle(b, x, y, lanes)) for lanes in (even, odd)]


def softmax_step(rows: Rows) -> Intrinsic:
    """Make ``softmax_step(scores, vectors, factor, greatest, total)`` -> factor for what was summed before.

    One query row, over `vectors` vectors of scores: they become weights, 2**(factor * score - greatest), in their place, and
    their sum is added to `total`. Where a score exceeds the reference `greatest` by more than ``HEADROOM``, it moves to the
    greatest score, and what was summed before has to be multiplied by the result; else that is 1. So the usual way needs no
    greatest lane and no rescaling. Weights of BFLOAT16_PAIRS are bfloat16, as torch rounds them.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), with a lazy reference.
    """
    lanes, pairs = rows.vectors.lanes, rows.kind is Kind.BFLOAT16_PAIRS
    type_, size = simd.floats(lanes), rows.vectors.bytes

    def emit(b: Any, scores: Any, vectors: Any, factor: Any, greatest: Any, total: Any) -> Any:
        factor = simd.splat(b, factor, lanes)
        top = cgutils.alloca_once(b, type_)
        b.store(simd.constant(type_, float("-inf")), top)
        with cgutils.for_range(b, vectors) as loop:
            x = b.fmul(_vector(b, scores, loop.index, size, type_), factor)
            b.store(simd.greater(b, x, b.load(top, typ=type_)), top)
        old = b.load(simd.at(b, greatest), typ=FLOAT)
        reference, rescale = cgutils.alloca_once_value(b, old), cgutils.alloca_once_value(b, ir.Constant(FLOAT, 1.0))
        b.store(old, reference)
        b.store(ir.Constant(FLOAT, 1.0), rescale)
        high = b.load(top, typ=type_)
        bound = b.fadd(simd.splat(b, old, lanes), simd.constant(type_, HEADROOM))
        above = b.bitcast(b.fcmp_ordered(">", high, bound), ir.IntType(lanes))
        with b.if_then(b.icmp_unsigned("!=", above, ir.IntType(lanes)(0)), likely=False):
            new = simd.greatest_lane(b, high)
            alpha = b.extract_element(simd.exp2(b, b.fsub(simd.splat(b, old, lanes), new), 5), I32(0))
            new = b.extract_element(new, I32(0))
            b.store(alpha, rescale)
            b.store(new, reference)
            b.store(new, simd.at(b, greatest))
        minus = b.fneg(simd.splat(b, b.load(reference, typ=FLOAT), lanes))
        sums = cgutils.alloca_once(b, type_)
        b.store(ir.Constant(type_, None), sums)
        with cgutils.for_range(b, vectors) as loop:
            x = _vector(b, scores, loop.index, size, type_)
            weights = simd.exp2(b, simd.fma(b, x, factor, minus), 3 if pairs else 5)
            b.store(b.fadd(b.load(sums, typ=type_), weights), sums)
            if pairs:
                short = b.fptrunc(weights, ir.VectorType(simd.BFLOAT, lanes))
                b.store(short, simd.at(b, scores, b.mul(loop.index, I64(size // 2))), align=2)
            else:
                b.store(weights, simd.at(b, scores, b.mul(loop.index, I64(size))), align=4)
        alpha = b.load(rescale, typ=FLOAT)
        before = b.fmul(b.load(simd.at(b, total), typ=FLOAT), alpha)
        b.store(b.fadd(before, simd.sum_lanes(b, b.load(sums, typ=type_))), simd.at(b, total))
        return alpha

    @intrinsic
    def step(_context, scores, vectors, factor, greatest, total):  # type: ignore[no-untyped-def]
        parameters = (types.int64, types.int64, types.float32, types.int64, types.int64)
        return types.float32(*parameters), lambda _c, b, _s, values: emit(b, *values)

    return step


def _vector(b: Any, address: Any, index: Any, size: int, type_: Any) -> Any:
    return b.load(simd.at(b, address, b.mul(index, I64(size))), typ=type_, align=4)


def pack(rows: Rows) -> Intrinsic:
    """Make ``pack(query, packed)``: one query row as ``scores`` wants it, float32 unless pairs are multiplied."""

    def emit(b: Any, query: Any, packed: Any) -> None:
        parts = rows.query_bytes // rows.chunks // rows.vectors.bytes
        for chunk in range(rows.chunks):
            raw = simd.load_raw(b, rows, query, rows.offset(chunk), chunk)
            vectors = [raw] if rows.kind is Kind.BFLOAT16_PAIRS else simd.widen(b, rows, raw)
            for part, x in enumerate(vectors):
                b.store(x, simd.at(b, packed, (chunk * parts + part) * rows.vectors.bytes), align=4)

    @intrinsic
    def copy(_context, query, packed):  # type: ignore[no-untyped-def]
        return _void([types.int64] * 2, emit)

    return copy


def clear(rows: Rows) -> Intrinsic:
    """Make ``clear(sums)``: a row of sums becomes zeros."""
    type_ = simd.floats(rows.vectors.lanes)

    def emit(b: Any, sums: Any) -> None:
        with cgutils.for_range(b, I64(rows.sum_bytes // rows.vectors.bytes)) as loop:
            b.store(ir.Constant(type_, None), simd.at(b, sums, b.mul(loop.index, I64(rows.vectors.bytes))), align=4)

    @intrinsic
    def zero(_context, sums):  # type: ignore[no-untyped-def]
        return _void([types.int64] * 1, emit)

    return zero


def scale(rows: Rows) -> Intrinsic:
    """Make ``scale(sums, factor)``: a row of sums, multiplied."""
    type_ = simd.floats(rows.vectors.lanes)

    def emit(b: Any, sums: Any, factor: Any) -> None:
        factor = simd.splat(b, factor, rows.vectors.lanes)
        with cgutils.for_range(b, I64(rows.sum_bytes // rows.vectors.bytes)) as loop:
            x = b.fmul(_vector(b, sums, loop.index, rows.vectors.bytes, type_), factor)
            b.store(x, simd.at(b, sums, b.mul(loop.index, I64(rows.vectors.bytes))), align=4)

    @intrinsic
    def multiply(_context, sums, factor):  # type: ignore[no-untyped-def]
        return _void([types.int64, types.float32], emit)

    return multiply


def blend(rows: Rows) -> Intrinsic:
    """Make ``blend(sums, own, others, weight)``: a row of sums becomes sums * own + others * weight."""
    type_ = simd.floats(rows.vectors.lanes)

    def emit(b: Any, sums: Any, own: Any, others: Any, weight: Any) -> None:
        own, weight = (simd.splat(b, factor, rows.vectors.lanes) for factor in (own, weight))
        with cgutils.for_range(b, I64(rows.sum_bytes // rows.vectors.bytes)) as loop:
            x, y = (_vector(b, address, loop.index, rows.vectors.bytes, type_) for address in (sums, others))
            x = simd.fma(b, x, own, b.fmul(y, weight))
            b.store(x, simd.at(b, sums, b.mul(loop.index, I64(rows.vectors.bytes))), align=4)

    @intrinsic
    def mix(_context, sums, own, others, weight):  # type: ignore[no-untyped-def]
        return _void([types.int64, types.float32, types.int64, types.float32], emit)

    return mix


def write(rows: Rows) -> Intrinsic:
    """Make ``write(sums, divisor, out)``: a row of sums, divided, rounded to the kind of the rows."""
    type_ = simd.floats(rows.vectors.lanes)

    def emit(b: Any, sums: Any, divisor: Any, out: Any) -> None:
        divisor = simd.splat(b, divisor, rows.vectors.lanes)
        for chunk in range(rows.chunks):
            values = []
            for part in range(rows.per_chunk):
                offset = (chunk * rows.per_chunk + part) * rows.vectors.bytes
                values.append(b.fdiv(b.load(simd.at(b, sums, offset), typ=type_, align=4), divisor))
            simd.store_chunk(b, rows, values, out, chunk)

    @intrinsic
    def put(_context, sums, divisor, out):  # type: ignore[no-untyped-def]
        return _void([types.int64, types.float32, types.int64], emit)

    return put


# --- scalars


@intrinsic
def load_float(_context, address):  # type: ignore[no-untyped-def]
    """The float32 at an address."""
    return types.float32(types.int64), lambda _c, b, _s, a: b.load(simd.at(b, a[0]), typ=FLOAT, align=4)


@intrinsic
def load_word(_context, address):  # type: ignore[no-untyped-def]
    """The int64 at an address."""
    return types.int64(types.int64), lambda _c, b, _s, a: b.load(simd.at(b, a[0]), typ=I64)


@intrinsic
def store_word(_context, address, value):  # type: ignore[no-untyped-def]
    """Write an int64."""
    return _void([types.int64, types.int64], lambda b, at, x: b.store(x, simd.at(b, at)))


@intrinsic
def load_half(_context, address):  # type: ignore[no-untyped-def]
    """The float16 at an address, as float32."""
    return types.float32(types.int64), lambda _c, b, _s, a: b.fpext(
        b.load(simd.at(b, a[0]), typ=simd.HALF, align=2), FLOAT
    )


@intrinsic
def load_bfloat(_context, address):  # type: ignore[no-untyped-def]
    """The bfloat16 at an address, as float32."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        bits = b.zext(b.load(simd.at(b, a[0]), typ=I16, align=2), I32)
        return b.bitcast(b.shl(bits, I32(16)), FLOAT)

    return types.float32(types.int64), emit


@intrinsic
def load_bool(_context, address):  # type: ignore[no-untyped-def]
    """The byte at an address is not 0."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        return b.icmp_unsigned("!=", b.load(simd.at(b, a[0]), typ=I8), I8(0))

    return types.boolean(types.int64), emit


@intrinsic
def store_float(_context, address, value):  # type: ignore[no-untyped-def]
    """Write a float32."""
    return _void([types.int64, types.float32], lambda b, at, x: b.store(x, simd.at(b, at), align=4))


@intrinsic
def exp2(_context, x):  # type: ignore[no-untyped-def]
    """2**x, as ``simd.exp2`` has it."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        return b.extract_element(simd.exp2(b, simd.splat(b, a[0], 4), 5), I32(0))

    return types.float32(types.float32), emit


@intrinsic
def fetch_add(_context, address):  # type: ignore[no-untyped-def]
    """``simd.count_up``."""
    return types.int64(types.int64), lambda _c, b, _s, a: simd.count_up(b, a[0])


@intrinsic
def call_int(_context, address):  # type: ignore[no-untyped-def]
    """Call ``int f(void)`` at an address that is known only when it runs, so that compiled code can be stored."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        function = b.inttoptr(a[0], ir.FunctionType(I32, []).as_pointer())
        return b.sext(b.call(function, []), I64)

    return types.int64(types.int64), emit


def _caller(parameters: int) -> Any:
    """Call a ``void f(int64_t, ...)`` at an address, likewise."""

    def emit(b: Any, function: Any, *values: Any) -> None:
        signature = ir.FunctionType(ir.VoidType(), [I64] * parameters)
        b.call(b.inttoptr(function, signature.as_pointer()), values)

    return _void([types.int64] * (1 + parameters), emit)


@intrinsic
def call_with_one(_context, address, first):  # type: ignore[no-untyped-def]
    """Call ``void f(int64_t)`` at an address."""
    return _caller(1)


@intrinsic
def call_with_two(_context, address, first, second):  # type: ignore[no-untyped-def]
    """Call ``void f(int64_t, int64_t)`` at an address."""
    return _caller(2)


@intrinsic
def call_with_three(_context, address, first, second, third):  # type: ignore[no-untyped-def]
    """Call ``void f(int64_t, int64_t, int64_t)`` at an address."""
    return _caller(3)


def _void(parameters: list[Any], emit: Any) -> Any:
    """The signature and the generator of an intrinsic that gives nothing."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        emit(builder, *values)
        return context.get_dummy_value()

    return types.void(*parameters), generate
