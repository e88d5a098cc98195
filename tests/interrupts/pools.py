"""NUMAThreadPool and NUMAProcessPool."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from interrupts.aim import Target
from interrupts.cases import CPUS, NODE, Q_HEADS, attention, case, numbers, require_close
from numa_lab import NUMAProcessPool, NUMAThreadPool

LEADERS = min(2, len(CPUS))  # of each node: so several, also on a machine with one
PATIENCE_SECONDS = 30  # for a result: less than what counts as a hang
INPUTS = 4
TOKENS = 200


def new_pool() -> NUMAThreadPool:
    return NUMAThreadPool(num_threads_per_node=LEADERS)


def require_working(pool: NUMAThreadPool | NUMAProcessPool) -> None:
    """Refuse a pool of which any leader does not answer, or wrongly."""
    futures = [
        pool.submit(torch.add, torch.ones(3), number, numa_node=node)
        for node in pool.nodes
        for number in range(2 * LEADERS)
    ]
    for number, future in enumerate(futures):
        assert future.result(PATIENCE_SECONDS).tolist() == [1 + number % (2 * LEADERS)] * 3


@case("pool-made")
def made() -> Iterator[Target]:
    pools: list[NUMAThreadPool] = []

    def right() -> None:
        pools.append(new_pool())
        require_working(pools[-1])
        while pools:
            pools.pop().shutdown()

    yield Target(lambda: pools.append(new_pool()), right)


def _task(name: str, call: Callable[[NUMAThreadPool, Tensor], object]) -> None:
    def task() -> Iterator[Target]:
        one = torch.ones(3)
        with new_pool() as pool:
            yield Target(lambda: call(pool, one), lambda: require_working(pool))

    case(name)(task)


_task("pool-submit", lambda pool, one: pool.submit(torch.add, one, 1, numa_node=NODE))
_task("pool-submit-result", lambda pool, one: pool.submit(torch.add, one, 1, numa_node=NODE).result())
_task("pool-execute_on_numa", lambda pool, one: pool.execute_on_numa(torch.add, one, 1, numa_node=NODE))


@case("pool-parallel_gqa_compute")
def parallel() -> Iterator[Target]:
    queries, keys, values = (
        [numbers(tokens, heads) for _ in range(INPUTS)] for tokens, heads in ((1, Q_HEADS), (TOKENS, 2), (TOKENS, 2))
    )
    expected = attention(queries[0], keys[0], values[0])
    with new_pool() as pool:

        def right() -> None:
            for output in pool.parallel_gqa_compute(queries, keys, values):
                require_close(output, expected)
            require_working(pool)

        yield Target(lambda: pool.parallel_gqa_compute(queries, keys, values), right)


@case("pool-scatter")
def scatter() -> Iterator[Target]:
    tensors = [numbers(TOKENS) for _ in range(INPUTS)]
    with new_pool() as pool:

        def right() -> None:
            assert all(torch.equal(copy, tensors[0]) for copy in pool.scatter(tensors))
            require_working(pool)

        yield Target(lambda: pool.scatter(tensors), right)


@case("pool-receipt")
def receipt() -> Iterator[Target]:
    with new_pool() as pool:

        def right() -> None:
            for node, found in pool.receipts().items():
                assert found.requested.cpu_nodes == (node,)
                assert len({thread.allowed for thread in found.threads}) == LEADERS, found.threads
            require_working(pool)

        yield Target(pool.receipt, right)


@case("pool-shutdown")
def shutdown() -> Iterator[Target]:
    pools = [new_pool()]

    def right() -> None:
        pools.pop().shutdown()  # again, or to its end
        pools.append(new_pool())
        require_working(pools[-1])

    yield Target(lambda: pools[-1].shutdown(), right)
    pools.pop().shutdown()


@case("with-pool")
def inside() -> Iterator[Target]:
    def work() -> None:
        with new_pool() as pool:
            require_working(pool)

    yield Target(work, work)


@case("process-pool-submit", share=0.1)
def processes() -> Iterator[Target]:
    one = torch.ones(3)
    with NUMAProcessPool([NODE]) as pool:
        yield Target(lambda: pool.submit(torch.add, one, 1).result(), lambda: require_working(pool))
