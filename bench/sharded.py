"""What sharding over teams costs: two teams of one core each against one team of two, on one node; and batches over them.

The teams share a node, so that nothing is gained by sharding and its cost is all that shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import common
import torch
from numba import cfunc, types

from numa_lab import kv_cache, memory
from numa_lab.attention.gqa import gqa_attention
from numa_lab.attention.plans import Merge
from numa_lab.attention.shapes import AttentionShape, preset
from numa_lab.kv_cache import NodeShardedKVCache
from numa_lab.node_team import NodeTeam, run_compiled
from numa_lab.pool import NUMAThreadPool
from numa_lab.topology import read_topology

KV_LENS = (2048, 8192, 32768, 131072)
INPUTS = 8  # of a batch
BATCH_KV_LEN = 4096
LAYERS = 4  # one after another, as a model has them, so that the caches hold none

ONE, CALLED, SHARDED, MERGE, HAND = "one team of 2", "called, 2 threads", "2 teams of 1", "merge", "handing over"


@cfunc(types.void(types.int64))
def nothing(_data):  # type: ignore[no-untyped-def]
    """What the teams run where handing over alone is timed."""


@contextmanager
def two_places(node: int) -> Iterator[None]:
    """Let a cache that is made here take memory of `node` whatever node it asks for: its shards all lie there."""

    def there(shape: tuple[int, ...], dtype: torch.dtype, _node: int, *, huge_pages: bool) -> torch.Tensor:
        return memory.empty(shape, dtype, node, huge_pages=huge_pages)

    with mock.patch.object(kv_cache, "memory", mock.Mock(wraps=memory, empty=there)):
        yield


def measure_steps(shape: AttentionShape, turns: int) -> dict[str, float]:
    """Median seconds of a decode step by what does it, and of its parts."""
    node = read_topology().effective_nodes[0]
    cpus = common.cores_here()
    whole = NodeTeam(node, cpus)
    halves = {number: NodeTeam(node, [cpu]) for number, cpu in enumerate(cpus)}
    dtype, query = getattr(torch, shape.dtype), common.query_of(shape)
    size = (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
    layers, caches = [], []
    for _ in range(LAYERS):
        layers.append(tuple(memory.empty(size, dtype, node).normal_() for _ in range(2)))
        with two_places(node):
            caches.append(
                NodeShardedKVCache(shape.batch, shape.kv_heads, shape.head_dim, shape.kv_len, dtype, teams=halves)
            )
        caches[-1].append(*layers[-1])
    parts = torch.randn(len(halves), *query.shape).to(dtype), torch.randn(len(halves), *query.shape[:-1])

    out, merge = torch.empty_like(query), Merge(dtype, shape.head_dim)
    jobs = {team: [(nothing.address, 0, 1)] for team in halves.values()}

    calls: dict[str, Callable[[int], object]] = {
        ONE: lambda layer: whole.submit(gqa_attention, query, *layers[layer], enable_gqa=True).result(),
        CALLED: lambda layer: gqa_attention(query, *layers[layer], enable_gqa=True),
        SHARDED: lambda layer: caches[layer].attend(query),
        MERGE: lambda _layer: merge(*parts, out),
        HAND: lambda _layer: run_compiled(jobs),
    }
    torch.testing.assert_close(calls[SHARDED](0), calls[CALLED](0), rtol=2e-2, atol=2e-2)
    return common.medians({name: common.seconds_of(call, LAYERS) for name, call in calls.items()}, turns)


def measure_batch(shape: AttentionShape, turns: int) -> dict[str, float]:
    """Sequences per second of one team and of a pool of such teams, and bytes that one and that all cores read per second."""
    node, cpus = read_topology().effective_nodes[0], common.cores_here()
    dtype, size = getattr(torch, shape.dtype), (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
    queries = [common.query_of(shape) for _ in range(INPUTS)]
    keys, values = ([torch.randn(size).to(dtype) for _ in range(INPUTS)] for _ in range(2))
    block = memory.empty((1 << 30,), torch.uint8, node).fill_(1)
    single = NodeTeam(node, cpus[:1])
    with NUMAThreadPool(num_threads_per_node=len(cpus)) as pool:

        def one_by_one() -> None:
            for query, key, value in zip(queries, keys, values, strict=True):
                gqa_attention(query, key, value, enable_gqa=True)

        batch = {
            "one": lambda _layer: single.submit(one_by_one).result(),
            "pool": lambda _layer: pool.parallel_gqa_compute(queries, keys, values),
        }
        times = {name: common.seconds_of(call, 1) for name, call in batch.items()}
        rates = {name: lambda seconds=seconds: INPUTS / seconds() for name, seconds in times.items()}
        limits = {count: common.read_limit(block, count) for count in (1, len(cpus))}
        return common.medians({**rates, "read by one": limits[1], "read by all": limits[len(cpus)]}, turns)


def main() -> None:
    """Print a table of steps, and the scaling of a batch beside that of the memory's bandwidth."""
    options = common.parser(__doc__, turns=15).parse_args()
    cores = len(common.cores_here())
    print(f"{'tokens':>8}  {ONE:>16}  {SHARDED:>16}  {'to one team':>11}  {'to called':>9}  {MERGE:>8}  {HAND:>12}")
    for kv_len in KV_LENS:
        shape = preset("llama-3-8b", kv_len=kv_len)
        seconds = common.in_own_process(cores, measure_steps, shape, options.turns)
        print(
            f"{kv_len:8}  {1e6 * seconds[ONE]:13.0f} us  {1e6 * seconds[SHARDED]:13.0f} us"
            f"  {seconds[SHARDED] / seconds[ONE]:11.3f}  {seconds[SHARDED] / seconds[CALLED]:9.3f}"
            f"  {1e6 * seconds[MERGE]:5.0f} us  {1e6 * seconds[HAND]:9.0f} us",
            flush=True,
        )
    found = common.in_own_process(cores, measure_batch, preset("llama-3-8b", kv_len=BATCH_KV_LEN), options.turns)
    print(
        f"\nbatch of {INPUTS}, {BATCH_KV_LEN} tokens: {cores} teams compute {found['pool'] / found['one']:.2f} times as fast as one; "
        f"{cores} cores read {found['read by all'] / found['read by one']:.2f} times as fast as one"
    )


if __name__ == "__main__":
    main()
