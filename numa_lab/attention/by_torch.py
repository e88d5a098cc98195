"""The backends that are made of torch's own operators, and so can be traced, transformed and derived."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from numa_lab.attention.call import AttentionCall


def plain(call: AttentionCall) -> Tensor:
    """Compute attention by one call of torch's own."""
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = call
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def folded(call: AttentionCall) -> Tensor:
    """Compute attention with the query heads of a group as further rows of one head: each KV head is read once and never expanded.

    A causal mask becomes an explicit one of group x q_len x kv_len, since rows are no longer positions.
    """
    if not call.enable_gqa:  # equal heads: nothing to fold
        return plain(call)
    query, key, value, attn_mask, dropout_p, is_causal, scale, _ = call
    kv_heads, q_len, kv_len = key.size(-3), query.size(-2), key.size(-2)
    group = query.size(-3) // kv_heads
    if is_causal:
        attn_mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        attn_mask = _fold_mask(attn_mask, kv_heads, group, q_len)
    rows = query.unflatten(-3, (kv_heads, group)).flatten(-3, -2)  # [..., kv_heads, group * q_len, head_dim]
    output = scaled_dot_product_attention(rows, key, value, attn_mask, dropout_p, scale=scale)
    unfolded: Tensor = output.unflatten(-2, (group, q_len)).flatten(-4, -3)
    if query.stride(-3) < query.stride(-2):  # the heads of a token lie side by side, and torch's own leaves them so
        unfolded = unfolded.transpose(-3, -2).contiguous().transpose(-3, -2)
    return unfolded


def _fold_mask(mask: Tensor, kv_heads: int, group: int, q_len: int) -> Tensor:
    """Return the mask of folded rows: a view where its strides allow it, and the mask itself where it is the same for all rows."""
    mask = mask if mask.dim() > 2 else mask.unsqueeze(0)
    if mask.shape[-3:-1] == (1, 1):
        return mask
    mask = mask.unsqueeze(-3) if mask.size(-3) == 1 else mask.unflatten(-3, (kv_heads, group))
    return mask.expand(*mask.shape[:-3], group, q_len, mask.size(-1)).flatten(-3, -2)


def guide(call: AttentionCall) -> Tensor:
    """Compute attention as the source guide does, by one call per query head of a group: K and V are read group times."""
    if not call.enable_gqa:
        return plain(call)
    query, key, value, attn_mask, dropout_p, is_causal, scale, _ = call
    kv_heads = key.size(-3)
    queries = query.unflatten(-3, (kv_heads, -1)).unbind(-3)  # group times [..., kv_heads, q_len, head_dim]
    masks = [attn_mask] * len(queries)
    if attn_mask is not None and attn_mask.dim() > 2 and attn_mask.size(-3) > 1:  # one for each query head
        masks = list(attn_mask.unflatten(-3, (kv_heads, -1)).unbind(-3))
    outputs = [
        scaled_dot_product_attention(head_query, key, value, head_mask, dropout_p, is_causal, scale=scale)
        for head_query, head_mask in zip(queries, masks, strict=True)
    ]
    return torch.stack(outputs, -3).flatten(-4, -3)


BACKENDS = {"torch": plain, "torch-folded": folded, "guide": guide}
