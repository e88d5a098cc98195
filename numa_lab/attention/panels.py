"""Panels: some query rows of a KV head, whose scores are computed together, and how their numbers lie in memory and registers.

A vector register holds `per_vector` query rows, each with `spread` = lanes / per_vector numbers. While scores are computed these
numbers belong to consecutive elements of a KV row: the row is loaded `spread` elements at a time, repeated for each query row of
the register, so that one load serves all of them, and the sums of `spread` numbers are added up at the end of the row. With one
query row in a vector this is the usual dot product, and with as many as there are lanes nothing is left to add up. When they
are stored, the `spread` numbers belong to consecutive KV rows.

In memory the panel is an array ``[vector][KV row][query row of the vector]`` of float32: softmax needs nothing but whole vectors,
and the weighted sum finds each weight at a distance that is known when it is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

from numa_lab.attention.simd import Kind, Rows

BLOCK = 64  # KV rows between two softmax steps
TALLEST = 16  # query rows of a panel
UNIT_BYTES = 4  # of what is multiplied at once: a float32, or a pair of bfloat16


@dataclass(frozen=True)
class Tile:
    """How many query rows a vector holds, and how many KV rows a tile of scores has."""

    per_vector: int
    kv_rows: int


# For panels of up to so many query rows, by the lanes of a vector. The sums of a tile are (vectors of the panel) x (KV rows): as
# many as registers hold beside the query, and at least twice as many as a multiply-add takes cycles. Fewer query rows in a vector
# mean more vectors that each load of K serves, and more additions at the end of a row.
_TILES = {
    16: {1: Tile(1, 8), 2: Tile(1, 8), 3: Tile(1, 4), 4: Tile(2, 8), 8: Tile(4, 8), 16: Tile(8, 8)},
    8: {1: Tile(1, 8), 2: Tile(1, 6), 4: Tile(2, 6), 8: Tile(4, 6), 16: Tile(8, 6)},
    4: {1: Tile(1, 8), 2: Tile(1, 8), 4: Tile(1, 4), 8: Tile(2, 4), 16: Tile(4, 4)},
}


@dataclass(frozen=True)
class Panel:
    """So many query rows against rows of K and V."""

    rows: Rows
    height: int

    @property
    def tile(self) -> Tile:
        """The tile of scores for this height."""
        tiles = _TILES[self.rows.vectors.lanes]
        return tiles[min(most for most in tiles if most >= self.height)]

    @property
    def pairs(self) -> bool:
        """Whether pairs of bfloat16 are multiplied."""
        return self.rows.kind is Kind.BFLOAT16_PAIRS

    @property
    def spread(self) -> int:
        """Numbers in a vector for each of its query rows."""
        return self.rows.vectors.lanes // self.tile.per_vector

    @property
    def vectors(self) -> int:
        """Vectors that hold a number of each query row."""
        return -(-self.height // self.tile.per_vector)

    @property
    def splits(self) -> int:
        """Sums that each vector of a tile has, used in turn, where there would be too few to keep the multipliers busy."""
        return 2 if self.vectors * self.tile.kv_rows <= self.rows.vectors.accumulators // 2 else 1

    @property
    def units(self) -> int:
        """Units of a row of K, once it has been widened to vectors."""
        return self.rows.chunks * self.rows.vectors.lanes * (1 if self.pairs else self.rows.per_chunk)

    @property
    def in_place(self) -> bool:
        """Whether a row of K is multiplied as it lies in memory; else a tile's rows are widened into working memory first."""
        whole = self.rows.row_bytes % (UNIT_BYTES * self.spread) == 0
        return self.tile.per_vector == 1 or (self.rows.kind in (Kind.FLOAT32, Kind.BFLOAT16_PAIRS) and whole)

    @property
    def query_bytes(self) -> int:
        """Bytes of the packed query rows, ``[step][vector][query row][unit]``."""
        return self.units * self.vectors * self.tile.per_vector * UNIT_BYTES

    @property
    def softmax_vectors(self) -> int:
        """Vectors of scores that one turn of the softmax handles; pairs need an even number."""
        return min(4, BLOCK // self.spread)

    @property
    def pitch(self) -> int:
        """Bytes from the scores of one vector to those of the next; the last tile of a block may write behind its end."""
        behind = max(self.tile.kv_rows, self.spread) + self.spread
        return -(-(BLOCK + behind) * self.tile.per_vector * 4 // 64) * 64

    @property
    def scores_bytes(self) -> int:
        """Bytes of the scores of a block."""
        return self.vectors * self.pitch

    @property
    def state_bytes(self) -> int:
        """Bytes of a float32 for each lane."""
        return self.vectors * self.rows.vectors.bytes

    @property
    def scratch_bytes(self) -> int:
        """Bytes of a tile's rows of K, widened."""
        return 0 if self.in_place else self.tile.kv_rows * self.units * UNIT_BYTES

    def lane(self, row: int) -> int:
        """Which float32 of the state, or of a KV row's scores, is the first of a query row."""
        return row // self.tile.per_vector * self.rows.vectors.lanes + row % self.tile.per_vector
