"""The merge of partial results by their log-sum-exp, compiled like the decode kernel.

It is the last step of context-parallel (split-KV) decoding over nodes. By torch it takes five operations, which took 180 us right after K
and V had gone through the caches, and 30 us where they had not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from numa_lab.attention.decode_spec import LOG2_E
from numa_lab.attention.vectors import Rows

# `outputs` is [parts, rows, head_dim] and `lse` [parts, rows], float32 and natural; `space` has room for two rows of sums.
FIELDS = ("outputs", "lse", "out", "space", "parts", "rows")
_ARGUMENTS = np.dtype([(name, np.int64) for name in FIELDS])


@dataclass(frozen=True)
class MergeSpec:
    """What one compiled version of the merge serves: a kind of rows, which is not that of pairs."""

    rows: Rows

    @property
    def space_bytes(self) -> int:
        """The bytes of working memory."""
        return 2 * self.rows.sum_bytes

    def build(self) -> Any:
        """Compile ``void merge(void *_ARGUMENTS)``."""
        from numba import cfunc, types

        from numa_lab.attention import tiles
        from numa_lab.attention.decode_kernel import LOWEST, ONE, ZERO, arguments_as
        from numa_lab.attention.tiles import jit

        rows = self.rows
        sum_bytes, row_bytes = rows.sum_bytes, rows.row_bytes
        widen, blend, write = (make(rows) for make in (tiles.pack, tiles.blend, tiles.write))
        clear = tiles.fill(rows.vectors, 0.0)
        arguments_at, log2_e = arguments_as(_ARGUMENTS), np.float32(LOG2_E)

        @jit
        def merge_row(a, row):  # type: ignore[no-untyped-def]
            top, total = LOWEST, ZERO
            for part in range(a.parts):
                top = max(top, tiles.load_float(a.lse + 4 * (part * a.rows + row)))
            sums, wide = a.space, a.space + sum_bytes
            clear(sums, sum_bytes)
            for part in range(a.parts):
                at = part * a.rows + row
                weight = tiles.exp2((tiles.load_float(a.lse + 4 * at) - top) * log2_e)
                total += weight
                widen(a.outputs + at * row_bytes, wide)
                blend(sums, ONE, wide, weight)
            # A row that may look at no key of any part gives zeros.
            write(sums, total if total != ZERO else np.float32(np.inf), a.out + row * row_bytes)

        @cfunc(types.void(types.int64), error_model="numpy")
        def merge(arguments):  # type: ignore[no-untyped-def]
            a = arguments_at(arguments)
            for row in range(a.rows):
                merge_row(a, row)

        return merge
