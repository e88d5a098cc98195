"""The decode kernel: what each of some threads runs, compiled by Numba for one kind of rows and one number of query rows.

All rows of K and V of a batch, head after head, are split evenly over the threads; each reads its share once, for all query
rows of a group together, with an online softmax block by block. A head that several threads share is merged by the log-sum-exp
of its parts, by the last thread to arrive ("flash-decoding": Dao et al., 2023).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cfunc, from_dtype, njit, types
from numba.extending import intrinsic

from numa_lab.attention import tiles
from numa_lab.attention.simd import CHANCES, STEP_BYTES, Rows

BLOCK = 64  # KV rows between two softmax steps
TILE = 4  # query rows whose sums fit into registers together
PITCH = 4 * BLOCK  # bytes from the scores of one query row to those of the next
FLUSH = 1024  # KV rows whose sums are added up apart, so that errors of long sequences do not pile up
MASK_NONE, MASK_BOOL, MASK_FLOAT, MASK_HALF, MASK_BFLOAT = range(5)
LOWEST = np.float32(tiles.LOWEST)
LOG2_E, LN_2 = math.log2(math.e), math.log(2)

# What the threads get: first what differs between calls of one shape, then addresses of functions (the kernel's own, and
# OpenMP's, for ``numa_lab.attention.openmp_regions``), strides in bytes, and counts. Fewer keys than `least_shared` are the first thread's
# alone. `factor` is the scale of the scores times log2(e).
CALL = ("arrived", "workspace", "query", "key", "value", "out", "lse", "mask", "kv_len")
FIELDS = (
    *CALL,
    "share", "thread_number", "team_size", "workspace_bytes", "least_shared",
    "batch", "kv_heads", "group", "q_len",
    "query_batch", "query_head", "query_row",
    "key_batch", "key_head", "key_row",
    "value_batch", "value_head", "value_row",
    "out_batch", "out_head", "out_row",
    "mask_batch", "mask_head", "mask_row", "mask_column", "mask_kind",
)  # fmt: skip
ARGUMENTS = np.dtype([*((name, np.int64) for name in FIELDS), ("factor", np.float64)])


@dataclass(frozen=True)
class Spec:
    """One compiled version: the rows, and how many query rows share a KV head."""

    rows: Rows
    query_rows: int

    @classmethod
    def of(cls, rows: Rows, query_rows: int) -> Spec:
        """The version that serves so many query rows; beyond 8 only the last, incomplete tile matters."""
        return cls(rows, query_rows if query_rows <= 2 * TILE else 2 * TILE + query_rows % TILE)

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Query rows of the first tile, of each further one (0: there is none), and of the last, incomplete one."""
        further = TILE if self.query_rows >= 2 * TILE else 0
        return min(TILE, self.query_rows), further, self.query_rows % TILE if self.query_rows > TILE else 0

    def part_bytes(self, query_rows: int) -> int:
        """Bytes of a partial result: two floats and a row of sums for each query row."""
        return query_rows * (8 + self.rows.sum_bytes)

    def workspace_bytes(self, query_rows: int) -> int:
        """Bytes that each thread needs: two parts, the packed query, and scores; whole pages, so that threads share none."""
        per_row = self.rows.query_bytes + self.rows.sum_bytes + PITCH
        needed = 2 * self.part_bytes(query_rows) + query_rows * per_row
        return -(-needed // mmap.PAGESIZE) * mmap.PAGESIZE

    def build(self) -> Any:
        """Compile it (``build``)."""
        return build(self)


def compiled(function: Any) -> Any:
    """A function that compiled ones call."""
    return njit(error_model="numpy")(function)


@compiled
def _nothing(*_arguments):  # type: ignore[no-untyped-def]
    """Stand in for a tile that there is not."""


def _score_tile(rows: Rows, height: int, chances: int) -> Any:
    """Scores of `height` query rows against a block."""
    if not height:
        return _nothing
    tile, width = tiles.scores(rows, height, PITCH, chances), tiles.tile_width(rows, height)

    @compiled
    def run(query, key, stride, count, ahead, nearer, out):  # type: ignore[no-untyped-def]
        for j in range(0, count, width):
            tile(query, key + j * stride, stride, count - 1 - j, ahead, nearer, out + 4 * j)

    return run


def _sum_tile(rows: Rows, height: int, chances: int) -> Any:
    """Weighted sums of a block for `height` query rows."""
    if not height:
        return _nothing
    tile = tiles.weighted_sum(rows, height, PITCH, chances)

    @compiled
    def run(weights, value, stride, count, ahead, nearer, out):  # type: ignore[no-untyped-def]
        tile(weights, value, stride, count, ahead, nearer, out)

    return run


@compiled
def _mask_row(scores, count, factor, mask, step, kind):  # type: ignore[no-untyped-def]
    """Scale scores to powers of two and mask them: -inf where a boolean says no, else plus a number."""
    for j in range(count):
        at, score = scores + 4 * j, np.float32(-np.inf)
        if kind == MASK_BOOL:
            if tiles.load_bool(mask + j * step):
                score = tiles.load_float(at) * factor
        else:
            if kind == MASK_FLOAT:
                bias = tiles.load_float(mask + j * step)
            elif kind == MASK_HALF:
                bias = tiles.load_half(mask + j * step)
            else:
                bias = tiles.load_bfloat(mask + j * step)
            scaled = bias * np.float32(LOG2_E)
            if scaled < LOWEST and bias >= LOWEST:  # the least number, as Hugging Face models mask, is no -inf
                scaled = LOWEST
            score = tiles.load_float(at) * factor + scaled
        tiles.store_float(at, score)


def arguments_as(dtype: np.dtype[Any]) -> Any:
    """Make ``arguments_at(address)``: the record there.

    Numba's own ``carray`` brings its run-time library along, which stored code can't have.
    """

    @intrinsic
    def arguments_at(_context, address):  # type: ignore[no-untyped-def]
        record = from_dtype(dtype)
        return record(types.int64), lambda context, b, _s, a: b.inttoptr(a[0], context.get_value_type(record))

    return arguments_at


def build(spec: Spec) -> Any:
    """Compile ``void share(void *ARGUMENTS, int64_t number, int64_t threads)``; whoever is done last merges."""
    rows = spec.rows
    first, further, rest = spec.tiles
    lanes, sum_bytes, query_bytes = rows.vectors.lanes, rows.sum_bytes, rows.query_bytes
    step_rows = max(1, STEP_BYTES // rows.row_bytes)
    padding = max(lanes, *(tiles.tile_width(rows, height) for height in (first, further, rest) if height))
    score_first, score_further, score_rest = (
        _score_tile(rows, first, CHANCES), _score_tile(rows, further, 0), _score_tile(rows, rest, 0)
    )  # fmt: skip
    sum_first, sum_further, sum_rest = (
        _sum_tile(rows, first, CHANCES), _sum_tile(rows, further, 0), _sum_tile(rows, rest, 0)
    )  # fmt: skip
    softmax_step, pack, clear, scale, blend, write = (
        make(rows) for make in (tiles.softmax_step, tiles.pack, tiles.clear, tiles.scale, tiles.blend, tiles.write)
    )
    arguments_at, one, nothing = arguments_as(ARGUMENTS), np.float32(1), np.float32(0)

    @compiled
    def score(query, query_rows, key, stride, count, out):  # type: ignore[no-untyped-def]
        """out[i, j] = query[i] . key[j]; only the first tile prefetches, the others find K in the caches."""
        score_first(query, key, stride, count, CHANCES * step_rows * stride, step_rows * stride, out)
        for i in range(TILE, query_rows - TILE + 1, TILE):
            score_further(query + i * query_bytes, key, stride, count, 0, 0, out + i * PITCH)
        i = query_rows - rest
        score_rest(query + i * query_bytes, key, stride, count, 0, 0, out + i * PITCH)

    @compiled
    def add_values(weights, query_rows, value, stride, count, out):  # type: ignore[no-untyped-def]
        """out[i] += sum of weights[i, j] * value[j]."""
        sum_first(weights, value, stride, count, CHANCES * step_rows * stride, step_rows * stride, out)
        for i in range(TILE, query_rows - TILE + 1, TILE):
            sum_further(weights + i * PITCH, value, stride, count, 0, 0, out + i * sum_bytes)
        i = query_rows - rest
        sum_rest(weights + i * PITCH, value, stride, count, 0, 0, out + i * sum_bytes)

    @compiled
    def attend(a, batch, head, begin, count, packed, scores, recent, part):  # type: ignore[no-untyped-def]
        """A partial result over `count` KV rows from `begin` on: greatest score, total of weights and sums of each row."""
        query_rows = a.group * a.q_len
        total, sums = part + 4 * query_rows, part + 8 * query_rows
        for i in range(query_rows):
            tiles.store_float(part + 4 * i, LOWEST)
            tiles.store_float(total + 4 * i, nothing)
            clear(sums + i * sum_bytes)
            clear(recent + i * sum_bytes)
        key = a.key + batch * a.key_batch + head * a.key_head + begin * a.key_row
        value = a.value + batch * a.value_batch + head * a.value_head + begin * a.value_row
        for block in range(0, count, BLOCK):
            here = min(BLOCK, count - block)
            vectors = (here + padding - 1) // padding * (padding // lanes)
            score(packed, query_rows, key + block * a.key_row, a.key_row, here, scores)
            for i in range(query_rows):
                row, factor = scores + i * PITCH, np.float32(a.factor)
                if a.mask_kind:
                    mask = a.mask + batch * a.mask_batch + (head * a.group + i // a.q_len) * a.mask_head
                    mask += i % a.q_len * a.mask_row + (begin + block) * a.mask_column
                    _mask_row(row, here, factor, mask, a.mask_column, a.mask_kind)
                    factor = one
                for j in range(here, vectors * lanes):
                    tiles.store_float(row + 4 * j, np.float32(-np.inf))
                alpha = softmax_step(row, vectors, factor, part + 4 * i, total + 4 * i)
                if alpha != one:
                    scale(sums + i * sum_bytes, alpha)
                    scale(recent + i * sum_bytes, alpha)
            add_values(scores, query_rows, value + block * a.value_row, a.value_row, here, recent)
            if block + BLOCK >= count or (block + BLOCK) % FLUSH == 0:
                for i in range(query_rows):
                    blend(sums + i * sum_bytes, one, recent + i * sum_bytes, one)
                    clear(recent + i * sum_bytes)

    @compiled
    def finish(a, batch, head, part, others, stride, count):  # type: ignore[no-untyped-def]
        """Write a head's output from one part and `count` - 1 others."""
        query_rows = a.group * a.q_len
        for i in range(query_rows):
            top = tiles.load_float(part + 4 * i)
            for other in range(count - 1):
                top = max(top, tiles.load_float(others + other * stride + 4 * i))
            own = tiles.exp2(tiles.load_float(part + 4 * i) - top)
            total = own * tiles.load_float(part + 4 * (query_rows + i))
            sums = part + 8 * query_rows + i * sum_bytes
            for other in range(count - 1):
                at = others + other * stride
                weight = tiles.exp2(tiles.load_float(at + 4 * i) - top)
                total += weight * tiles.load_float(at + 4 * (query_rows + i))
                blend(sums, own, at + 8 * query_rows + i * sum_bytes, weight)
                own = one
            divisor = total if total != nothing else np.float32(np.inf)  # a row that may look at no key gives zeros
            query_head, row = head * a.group + i // a.q_len, i % a.q_len
            write(sums, divisor, a.out + batch * a.out_batch + query_head * a.out_head + row * a.out_row)
            if a.lse:
                value = (top + np.log2(total)) * LN_2
                place = (batch * a.kv_heads * a.group + query_head) * a.q_len + row
                tiles.store_float(a.lse + 4 * place, np.float32(value))

    @compiled
    def merge(a, total, threads, part_bytes):  # type: ignore[no-untyped-def]
        """Finish the heads that several threads share; a thread's second part is of the head that its share ends in."""
        merged = -1
        for t in range(1, threads):
            cut = total * t // threads
            h = cut // a.kv_len
            if cut % a.kv_len == 0 or h == merged:
                continue
            part = a.workspace + (t - 1) * a.workspace_bytes
            if total * (t - 1) // threads < h * a.kv_len:
                part += part_bytes
            count = 1
            while t + count - 1 < threads and total * (t + count - 1) // threads < (h + 1) * a.kv_len:
                count += 1
            others = a.workspace + t * a.workspace_bytes
            finish(a, h // a.kv_heads, h % a.kv_heads, part, others, a.workspace_bytes, count)
            merged = h

    @cfunc(types.void(types.int64, types.int64, types.int64), error_model="numpy")
    def share(arguments, me, threads):  # type: ignore[no-untyped-def]
        a = arguments_at(arguments)
        if a.kv_len < a.least_shared:
            if me > 0:
                return
            threads = 1
        query_rows = a.group * a.q_len
        part_bytes = query_rows * (8 + sum_bytes)
        total = a.batch * a.kv_heads * a.kv_len
        at, end = total * me // threads, total * (me + 1) // threads
        part = own_space = a.workspace + me * a.workspace_bytes
        packed = part + 2 * part_bytes
        scores = packed + query_rows * query_bytes
        recent = scores + query_rows * PITCH
        while at < end:
            h = at // a.kv_len
            batch, head, begin = h // a.kv_heads, h % a.kv_heads, at - h * a.kv_len
            count = min(a.kv_len - begin, end - at)
            for i in range(query_rows):
                query = a.query + batch * a.query_batch + (head * a.group + i // a.q_len) * a.query_head
                pack(query + i % a.q_len * a.query_row, packed + i * query_bytes)
            attend(a, batch, head, begin, count, packed, scores, recent, part)
            if count == a.kv_len:
                finish(a, batch, head, part, 0, 0, 1)
            at += count
            part = own_space + part_bytes
        if tiles.fetch_add(a.arrived) == threads - 1:
            tiles.store_word(a.arrived, 0)  # for the next call
            merge(a, total, threads, part_bytes)

    return share
