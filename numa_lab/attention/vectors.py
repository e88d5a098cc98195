"""The vector registers of the CPU at hand, and how rows of K, V and the query are held in them.

All that the kernels need to know of a CPU follows from ``Vectors``, so that one source serves AVX-512, AVX2 and NEON.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache

from numa_lab.attention.processors import DEFAULTS, Processor, processor
from numa_lab.errors import InvalidInput
from numa_lab.placement import jit

LINE_BYTES = 64  # of a cache line


class Kind(IntEnum):
    """The ways in which the elements of K and V are read and multiplied."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2  # by shifts: a bfloat16 is the upper half of a float32
    BFLOAT16_PAIRS = 3  # by AVX512_BF16, which multiplies pairs and adds both products

    @property
    def element_bytes(self) -> int:
        """The bytes of an element in memory."""
        return 4 if self is Kind.FLOAT32 else 2


@dataclass(frozen=True)
class Vectors:
    """The vector registers of a CPU, and what the kernels make of them."""

    lanes: int  # float32 numbers in one register
    accumulators: int  # how many registers may hold sums; the others are left for what is multiplied
    value_rows: int  # of how many query rows the registers hold weighted sums at the same time
    prefetch: str  # the instruction that asks for the line at $0 + $1 + {offset}, to be put into the second-level cache
    pairs: bool = False  # whether the CPU has AVX512_BF16
    processor: Processor = DEFAULTS

    @property
    def bytes(self) -> int:
        """The bytes of a register."""
        return 4 * self.lanes


AVX512 = Vectors(16, 24, 8, "prefetcht1 {offset}($0,$1)")
AVX512_BF16 = Vectors(16, 24, 8, "prefetcht1 {offset}($0,$1)", pairs=True)
AVX2 = Vectors(8, 12, 4, "prefetcht1 {offset}($0,$1)")
NEON = Vectors(4, 24, 4, "add x16, $0, $1; prfm pldl2keep, [x16, #{offset}]")


VARIABLE = (
    "NUMA_LAB_VECTORS"  # this environment variable names the vectors to use in place of the best that this CPU has
)
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
    """Return the vectors that this CPU has by the names that ``NUMA_LAB_VECTORS`` takes, the fastest first."""
    if platform.machine() in ("aarch64", "arm64"):
        return {"neon": NEON}
    with jit.needed():
        import llvmlite.binding as llvm

        has, own = llvm.get_host_cpu_features(), processor(llvm.get_host_cpu_name())
    # Zen 4 multiplies pairs of bfloat16 as fast as single numbers. Intel's processors take four times as long for that instruction
    # (a Xeon with AMX did 1.05 in a nanosecond, and 4.1 of the other), so that widening to float32 is faster there.
    names = list(_X86) if own.pairs_first else ["avx512", "avx512-bf16", "avx2"]
    return {
        name: replace(_X86[name], processor=own) for name in names if all(has.get(feature) for feature in _NEEDED[name])
    }


def chosen() -> str | None:
    """Return the name of the vectors that kernels use; None on a CPU that has none of those that are known.

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
    """Return the vectors that kernels use, or None; they are those that ``chosen`` names when this is called for the first time."""
    name = chosen()
    return available()[name] if name else None


def target_features() -> str:
    """Return the features of this CPU that kernels may use, as LLVM takes them: none that is wider than the chosen vectors."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    for withheld in _WITHHELD.get(chosen() or "", ()):
        features.update({feature: False for feature in features if feature.startswith(withheld)})
    return str(features.flatten())


@dataclass(frozen=True)
class Rows:
    """How rows of K, V and the query are held in vectors.

    A *chunk* is what one load brings. A chunk of bfloat16 becomes two vectors of float32, one of the even and one of the odd elements. They
    are not put back in order, since a dot product is the same in any order; the output is, when it is written.
    """

    vectors: Vectors
    kind: Kind
    head_dim: int

    @property
    def per_chunk(self) -> int:
        """The number of float32 vectors that a chunk becomes."""
        return 2 if self.kind in (Kind.BFLOAT16, Kind.BFLOAT16_PAIRS) else 1

    @property
    def width(self) -> int:
        """The number of elements of a chunk."""
        return self.vectors.lanes * self.per_chunk

    @property
    def chunks(self) -> int:
        """The number of chunks of a row, of which the last may be shorter."""
        return -(-self.head_dim // self.width)

    @property
    def row_bytes(self) -> int:
        """The bytes of a row in memory."""
        return self.head_dim * self.kind.element_bytes

    @property
    def sum_bytes(self) -> int:
        """The bytes of a row of float32 sums."""
        return self.chunks * self.per_chunk * self.vectors.bytes

    @property
    def query_bytes(self) -> int:
        """The bytes of a packed query row."""
        return self.chunks * self.vectors.bytes * (2 if self.kind is Kind.BFLOAT16 else 1)

    def elements(self, chunk: int) -> int:
        """Return how many elements of a chunk exist, which are fewer in the last one."""
        return min(self.width, self.head_dim - chunk * self.width)

    def offset(self, chunk: int) -> int:
        """Return the bytes of a row that lie in front of a chunk."""
        return chunk * self.width * self.kind.element_bytes
