"""Attention over a part of the keys by torch, and the merge of such parts into attention over all of them.

Limits: no gradients, no dropout; a row that may look at no key gives zeros, as everywhere in this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096  # keys that are turned into float32 at once
LOWEST = -1e30  # stands in for a log-sum-exp of -inf


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over some keys, by matrix products, some thousand keys at a time, in float32 at least.

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

    Returns
    -------
    output : Tensor
        ``[batch, q_heads, q_len, head_dim]``.
    log_sum_exp : Tensor
        ``[batch, q_heads, q_len]``, natural, ``-inf`` for rows that may look at no key.
    """
    group, q_len = query.size(1) // key.size(1), query.size(2)
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    rows = (
        (query.to(wide) * scale).unflatten(1, (key.size(1), group)).flatten(2, 3)
    )  # [.., kv_heads, group * q_len, ..]
    outputs, sums = [], []
    for begin in range(0, key.size(2), CHUNK):
        part = slice(begin, begin + CHUNK)
        scores = rows @ key[:, :, part].to(wide).mT
        if attn_mask is not None:
            scores.masked_fill_(~attn_mask[:, part].repeat(group, 1), -torch.inf)
        log_sum_exp = scores.logsumexp(-1)
        weights = (scores - log_sum_exp.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
        output = weights @ value[:, :, part].to(wide)
        outputs.append(output.unflatten(2, (group, q_len)).flatten(1, 2))
        sums.append(log_sum_exp.unflatten(2, (group, q_len)).flatten(1, 2))
    each = torch.stack(sums)
    return merge(torch.stack(outputs), each), each.logsumexp(0)


def merge(outputs: Tensor, log_sum_exps: Tensor) -> Tensor:
    """Attention over the keys of all parts together; each key is in one of them.

    Parameters
    ----------
    outputs
        ``[parts, batch, q_heads, q_len, head_dim]``; zeros where a row may look at no key of a part.
    log_sum_exps
        ``[parts, batch, q_heads, q_len]``.

    Returns
    -------
    Tensor
        ``[batch, q_heads, q_len, head_dim]``, of the wider dtype of both.

    Notes
    -----
    Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
    """
    # Where a row may look at no key of any part all outputs are zeros: any weights will do that are no NaN.
    weights = log_sum_exps.clamp(min=LOWEST).softmax(0).unsqueeze(-1)
    weighted: Tensor = outputs * weights
    return weighted.sum(0)
