"""Where the cases are listed, and the numbers that they compute with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from interrupts.aim import Case, Target
from numa_lab import NUMAOptimizedGQA
from numa_lab.machine.topology_reader import read_topology

NODE = read_topology().effective_nodes[0]
CPUS = read_topology().cpus_for([NODE])
KV_HEADS, Q_HEADS, HEAD_DIM = 2, 8, 64

CASES: dict[str, Case] = {}


def case(name: str, share: float = 1.0) -> Callable[[Callable[[], Iterator[Target]]], None]:
    """List a generator that yields the target, in whatever context it needs."""

    def listed(made: Callable[[], Iterator[Target]]) -> None:
        CASES[name] = Case(name, contextmanager(made), share)

    return listed


def numbers(tokens: int, heads: int = KV_HEADS, batch: int = 1) -> Tensor:
    """So many tokens of K, V or queries, the same each time."""
    return torch.randn(batch, heads, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(tokens + heads))


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By torch alone: the queries are the last of the tokens, and see those up to their own."""
    q_len, kv_len = query.size(2), key.size(2)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    return scaled_dot_product_attention(query.double(), key.double(), value.double(), mask, enable_gqa=True)


def require_close(output: Tensor, expected: Tensor) -> None:
    """Refuse what differs by more than float32 explains."""
    error = (output - expected).abs().max().item()
    assert error < 1e-5, f"off by {error:.2g}"


def warm_up() -> None:
    """Compile what is compiled once in a process, so that the processes of the cases, which are forked, need not."""
    with NUMAOptimizedGQA(NODE) as helper:
        helper.compute(numbers(1, Q_HEADS), numbers(9), numbers(9))
