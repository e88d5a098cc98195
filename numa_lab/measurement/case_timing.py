"""Time one attention case and take its receipt, as rows of the tidy schema.

An execution of a sweep, the ranking of nodes and the guide's analyses all measure with ``sample_case``. K and V lie in a
``KVPool``, which holds those of several layers, so that a call finds none of them in a cache, as in a model.
"""

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

CACHE_MULTIPLE = (
    4  # times the last-level cache: K and V of all layers together are so large, since a model reads them in turn
)
BY_HAND = {"run_id": "by-hand", "execution_id": "by-hand", "block": 0, "order": 0}

_SIZES = ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "dtype")


def pool_bytes(topology: Topology, cpus: Sequence[int], largest_kv_bytes: int, sharers: int = 1) -> int:
    """Return how large a ``KVPool`` has to be: enough for the largest case, and several times the last-level caches.

    Parameters
    ----------
    topology
        The machine.
    cpus
        The CPUs that compute, whose caches count.
    largest_kv_bytes
        Bytes of K and V of the largest case; the pool is never smaller.
    sharers
        How many such pools there are at once. Together they stay within a share of what control groups leave to this
        process.

    Returns
    -------
    Bytes. On an emulated machine caches don't count.
    """
    # The caches of an emulated machine are invented, and filling much memory there takes minutes.
    cache_bytes = 0 if topology.emulated else topology.last_cache_bytes_of(cpus)
    shares = (int(MEMORY_SHARE * limit.available_bytes / sharers) for limit in topology.memory_limits)
    return max(largest_kv_bytes, min([CACHE_MULTIPLE * cache_bytes, *shares]))


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
    """Time one case on the calling thread's OpenMP team, which the caller has placed (``numa_lab.placement.pinned_team``).

    Parameters
    ----------
    case
        What is computed, and by how many threads.
    pool
        Memory that holds K and V, at least as large as the case needs.
    requested, granted
        The binding that was asked for, and the one that the kernel granted.
    topology
        The machine.
    backend
        A backend of ``gqa_attention``, or ``auto``.
    seconds
        For warm-up and samples together.
    identity
        The value of ``label``, and those of ``BY_HAND`` that differ from its own.
    own_process
        Whether this process was bound from its first instruction. If not, the receipt leaves two things out: the pages of
        the output, since ``malloc`` may give it pages again that were touched on another node; and the share of K and V
        on huge pages, since asking for it takes longer than a short visit.

    Returns
    -------
    One row per sample, with the columns of ``numa_lab.measurement.results.COLUMNS``. The first is the cold one.

    Raises
    ------
    InvalidInput
        The backend can't compute this case.
    """
    shape = case.shape
    layers, query = pool.layers(shape), _query(shape)
    options: dict[str, Any] = {"is_causal": shape.phase == "prefill", "enable_gqa": shape.group > 1}
    backend = gqa.choose_backend(query, *layers[0], **options, backend=backend)
    output = query

    def call(number: int) -> None:
        nonlocal output
        key, value = layers[number % len(layers)]
        output = gqa.gqa_attention(query, key, value, **options, backend=backend)

    def pages() -> dict[str, dict[int, int]]:
        tensors = {"key": pool.keys, "value": pool.values, "query": query}
        return {name: page_location.locate(tensor) for name, tensor in tensors.items()}

    pages_before, moved_before, watch = pages(), kernel_moves(), ThreadWatch()
    timed = timing.measure(call, seconds=seconds, after_sample=watch.look)
    threads, pages_after = watch.threads(), pages() | ({"output": page_location.locate(output)} if own_process else {})
    moved = kernel_moves() - moved_before
    receipt = Receipt(
        requested, granted, threads, pages_before, pages_after, _notes(timed, moved),
        pool.huge_pages if own_process else {},
        team=team_of(case.threads, openmp.team(case.threads) if openmp.runtime() else ()),
    )  # fmt: skip
    local_nodes = {topology.node_of_cpu(cpu) for cpu in receipt.observed_cpus}
    shared: dict[str, object] = {
        **{name: identity.get(name, default) for name, default in BY_HAND.items()},
        "label": identity["label"],
        "cpu_nodes": format_cpulist(requested.cpu_nodes),
        "mem_nodes": format_cpulist(requested.mem_nodes),
        "policy": requested.policy.value,
        "observed_cpus": format_cpulist(receipt.observed_cpus),
        "local_page_share": receipt.page_share(local_nodes),
        "attention": shape.kind,
        "phase": shape.phase,
        **{name: getattr(shape, name) for name in _SIZES},
        "backend": backend,
        "threads": case.threads,
        "kv_bytes": shape.kv_bytes,
        "flops": shape.flops,
        "limit_bytes_per_s": math.nan,  # a caller that measures the limit fills it in
        **receipt.to_columns(),
    }
    samples = [timed.cold_seconds, *timed.samples]
    return [{**shared, "sample": i, "cold": i == 0, "seconds": seconds} for i, seconds in enumerate(samples)]


class KVPool:
    """Memory for K and V of several layers, on pages of its own.

    Every case looks at the same pages: standard normal numbers as bfloat16 are sensible data when their bits are read as
    float16 or float32, too.

    Parameters
    ----------
    nbytes
        Bytes of K and V together; each half is rounded up to whole pages.
    node
        The node to which the pages are bound. By default they are touched under the calling thread's memory policy.

    Attributes
    ----------
    buffer
        All of the memory, a tensor of uint8.
    keys, values
        Its two halves.

    Raises
    ------
    NodeUnavailable
        The node has too little free memory.
    """

    def __init__(self, nbytes: int, node: int | None = None) -> None:
        page = memory.page_unit(nbytes // 2)
        half = -(-nbytes // 2 // page) * page
        self.buffer = memory.empty((2 * half,), torch.uint8, node)
        self.keys, self.values = self.buffer[:half], self.buffer[half:]
        numbers = noise(torch.bfloat16)
        for part in self.buffer.view(torch.bfloat16).split(len(numbers)):
            part.copy_(numbers[: len(part)])

    @cached_property
    def huge_pages(self) -> dict[str, float]:
        """Share of keys and of values on huge pages, 0 to 1; empty where the kernel does not say.

        It is looked up once, since the kernel writes out all mappings of the process for it.
        """
        share = page_location.huge_page_share(self.buffer)
        return {} if math.isnan(share) else dict.fromkeys(("key", "value"), share)

    def layers(self, shape: AttentionShape) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of this shape for as many layers as fit, each (batch, kv_heads, kv_len, head_dim), over this memory."""
        dtype, size = getattr(torch, shape.dtype), (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
        nbytes = shape.kv_bytes // 2

        def layer(half: torch.Tensor, index: int) -> torch.Tensor:
            return half[index * nbytes : (index + 1) * nbytes].view(dtype).view(size)

        return [(layer(self.keys, i), layer(self.values, i)) for i in range(len(self.keys) // nbytes)]


@cache
def noise(dtype: torch.dtype, elements: int = 1 << 20) -> torch.Tensor:
    """Standard normal numbers, the same each time. They are made once and shared, so no caller may write to them."""
    return torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype)


def _query(shape: AttentionShape) -> torch.Tensor:
    size = (shape.batch, shape.q_heads, shape.q_len, shape.head_dim)
    query = memory.empty(size, getattr(torch, shape.dtype))
    return query.copy_(noise(query.dtype, query.numel()).view(size))


def _notes(timed: timing.Timing, moved: int) -> tuple[str, ...]:
    """Return what the receipt could not see, or what makes the timing doubtful; `moved` counts the pages that the kernel moved."""
    doubts = {
        f"kernel.numa_balancing moved {moved} pages on this machine meanwhile": moved > 0,
        "torch's OpenMP library was not found: its threads were not pinned one by one": openmp.runtime() is None,
        "the warm-up did not settle": not timed.settled,
    }
    return (*memory.stand_ins(), *(doubt for doubt, holds in doubts.items() if holds))
