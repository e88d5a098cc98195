"""The steps of a panel over a block of KV rows, as functions that the decode kernel calls: each is compiled for the height of the panel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from numa_lab.attention import score_tile, tiles, value_tile
from numa_lab.attention.decode_spec import Space
from numa_lab.attention.panels import Panel
from numa_lab.attention.softmax_step import softmax_step
from numa_lab.attention.tiles import jit
from numa_lab.attention.vectors import Rows


@jit
def _nothing(*_arguments):  # type: ignore[no-untyped-def]
    """Do nothing, in place of a step of a panel that there is not."""


@dataclass(frozen=True)
class Steps:
    """The compiled steps of a panel; all of them do nothing where there is no such panel."""

    pack: Any = _nothing
    score: Any = _nothing
    soften: Any = _nothing
    add_values: Any = _nothing
    collect: Any = _nothing


def steps_of(rows: Rows, height: int, space: Space, ahead: bool) -> Steps:
    """Return the steps of a panel of `height` query rows; with `ahead` they prefetch what is needed next."""
    if not height:
        return Steps()
    panel = Panel(rows, height)
    return Steps(
        _pack(panel), _score(panel, ahead), _soften(panel, space), _add_values(panel, ahead), _collect(panel, space)
    )  # fmt: skip


def _pack(panel: Panel) -> Any:
    """Make ``pack(query, i, packed, row)``, which writes a query row to place i of the packed panel; `row` is working memory."""
    per_vector, spread, lanes = panel.tile.per_vector, panel.spread, panel.rows.vectors.lanes
    widen, deal = score_tile.widen(panel, ahead=False), score_tile.deal(panel)

    @jit
    def pack(query, i, packed, row):  # type: ignore[no-untyped-def]
        widen(query, 0, row, 0)
        deal(row, packed + 4 * (i // per_vector * lanes + i % per_vector * spread))

    return pack


def _score(panel: Panel, ahead: bool) -> Any:
    """Make ``score(query, key, stride, count, following, following_stride, out, scratch)``, which computes the scores of a block."""
    wide, step, pitch = panel.tile.kv_rows, 4 * panel.tile.per_vector, 4 * panel.units
    tile = score_tile.scores(panel, ahead)
    if panel.in_place:

        @jit
        def score(query, key, stride, count, following, following_stride, out, scratch):  # type: ignore[no-untyped-def]
            for j in range(0, count, wide):
                at, ahead_of = key + j * stride, following + j * following_stride
                tile(query, at, stride, count - 1 - j, ahead_of - at, out + step * j)

        return score
    widen = score_tile.widen(panel, ahead)

    @jit
    def score_widened(query, key, stride, count, following, following_stride, out, scratch):  # type: ignore[no-untyped-def]
        for j in range(0, count, wide):
            # The last row stands in for rows behind it: what memory held before may be denormal, which is slow.
            for i in range(wide):
                row = min(j + i, count - 1)
                widen(key + row * stride, stride, scratch + i * pitch, following + row * following_stride)
            tile(query, scratch, 0, 0, 0, out + step * j)

    return score_widened


def _soften(panel: Panel, space: Space) -> Any:
    """Make ``soften(scores, count, factor, state, sums, recent, begun)``, a step of the online softmax: scores become weights.

    Where a reference moves, what was summed before is rescaled; nothing was, unless the sums have `begun`.
    """
    height, per_vector, vectors, pitch, sum_bytes = (
        panel.height, panel.tile.per_vector, panel.vectors, panel.pitch, panel.rows.sum_bytes
    )  # fmt: skip
    lanes, multiple = panel.rows.vectors.lanes, panel.softmax_vectors * panel.spread
    step, scale, state_bytes = softmax_step(panel), tiles.scale(panel.rows), space.state
    set_to_minus_infinity = tiles.fill(panel.rows.vectors, float("-inf"))

    @jit
    def soften(scores, count, factor, state, sums, recent, begun):  # type: ignore[no-untyped-def]
        padded = (count + multiple - 1) // multiple * multiple
        for v in range(vectors):
            # The last vector may reach behind the block, where the pitch has room for it.
            set_to_minus_infinity(scores + v * pitch + 4 * count * per_vector, 4 * (padded - count) * per_vector)
        total, rescale = state + state_bytes, state + 2 * state_bytes
        if step(scores, padded * per_vector // lanes, factor, state, total, rescale) and begun:
            for i in range(height):
                alpha = tiles.load_float(rescale + 4 * (i // per_vector * lanes + i % per_vector))
                scale(sums + i * sum_bytes, alpha)
                scale(recent + i * sum_bytes, alpha)

    return soften


def _add_values(panel: Panel, ahead: bool) -> Any:
    """Make ``add_values(weights, value, stride, count, following, following_stride, out)``, which adds weighted rows of V to sums."""
    sum_bytes, first, steps = panel.rows.sum_bytes, 0, None
    for height in value_tile.heights(panel):
        tile = value_tile.weighted_sum(panel, first, height, ahead and not first)
        steps = _followed(steps, tile, first * sum_bytes)
        first += height
    return steps


def _followed(before: Any, tile: Any, offset: int) -> Any:
    """Return a function that calls `before`, if there is one, and then the tile, whose sums begin `offset` bytes further on."""
    if before is None:

        @jit
        def only_tile(weights, value, stride, count, following, following_stride, out):  # type: ignore[no-untyped-def]
            tile(weights, value, stride, count, following, following_stride, out + offset)

        return only_tile

    @jit
    def both(weights, value, stride, count, following, following_stride, out):  # type: ignore[no-untyped-def]
        before(weights, value, stride, count, following, following_stride, out)
        tile(weights, value, stride, count, following, following_stride, out + offset)

    return both


def _collect(panel: Panel, space: Space) -> Any:
    """Make ``collect(state, tops, totals)``, which writes the reference and the total of weights of each query row."""
    height, per_vector, lanes = panel.height, panel.tile.per_vector, panel.rows.vectors.lanes
    state_bytes = space.state

    @jit
    def collect(state, tops, totals):  # type: ignore[no-untyped-def]
        for i in range(height):
            vector, lane = i // per_vector * lanes, i % per_vector
            tiles.store_float(tops + 4 * i, tiles.load_float(state + 4 * (vector + lane)))
            total = np.float32(0)
            for k in range(lane, lanes, per_vector):
                total += tiles.load_float(state + state_bytes + 4 * (vector + k))
            tiles.store_float(totals + 4 * i, total)

    return collect
