"""Operations on vectors, rows of half-precision numbers and prefetches, written as LLVM IR: what Numba's own loops can't say.

The functions here emit IR through an llvmlite builder. ``numa_lab.attention.tiles`` and its neighbours make Numba intrinsics of them, and
so does ``numa_lab.bandwidth.read_probe``.

Limits: little-endian CPUs. Addresses are plain integers, and nothing checks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from numa_lab.attention import compiler
from numa_lab.attention.vectors import Kind, Rows, Vectors

llvm.initialize_native_asmparser()  # for the instruction in ``prefetch``

# A line is asked for CHANCES times, each time STEP_BYTES nearer: a core drops prefetches that find its queue of misses full.
STEP_BYTES = 4096
CHANCES = 4

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT, HALF, POINTER = ir.FloatType(), ir.HalfType(), ir.PointerType()


# --- one vector


def floats(lanes: int) -> ir.VectorType:
    """Return the type of `lanes` float32 numbers."""
    return ir.VectorType(FLOAT, lanes)


def constant(type_: ir.VectorType, value: float) -> ir.Constant:
    """Return a vector whose lanes all have one value."""
    return ir.Constant(type_, [value] * type_.count)


def at(b: Any, address: Any, offset: Any = 0) -> Any:
    """Return a pointer to `offset` bytes behind an address."""
    return b.inttoptr(b.add(address, I64(offset) if isinstance(offset, int) else offset), POINTER)


def call(b: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    """Call one of LLVM's own functions; return its result."""
    type_ = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(compiler.get_or_insert_function(b.module, type_, name), arguments)


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z, rounded once."""
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def shuffle(b: Any, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    """Return the lanes of x and y that `lanes` names: those of y are counted on from those of x."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat(b: Any, scalar: Any, lanes: int) -> Any:
    """Return a vector whose lanes all have one value, which is known only when the code runs."""
    type_ = ir.VectorType(scalar.type, lanes)
    first_lane = b.insert_element(ir.Constant(type_, ir.Undefined), scalar, I32(0))
    return shuffle(b, first_lane, first_lane, [0] * lanes)


def greater(b: Any, x: Any, y: Any) -> Any:
    """Return the greater number of each lane; that of y where one of them is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def sum_lanes(b: Any, x: Any) -> Any:
    """Return the sum of the lanes as a scalar."""
    width = x.type.count // 2
    while width:
        x = b.fadd(x, shuffle(b, x, x, [lane ^ width for lane in range(x.type.count)]))
        width //= 2
    return b.extract_element(x, I32(0))


# Minimax polynomials of 2**x on [-0.5, 0.5], the highest power first. They were fitted for this package, and each has the relative error
# of its values in float32 behind it. All are exactly 1 at 0, so that keys with equal scores have exactly equal weights.
_EXP2 = {
    3: (0.0550089318541, 0.242210959442, 0.693282926943, 1.0),  # 1.1e-4; rounding to bfloat16 errs by 2e-3
    4: (0.00958285321723, 0.0559064254423, 0.240240986129, 0.693124193321, 1.0),  # 2.8e-6
    5: (0.00132646523924, 0.00967151132436, 0.055507339628, 0.240222421236, 0.693146977527, 1.0),  # 1.9e-7
}
_ROUNDER = 1.5 * 2**23  # added to a float32 below 2**22, it leaves the number rounded to an integer in the low bits


def exp2(b: Any, x: Any, degree: int) -> Any:
    """Return 2**x of each lane, for x up to 127; 0 for x of -127 and less; NaN of NaN."""
    type_ = x.type
    integers = ir.VectorType(I32, type_.count)
    least = constant(type_, -127.0)
    x = b.select(b.fcmp_ordered("<", x, least), least, x)
    shifted = b.fadd(x, constant(type_, _ROUNDER + 127))
    fraction = b.fsub(x, b.fsub(shifted, constant(type_, _ROUNDER + 127)))
    y = constant(type_, _EXP2[degree][0])
    for coefficient in _EXP2[degree][1:]:
        y = fma(b, y, fraction, constant(type_, coefficient))
    power = b.bitcast(b.shl(b.bitcast(shifted, integers), constant(integers, 23)), type_)
    return b.fmul(y, power)


# --- rows of half-precision numbers


def load_raw(b: Any, rows: Rows, address: Any, offset: Any, chunk: int) -> Any:
    """Return a chunk as it lies in memory, with zeros behind the end of the row, where nothing is read."""
    element = FLOAT if rows.kind is Kind.FLOAT32 else HALF if rows.kind is Kind.FLOAT16 else I16
    present, width = rows.elements(chunk), rows.width
    x = b.load(at(b, address, offset), typ=ir.VectorType(element, present), align=rows.kind.element_bytes)
    if present < width:
        x = shuffle(b, x, ir.Constant(x.type, None), [*range(present), *[present] * (width - present)])
    return x


def widen(b: Any, rows: Rows, x: Any) -> list[Any]:
    """Return the float32 vectors of a chunk that was loaded."""
    if rows.kind is Kind.FLOAT32:
        return [x]
    if rows.kind is Kind.FLOAT16:
        return [b.fpext(x, floats(rows.width))]
    integers = ir.VectorType(I32, rows.vectors.lanes)
    x, type_ = b.bitcast(x, integers), floats(rows.vectors.lanes)
    even = b.shl(x, constant(integers, 16))
    odd = b.and_(x, constant(integers, 0xFFFF0000))
    return [b.bitcast(even, type_), b.bitcast(odd, type_)]


def _to_bfloat_bits(b: Any, x: Any) -> Any:
    """Return integers whose upper halves are x as bfloat16, rounded to the nearest even; their lower halves mean nothing."""
    integers = ir.VectorType(I32, x.type.count)
    bits = b.bitcast(x, integers)
    odd = b.and_(b.lshr(bits, constant(integers, 16)), constant(integers, 1))
    rounded = b.add(bits, b.add(odd, constant(integers, 0x7FFF)))
    return b.select(b.fcmp_unordered("uno", x, x), constant(integers, 0x7FC00000), rounded)


def store_chunk(b: Any, rows: Rows, values: Sequence[Any], address: Any, chunk: int) -> None:
    """Round a chunk's float32 vectors to the kind of the rows, and write those elements that exist."""
    if rows.kind is Kind.FLOAT32:
        (x,) = values
    elif rows.kind is Kind.FLOAT16:
        x = b.fptrunc(values[0], ir.VectorType(HALF, rows.width))
    else:
        even, odd = (_to_bfloat_bits(b, value) for value in values)
        integers = even.type
        x = b.or_(b.lshr(even, constant(integers, 16)), b.and_(odd, constant(integers, 0xFFFF0000)))
        x = b.bitcast(x, ir.VectorType(I16, rows.width))
    present = rows.elements(chunk)
    if present < rows.width:
        x = shuffle(b, x, x, range(present))
    b.store(x, at(b, address, rows.offset(chunk)), align=rows.kind.element_bytes)


def prefetch(b: Any, vectors: Vectors, address: Any, distance: Any, offset: int) -> None:
    """Ask for the line at address + distance + offset, to be put into the second-level cache.

    The instruction is given as assembler: LLVM's scheduler gathers prefetches that it knows into bursts, and a core drops those that find
    its queue of misses full.
    """
    type_ = ir.FunctionType(ir.VoidType(), [I64, I64])
    scratch = ",~{x16}" if "x16" in vectors.prefetch else ""
    instruction = ir.InlineAsm(type_, vectors.prefetch.format(offset=offset), f"r,r,~{{memory}}{scratch}", True)
    b.call(instruction, [address, distance])


def stream_distances(b: Any, rows: Rows, stride: Any, ahead: Sequence[int]) -> list[Any]:
    """Return how far away lines lie that are read so many bytes of rows later: whole rows, since between rows there may be others."""
    return [opaque(b, b.mul(stride, I64(max(1, nbytes // rows.row_bytes)))) for nbytes in ahead]


def count_up(b: Any, address: Any) -> Any:
    """Add 1 to the int64 at an address, atomically among threads; return what it was before."""
    return b.atomic_rmw("add", at(b, address), I64(1), "acq_rel")


def opaque(b: Any, x: Any) -> Any:
    """Return the same integer, of which LLVM no longer knows how it was computed, so that it stays in one register.

    Without this, LLVM computed the address of each load of an unrolled tile anew from whatever it could keep outside of the loop, and a
    third of a tile's instructions moved addresses to and from the stack.
    """
    return b.call(ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0", False), [x])
