"""NUMAOptimizedGQA, pinned_team, and attention without either."""

import itertools
from collections.abc import Iterator
from unittest import mock

import torch

from interrupts import threads
from interrupts.aim import Target
from interrupts.cases import CPUS, NODE, Q_HEADS, attention, case, numbers, require_close
from numa_lab import NUMAOptimizedGQA, gqa_attention
from numa_lab.attention.decode import decode_attention
from numa_lab.machine import libnuma
from numa_lab.placement import memory
from numa_lab.placement.pinned_team import pinned_team

TOKENS = 300
QUERY, KEY, VALUE = numbers(1, Q_HEADS), numbers(TOKENS), numbers(TOKENS).flip(2)
EXPECTED = attention(QUERY, KEY, VALUE)


def plain() -> None:
    require_close(gqa_attention(QUERY, KEY, VALUE, enable_gqa=True), EXPECTED)


@case("gqa_attention")
def kernel() -> Iterator[Target]:
    yield Target(lambda: gqa_attention(QUERY, KEY, VALUE, enable_gqa=True), plain)


@case("decode_attention")
def decode() -> Iterator[Target]:
    yield Target(
        lambda: decode_attention(QUERY, KEY, VALUE),
        lambda: require_close(decode_attention(QUERY, KEY, VALUE), EXPECTED),
    )


@case("memory-first-touch")
def touched() -> Iterator[Target]:
    """Where mbind is refused."""

    def right() -> None:
        assert memory.empty((3, 1000), torch.float32, NODE).fill_(1).sum() == 3000

    with mock.patch.object(memory, "placer", return_value="first touch"):
        yield Target(lambda: memory.empty((3, 1000), torch.float32, NODE), right)


@case("pinned_team")
def pinned() -> Iterator[Target]:
    def compute() -> None:
        with pinned_team(CPUS, (libnuma.MPOL_PREFERRED, [NODE])) as team:
            assert [thread.cpus for thread in team] == [{cpu} for cpu in CPUS], team
            plain()

    yield Target(compute, compute)


def steps(helper: NUMAOptimizedGQA) -> None:
    """Entered, as around a decode loop."""
    with helper:
        for _ in range(3):
            plain()


@case("with-helper")
def entered() -> Iterator[Target]:
    helper = NUMAOptimizedGQA(NODE)
    yield Target(lambda: steps(helper), lambda: steps(helper))


@case("with-helper-nested")
def nested() -> Iterator[Target]:
    """Another one inside, of fewer threads, and the same once more."""
    outer, inner = NUMAOptimizedGQA(NODE), NUMAOptimizedGQA(NODE, threads=1)

    def work() -> None:
        with outer:
            steps(inner)
            steps(outer)

    yield Target(work, work)


@case("helper-compute")
def compute() -> Iterator[Target]:
    helper = NUMAOptimizedGQA(NODE)
    yield Target(
        lambda: helper.compute(QUERY, KEY, VALUE), lambda: require_close(helper.compute(QUERY, KEY, VALUE), EXPECTED)
    )


@case("helper-compute-inside")
def compute_inside() -> Iterator[Target]:
    helper = NUMAOptimizedGQA(NODE)
    steps(helper)
    before = threads.now()
    with helper:
        yield Target(
            lambda: helper.compute(QUERY, KEY, VALUE),
            lambda: require_close(helper.compute(QUERY, KEY, VALUE), EXPECTED),
        )
    assert not (found := threads.settled(before).differences(before)), f"after leaving: {found}"


@case("helper-create_tensors")
def create() -> Iterator[Target]:
    helper, shapes = NUMAOptimizedGQA(NODE), {"key": KEY.shape, "value": VALUE.shape}

    def right() -> None:
        assert {name: tensor.shape for name, tensor in helper.create_tensors(shapes).items()} == shapes
        steps(helper)

    yield Target(lambda: helper.create_tensors(shapes), right)


@case("helper-memory_pool")
def memory_pool() -> Iterator[Target]:
    """One that grows each time: a pool hands the same memory out again."""
    helper, rows = NUMAOptimizedGQA(NODE), itertools.cycle(range(1, 100))

    def right() -> None:
        tensor = helper.memory_pool({"rows": (next(rows), 1000)})["rows"]
        assert tensor.fill_(1).sum() == tensor.numel()
        steps(helper)

    yield Target(lambda: helper.memory_pool({"rows": (100 + next(rows), 1000)}), right)


@case("helper-receipt")
def receipt() -> Iterator[Target]:
    helper = NUMAOptimizedGQA(NODE)

    def right() -> None:
        found = helper.receipt({"key": KEY})
        assert not found.contradictions(CPUS, [NODE]), found
        assert len(found.threads) == len(CPUS)

    yield Target(lambda: helper.receipt({"key": KEY}), right)
