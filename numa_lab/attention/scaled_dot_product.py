"""Grouped-query attention under the name, and with the arguments, of the source guide's function."""

from __future__ import annotations

from torch import Tensor

from numa_lab.attention.checks import require_tensors
from numa_lab.attention.gqa import gqa_attention
from numa_lab.errors import InvalidInput


def scaled_dot_product_attention_gqa(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = True,
    is_causal: bool = False,
    output_tensor: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute grouped-query attention by ``gqa_attention``, which says what each argument means.

    Parameters
    ----------
    query_states
        ``[..., q_heads, q_len, head_dim]``.
    key_states, value_states
        ``[..., kv_heads, kv_len, head_dim]``.
    output_tensor
        It is written to and returned where it is given: a tensor of the output's shape, dtype and device, with any strides.

    Returns
    -------
    Tensor
        ``[..., q_heads, q_len, head_dim]``, of the query's dtype.

    Raises
    ------
    InvalidInput, WrongType
        As ``gqa_attention``, or an `output_tensor` that does not fit.
    """
    output = gqa_attention(
        query_states, key_states, value_states, attn_mask, dropout_p, is_causal, scale, enable_gqa=enable_gqa
    )
    if output_tensor is None:
        return output
    require_tensors(output_tensor=output_tensor)
    fits = (output_tensor.shape, output_tensor.dtype, output_tensor.device) == (
        output.shape, output.dtype, output.device
    )  # fmt: skip
    expanded = any(
        not stride and size > 1 for size, stride in zip(output_tensor.shape, output_tensor.stride(), strict=True)
    )
    if not fits or expanded:
        raise InvalidInput(
            f"output_tensor {tuple(output_tensor.shape)} with strides {output_tensor.stride()} of {output_tensor.dtype} "
            f"on {output_tensor.device}: expected {tuple(output.shape)} of {output.dtype} on {output.device}, "
            "not expanded; take torch.empty_like(query_states)"
        )
    return output_tensor.copy_(output)
