"""What a call costs beside its arithmetic: microseconds of the ways into the kernel, for K and V of one token."""

from __future__ import annotations

from collections.abc import Callable

import common
import torch
from torch.nn.functional import scaled_dot_product_attention

from numa_lab import gqa_attention
from numa_lab.attention import decode, kernel_cache, kernel_plan, openmp_regions
from numa_lab.attention.call import AttentionCall
from numa_lab.placement import openmp


def measure(turns: int) -> dict[str, float]:
    """Median seconds by what is called."""
    query = torch.randn(1, 8, 1, 128)
    key, value = torch.randn(2, 1, 2, 1, 128)
    out = torch.empty_like(query)
    call = AttentionCall(query, key, value, enable_gqa=True)
    plan = kernel_plan.KernelPlan.of(call, out, torch.get_num_threads())
    arguments, workspace = kernel_plan.KernelArguments(), kernel_plan.Workspace()
    tensors = (tensor.data_ptr() for tensor in (query, key, value, out))
    plan.pack(arguments, workspace.at_least(plan.workspace_bytes), *tensors, 0, 0, 1)
    region = kernel_cache.address(openmp_regions.TeamRegion())

    def kernel() -> None:
        openmp.run_on_team(region, arguments.address, 1)

    calls: dict[str, Callable[[], object]] = {
        "gqa_attention": lambda: gqa_attention(query, key, value, enable_gqa=True),
        "decode_attention(out=)": lambda: decode.decode_attention(query, key, value, out=out),
        "the kernel alone": kernel,
        "torch": lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True),
        "torch.empty_like": lambda: torch.empty_like(query),
        "nothing": lambda: None,
    }
    work = {name: common.seconds_of(lambda _, call=call: call(), 1) for name, call in calls.items()}
    return common.medians(work, turns)


def main() -> None:
    """Print one line per way: microseconds, and the difference to the kernel alone, which is Python's part."""
    options = common.parser(__doc__, turns=50).parse_args()
    for threads in options.threads:
        seconds = common.in_own_process(threads, measure, options.turns)
        print(f"\n{threads} threads{'':22} us   beyond the kernel   of torch's")
        for name, one in seconds.items():
            beyond = one - seconds["the kernel alone"]
            print(f"{name:28} {1e6 * one:6.2f} {1e6 * beyond:16.2f} {one / seconds['torch']:14.2f}", flush=True)


if __name__ == "__main__":
    main()
