"""The source guide's decode loop: a growing KV cache, tokens per second with the NUMA helper and without it."""

import argparse

from torch import Tensor

from numa_lab import NUMAOptimizedGQA, scaled_dot_product_attention_gqa
from numa_lab.attention.shapes import fit, preset
from numa_lab.errors import run_script
from numa_lab.machine.topology_reader import read_topology

_global_numa_gqa: NUMAOptimizedGQA | None = None


def get_numa_gqa() -> NUMAOptimizedGQA:
    """The one helper of this process, made when it is first asked for."""
    global _global_numa_gqa
    if _global_numa_gqa is None:
        _global_numa_gqa = NUMAOptimizedGQA()
    return _global_numa_gqa


def scaled_dot_product_attention_help(
    query_states: Tensor, key_states: Tensor, value_states: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, enable_gqa: bool = True, is_causal: bool = False, output_tensor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention on the helper's node; see ``scaled_dot_product_attention_gqa``."""
    with get_numa_gqa():
        return scaled_dot_product_attention_gqa(
            query_states, key_states, value_states, attn_mask, dropout_p, enable_gqa, is_causal, output_tensor
        )


def attn(layer: object, query_states: Tensor, key_states: Tensor, value_states: Tensor) -> Tensor:
    """One layer's attention over the tokens so far."""
    with get_numa_gqa():
        return scaled_dot_product_attention_help(query_states, key_states, value_states)


def main() -> None:
    """Print tokens per second with and without the helper, and where the helper's cache lay."""
    from numa_lab.experiments import decode_loop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the guide's batch of 512, as far as memory allows")
    parser.add_argument("--seconds", type=float, default=10.0, help="for all runs; filling large caches takes more")
    options = parser.parse_args()
    helper = get_numa_gqa()
    wanted = preset("guide") if options.full else preset("guide", batch=1, kv_len=2048)
    layers = 1 if options.full else 4  # one of that size is past every cache, and takes its time to fill
    shape, message = fit(wanted, read_topology().available_bytes([helper.node]) // (4 * layers))
    sizes = f"{layers} layers, batch {shape.batch}, kv_len {shape.kv_len}."
    print(f"Node {helper.node}, {helper.threads} threads; {sizes} {message}".rstrip())
    compared = decode_loop.compare(helper, shape, attend_with=attn, layers=layers, seconds=options.seconds)
    print(compared.sentence())
    print(
        f"Pages of K per node: with the helper {compared.receipt.pages_after['keys']}, without {compared.pages_without}."
    )
    print("\n".join(compared.receipt.notes) or "The receipt has nothing to add.")


if __name__ == "__main__":
    run_script(main)
