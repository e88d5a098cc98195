"""Rows of sums and scalars for the decode kernel, as Numba intrinsics, and what its other intrinsics are made of.

Addresses are int64, strides between rows of K and V are in bytes, scores and sums are float32.
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


def as_pairs(b: Any, x: Any) -> Any:
    """A vector of 512 bits as 32 bfloat16."""
    return b.bitcast(x, ir.VectorType(simd.BFLOAT, 32))


def multiply_add(b: Any, pairs: bool, x: Any, y: Any, total: Any) -> Any:
    """total + x * y of each lane; of pairs both products."""
    if pairs:
        x, y = as_pairs(b, x), as_pairs(b, y)
    if pairs:
        return simd.call(b, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, x, y)
    return simd.fma(b, x, y, total)


def pair_up(b: Any, x: Any, y: Any) -> list[Any]:
    """The even elements of two rows as pairs, and the odd ones."""
    even, odd = ([lane + half for i in range(16) for lane in (2 * i, 2 * i + 32)] for half in (0, 1))
    return [as_pairs(b, simd.shuffle(b, x, y, lanes)) for lanes in (even, odd)]


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
        return no_result([types.int64] * 2, emit)

    return copy


def clear(rows: Rows) -> Intrinsic:
    """Make ``clear(sums)``: a row of sums becomes zeros."""
    type_ = simd.floats(rows.vectors.lanes)

    def emit(b: Any, sums: Any) -> None:
        with cgutils.for_range(b, I64(rows.sum_bytes // rows.vectors.bytes)) as loop:
            b.store(ir.Constant(type_, None), simd.at(b, sums, b.mul(loop.index, I64(rows.vectors.bytes))), align=4)

    @intrinsic
    def zero(_context, sums):  # type: ignore[no-untyped-def]
        return no_result([types.int64] * 1, emit)

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
        return no_result([types.int64, types.float32], emit)

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
        return no_result([types.int64, types.float32, types.int64, types.float32], emit)

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
        return no_result([types.int64, types.float32, types.int64], emit)

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
    return no_result([types.int64, types.int64], lambda b, at, x: b.store(x, simd.at(b, at)))


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
    return no_result([types.int64, types.float32], lambda b, at, x: b.store(x, simd.at(b, at), align=4))


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

    return no_result([types.int64] * (1 + parameters), emit)


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


def no_result(parameters: list[Any], emit: Any) -> Any:
    """The signature and the generator of an intrinsic that gives nothing."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        emit(builder, *values)
        return context.get_dummy_value()

    return types.void(*parameters), generate
