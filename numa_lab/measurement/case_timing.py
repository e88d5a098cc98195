"""One attention case, sampled beside its limit and with its receipt: what executions and the ranking of nodes share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch

from numa_lab.attention import gqa
from numa_lab.attention.shapes import AttentionShape
from numa_lab.machine.page_maps import kernel_moves
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.measurement import timing
from numa_lab.measurement.workloads import MEMORY_SHARE, Case
from numa_lab.placement import memory, openmp, page_location
from numa_lab.placement.binding import Binding
from numa_lab.placement.receipt import Receipt, team_of
from numa_lab.placement.thread_watch import ThreadWatch

CACHE_MULTIPLE = 4  # K and V of so many layers as exceed the last cache this much: a model reads one after another
BY_HAND = {"run_id": "by-hand", "execution_id": "by-hand", "block": 0, "order": 0}

_SIZES = ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "dtype")


def pool_bytes(topology: Topology, cpus: Sequence[int], largest_kv_bytes: int, sharers: int = 1) -> int:
    """Room for K and V that suffices for the largest case and, where the caches are real, exceeds them.

    `sharers` is how many such rooms there are at once: all of them together leave room below a control group's limit.
    """
    # The caches of an emulated machine are invented, and filling much memory there takes minutes.
    caches = 0 if topology.emulated else topology.last_cache_bytes_of(cpus)
    limits = (int(MEMORY_SHARE * limit.available_bytes / sharers) for limit in topology.memory_limits)
    return max(largest_kv_bytes, min([CACHE_MULTIPLE * caches, *limits]))


def sample_case(
    case: Case,
    pool: KVPool,
    *,
    requested: Binding,
    granted: Binding,
    topology: Topology,
    backend: str,
    seconds: float,
    identity: Mapping[str, Any],
    own_process: bool = True,
) -> list[dict[str, object]]:
    """Time one case on the calling thread's team as it is; tidy rows (``numa_lab.measurement.results.COLUMNS``), one per sample.

    Parameters
    ----------
    case, pool
        What is computed, and the memory of K and V. Place the team first (``numa_lab.placement.pinned_team``).
    requested, granted
        The binding that was asked for, and what the kernel grants.
    topology
        The machine.
    backend
        Of ``gqa_attention``, or ``auto``.
    seconds
        For warm-up and samples together.
    identity
        The columns of ``BY_HAND``, and the label.
    own_process
        Whether this process was bound from its first instruction. One that has computed on other nodes before gets
        pages of theirs again from ``malloc``, so the receipt then leaves the few of the output out; and it leaves out
        how much of K and V lies on huge pages, which takes longer to ask than a short visit lasts.
    """
    shape = case.shape
    layers, query = pool.layers(shape), _query(shape)
    options: dict[str, Any] = {"is_causal": shape.phase == "prefill", "enable_gqa": shape.group > 1}
    backend = gqa.choose_backend(query, *layers[0], **options, backend=backend)
    output = query

    def call(turn: int) -> None:
        nonlocal output
        key, value = layers[turn % len(layers)]
        output = gqa.gqa_attention(query, key, value, **options, backend=backend)

    def pages() -> dict[str, dict[int, int]]:
        tensors = {"key": pool.keys, "value": pool.values, "query": query}
        return {name: page_location.locate(tensor) for name, tensor in tensors.items()}

    before, moves, watch = pages(), kernel_moves(), ThreadWatch()
    taken = timing.measure(call, seconds=seconds, after_sample=watch.look)
    threads, after = watch.threads(), pages() | ({"output": page_location.locate(output)} if own_process else {})
    moved = kernel_moves() - moves
    receipt = Receipt(
        requested, granted, threads, before, after, _notes(taken, moved), pool.huge_pages if own_process else {},
        team=team_of(case.threads, openmp.team(case.threads) if openmp.runtime() else ()),
    )  # fmt: skip
    local = {topology.node_of_cpu(cpu) for cpu in receipt.observed_cpus}
    shared: dict[str, object] = {
        **{name: identity.get(name, default) for name, default in BY_HAND.items()},
        "label": identity["label"],
        "cpu_nodes": format_cpulist(requested.cpu_nodes),
        "mem_nodes": format_cpulist(requested.mem_nodes),
        "policy": requested.policy.value,
        "observed_cpus": format_cpulist(receipt.observed_cpus),
        "local_page_share": receipt.page_share(local),
        "attention": shape.kind,
        "phase": shape.phase,
        **{name: getattr(shape, name) for name in _SIZES},
        "backend": backend,
        "threads": case.threads,
        "kv_bytes": shape.kv_bytes,
        "flops": shape.flops,
        "limit_bytes_per_s": math.nan,  # for who measures it beside
        **receipt.to_columns(),
    }
    samples = [taken.cold_seconds, *taken.samples]
    return [{**shared, "sample": i, "cold": i == 0, "seconds": seconds} for i, seconds in enumerate(samples)]


class KVPool:
    """Memory for K and V of several layers, on pages of its own, bound to `node` or touched under the caller's policy.

    NodeUnavailable is raised where the node has too little free memory.

    Every case looks at the same pages: the noise of bfloat16 numbers is sensible data in each of the three dtypes.
    """

    def __init__(self, nbytes: int, node: int | None = None) -> None:
        page = memory.page_unit(nbytes // 2)
        half = -(-nbytes // 2 // page) * page
        self.block = memory.empty((2 * half,), torch.uint8, node)
        self.keys, self.values = self.block[:half], self.block[half:]
        numbers = noise(torch.bfloat16)
        for part in self.block.view(torch.bfloat16).split(len(numbers)):
            part.copy_(numbers[: len(part)])

    @cached_property
    def huge_pages(self) -> dict[str, float]:
        """Share of keys and of values on huge pages: looked up once, since the kernel writes out all mappings for it."""
        share = page_location.huge_page_share(self.block)
        return {} if math.isnan(share) else dict.fromkeys(("key", "value"), share)

    def layers(self, shape: AttentionShape) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As many K and V of this shape as fit."""
        dtype, size = getattr(torch, shape.dtype), (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
        nbytes = shape.kv_bytes // 2

        def layer(half: torch.Tensor, index: int) -> torch.Tensor:
            return half[index * nbytes : (index + 1) * nbytes].view(dtype).view(size)

        return [(layer(self.keys, i), layer(self.values, i)) for i in range(len(self.keys) // nbytes)]


@cache
def noise(dtype: torch.dtype, elements: int = 1 << 20) -> torch.Tensor:
    """Standard normal numbers, the same each time; made once, so they are for reading alone."""
    return torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype)


def _query(shape: AttentionShape) -> torch.Tensor:
    size = (shape.batch, shape.q_heads, shape.q_len, shape.head_dim)
    query = memory.empty(size, getattr(torch, shape.dtype))
    return query.copy_(noise(query.dtype, query.numel()).view(size))


def _notes(taken: timing.Timing, moved: int) -> tuple[str, ...]:
    """What the receipt could not see, or what makes the timing doubtful."""
    doubts = {
        f"kernel.numa_balancing moved {moved} pages on this machine meanwhile": moved > 0,
        "torch's OpenMP library was not found: its threads were not pinned one by one": openmp.runtime() is None,
        "the warm-up did not settle": not taken.settled,
    }
    return (*memory.stand_ins(), *(doubt for doubt, holds in doubts.items() if holds))
