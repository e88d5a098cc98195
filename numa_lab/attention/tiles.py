"""Numba intrinsics for the rows of sums and the scalars of the decode kernel, and what its other intrinsics are made of.

Addresses are int64, strides between rows of K and V are in bytes, scores and sums are float32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from numa_lab.attention import compiler, simd
from numa_lab.attention.simd import FLOAT, I8, I16, I32, I64
from numa_lab.attention.vectors import Kind, Rows, Vectors

HEADROOM = 8.0  # weights may reach 2**HEADROOM: only a score that is higher than that moves the reference of a softmax
LOWEST = -3.4028234663852886e38  # the reference before the first score; with -inf, -inf - -inf would be NaN

Intrinsic = Any


def jit(function: Any) -> Any:
    """Return a function that other functions of a kernel call, compiled together with them."""
    return njit(error_model="numpy")(function)


def as_pairs(b: Any, x: Any) -> Any:
    """Return a vector of 512 bits as 32 bfloat16."""
    return b.bitcast(x, ir.VectorType(compiler.BFLOAT, 32))


def multiply_add(b: Any, pairs: bool, x: Any, y: Any, total: Any) -> Any:
    """Return total + x * y of each lane; where a lane holds a pair, both products are added."""
    if pairs:
        x, y = as_pairs(b, x), as_pairs(b, y)
        return simd.call(b, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, x, y)
    return simd.fma(b, x, y, total)


def pair_up(b: Any, x: Any, y: Any) -> list[Any]:
    """Return pairs of the even elements of two rows, and pairs of the odd ones."""
    even, odd = ([lane + half for i in range(16) for lane in (2 * i, 2 * i + 32)] for half in (0, 1))
    return [as_pairs(b, simd.shuffle(b, x, y, lanes)) for lanes in (even, odd)]


def _vector(b: Any, address: Any, index: Any, size: int, type_: Any) -> Any:
    return b.load(simd.at(b, address, b.mul(index, I64(size))), typ=type_, align=4)


def pack(rows: Rows) -> Intrinsic:
    """Make ``pack(query, packed)``, which writes a row as vectors of float32, or as it is where pairs are multiplied."""

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


def fill(vectors: Vectors, value: float) -> Intrinsic:
    """Make ``fill(address, nbytes)``, which writes one float32 to whole vectors, of which the last may reach behind the end."""
    constant = simd.constant(simd.floats(vectors.lanes), value)

    def emit(b: Any, address: Any, nbytes: Any) -> None:
        with compiler.for_range_slice(b, I64(0), nbytes, I64(vectors.bytes)) as (offset, _):
            b.store(constant, simd.at(b, address, offset), align=4)

    @intrinsic
    def put(_context, address, nbytes):  # type: ignore[no-untyped-def]
        return no_result([types.int64] * 2, emit)

    return put


def scale(rows: Rows) -> Intrinsic:
    """Make ``scale(sums, factor)``, which multiplies a row of sums."""
    type_ = simd.floats(rows.vectors.lanes)

    def emit(b: Any, sums: Any, factor: Any) -> None:
        factor = simd.splat(b, factor, rows.vectors.lanes)
        with compiler.for_range(b, I64(rows.sum_bytes // rows.vectors.bytes)) as loop:
            x = b.fmul(_vector(b, sums, loop.index, rows.vectors.bytes, type_), factor)
            b.store(x, simd.at(b, sums, b.mul(loop.index, I64(rows.vectors.bytes))), align=4)

    @intrinsic
    def multiply(_context, sums, factor):  # type: ignore[no-untyped-def]
        return no_result([types.int64, types.float32], emit)

    return multiply


def blend(rows: Rows) -> Intrinsic:
    """Make ``blend(sums, own, others, weight)``, which sets a row of sums to sums * own + others * weight."""
    type_ = simd.floats(rows.vectors.lanes)

    def emit(b: Any, sums: Any, own: Any, others: Any, weight: Any) -> None:
        own, weight = (simd.splat(b, factor, rows.vectors.lanes) for factor in (own, weight))
        with compiler.for_range(b, I64(rows.sum_bytes // rows.vectors.bytes)) as loop:
            x, y = (_vector(b, address, loop.index, rows.vectors.bytes, type_) for address in (sums, others))
            x = simd.fma(b, x, own, b.fmul(y, weight))
            b.store(x, simd.at(b, sums, b.mul(loop.index, I64(rows.vectors.bytes))), align=4)

    @intrinsic
    def mix(_context, sums, own, others, weight):  # type: ignore[no-untyped-def]
        return no_result([types.int64, types.float32, types.int64, types.float32], emit)

    return mix


def write(rows: Rows) -> Intrinsic:
    """Make ``write(sums, divisor, out)``, which writes a row of sums, divided, and rounded to the kind of the rows."""
    type_ = simd.floats(rows.vectors.lanes)

    # A product with the reciprocal is quicker than a quotient, and off by half a unit in the last place more: too much for float32 alone.
    exact = rows.kind is Kind.FLOAT32

    def emit(b: Any, sums: Any, divisor: Any, out: Any) -> None:
        by = simd.splat(b, divisor if exact else b.fdiv(ir.Constant(FLOAT, 1.0), divisor), rows.vectors.lanes)
        divided = b.fdiv if exact else b.fmul
        for chunk in range(rows.chunks):
            values = []
            for part in range(rows.per_chunk):
                offset = (chunk * rows.per_chunk + part) * rows.vectors.bytes
                values.append(divided(b.load(simd.at(b, sums, offset), typ=type_, align=4), by))
            simd.store_chunk(b, rows, values, out, chunk)

    @intrinsic
    def put(_context, sums, divisor, out):  # type: ignore[no-untyped-def]
        return no_result([types.int64, types.float32, types.int64], emit)

    return put


# --- scalars


@intrinsic
def load_float(_context, address):  # type: ignore[no-untyped-def]
    """Return the float32 at an address."""
    return types.float32(types.int64), lambda _c, b, _s, a: b.load(simd.at(b, a[0]), typ=FLOAT, align=4)


@intrinsic
def load_word(_context, address):  # type: ignore[no-untyped-def]
    """Return the int64 at an address."""
    return types.int64(types.int64), lambda _c, b, _s, a: b.load(simd.at(b, a[0]), typ=I64)


@intrinsic
def store_word(_context, address, value):  # type: ignore[no-untyped-def]
    """Write an int64 to an address."""
    return no_result([types.int64, types.int64], lambda b, at, x: b.store(x, simd.at(b, at)))


@intrinsic
def load_half(_context, address):  # type: ignore[no-untyped-def]
    """Return the float16 at an address as a float32."""
    return types.float32(types.int64), lambda _c, b, _s, a: b.fpext(
        b.load(simd.at(b, a[0]), typ=simd.HALF, align=2), FLOAT
    )


@intrinsic
def load_bfloat(_context, address):  # type: ignore[no-untyped-def]
    """Return the bfloat16 at an address as a float32."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        bits = b.zext(b.load(simd.at(b, a[0]), typ=I16, align=2), I32)
        return b.bitcast(b.shl(bits, I32(16)), FLOAT)

    return types.float32(types.int64), emit


@intrinsic
def load_bool(_context, address):  # type: ignore[no-untyped-def]
    """Return whether the byte at an address is not 0."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        return b.icmp_unsigned("!=", b.load(simd.at(b, a[0]), typ=I8), I8(0))

    return types.boolean(types.int64), emit


@intrinsic
def store_float(_context, address, value):  # type: ignore[no-untyped-def]
    """Write a float32 to an address."""
    return no_result([types.int64, types.float32], lambda b, at, x: b.store(x, simd.at(b, at), align=4))


@intrinsic
def exp2(_context, x):  # type: ignore[no-untyped-def]
    """Return 2**x as ``simd.exp2`` computes it."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        return b.extract_element(simd.exp2(b, simd.splat(b, a[0], 4), 5), I32(0))

    return types.float32(types.float32), emit


@intrinsic
def fetch_add(_context, address):  # type: ignore[no-untyped-def]
    """Add 1 to the int64 at an address, atomically among threads; return what it was before."""
    return types.int64(types.int64), lambda _c, b, _s, a: simd.count_up(b, a[0])


@intrinsic
def call_int(_context, address):  # type: ignore[no-untyped-def]
    """Call the ``int f(void)`` at an address, which is known only when the code runs, so that the code can be stored; return its result."""

    def emit(_c: Any, b: Any, _s: Any, a: Any) -> Any:
        function = b.inttoptr(a[0], ir.FunctionType(I32, []).as_pointer())
        return b.sext(b.call(function, []), I64)

    return types.int64(types.int64), emit


def _caller(parameters: int) -> Any:
    """Return the signature and the generator of an intrinsic that calls the ``void f(int64_t, ...)`` at an address."""

    def emit(b: Any, function: Any, *values: Any) -> None:
        signature = ir.FunctionType(ir.VoidType(), [I64] * parameters)
        b.call(b.inttoptr(function, signature.as_pointer()), values)

    return no_result([types.int64] * (1 + parameters), emit)


@intrinsic
def call_with_one(_context, address, first):  # type: ignore[no-untyped-def]
    """Call the ``void f(int64_t)`` at an address."""
    return _caller(1)


@intrinsic
def call_with_two(_context, address, first, second):  # type: ignore[no-untyped-def]
    """Call the ``void f(int64_t, int64_t)`` at an address."""
    return _caller(2)


@intrinsic
def call_with_three(_context, address, first, second, third):  # type: ignore[no-untyped-def]
    """Call the ``void f(int64_t, int64_t, int64_t)`` at an address."""
    return _caller(3)


def no_result(parameters: list[Any], emit: Any) -> Any:
    """Return the signature and the generator of an intrinsic without a result."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        emit(builder, *values)
        return compiler.no_value(context)

    return types.void(*parameters), generate
