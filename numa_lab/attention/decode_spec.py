"""What one version of the decode kernel serves and takes: the fields of its arguments, and its working memory.

Nothing here needs Numba. ``numa_lab.attention.decode_kernel`` is the kernel itself.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from numa_lab.attention.panels import TALLEST, Panel
from numa_lab.attention.vectors import LINE_BYTES, Rows

MASK_NONE, MASK_BOOL, MASK_FLOAT, MASK_HALF, MASK_BFLOAT = range(5)
LOG2_E = math.log2(math.e)

# What the threads get: first what differs between calls of one layout, with the address of the kernel itself (`share`) at the end; then
# the addresses of OpenMP's functions (for ``numa_lab.attention.openmp_regions``), strides in bytes, and counts. Over fewer keys than
# `least_shared` the first thread computes alone. `factor` is the scale of the scores times log2(e).
CALL = ("arrived", "workspace", "query", "key", "value", "out", "lse", "mask", "kv_len", "share")
FIELDS = (
    *CALL,
    "thread_number", "team_size", "workspace_bytes", "least_shared",
    "batch", "kv_heads", "group", "q_len",
    "query_batch", "query_head", "query_row",
    "key_batch", "key_head", "key_row",
    "value_batch", "value_head", "value_row",
    "out_batch", "out_head", "out_row",
    "mask_batch", "mask_head", "mask_row", "mask_column", "mask_kind",
)  # fmt: skip
ARGUMENTS = np.dtype([*((name, np.int64) for name in FIELDS), ("factor", np.float64)])


@dataclass(frozen=True)
class DecodeSpec:
    """What one compiled version of the decode kernel serves: a kind of rows, and how many query rows share a KV head."""

    rows: Rows
    query_rows: int

    @classmethod
    def of(cls, rows: Rows, query_rows: int) -> DecodeSpec:
        """Return the version that serves so many query rows; of more than two panels only the height of the last one matters."""
        return cls(rows, query_rows if query_rows <= 2 * TALLEST else 2 * TALLEST + query_rows % TALLEST)

    @property
    def heights(self) -> tuple[int, int, int]:
        """The query rows of the first panel, of each further one, and of the last, lower one; 0 where there is no such panel."""
        further = TALLEST if self.query_rows >= 2 * TALLEST else 0
        return min(TALLEST, self.query_rows), further, self.query_rows % TALLEST if self.query_rows > TALLEST else 0

    def workspace_bytes(self, query_rows: int) -> int:
        """Return how many bytes each thread needs, in whole pages, so that no two threads share a page."""
        panels = -(-query_rows // TALLEST)
        each, whole = Space.of(Panel(self.rows, min(TALLEST, query_rows))), query_rows * self.rows.sum_bytes
        needed = 2 * (line_up(8 * query_rows) + whole) + whole + panels * each.panel_bytes + each.shared_bytes
        return -(-needed // mmap.PAGESIZE) * mmap.PAGESIZE

    def build(self) -> Any:
        """Compile it, as ``decode_kernel.build`` does."""
        from numa_lab.attention import decode_kernel

        return decode_kernel.build(self)


@dataclass(frozen=True)
class Space:
    """The bytes of working memory, in whole cache lines: of each panel, as the highest needs them, and of what all panels share."""

    query: int
    scores: int
    state: int  # of each of three: references of the softmax, totals of weights, and factors of what was summed before
    scratch: int
    row: int

    @classmethod
    def of(cls, panel: Panel) -> Space:
        """Return what this panel and lower ones need."""
        panels = [Panel(panel.rows, height) for height in range(1, panel.height + 1)]
        query, scores, state, scratch = (
            line_up(max(sizes))
            for sizes in zip(
                *((p.query_bytes, p.scores_bytes, p.state_bytes, p.scratch_bytes) for p in panels), strict=True
            )
        )
        return cls(query, scores, state, scratch, row=line_up(4 * panel.units))

    @property
    def panel_bytes(self) -> int:
        """The bytes of one panel."""
        return self.query + self.scores + 3 * self.state

    @property
    def shared_bytes(self) -> int:
        """The bytes of what all panels share."""
        return self.scratch + self.row


def line_up(nbytes: int) -> int:
    """Return the bytes of whole cache lines, rounded up: a vector that crosses a line takes twice as long to load."""
    return -(-nbytes // LINE_BYTES) * LINE_BYTES
