"""One node in two halves, each of which a sharded cache takes for a node of its own, beside the same attention called on all cores.

Nothing is gained by sharding there, so that its cost is all that shows.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import NamedTuple
from unittest import mock

import common
import torch
from torch import Tensor

from numa_lab.attention.gqa import gqa_attention
from numa_lab.attention.shapes import AttentionShape
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.kv_cache import NodeShardedKVCache
from numa_lab.nodes.one_node import NUMAOptimizedGQA
from numa_lab.nodes.seats import Place
from numa_lab.placement import memory

LAYERS_BYTES = (
    256 << 20
)  # of K and V of all layers, which are read in turn as a model reads them, so that caches hold none
FEWEST_LAYERS, MOST_LAYERS = 2, 32  # the most are llama-3-8b's
BLOCK = 256  # tokens in a row on a node
SAMPLE_SECONDS = 0.1  # of one timing
FEWEST_STEPS = 5  # in one timing

CALLED, PINNED, SHARDED, ENTERED = "called", "called, pinned", "sharded", "entered"


class Way(NamedTuple):
    """A way to compute a decode step."""

    attend: Callable[[int, Tensor], Tensor]  # of a layer, by its number, to a query
    inside: Callable[[], AbstractContextManager[object]] = nullcontext  # entered around many steps


class Model(NamedTuple):
    """Layers of K and V, and the ways to attend to them."""

    shape: AttentionShape
    layers: int
    ways: dict[str, Way]


def make_model(shape: AttentionShape) -> Model:
    """Layers of random K and V, each once as two tensors and once as a cache of two nodes, which are checked to agree.

    Attention is also called with its threads pinned: a worker that wakes up beside the caller, on its CPU, may wait there for some
    milliseconds. The caches are also entered around many steps.
    """
    node, dtype = read_topology().effective_nodes[0], getattr(torch, shape.dtype)
    size = (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
    layers: list[tuple[Tensor, ...]] = []
    caches: list[NodeShardedKVCache] = []
    for _ in range(min(max(FEWEST_LAYERS, -(-LAYERS_BYTES // shape.kv_bytes)), MOST_LAYERS)):
        layers.append(tuple(memory.empty(size, dtype, node).normal_() for _ in range(2)))
        with _all_memory_on(node):
            caches.append(
                NodeShardedKVCache(
                    shape.batch, shape.kv_heads, shape.head_dim, capacity=shape.kv_len, dtype=dtype,
                    teams=_halves(node),
                    block=min(BLOCK, shape.kv_len // 2),
                )
            )  # fmt: skip
        caches[-1].append(*layers[-1])
    called = Way(lambda layer, query: gqa_attention(query, *layers[layer], enable_gqa=True))
    sharded = Way(lambda layer, query: caches[layer].attend(query))
    ways = {CALLED: called, PINNED: called._replace(inside=partial(NUMAOptimizedGQA, node)), SHARDED: sharded}
    ways[ENTERED] = sharded._replace(inside=lambda: caches[0])  # whose seats are those of all
    query = common.query_of(shape)
    outputs = [way.attend(0, query) for way in ways.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0.02, atol=0.02 * float(outputs[0].abs().max()))
    return Model(shape, len(layers), ways)


@cache
def _halves(node: int) -> dict[int, Place]:
    """Each half of the cores, by the number of the node that it stands for."""
    cpus = common.cores_here()
    return {0: Place(node, tuple(cpus[: len(cpus) // 2])), 1: Place(node, tuple(cpus[len(cpus) // 2 :]))}


@contextmanager
def _all_memory_on(node: int) -> Iterator[None]:
    """Let a cache that is made here take memory of `node` whatever node it asks for."""
    empty = memory.empty

    def there(shape: Sequence[int], dtype: torch.dtype, _node: int, **options: bool) -> Tensor:
        return empty(shape, dtype, node, **options)

    with mock.patch.object(memory, "empty", there):
        yield


def steps(model: Model, name: str, wait: Callable[[], object] = lambda: None, times: int = 1) -> Callable[[], float]:
    """What measures the seconds of a decode step, each after a wait that does not count, for so many `times` of a sample."""
    way, query = model.ways[name], common.query_of(model.shape)
    return lambda: _measure(lambda turn: way.attend(turn % model.layers, query), way.inside, wait, times)


def tokens(model: Model, name: str, weights: Sequence[Tensor]) -> Callable[[], float]:
    """What measures the seconds of a token in a decode loop: in each layer a linear layer gives the query of the attention."""
    way, query = model.ways[name], common.query_of(model.shape)

    def token(_turn: int) -> None:
        hidden = query
        for layer, weight in enumerate(weights):
            hidden = way.attend(layer, torch.nn.functional.linear(hidden.view(1, -1), weight).view(query.shape))

    return lambda: _measure(token, way.inside)


def in_threads(measures: Sequence[Callable[[], float]]) -> float:
    """The mean of what is measured at once, each in a Python thread of its own, whose OpenMP team ends with it."""
    with ThreadPoolExecutor(len(measures)) as threads:
        return statistics.mean(threads.map(lambda measure: measure(), measures))


def _measure(
    call: Callable[[int], object],
    inside: Callable[[], AbstractContextManager[object]],
    wait: Callable[[], object] = lambda: None,
    times: int = 1,
) -> float:
    """Mean seconds of calls, which are numbered, when the threads of what was measured before are asleep."""
    turn = itertools.count()
    with inside():
        common.settle(lambda: call(next(turn)))
        seconds, count, end = 0.0, 0, time.perf_counter() + times * SAMPLE_SECONDS
        while count < FEWEST_STEPS or time.perf_counter() < end:
            wait()
            begin = time.perf_counter()
            call(next(turn))
            seconds += time.perf_counter() - begin
            count += 1
    return seconds / count
