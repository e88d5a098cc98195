"""Panels: some query rows of one KV head, whose scores are computed together, and how their numbers lie in registers and in memory.

A vector register holds `per_vector` query rows, and of each of them `spread` = lanes / per_vector numbers. While scores are computed, these
numbers belong to consecutive elements of a KV row. The KV row is loaded `spread` elements at a time, which are repeated for each query row
of the register, so that one load serves all of them; at the end of the KV row the `spread` sums of each query row are added up. With one
query row in a register this is the usual dot product. With as many query rows as there are lanes, nothing is left to add up. In scores that
have been stored, the `spread` numbers belong to consecutive KV rows.

The scores of a panel are an array ``[vector][KV row][query row of the vector]`` of float32 in memory. So the softmax works on whole vectors
alone, and the weighted sum finds each weight at a distance that is known when the kernel is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

from numa_lab.attention.vectors import Kind, Rows

BLOCK_ROWS = 64  # KV rows of a block: the online softmax takes a step after each block, as in flash attention
TALLEST = 16  # the most query rows of a panel
UNIT_BYTES = 4  # of a unit, which is what one lane multiplies at once: a float32, or a pair of bfloat16


@dataclass(frozen=True)
class Tile:
    """The scores that are computed in registers at the same time: how many query rows a vector holds, and how many KV rows there are."""

    per_vector: int
    kv_rows: int


# The tiles by the number of lanes, and for each by the most query rows of a panel that it serves. A tile has (vectors of the panel) x (KV
# rows) sums: as many as registers hold beside the query, and at least twice as many as the cycles that a multiply-add takes. With fewer
# query rows in a vector, each load of K serves more vectors, and there is more to add up at the end of a row.
_TILES = {
    16: {1: Tile(1, 8), 2: Tile(1, 8), 3: Tile(1, 4), 4: Tile(2, 8), 8: Tile(4, 8), 16: Tile(8, 8)},
    8: {1: Tile(1, 8), 2: Tile(1, 6), 4: Tile(2, 6), 8: Tile(4, 6), 16: Tile(8, 6)},
    4: {1: Tile(1, 8), 2: Tile(1, 8), 4: Tile(1, 4), 8: Tile(2, 4), 16: Tile(4, 4)},
}


@dataclass(frozen=True)
class Panel:
    """Some query rows, as many as `height`, against rows of K and V."""

    rows: Rows
    height: int

    @property
    def tile(self) -> Tile:
        """The tile of scores for a panel of this height."""
        tiles = _TILES[self.rows.vectors.lanes]
        return tiles[min(most for most in tiles if most >= self.height)]

    @property
    def pairs(self) -> bool:
        """Whether pairs of bfloat16 are multiplied."""
        return self.rows.kind is Kind.BFLOAT16_PAIRS

    @property
    def spread(self) -> int:
        """How many numbers a vector holds of each of its query rows."""
        return self.rows.vectors.lanes // self.tile.per_vector

    @property
    def vectors(self) -> int:
        """How many vectors hold all query rows together."""
        return -(-self.height // self.tile.per_vector)

    @property
    def splits(self) -> int:
        """How many sums each vector of a tile adds into in turn: 2 where a tile has too few to keep the multipliers busy."""
        return 2 if self.vectors * self.tile.kv_rows <= self.rows.vectors.accumulators // 2 else 1

    @property
    def units(self) -> int:
        """The number of units of a row of K, once it has been widened to vectors."""
        return self.rows.chunks * self.rows.vectors.lanes * (1 if self.pairs else self.rows.per_chunk)

    @property
    def in_place(self) -> bool:
        """Whether a row of K is multiplied as it lies in memory; if not, the rows of a tile are widened into working memory first."""
        whole = self.rows.row_bytes % (UNIT_BYTES * self.spread) == 0
        return self.tile.per_vector == 1 or (self.rows.kind in (Kind.FLOAT32, Kind.BFLOAT16_PAIRS) and whole)

    @property
    def query_bytes(self) -> int:
        """The bytes of the packed query rows, ``[step][vector][query row][unit]``."""
        return self.units * self.vectors * self.tile.per_vector * UNIT_BYTES

    @property
    def softmax_vectors(self) -> int:
        """How many vectors of scores one turn of the softmax handles; pairs need an even number."""
        return min(4, BLOCK_ROWS // self.spread)

    @property
    def pitch(self) -> int:
        """The bytes from one vector's scores to the next one's, with room for what a block's last tile writes behind its end."""
        behind = max(self.tile.kv_rows, self.spread) + self.spread
        return -(-(BLOCK_ROWS + behind) * self.tile.per_vector * 4 // 64) * 64

    @property
    def scores_bytes(self) -> int:
        """The bytes of the scores of a block."""
        return self.vectors * self.pitch

    @property
    def state_bytes(self) -> int:
        """The bytes of a float32 for each lane of the panel's vectors."""
        return self.vectors * self.rows.vectors.bytes

    @property
    def intensity(self) -> float:
        """The arithmetic intensity: multiply-adds of a lane for each byte of K that is read, and for each byte of V."""
        return self.units * self.height / self.rows.row_bytes

    @property
    def stream_ahead(self) -> tuple[int, ...]:
        """How many bytes before it is read each line is prefetched, on this processor."""
        own = self.rows.vectors.processor
        return own.stream_ahead if self.intensity <= own.bound_by_memory else own.busy_stream_ahead

    @property
    def scratch_bytes(self) -> int:
        """The bytes of the rows of K of a tile, widened; 0 where they are multiplied in place."""
        return 0 if self.in_place else self.tile.kv_rows * self.units * UNIT_BYTES

    def lane(self, row: int) -> int:
        """Return which float32 of the state, or of the scores of a KV row, is the first one of a query row."""
        return row // self.tile.per_vector * self.rows.vectors.lanes + row % self.tile.per_vector
