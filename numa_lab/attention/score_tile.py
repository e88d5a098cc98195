"""Numba intrinsics that compute the scores of a panel's query rows against the KV rows of a tile.

``numa_lab.attention.panels`` says how query rows and scores lie in registers and in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numa_lab.attention import compiler, simd
from numa_lab.attention.panels import UNIT_BYTES, Panel
from numa_lab.attention.simd import FLOAT, I32, I64
from numa_lab.attention.tiles import Intrinsic, multiply_add, no_result
from numa_lab.attention.vectors import LINE_BYTES


def scores(panel: Panel, ahead: bool) -> Intrinsic:
    """Make ``scores(query, key, key_stride, last, distance, out)``, which computes a tile of scores.

    The score of query row i and KV row j of the tile is the dot product of query[i] and key[min(j, last)], so that nothing is read
    behind the last row. With `ahead`, what comes later is prefetched for each line of the tile, as suits the processor: lines further on
    in K, and one that is `distance` bytes further on, where the next step reads.
    """
    rows, tile, vectors = panel.rows, panel.tile, panel.vectors
    lanes, size = rows.vectors.lanes, rows.vectors.bytes
    type_ = simd.floats(lanes)
    zero = ir.Constant(type_, None)
    asked = ahead and panel.in_place

    def emit(b: Any, query: Any, key: Any, stride: Any, last: Any, distance: Any, out: Any) -> None:
        sums = [
            [[compiler.alloca_once(b, type_) for _ in range(panel.splits)] for _ in range(vectors)]
            for _ in range(tile.kv_rows)
        ]
        for cell in (cell for row in sums for vector in row for cell in vector):
            b.store(zero, cell)
        at_rows = _rows_in_place(b, panel, key, stride, last) if panel.in_place else _rows_in_scratch(b, panel, key)
        query = simd.opaque(b, query)
        distances = simd.stream_distances(b, rows, stride, panel.stream_ahead) if asked else []
        if asked and rows.vectors.processor.next_step_ahead:
            distances.append(simd.opaque(b, distance))
        load, step_bytes, steps = _loader(panel)

        def turn(offset: Any, query_offset: Any, first: int, count: int) -> None:
            """Emit `count` steps from step `first` on, which begin `offset` bytes into the row and `query_offset` bytes into the query."""
            for step in range(count):
                at_query = b.add(query, query_offset)
                queries = [
                    b.load(simd.at(b, at_query, (step * vectors + v) * size), typ=type_, align=4)
                    for v in range(vectors)
                ]
                for j, (base, displacement) in enumerate(at_rows):
                    row = b.add(base, offset)
                    x = load(b, row, displacement, step, first + step)
                    for v in range(vectors):
                        cell = sums[j][v][step % panel.splits]
                        b.store(multiply_add(b, panel.pairs, queries[v], x, b.load(cell, typ=type_)), cell)
                    for line in _lines_begun(step, step_bytes):
                        for further in distances:
                            simd.prefetch(b, rows.vectors, base, b.add(offset, further), line)

        per_turn = rows.vectors.processor.score_steps
        whole = steps // per_turn
        if whole > 1:
            turn_bytes = per_turn * step_bytes
            query_bytes = per_turn * vectors * size
            end = simd.opaque(b, I64(whole * turn_bytes))
            with compiler.for_range_slice(b, I64(0), end, I64(turn_bytes)) as (offset, _):
                turn(offset, b.mul(offset, I64(query_bytes // turn_bytes)), 0, per_turn)
            done = whole * per_turn
        else:
            done = 0
        if done < steps:
            turn(I64(done * step_bytes), I64(done * vectors * size), done, steps - done)
        for v in range(vectors):
            totals = [_total(b, [b.load(cell, typ=type_) for cell in row[v]]) for row in sums]
            for j in range(0, tile.kv_rows, panel.spread):
                some = totals[j : j + panel.spread]
                some += [zero] * (panel.spread - len(some))
                x = _sum_spread(b, some, tile.per_vector)
                b.store(x, simd.at(b, out, v * panel.pitch + j * tile.per_vector * 4), align=4)

    @intrinsic
    def score(_context, query, key, key_stride, last, distance, out):  # type: ignore[no-untyped-def]
        return no_result([types.int64] * 6, emit)

    return score


def _rows_in_place(b: Any, panel: Panel, key: Any, stride: Any, last: Any) -> list[tuple[Any, int]]:
    """Return the addresses of a tile's KV rows, and what to add to each; the last row stands in for rows behind it."""
    addresses, row = [], key
    for j in range(panel.tile.kv_rows):
        addresses.append((simd.opaque(b, row), 0))
        row = b.select(b.icmp_signed("<", I64(j), last), b.add(row, stride), row)
    return addresses


def _rows_in_scratch(b: Any, panel: Panel, scratch: Any) -> list[tuple[Any, int]]:
    """Return the same for rows that were widened into working memory."""
    base = simd.opaque(b, scratch)
    return [(base, j * panel.units * UNIT_BYTES) for j in range(panel.tile.kv_rows)]


def _loader(panel: Panel) -> tuple[Callable[..., Any], int, int]:
    """Return a function that loads the vector of a KV row for a step, the bytes of a step, and the number of steps of a row."""
    rows, spread, lanes = panel.rows, panel.spread, panel.rows.vectors.lanes
    if panel.tile.per_vector > 1:
        step_bytes = spread * UNIT_BYTES
        units = rows.row_bytes // UNIT_BYTES if panel.in_place else panel.units

        def load_repeated(b: Any, row: Any, displacement: int, step: int, _number: int) -> Any:
            x = _repeated(b, simd.at(b, row, displacement + step * step_bytes), spread, lanes)
            return x

        return load_repeated, step_bytes, units // spread
    parts = 1 if panel.pairs else rows.per_chunk

    def load_part(b: Any, row: Any, _displacement: int, step: int, number: int) -> Any:
        # Only the last chunk may be incomplete, and that one is loaded outside of the loop.
        chunk, part = divmod(number, parts)
        raw = simd.load_raw(b, rows, row, step // parts * rows.offset(1), chunk)
        return raw if panel.pairs else simd.widen(b, rows, raw)[part]

    return load_part, rows.offset(1) // parts, rows.chunks * parts


def _lines_begun(step: int, step_bytes: int) -> list[int]:
    """Return the offsets of the cache lines that begin within a step of a turn; a turn begins at a line."""
    begin, end = step * step_bytes, (step + 1) * step_bytes
    return list(range(-(-begin // LINE_BYTES) * LINE_BYTES, end, LINE_BYTES))


def _repeated(b: Any, pointer: Any, units: int, lanes: int) -> Any:
    """Return a vector that is filled with `units` units from memory, repeated."""
    if units == lanes:
        return b.load(pointer, typ=simd.floats(lanes), align=2)
    if units <= 2:  # as one integer, since that is what processors repeat while they load
        number = b.load(pointer, typ=I32 if units == 1 else I64, align=2)
        return b.bitcast(simd.splat(b, number, lanes // units), simd.floats(lanes))
    x = b.load(pointer, typ=ir.VectorType(FLOAT, units), align=2)
    return simd.shuffle(b, x, x, [lane % units for lane in range(lanes)])


def _total(b: Any, vectors: Sequence[Any]) -> Any:
    total = vectors[0]
    for x in vectors[1:]:
        total = b.fadd(total, x)
    return total


def _sum_spread(b: Any, vectors: Sequence[Any], per_vector: int) -> Any:
    """Return the sums of the numbers of each query row as one vector ``[KV row][query row]``.

    Each KV row has a vector ``[query row][number]``.
    """
    lanes, count = vectors[0].type.count, len(vectors)
    vectors = list(vectors)
    while len(vectors) > 1:
        half = len(vectors) // 2
        merged = []
        for x, y in zip(vectors[:half], vectors[half:], strict=True):
            keep = simd.shuffle(b, x, y, [lane + lanes * bool(lane & half) for lane in range(lanes)])
            swap = simd.shuffle(b, x, y, [(lane ^ half) + lanes * bool(lane & half) for lane in range(lanes)])
            merged.append(b.fadd(keep, swap))
        vectors = merged
    if per_vector == 1 or count == 1:
        return vectors[0]
    return simd.shuffle(b, vectors[0], vectors[0], [i * count + j for j in range(count) for i in range(per_vector)])


def widen(panel: Panel, ahead: bool) -> Intrinsic:
    """Make ``widen(row, stride, out, following)``, which writes the units of a row as they are multiplied, with zeros behind its end.

    With `ahead`, what comes later is prefetched meanwhile, as suits the processor: rows of K further on, which are `stride` bytes
    apart, and the row at `following`, which the next step reads.
    """
    rows, size = panel.rows, panel.rows.vectors.bytes

    def emit(b: Any, row: Any, stride: Any, out: Any, following: Any) -> None:
        distances = simd.stream_distances(b, rows, stride, panel.stream_ahead) if ahead else []
        for chunk in range(rows.chunks):
            for line in range(-(-rows.offset(chunk) // LINE_BYTES) * LINE_BYTES, rows.offset(chunk + 1), LINE_BYTES):
                for further in distances:
                    simd.prefetch(b, rows.vectors, row, further, line)
                if ahead and rows.vectors.processor.next_step_ahead:
                    simd.prefetch(b, rows.vectors, following, I64(0), line)
            raw = simd.load_raw(b, rows, row, rows.offset(chunk), chunk)
            parts = [raw] if panel.pairs else simd.widen(b, rows, raw)
            for part, x in enumerate(parts):
                b.store(x, simd.at(b, out, (chunk * len(parts) + part) * size), align=4)

    @intrinsic
    def copy(_context, row, stride, out, following):  # type: ignore[no-untyped-def]
        return no_result([types.int64] * 4, emit)

    return copy


def deal(panel: Panel) -> Intrinsic:
    """Make ``deal(row, packed)``, which writes the units of a query row, `spread` at a time, to where each step of the scores has them."""
    some, step_bytes = simd.floats(panel.spread), panel.vectors * panel.rows.vectors.bytes

    def emit(b: Any, row: Any, packed: Any) -> None:
        with compiler.for_range(b, I64(panel.units // panel.spread)) as loop:
            x = b.load(simd.at(b, row, b.mul(loop.index, I64(panel.spread * UNIT_BYTES))), typ=some, align=4)
            b.store(x, simd.at(b, packed, b.mul(loop.index, I64(step_bytes))), align=4)

    @intrinsic
    def write(_context, row, packed):  # type: ignore[no-untyped-def]
        return no_result([types.int64] * 2, emit)

    return write
