"""The plain definition of attention in float64, which is slow and meant to be read; every backend is checked against it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(query key^T scale + mask) value by its formula.

    It has no dropout, checks nothing, and holds all scores in memory at once. A query that may look at no key (a row
    that is masked throughout, or kv_len 0) gives zeros: what ``scaled_dot_product_attention`` of torch 2.13 gives on
    CPUs for both, in each of its kernels, boolean and ``-inf`` masks alike. Numbers however small that are not ``-inf`` hide no
    key from a row that has them throughout: it gives the mean.

    Parameters
    ----------
    query
        ``[..., q_heads, q_len, head_dim]``.
    key, value
        ``[..., kv_heads, kv_len, head_dim]``.
    attn_mask
        Broadcastable to ``[..., q_heads, q_len, kv_len]``: boolean, True where a query may look, or numbers to add.
    is_causal
        Query i may look at the keys 0 to i, counted from the upper left corner also where q_len and kv_len differ.
    scale
        Factor of the scores; 1 / sqrt(head_dim) where it is None.
    enable_gqa
        Query head h uses KV head h // group, with group = q_heads // kv_heads.

    Returns
    -------
    output : Tensor
        ``[..., q_heads, q_len, head_dim]``, float64.
    lse : Tensor
        ``[..., q_heads, q_len]``, float64, natural: log of the sum of exp(scores), ``-inf`` where there is no key.

    Notes
    -----
    Source: the definition in the documentation of ``torch.nn.functional.scaled_dot_product_attention``.
    """
    query, key, value = (tensor.to(torch.float64) for tensor in (query, key, value))
    if enable_gqa:
        group = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)

    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = query @ key.mT * scale  # [..., q_heads, q_len, kv_len]
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask

    lse = scores.logsumexp(-1)
    # Weights are not exp(scores - lse): beside the least number, by which models mask, the logarithm of the number of keys vanishes.
    without_key = (lse == -math.inf).unsqueeze(-1)
    weights = scores.masked_fill(without_key, 0).softmax(-1).masked_fill(without_key, 0)
    return weights @ value, lse
