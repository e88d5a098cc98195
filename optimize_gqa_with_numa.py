"""The source guide's helpers by the names that it imports them by; run as a script, what they gain on this machine."""

import argparse
from typing import TYPE_CHECKING

from numa_lab import (
    NUMAOptimizedGQA,
    NUMAThreadPool,
    bind_to_numa_node,
    get_optimal_numa_node,
    scaled_dot_product_attention_gqa,
)
from numa_lab.errors import run_script

if TYPE_CHECKING:
    from numa_lab import rank_nodes

__all__ = [
    "NUMAOptimizedGQA",
    "NUMAThreadPool",
    "bind_to_numa_node",
    "get_optimal_numa_node",
    "rank_nodes",
    "scaled_dot_product_attention_gqa",
]


def __getattr__(name: str) -> object:
    """Import ``rank_nodes`` when it is first used: it needs the notebook suite, and the other helpers do not."""
    if name == "rank_nodes":
        from numa_lab import rank_nodes

        return rank_nodes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Print the node, default against optimised, and how to use it."""
    from numa_lab.experiments import guide_analyses
    from numa_lab.machine.topology_reader import read_topology
    from numa_lab.nodes import optimal_node
    from numa_lab.placement.binding import Binding

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the guide's batch of 512, as far as memory allows")
    parser.add_argument("--seconds", type=float, default=15.0, help="for default against optimised (default 15)")
    options = parser.parse_args()

    ranking = optimal_node.rank()
    print(f"Nodes:\n{ranking.render()}\n{ranking.sentence()}\n")
    helper = NUMAOptimizedGQA(optimal_node.choose(ranking))
    _, shape, message = guide_analyses.this_machine(full=options.full)
    print(
        f"Default against optimised on node {helper.node}: batch {shape.batch}, kv_len {shape.kv_len}. {message}".rstrip()
    )
    print("\n".join(guide_analyses.before_and_after(helper, shape, seconds=options.seconds).sentences()))
    node = helper.node
    numactl = " ".join(Binding((node,)).numactl(read_topology()))
    print(f"""
Three ways of use:
  one call         with NUMAOptimizedGQA(numa_node={node}) as numa_gqa: output = numa_gqa.compute(query, key, value)
  a batch          NUMAThreadPool().parallel_gqa_compute(queries, keys, values)
  a long service   {numactl} --membind={node} python ...

Also: {numactl} python ...   (memory of any node)
      numactl --preferred={node} python ...     (this node's memory first, beside a GPU)""")


if __name__ == "__main__":
    run_script(main)
