"""A Numba intrinsic that adds up weighted rows of V for some query rows of a panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from numba import types
from numba.extending import intrinsic

from numa_lab.attention import compiler, simd
from numa_lab.attention.panels import BLOCK_ROWS, Panel
from numa_lab.attention.simd import FLOAT, I32, I64
from numa_lab.attention.tiles import Intrinsic, multiply_add, no_result, pair_up
from numa_lab.attention.vectors import LINE_BYTES, Rows, Vectors

MOST_VECTORS = 8  # the widest stripe, in vectors


def heights(panel: Panel) -> list[int]:
    """Return how the query rows of a panel are divided into parts whose sums registers hold together; they differ by one row at most."""
    most = panel.rows.vectors.value_rows
    parts = -(-panel.height // most)
    return [panel.height * (n + 1) // parts - panel.height * n // parts for n in range(parts)]


def weighted_sum(panel: Panel, first: int, height: int, ahead: bool) -> Intrinsic:
    """Make ``weighted_sum(weights, value, value_stride, count, following, following_stride, out)``.

    It adds the sum over j < count of weights[first + i, j] * value[j] to out[i], for `height` query rows i. It takes two KV rows at a time;
    where the second one is missing, its weight has to be 0. V is read in *stripes* of columns, which are as wide as the sums that
    registers hold, so that the loop reads nothing but V and weights. With `ahead`, what comes later is prefetched meanwhile, as suits the
    processor: lines further on in V, by each stripe its own, and the block of rows from `following` on, line by line in the order of
    memory.
    """
    rows, pairs, per_vector = panel.rows, panel.pairs, panel.tile.per_vector
    type_, size = simd.floats(rows.vectors.lanes), rows.vectors.bytes
    bounds = _stripes(panel, height)
    per_turn = -(-rows.row_bytes * BLOCK_ROWS // LINE_BYTES // ((len(bounds) - 1) * BLOCK_ROWS // 2))
    next_step = ahead and rows.vectors.processor.next_step_ahead

    def emit(
        b: Any, weights: Any, value: Any, stride: Any, count: Any, following: Any, next_stride: Any, out: Any
    ) -> None:
        prefetcher = _Prefetcher.of(b, rows, following, next_stride) if next_step else None
        distances = simd.stream_distances(b, rows, stride, panel.stream_ahead) if ahead else []
        for begin, end in pairwise(bounds):
            vectors = range(begin, end)
            cells = [[compiler.alloca_once(b, type_) for _ in vectors] for _ in range(height)]
            offsets = [[i * rows.sum_bytes + n * size for n in vectors] for i in range(height)]
            for row_offsets, row_cells in zip(offsets, cells, strict=True):
                for offset, cell in zip(row_offsets, row_cells, strict=True):
                    b.store(b.load(simd.at(b, out, offset), typ=type_, align=4), cell)
            with compiler.for_range_slice(b, I64(0), count, I64(2)) as (j, _):
                row = b.add(value, b.mul(j, stride))
                second = b.select(b.icmp_signed("<", b.add(j, I64(1)), count), b.add(row, stride), row)
                at_weights = b.add(weights, b.mul(j, I64(per_vector * (2 if pairs else 4))))
                if prefetcher:
                    prefetcher.ask(b, rows.vectors, per_turn)

                def weight(i: int, step: int, at_weights: Any = at_weights) -> Any:
                    v, lane = divmod(first + i, per_vector)
                    pointer = simd.at(b, at_weights, v * panel.pitch + (step * per_vector + lane) * 4)
                    x = simd.splat(b, b.load(pointer, typ=I32 if pairs else FLOAT, align=4), rows.vectors.lanes)
                    return x

                for step, parts in enumerate(_loaded(b, rows, pairs, (row, second), vectors, distances)):
                    # Of weights and values, those that are fewer stay in registers while the others pass by.
                    if len(vectors) < height:
                        values = [part() for part in parts]
                        for i in range(height):
                            x = weight(i, step)
                            for cell, y in zip(cells[i], values, strict=True):
                                b.store(multiply_add(b, pairs, x, y, b.load(cell, typ=type_)), cell)
                    else:
                        held = [weight(i, step) for i in range(height)]
                        for n, part in enumerate(parts):
                            y = part()
                            for i in range(height):
                                cell = cells[i][n]
                                b.store(multiply_add(b, pairs, held[i], y, b.load(cell, typ=type_)), cell)
            for row_offsets, row_cells in zip(offsets, cells, strict=True):
                for offset, cell in zip(row_offsets, row_cells, strict=True):
                    b.store(b.load(cell, typ=type_), simd.at(b, out, offset), align=4)

    @intrinsic
    def add(_context, weights, value, value_stride, count, following, following_stride, out):  # type: ignore[no-untyped-def]
        return no_result([types.int64] * 7, emit)

    return add


def _stripes(panel: Panel, height: int) -> list[int]:
    """Return the bounds of the stripes, in vectors of a row; stripes of pairs consist of whole chunks."""
    unit = panel.rows.per_chunk if panel.pairs else 1
    total = panel.rows.chunks * panel.rows.per_chunk // unit
    most = max(1, min(MOST_VECTORS, panel.rows.vectors.accumulators // height) // unit)
    count = -(-total // most)
    return [total * n // count * unit for n in range(count + 1)]


def _loaded(
    b: Any, rows: Rows, pairs: bool, addresses: tuple[Any, Any], vectors: range, distances: Sequence[Any]
) -> list[list[Any]]:
    """Return for each step over two KV rows the functions that load its vectors of V; pairs take one step, other kinds two.

    For each line that is loaded, those so many bytes further on are prefetched.
    """

    def load_chunk(address: Any, chunk: int, distances: Sequence[Any] = distances) -> Any:
        if rows.offset(chunk) % LINE_BYTES < min(LINE_BYTES, rows.offset(1)):  # a line begins in it
            for distance in distances:
                simd.prefetch(b, rows.vectors, address, distance, rows.offset(chunk))
        return simd.load_raw(b, rows, address, rows.offset(chunk), chunk)

    if pairs:
        paired = []
        for chunk in range(vectors.start // rows.per_chunk, vectors.stop // rows.per_chunk):
            x, y = (load_chunk(at, chunk) for at in addresses)
            paired += pair_up(b, x, y)
        return [[lambda x=x: x for x in paired]]

    def loader(address: Any, again: Any, n: int) -> Any:
        chunk, part = divmod(n, rows.per_chunk)

        def load() -> Any:
            raw = load_chunk(again, chunk, ()) if part else load_chunk(address, chunk)
            return simd.widen(b, rows, raw)[part]

        return load

    # Where registers are few, the odd half of a chunk is loaded again: kept since the even half was used, it would take a register.
    twice = rows.per_chunk > 1 and rows.vectors.lanes == 8
    return [
        [loader(at, again, n) for n in vectors]
        for at, again in ((at, simd.opaque(b, at) if twice else at) for at in addresses)
    ]


@dataclass(frozen=True)
class _Prefetcher:
    """A prefetcher that asks for rows line by line: it keeps the next line, the end of its row, and the way from there to the next row."""

    line: Any
    end: Any
    jump: Any
    stride: Any

    @classmethod
    def of(cls, b: Any, rows: Rows, first: Any, stride: Any) -> _Prefetcher:
        """Begin at a row; rows that lie in memory without gaps are taken for one long row."""
        prefetcher = cls(
            compiler.alloca_once(b, I64), compiler.alloca_once(b, I64), simd.opaque(b, b.sub(stride, I64(rows.row_bytes))), stride
        )  # fmt: skip
        gapless = b.icmp_signed("==", stride, I64(rows.row_bytes))
        b.store(first, prefetcher.line)
        b.store(b.select(gapless, I64(-1), b.add(first, I64(rows.row_bytes))), prefetcher.end)
        return prefetcher

    def ask(self, b: Any, vectors: Vectors, lines: int) -> None:
        """Prefetch the next `lines` lines."""
        for _ in range(lines):
            at, end = b.load(self.line, typ=I64), b.load(self.end, typ=I64)
            simd.prefetch(b, vectors, at, I64(0), 0)
            at = b.add(at, I64(LINE_BYTES))
            over = b.icmp_unsigned(">=", at, end)
            b.store(b.select(over, b.add(at, self.jump), at), self.line)
            b.store(b.select(over, b.add(end, self.stride), end), self.end)
