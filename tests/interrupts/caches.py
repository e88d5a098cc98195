"""NodeShardedKVCache."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from interrupts.aim import Target
from interrupts.cases import CPUS, HEAD_DIM, KV_HEADS, NODE, Q_HEADS, attention, case, numbers, require_close
from numa_lab import NodeShardedKVCache
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes import kv_segments
from numa_lab.nodes.seats import Place
from numa_lab.placement import memory

TOKENS, BLOCK, ROOM = 600, 32, 200


@contextmanager
def two_nodes() -> Iterator[Mapping[str, Any]]:
    """What a cache is made with, so that it has several shards: two on the one node that is here, each of one core."""
    if len(read_topology().effective_nodes) > 1:
        yield {}
        return

    def here(shape: tuple[int, ...], dtype: torch.dtype, _node: int, *, huge_pages: bool) -> Tensor:
        return memory.empty(shape, dtype, NODE, huge_pages=huge_pages)

    with mock.patch.object(kv_segments, "memory", mock.Mock(wraps=memory, empty=here)):
        yield {"teams": {number: Place(NODE, (cpu,)) for number, cpu in enumerate((CPUS * 2)[:2])}}


class Filled:
    """A cache of TOKENS tokens, and what torch makes of them and of those that come."""

    def __init__(self, given: Mapping[str, Any], q_len: int = 1) -> None:
        self._key, self._value = numbers(TOKENS + ROOM), numbers(TOKENS + ROOM).flip(2)
        self.query = numbers(q_len, Q_HEADS)
        self.cache = NodeShardedKVCache(
            1, KV_HEADS, HEAD_DIM, capacity=TOKENS + ROOM, dtype=torch.float32, block=BLOCK, **given
        )
        self._expected: dict[int, Tensor] = {}
        self.append(TOKENS)

    def append(self, until: int, cache: NodeShardedKVCache | None = None) -> None:
        """Fill this cache, or one that was forked from it, up to a token."""
        cache = cache or self.cache
        new = slice(len(cache), until)
        cache.append(self._key[:, :, new], self._value[:, :, new])

    def require_right(self, tokens: Collection[int] = (TOKENS,), cache: NodeShardedKVCache | None = None) -> None:
        """Refuse another number of tokens than these, and a wrong output of the next step."""
        cache = cache or self.cache
        held = len(cache)
        assert held in tokens, f"{held} tokens, expected one of {tokens}"
        if held not in self._expected:
            self._expected[held] = attention(self.query, self._key[:, :, :held], self._value[:, :, :held])
        require_close(cache.attend(self.query), self._expected[held])


def _attend(name: str, q_len: int) -> None:
    def attend() -> Iterator[Target]:
        with two_nodes() as given:
            filled = Filled(given, q_len)
            yield Target(lambda: filled.cache.attend(filled.query), filled.require_right)

    case(name)(attend)


_attend("cache-attend", 1)
_attend("cache-attend-4", 4)
_attend("cache-attend-32", 32)  # which torch computes


def _append(name: str, new: int) -> None:
    after = TOKENS + new

    def append() -> Iterator[Target]:
        with two_nodes() as given:
            filled = Filled(given)

            def right() -> None:
                filled.require_right((TOKENS, after))
                filled.cache.truncate(TOKENS)
                filled.append(after)
                filled.require_right((after,))
                filled.cache.truncate(TOKENS)

            yield Target(lambda: filled.append(after), right)

    case(name)(append)


_append("cache-append", 1)
_append("cache-append-prompt", ROOM)


@case("cache-truncate")
def truncate() -> Iterator[Target]:
    """Over several segments, as forks make them."""
    with two_nodes() as given:
        filled, left = Filled(given), TOKENS // 2

        def right() -> None:
            filled.require_right((TOKENS, left))
            filled.cache.truncate(left)
            for until in (TOKENS - BLOCK - 1, TOKENS):
                filled.cache = filled.cache.fork()  # may not write behind the tokens that it shares
                filled.append(until)
            filled.require_right()

        yield Target(lambda: filled.cache.truncate(left), right)


@case("cache-truncate-forked")
def truncate_forked() -> Iterator[Target]:
    """What is added afterwards may not be written over the tokens that the other one still reads."""
    with two_nodes() as given:
        both = [(filled := Filled(given)), filled.cache.fork()]
        noise = numbers(ROOM, KV_HEADS)

        def right() -> None:
            filled, twin = both
            filled.require_right((TOKENS, TOKENS // 2))
            if len(filled.cache) < TOKENS:
                filled.cache.append(noise, noise)
            filled.require_right((TOKENS,), twin)
            both[:] = (new := Filled(given)), new.cache.fork()

        yield Target(lambda: both[0].cache.truncate(TOKENS // 2), right)


@case("cache-fork")
def fork() -> Iterator[Target]:
    """And going on with both."""
    with two_nodes() as given:
        filled = Filled(given)

        def go_on() -> None:
            twin = filled.cache.fork()
            filled.append(TOKENS + 1, twin)
            filled.require_right((TOKENS + 1,), twin)

        def right() -> None:
            filled.require_right()
            go_on()
            filled.append(TOKENS + 2)
            filled.require_right((TOKENS + 2,))
            filled.cache.truncate(TOKENS)

        yield Target(go_on, right)


@case("cache-receipt")
def receipt() -> Iterator[Target]:
    with two_nodes() as given:
        filled = Filled(given)
        before = _lasting(filled.cache)

        def right() -> None:
            assert (found := _lasting(filled.cache)) == before, f"{found}, before {before}"
            filled.require_right()

        yield Target(filled.cache.receipt, right)


def _lasting(cache: NodeShardedKVCache) -> dict[int, tuple[object, ...]]:
    """What does not depend on the moment."""
    return {
        node: (one.effective, one.pages_after, one.notes, sorted(thread.allowed for thread in one.threads))
        for node, one in cache.receipts().items()
    }


@case("with-cache")
def inside() -> Iterator[Target]:
    """A few steps, entered once."""
    with two_nodes() as given:
        filled = Filled(given)

        def steps() -> None:
            with filled.cache:
                for until in range(TOKENS + 1, TOKENS + 4):
                    filled.append(until)
                    filled.require_right((until,))

        def right() -> None:
            filled.cache.truncate(TOKENS)
            steps()
            filled.cache.truncate(TOKENS)
            filled.require_right()

        yield Target(steps, right)
