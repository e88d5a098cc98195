"""The decode kernel: the code that each thread of a team runs, compiled by Numba for one kind of rows and one number of query rows.

This is flash-decoding (split-KV decoding: Dao et al., 2023). All rows of K and V of a batch, head after head, are split evenly over the
threads. Each thread reads its share once, for all query rows of a group together, and takes a step of an online softmax after each block of
rows. Where several threads share a head, the thread that arrives last merges their parts by the log-sum-exp.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cfunc, from_dtype, types
from numba.extending import intrinsic

from numa_lab.attention import compiler, decode_spec, tiles
from numa_lab.attention.decode_spec import ARGUMENTS, LOG2_E, MASK_BOOL, MASK_FLOAT, MASK_HALF, DecodeSpec, Space
from numa_lab.attention.panel_steps import steps_of
from numa_lab.attention.panels import BLOCK_ROWS, TALLEST, Panel
from numa_lab.attention.tiles import jit

FLUSH = 1024  # the sums of so many KV rows are kept apart before they are added, so that errors of long sequences do not pile up
LOWEST = np.float32(tiles.LOWEST)
ONE, ZERO = np.float32(1), np.float32(0)
LN_2 = math.log(2)


@jit
def _mask_row(scores, apart, count, factor, mask, step, kind):  # type: ignore[no-untyped-def]
    """Scale the scores of a query row to powers of two, and mask them.

    A boolean mask makes scores -inf, and numbers are added. The scores are `apart` bytes from one KV row to the next.
    """
    for j in range(count):
        at, score = scores + apart * j, np.float32(-np.inf)
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
            if scaled < LOWEST and bias >= LOWEST:  # the least number, by which Hugging Face models mask, is not -inf
                scaled = LOWEST
            score = tiles.load_float(at) * factor + scaled
        tiles.store_float(at, score)


def arguments_as(dtype: np.dtype[Any]) -> Any:
    """Make ``arguments_at(address)``, which returns the record at an address.

    Numba's own ``carray`` needs its run-time library, which stored code can't have.
    """

    @intrinsic
    def arguments_at(_context, address):  # type: ignore[no-untyped-def]
        record = from_dtype(dtype)
        return record(types.int64), lambda context, b, _s, a: b.inttoptr(a[0], compiler.value_type(context, record))

    return arguments_at


def build(spec: DecodeSpec) -> Any:
    """Compile ``void share(void *ARGUMENTS, int64_t number, int64_t threads)``, one thread's share; the last thread merges."""
    rows = spec.rows
    first, further, rest = spec.heights
    sum_bytes = rows.sum_bytes
    space = Space.of(Panel(rows, first))
    # Only the first panel prefetches what comes next; for the others it is on its way then.
    of_first = steps_of(rows, first, space, ahead=True)
    of_further, of_rest = (steps_of(rows, height, space, ahead=False) for height in (further, rest))
    pack_first, pack_further, pack_rest = of_first.pack, of_further.pack, of_rest.pack
    score_first, score_further, score_rest = of_first.score, of_further.score, of_rest.score
    soften_first, soften_further, soften_rest = of_first.soften, of_further.soften, of_rest.soften
    add_first, add_further, add_rest = of_first.add_values, of_further.add_values, of_rest.add_values
    collect_first, collect_further, collect_rest = of_first.collect, of_further.collect, of_rest.collect
    query_bytes, scores_bytes, states_bytes, state_bytes = space.query, space.scores, 3 * space.state, space.state
    scratch_bytes = space.scratch
    lower = Panel(rows, rest or first)
    per_vector, lower_per_vector = Panel(rows, first).tile.per_vector, lower.tile.per_vector
    pitch, lower_pitch = Panel(rows, first).pitch, lower.pitch
    clear, blend, write = tiles.fill(rows.vectors, 0.0), tiles.blend(rows), tiles.write(rows)
    set_to_lowest = tiles.fill(rows.vectors, tiles.LOWEST)
    line_up = jit(decode_spec.line_up)
    arguments_at = arguments_as(ARGUMENTS)

    @jit
    def pack(a, batch, head, packed, row):  # type: ignore[no-untyped-def]
        """Pack the query rows of a KV head, panel by panel."""
        query_rows = a.group * a.q_len
        for i in range(query_rows):
            query = a.query + batch * a.query_batch + (head * a.group + i // a.q_len) * a.query_head
            query += i % a.q_len * a.query_row
            panel, at = i // TALLEST, i % TALLEST
            there = packed + panel * query_bytes
            if panel == 0:
                pack_first(query, at, there, row)
            elif query_rows - panel * TALLEST >= TALLEST:
                pack_further(query, at, there, row)
            else:
                pack_rest(query, at, there, row)

    @jit
    def mask_block(a, batch, head, begin, count, scores):  # type: ignore[no-untyped-def]
        """Scale and mask the scores of a block whose first KV row is `begin`."""
        query_rows = a.group * a.q_len
        for i in range(query_rows):
            panel, at = i // TALLEST, i % TALLEST
            wide, long = per_vector, pitch
            if panel and query_rows - panel * TALLEST < TALLEST:
                wide, long = lower_per_vector, lower_pitch
            mask = a.mask + batch * a.mask_batch + (head * a.group + i // a.q_len) * a.mask_head
            mask += i % a.q_len * a.mask_row + begin * a.mask_column
            row = scores + panel * scores_bytes + at // wide * long + 4 * (at % wide)
            _mask_row(row, 4 * wide, count, np.float32(a.factor), mask, a.mask_column, a.mask_kind)

    @jit
    def attend(a, batch, head, begin, count, packed, scores, recent, states, scratch, part):  # type: ignore[no-untyped-def]
        """Compute a partial result over `count` KV rows from `begin` on: reference, total of weights and sums of each query row."""
        query_rows = a.group * a.q_len
        total, sums = part + 4 * query_rows, part + line_up(8 * query_rows)
        whole, panels = query_rows // TALLEST, (query_rows + TALLEST - 1) // TALLEST
        last = panels - 1
        for i in range(query_rows):
            clear(sums + i * sum_bytes, sum_bytes)
            clear(recent + i * sum_bytes, sum_bytes)
        for panel in range(panels):
            set_to_lowest(states + panel * states_bytes, state_bytes)
            clear(states + panel * states_bytes + state_bytes, state_bytes)
        key = a.key + batch * a.key_batch + head * a.key_head + begin * a.key_row
        value = a.value + batch * a.value_batch + head * a.value_head + begin * a.value_row
        for block in range(0, count, BLOCK_ROWS):
            here = min(BLOCK_ROWS, count - block)
            k, v, next_k = key + block * a.key_row, value + block * a.value_row, key + (block + BLOCK_ROWS) * a.key_row
            # While scores are computed, V of the block is prefetched, and while V is summed, K of the next block.
            score_first(packed, k, a.key_row, here, v, a.value_row, scores, scratch)
            for n in range(1, whole):
                score_further(packed + n * query_bytes, k, a.key_row, here, 0, 0, scores + n * scores_bytes, scratch)
            score_rest(packed + last * query_bytes, k, a.key_row, here, 0, 0, scores + last * scores_bytes, scratch)
            factor = np.float32(a.factor)
            if a.mask_kind:
                mask_block(a, batch, head, begin + block, here, scores)
                factor = ONE
            soften_first(scores, here, factor, states, sums, recent, block)
            for n in range(1, whole):
                before = n * TALLEST * sum_bytes
                soften_further(
                    scores + n * scores_bytes,
                    here,
                    factor,
                    states + n * states_bytes,
                    sums + before,
                    recent + before,
                    block,
                )
            before = last * TALLEST * sum_bytes
            soften_rest(
                scores + last * scores_bytes,
                here,
                factor,
                states + last * states_bytes,
                sums + before,
                recent + before,
                block,
            )
            add_first(scores, v, a.value_row, here, next_k, a.key_row, recent)
            for n in range(1, whole):
                add_further(scores + n * scores_bytes, v, a.value_row, here, 0, 0, recent + n * TALLEST * sum_bytes)
            add_rest(scores + last * scores_bytes, v, a.value_row, here, 0, 0, recent + last * TALLEST * sum_bytes)
            if block + BLOCK_ROWS >= count or (block + BLOCK_ROWS) % FLUSH == 0:
                for i in range(query_rows):
                    blend(sums + i * sum_bytes, ONE, recent + i * sum_bytes, ONE)
                    clear(recent + i * sum_bytes, sum_bytes)
        collect_first(states, part, total)
        for n in range(1, whole):
            collect_further(states + n * states_bytes, part + 4 * n * TALLEST, total + 4 * n * TALLEST)
        collect_rest(states + last * states_bytes, part + 4 * last * TALLEST, total + 4 * last * TALLEST)

    @jit
    def finish(a, batch, head, part, others, stride, count):  # type: ignore[no-untyped-def]
        """Write the output of a head from one part and `count` - 1 others."""
        query_rows = a.group * a.q_len
        for i in range(query_rows):
            top = tiles.load_float(part + 4 * i)
            for other in range(count - 1):
                top = max(top, tiles.load_float(others + other * stride + 4 * i))
            own = ONE if count == 1 else tiles.exp2(tiles.load_float(part + 4 * i) - top)
            total = own * tiles.load_float(part + 4 * (query_rows + i))
            before = line_up(8 * query_rows) + i * sum_bytes
            sums = part + before
            for other in range(count - 1):
                at = others + other * stride
                weight = tiles.exp2(tiles.load_float(at + 4 * i) - top)
                total += weight * tiles.load_float(at + 4 * (query_rows + i))
                blend(sums, own, at + before, weight)
                own = ONE
            divisor = total if total != ZERO else np.float32(np.inf)  # a row that may look at no key gives zeros
            query_head, row = head * a.group + i // a.q_len, i % a.q_len
            write(sums, divisor, a.out + batch * a.out_batch + query_head * a.out_head + row * a.out_row)
            if a.lse:
                value = (top + np.log2(total)) * LN_2
                place = (batch * a.kv_heads * a.group + query_head) * a.q_len + row
                tiles.store_float(a.lse + 4 * place, np.float32(value))

    @jit
    def merge(a, total, threads, part_bytes):  # type: ignore[no-untyped-def]
        """Finish the heads that several threads share; the second part of a thread belongs to the head in which its share ends."""
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
        part_bytes = line_up(8 * query_rows) + query_rows * sum_bytes
        total = a.batch * a.kv_heads * a.kv_len
        at, end = total * me // threads, total * (me + 1) // threads
        part = own_space = a.workspace + me * a.workspace_bytes
        packed = part + 2 * part_bytes
        panels = (query_rows + TALLEST - 1) // TALLEST
        scores = packed + panels * query_bytes
        states = scores + panels * scores_bytes
        recent = states + panels * states_bytes
        scratch = recent + query_rows * sum_bytes
        row = scratch + scratch_bytes
        while at < end:
            h = at // a.kv_len
            batch, head, begin = h // a.kv_heads, h % a.kv_heads, at - h * a.kv_len
            count = min(a.kv_len - begin, end - at)
            pack(a, batch, head, packed, row)
            attend(a, batch, head, begin, count, packed, scores, recent, states, scratch, part)
            if count == a.kv_len:
                finish(a, batch, head, part, 0, 0, 1)
            at += count
            part = own_space + part_bytes
        if tiles.fetch_add(a.arrived) == threads - 1:
            tiles.store_word(a.arrived, 0)  # for the next call
            merge(a, total, threads, part_bytes)

    return share
