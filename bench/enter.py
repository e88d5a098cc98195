"""What it costs to enter and leave NUMAOptimizedGQA, beside the attention call that it surrounds.

Every turn times each of the rows once, in random order, so that all see the same machine; medians are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import progress
import torch
from torch.nn.functional import scaled_dot_product_attention

from numa_lab import NUMAOptimizedGQA
from numa_lab.attention.shapes import PRESETS, preset
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement.blocks import randomized_blocks
from numa_lab.placement import recycled_memory


def main() -> None:
    """Print one line per row: median microseconds, and its ratio to torch's own call of the same run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama-3-8b", choices=PRESETS)
    parser.add_argument("--kv-len", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=1000)
    options = parser.parse_args()

    shape = preset(options.shape, kv_len=options.kv_len)
    helper = NUMAOptimizedGQA()
    print(f"{read_topology().model_name}, {helper.threads} cores of NUMA node {helper.node}", flush=True)
    torch.set_num_threads(helper.threads)
    dtype = getattr(torch, shape.dtype)
    query = torch.randn(shape.batch, shape.q_heads, shape.q_len, shape.head_dim, dtype=dtype)
    key, value = torch.randn(2, shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim, dtype=dtype).unbind()
    recycled_memory.can_lie_elsewhere = lambda: True  # the costs are those of a machine with several nodes, on any
    looked_at = recycled_memory.Settled()
    fewer = NUMAOptimizedGQA(helper.node, threads=max(1, helper.threads // 2))

    def torch_call() -> object:
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def entered(inside: NUMAOptimizedGQA) -> None:
        with inside:
            pass

    def nested() -> None:
        with helper:
            start = time.perf_counter()
            entered(helper)
            taken["enter and leave again inside itself"].append(time.perf_counter() - start)

    torch_row = f"torch's own call, {options.shape}, kv_len {options.kv_len}"
    rows: dict[str, Callable[[], object]] = {
        torch_row: torch_call,
        f"enter and leave, {helper.threads} threads inside and outside": lambda: entered(helper),
        f"enter and leave, {fewer.threads} threads inside": lambda: entered(fewer),
        f"enter and leave, {fewer.threads} threads inside, torch's call after it": lambda: (
            entered(fewer),
            torch_call(),
        ),
        "enter, torch's own call, leave": lambda: (
            helper.__enter__() and (torch_call(), helper.__exit__(None, None, None))
        ),
        "give malloc's free memory back, as entering does on machines with several nodes": recycled_memory.malloc_trim,
        f"look where {key.nbytes >> 10} KiB of K lie, as `compute` does there once": lambda: recycled_memory.settle(
            key, helper.node
        ),
        "find that it was looked at": lambda: looked_at.settle(key, helper.node),
    }
    taken: dict[str, list[float]] = {name: [] for name in (*rows, "enter and leave again inside itself")}
    for turn in progress.turns(options.turns + 20, "entering"):
        for _, name in randomized_blocks(rows, 1):
            start = time.perf_counter()
            rows[name]()
            taken[name].append(time.perf_counter() - start)
        nested()
        if turn == 20:  # everything is compiled, and the team known
            for samples in taken.values():
                samples.clear()
    reference = statistics.median(taken[torch_row])
    for name, samples in taken.items():
        median = statistics.median(samples)
        print(f"{median * 1e6:10.1f} us  {median / reference:7.3f} x torch  {name}")


if __name__ == "__main__":
    main()
