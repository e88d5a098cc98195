"""A decode loop over a growing KV cache, with the helper in it and without: what it gains, and proof of where it ran.

It is the attention part of decoding alone: per token each layer appends one K and one V, and attends to all before.
Runs with and without the helper alternate in random order, each with a cache of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from numa_lab.attention.scaled_dot_product import scaled_dot_product_attention_gqa
from numa_lab.attention.shapes import AttentionShape
from numa_lab.errors import InvalidInput, UntrustedResult
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement import timing
from numa_lab.measurement.blocks import randomized_blocks
from numa_lab.measurement.significance import Ratio, ratio_of_medians
from numa_lab.nodes.one_node import NUMAOptimizedGQA
from numa_lab.placement import memory, page_location
from numa_lab.placement.receipt import Receipt

Attend = Callable[["Layer", Tensor, Tensor, Tensor], Tensor]  # layer, query, keys and values so far -> output

WITHOUT, WITH = "without", "with"
FEWEST_TOKENS = 2  # of a run, however slow


@dataclass
class Layer:
    """The KV cache of one layer: ``[batch, kv_heads, max_len, head_dim]`` twice, of which `length` tokens are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token; views of K and V up to it.

        Raises
        ------
        InvalidInput
            The cache is full.
        """
        if self.length == self.keys.size(-2):
            raise InvalidInput(f"the KV cache holds {self.length} tokens and is full: make it longer")
        self.keys[:, :, self.length] = key
        self.values[:, :, self.length] = value
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def make_layers(shape: AttentionShape, layers: int, tokens: int, helper: NUMAOptimizedGQA | None = None) -> list[Layer]:
    """Caches filled with `kv_len` random tokens, and room for `tokens` more: on the helper's node, or in plain memory."""
    size = (shape.batch, shape.kv_heads, shape.kv_len + tokens, shape.head_dim)
    dtype = getattr(torch, shape.dtype)
    numbers = torch.randn(size[-2:], dtype=dtype)  # for all heads alike: a large cache of numbers of its own takes long

    def cache() -> Tensor:
        return helper.empty(size, dtype) if helper else torch.empty(size, dtype=dtype)

    with helper or nullcontext():
        return [Layer(cache().copy_(numbers), cache().copy_(numbers), shape.kv_len) for _ in range(layers)]


def torch_attention(_layer: Layer, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """torch's own attention, as a loop without the helper calls it."""
    return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def plain_attention(_layer: Layer, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``gqa_attention`` without any placement."""
    return scaled_dot_product_attention_gqa(query, keys, values)


def helper_attention(helper: NUMAOptimizedGQA) -> Attend:
    """Return what computes as ``plain_attention`` does, with the helper entered at every call, as the source guide does it."""

    def attend(_layer: Layer, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with helper:
            return scaled_dot_product_attention_gqa(query, keys, values)

    return attend


def decode(layers: list[Layer], shape: AttentionShape, tokens: int, attend: Attend) -> list[float]:
    """Decode so many tokens; the seconds of each."""
    dtype = getattr(torch, shape.dtype)
    query = torch.randn(shape.batch, shape.q_heads, 1, shape.head_dim, dtype=dtype)
    key, value = torch.randn(2, shape.batch, shape.kv_heads, shape.head_dim, dtype=dtype).unbind()
    seconds = []
    for _ in range(tokens):
        start = time.perf_counter()
        for layer in layers:
            attend(layer, query, *layer.append(key, value))
        seconds.append(time.perf_counter() - start)
    return seconds


@dataclass(frozen=True)
class Comparison:
    """Runs with and without the helper: `runs` has a row for each, with its tokens per second."""

    runs: pd.DataFrame
    speedup: Ratio  # tokens per second with the helper over those without
    receipt: Receipt
    pages_without: dict[int, int]  # of the first layer's K of the last run without the helper

    def receipts_table(self) -> pd.DataFrame:
        """Return a table of where threads with the helper were allowed and seen, and where K of the first layer lay in either."""
        seen = {"allowed CPUs": format_cpulist({cpu for t in self.receipt.threads for cpu in t.allowed})}
        seen["seen on CPUs"] = format_cpulist(self.receipt.observed_cpus)
        return pd.DataFrame([
            {"helper": WITH, "binding": str(self.receipt.effective), **seen, "pages of K": self.receipt.pages_after["keys"]},
            {"helper": WITHOUT, "binding": "none", "pages of K": self.pages_without},
        ]).fillna("not looked at")  # fmt: skip

    def sentence(self) -> str:
        """Return what came out, in words."""
        medians = self.runs.groupby("helper")["tokens_per_s"].median()
        speeds = f"{medians[WITH]:.1f} tokens/s with the helper and {medians[WITHOUT]:.1f} without"
        return f"{speeds}: {self.speedup.describe('as many')}."


def compare(
    helper: NUMAOptimizedGQA,
    shape: AttentionShape,
    *,
    attend_with: Attend,
    attend_without: Attend = torch_attention,
    layers: int = 4,
    tokens: int = 32,
    seconds: float = 10.0,
    min_blocks: int = 5,
) -> Comparison:
    """Decode in blocks of one run with the helper and one without, in random order, for about `seconds`.

    Parameters
    ----------
    helper
        Its node holds the caches of the runs with it.
    shape
        Of each layer's attention; `kv_len` tokens are in the cache when a run begins.
    attend_with, attend_without
        What a layer calls. To tell the kernel's effect from the placement's, give both the same.
    layers, tokens
        Of one run; fewer tokens, of both kinds alike, where so many would not fit into the time.
    seconds, min_blocks
        Blocks are run until the time has passed, and at least so many: with less than three there is no interval.
        Filling the caches counts, but is not shortened: large ones take longer than `seconds`.

    Raises
    ------
    InvalidInput
        A number is not positive.
    """
    timing.require_seconds(seconds)
    if min(layers, tokens, min_blocks) < 1:
        raise InvalidInput(f"layers={layers}, tokens={tokens}, min_blocks={min_blocks}: expected at least 1 of each")
    arms = {WITH: (attend_with, helper), WITHOUT: (attend_without, None)}
    rows: list[dict[str, object]] = []
    pages: dict[int, int] = {}
    per_token: dict[str, float] = {}  # the fastest warm-up of each kind: one that was disturbed shortens no run
    for block, name in randomized_blocks(arms, min_blocks, seconds=seconds):
        attend, owner = arms[name]
        caches = make_layers(shape, layers, max(tokens, FEWEST_TOKENS) + 1, owner)
        (warm_up,) = decode(caches, shape, 1, attend)
        per_token[name] = min(warm_up, per_token.get(name, math.inf))
        fitting = int(seconds / (len(arms) * min_blocks) / max(per_token.values()))
        taken = decode(caches, shape, min(tokens, max(fitting, FEWEST_TOKENS)), attend)
        rate = shape.batch * len(taken) / sum(taken)
        rows.append({"helper": name, "block": block, "tokens": len(taken), "tokens_per_s": rate})
        if owner is None:
            pages = page_location.locate(caches[0].keys)
        else:
            receipt = owner.receipt({"keys": caches[0].keys, "values": caches[0].values})
    runs = pd.DataFrame(rows)
    samples = {name: 1 / runs.loc[runs["helper"] == name, "tokens_per_s"].to_numpy() for name in arms}
    return Comparison(runs, ratio_of_medians(samples[WITHOUT], samples[WITH]), receipt, pages)


def require_placed(found: Comparison, helper: NUMAOptimizedGQA) -> str:
    """Say that threads and cache of the runs with the helper were on its node.

    Raises
    ------
    UntrustedResult
        They were not.
    """
    cpus, receipt = read_topology().cpus_of([helper.node]), found.receipt
    # A call that is refused has a stand-in, and no huge pages are no other node.
    doubts = [note for note in receipt.notes if note not in memory.stand_ins()]
    unseen = [f"No page of {name} could be looked at." for name, pages in receipt.pages_after.items() if not pages]
    wrong = [*receipt.contradictions(cpus, [helper.node]), *doubts, *unseen]
    if wrong:
        raise UntrustedResult(" ".join(wrong))
    return f"{len(found.receipt.threads)} threads and all pages of the cache were on node {helper.node}."
