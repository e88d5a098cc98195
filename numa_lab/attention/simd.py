"""Vectors, half-precision rows and prefetches for Numba, written as LLVM IR: what its own loops can't be made to say.

One source serves AVX-512, AVX2 and NEON: all widths follow from ``Vectors``, which is read off the CPU. The functions here
emit IR through an llvmlite builder; ``numa_lab.attention.tiles`` and ``numa_lab.bandwidth.read_probe`` make Numba intrinsics of them.

Limits: little-endian CPUs; addresses are plain integers, and nothing checks them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

from numa_lab.errors import InvalidInput

llvm.initialize_native_asmparser()  # for the prefetch below

LINE_BYTES = 64
# Each line is asked for CHANCES times, each time STEP_BYTES nearer: a core drops prefetches that find its queue of misses full.
STEP_BYTES = 4096
CHANCES = 4

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT, HALF, POINTER = ir.FloatType(), ir.HalfType(), ir.PointerType()


class _BFloat(ir.HalfType):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()  # llvmlite's float types are one object each; without its own this one would be half
BFLOAT = _BFloat()


class Kind(IntEnum):
    """How the elements of K and V are read."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2  # by shifts: a bfloat16 is the upper half of a float32
    BFLOAT16_PAIRS = 3  # by AVX512_BF16, which multiplies pairs and adds both products

    @property
    def element_bytes(self) -> int:
        """Bytes of an element in memory."""
        return 4 if self is Kind.FLOAT32 else 2


@dataclass(frozen=True)
class Vectors:
    """The vector registers of a CPU."""

    lanes: int  # float32 numbers in one
    accumulators: int  # registers to add into, with some left for what is multiplied
    value_rows: int  # query rows whose weighted sums registers hold together
    prefetch: str  # the instruction that asks for the line at $0 + $1 + {offset} in the second-level cache
    pairs: bool = False  # whether it has AVX512_BF16

    @property
    def bytes(self) -> int:
        """Bytes of a register."""
        return 4 * self.lanes


AVX512 = Vectors(16, 24, 8, "prefetcht1 {offset}($0,$1)")
AVX512_BF16 = Vectors(16, 24, 8, "prefetcht1 {offset}($0,$1)", pairs=True)
AVX2 = Vectors(8, 12, 4, "prefetcht1 {offset}($0,$1)")
NEON = Vectors(4, 24, 4, "add x16, $0, $1; prfm pldl2keep, [x16, #{offset}]")


VARIABLE = "NUMA_LAB_VECTORS"  # names the vectors to use in place of the best that this CPU has
_X86 = {"avx512-bf16": AVX512_BF16, "avx512": AVX512, "avx2": AVX2}
_NEEDED = {
    "avx512-bf16": ("avx512f", "avx512bw", "avx512vl", "avx512bf16"),
    "avx512": ("avx512f", "avx512bw", "avx512vl"),
    "avx2": ("avx2", "fma", "f16c"),
}
_WITHHELD = {
    "avx512": ("avx512bf16", "avx512fp16", "amx"),
    "avx2": ("avx512", "amx", "avx10"),
}  # features by their beginnings


@cache  # an interrupt in llvmlite's own objects frees their memory twice, so a step asks it nothing
def available() -> dict[str, Vectors]:
    """The vectors that this CPU has, by the name that ``NUMA_LAB_VECTORS`` takes, the best first."""
    if platform.machine() in ("aarch64", "arm64"):
        return {"neon": NEON}
    has = llvm.get_host_cpu_features()
    # AMD's processors multiply pairs as fast as single numbers. Intel's take four times as long for a pair's instruction (measured
    # on a Xeon with AMX: 1.05 against 4.1 per nanosecond), so that widening to float32 is faster there.
    names = list(_X86) if llvm.get_host_cpu_name().startswith("znver") else ["avx512", "avx512-bf16", "avx2"]
    return {name: _X86[name] for name in names if all(has.get(feature) for feature in _NEEDED[name])}


def chosen() -> str | None:
    """The name of the vectors that kernels use; None on a CPU that has none of those that are known.

    Raises
    ------
    InvalidInput
        ``NUMA_LAB_VECTORS`` names none that this CPU has.
    """
    names = list(available())
    name = os.environ.get(VARIABLE)
    if name and name not in names:
        raise InvalidInput(
            f"{VARIABLE}={name}: expected one that this CPU has ({', '.join(names) or 'there is none'}), or nothing"
        )
    return name or next(iter(names), None)


@cache
def host() -> Vectors | None:
    """The vectors that kernels use (``chosen``, when this is first asked), or None."""
    name = chosen()
    return available()[name] if name else None


def target_features() -> str:
    """The features of this CPU that kernels may use, as LLVM takes them: none wider than the vectors that are chosen."""
    features = llvm.get_host_cpu_features()
    for withheld in _WITHHELD.get(chosen() or "", ()):
        features.update({feature: False for feature in features if feature.startswith(withheld)})
    return str(features.flatten())


@dataclass(frozen=True)
class Rows:
    """How rows of K, V and the query are held in vectors.

    A *chunk* is what one load brings. Of bfloat16 it is two vectors, the even and the odd elements, so that they need no
    reordering: a dot product is the same in any order, and the output is put back in order when it is written.
    """

    vectors: Vectors
    kind: Kind
    head_dim: int

    @property
    def per_chunk(self) -> int:
        """Vectors of float32 that a chunk becomes."""
        return 2 if self.kind in (Kind.BFLOAT16, Kind.BFLOAT16_PAIRS) else 1

    @property
    def width(self) -> int:
        """Elements of a chunk."""
        return self.vectors.lanes * self.per_chunk

    @property
    def chunks(self) -> int:
        """Chunks of a row; the last may be shorter."""
        return -(-self.head_dim // self.width)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return self.head_dim * self.kind.element_bytes

    @property
    def sum_bytes(self) -> int:
        """Bytes of a row of float32 sums."""
        return self.chunks * self.per_chunk * self.vectors.bytes

    @property
    def query_bytes(self) -> int:
        """Bytes of a packed query row."""
        return self.chunks * self.vectors.bytes * (2 if self.kind is Kind.BFLOAT16 else 1)

    def elements(self, chunk: int) -> int:
        """Elements of a chunk that exist."""
        return min(self.width, self.head_dim - chunk * self.width)

    def offset(self, chunk: int) -> int:
        """Bytes in front of a chunk, in its row."""
        return chunk * self.width * self.kind.element_bytes


# --- one vector


def floats(lanes: int) -> ir.VectorType:
    """The type of `lanes` float32 numbers."""
    return ir.VectorType(FLOAT, lanes)


def constant(type_: ir.VectorType, value: float) -> ir.Constant:
    """A vector of one value."""
    return ir.Constant(type_, [value] * type_.count)


def at(b: Any, address: Any, offset: Any = 0) -> Any:
    """A pointer to an address and so many bytes behind it."""
    return b.inttoptr(b.add(address, I64(offset) if isinstance(offset, int) else offset), POINTER)


def call(b: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    """Call one of LLVM's own functions."""
    type_ = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, type_, name), arguments)


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """X * y + z, rounded once."""
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def shuffle(b: Any, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    """Lanes of x, and counted on of y."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat(b: Any, scalar: Any, lanes: int) -> Any:
    """A vector of one value that is known when it runs."""
    type_ = ir.VectorType(scalar.type, lanes)
    one = b.insert_element(ir.Constant(type_, ir.Undefined), scalar, I32(0))
    return shuffle(b, one, one, [0] * lanes)


def greater(b: Any, x: Any, y: Any) -> Any:
    """The greater of each lane; y where one of them is no number."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def greatest_lane(b: Any, x: Any) -> Any:
    """Every lane gets the greatest of all."""
    width = x.type.count // 2
    while width:
        x = greater(b, x, shuffle(b, x, x, [lane ^ width for lane in range(x.type.count)]))
        width //= 2
    return x


def sum_lanes(b: Any, x: Any) -> Any:
    """The sum of the lanes, a scalar."""
    width = x.type.count // 2
    while width:
        x = b.fadd(x, shuffle(b, x, x, [lane ^ width for lane in range(x.type.count)]))
        width //= 2
    return b.extract_element(x, I32(0))


def sum_each(b: Any, vectors: Sequence[Any]) -> Any:
    """Lane i gets the sum of the lanes of vector i; as many vectors as lanes.

    A tree: each step merges two vectors into one, lanes of the first in one half and of the second in the other.
    """
    lanes = vectors[0].type.count
    width = lanes // 2
    while width:
        merged = []
        for x, y in zip(vectors[:width], vectors[width:], strict=True):
            keep = shuffle(b, x, y, [lane + lanes * bool(lane & width) for lane in range(lanes)])
            swap = shuffle(b, x, y, [(lane ^ width) + lanes * bool(lane & width) for lane in range(lanes)])
            merged.append(b.fadd(keep, swap))
        vectors = merged
        width //= 2
    return vectors[0]


# Minimax polynomials of 2**x on [-0.5, 0.5], highest power first (own fits, relative errors of their values in float32). They
# are 1 at 0, so that keys that score alike weigh exactly alike.
_EXP2 = {
    3: (0.0550089318541, 0.242210959442, 0.693282926943, 1.0),  # 1.1e-4: a bfloat16 holds 2e-3
    4: (0.00958285321723, 0.0559064254423, 0.240240986129, 0.693124193321, 1.0),  # 2.8e-6
    5: (0.00132646523924, 0.00967151132436, 0.055507339628, 0.240222421236, 0.693146977527, 1.0),  # 1.9e-7
}
_ROUNDER = 1.5 * 2**23  # added to a float32 below 2**22, it leaves the number rounded to an integer in the low bits


def exp2(b: Any, x: Any, degree: int) -> Any:
    """2**x of each lane, for x up to 127; 0 from -127 down; what is no number stays so."""
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
    """A chunk as it lies in memory, zeros behind the end of the row: nothing is read there."""
    element = FLOAT if rows.kind is Kind.FLOAT32 else HALF if rows.kind is Kind.FLOAT16 else I16
    present, width = rows.elements(chunk), rows.width
    x = b.load(at(b, address, offset), typ=ir.VectorType(element, present), align=rows.kind.element_bytes)
    if present < width:
        x = shuffle(b, x, ir.Constant(x.type, None), [*range(present), *[present] * (width - present)])
    return x


def widen(b: Any, rows: Rows, x: Any) -> list[Any]:
    """The float32 vectors of a chunk that was loaded."""
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
    """The float32 whose upper half is x as a bfloat16, rounded to nearest even; its lower half means nothing."""
    integers = ir.VectorType(I32, x.type.count)
    bits = b.bitcast(x, integers)
    odd = b.and_(b.lshr(bits, constant(integers, 16)), constant(integers, 1))
    rounded = b.add(bits, b.add(odd, constant(integers, 0x7FFF)))
    return b.select(b.fcmp_unordered("uno", x, x), constant(integers, 0x7FC00000), rounded)


def store_chunk(b: Any, rows: Rows, values: Sequence[Any], address: Any, chunk: int) -> None:
    """Round a chunk's float32 vectors to the kind, and write as many elements as exist."""
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
    """Ask for the line at address + distance + offset, into the second-level cache.

    As assembler: LLVM's scheduler gathers prefetches of its own into bursts, and a core drops those that find its queue of
    misses full.
    """
    type_ = ir.FunctionType(ir.VoidType(), [I64, I64])
    scratch = ",~{x16}" if "x16" in vectors.prefetch else ""
    words = ir.InlineAsm(type_, vectors.prefetch.format(offset=offset), f"r,r,~{{memory}}{scratch}", True)
    b.call(words, [address, distance])


def count_up(b: Any, address: Any) -> Any:
    """Count the int64 at an address up by one, all threads in some order; what it was before."""
    return b.atomic_rmw("add", at(b, address), I64(1), "acq_rel")


def opaque(b: Any, x: Any) -> Any:
    """An integer of which LLVM forgets how it came about, so that it stays in one register.

    Without it, the address of each load of an unrolled tile was worked out anew from whatever could be kept outside of the
    loop, and a third of a tile's instructions moved addresses to and from the stack.
    """
    return b.call(ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0", False), [x])
