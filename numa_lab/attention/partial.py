"""Attention over a part of the keys, and the merge of such parts into attention over all of them.

Limits: no gradients, no dropout; a row that may look at no key gives zeros, as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from numa_lab.attention import decode

CHUNK = 4096  # keys that are turned into float32 at once where the decode kernel does not serve

Part = tuple[
    Tensor, Tensor
]  # output [batch, q_heads, q_len, head_dim], and log-sum-exp [batch, q_heads, q_len] in float32


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Part:
    """Attention over some keys, with what ``merge`` needs to know of them.

    By the decode kernel where it serves, else by torch's matrix products, some thousand keys at a time, in float32 at least.

    Parameters
    ----------
    query
        ``[batch, q_heads, q_len, head_dim]``.
    key, value
        ``[batch, kv_heads, kv_len, head_dim]``, with kv_len at least 1.
    attn_mask
        Boolean, ``[q_len, kv_len]``: True where a query may look.
    scale
        Factor of the scores; 1 / sqrt(head_dim) where it is None.
    """
    if not decode.refusal(query, key, value, attn_mask, 0.0, scale):
        output, log_sum_exp = decode.decode_attention(query, key, value, attn_mask, scale=scale, return_lse=True)
        return output, log_sum_exp
    group, q_len = query.size(1) // key.size(1), query.size(2)
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    rows = (
        (query.to(wide) * scale).unflatten(1, (key.size(1), group)).flatten(2, 3)
    )  # [.., kv_heads, group * q_len, ..]
    parts = []
    for begin in range(0, key.size(2), CHUNK):
        part = slice(begin, begin + CHUNK)
        scores = rows @ key[:, :, part].to(wide).mT
        if attn_mask is not None:
            scores.masked_fill_(~attn_mask[:, part].repeat(group, 1), -torch.inf)
        log_sum_exp = scores.logsumexp(-1)
        weights = (scores - log_sum_exp.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
        output = weights @ value[:, :, part].to(wide)
        parts.append(
            (output.unflatten(2, (group, q_len)).flatten(1, 2), log_sum_exp.unflatten(2, (group, q_len)).flatten(1, 2))
        )
    return merge(parts)


def merge(parts: Sequence[Part]) -> Part:
    """Attention over the keys of all parts together; each key is in one of them.

    Returns
    -------
    output : Tensor
        ``[batch, q_heads, q_len, head_dim]``, float32 where there is more than one part.
    log_sum_exp : Tensor
        ``[batch, q_heads, q_len]``.

    Notes
    -----
    Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
    """
    if len(parts) == 1:
        return parts[0]
    each = torch.stack([log_sum_exp for _, log_sum_exp in parts])
    total = each.logsumexp(0)
    weights = (each - total.nan_to_num(neginf=0.0)).exp().unsqueeze(-1)
    output = weights[0] * parts[0][0]
    for weight, (part, _) in zip(weights[1:], parts[1:], strict=True):
        output.addcmul_(weight, part)
    return output, total
