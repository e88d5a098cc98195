"""Attention over a part of the keys by torch, and the merge of such parts into attention over all of them.

Limits: no gradients, no dropout; a row that may look at no key gives zeros, as everywhere in this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096  # keys that are turned into float32 at once


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
            seen = attn_mask[:, part].repeat(group, 1)
            without_key = ~seen.any(-1, keepdim=True)
            # A row of -inf throughout has no derivative, so one that may look at no key keeps its scores at first.
            scores = scores.masked_fill(~seen & ~without_key, -torch.inf)
        # Not exp(scores - log_sum_exp): beside scores of a hundred million the logarithm of how many keys there are vanishes.
        log_sum_exp, weights = scores.logsumexp(-1), scores.softmax(-1)
        if attn_mask is not None:
            log_sum_exp = log_sum_exp.masked_fill(without_key.squeeze(-1), -torch.inf)
            weights = weights.masked_fill(without_key, 0)
        output = weights @ value[:, :, part].to(wide)
        outputs.append(output.unflatten(2, (group, q_len)).flatten(1, 2))
        sums.append(log_sum_exp.unflatten(2, (group, q_len)).flatten(1, 2))
    each = torch.stack(sums)
    without_key = each.amax(0).isneginf()
    whole = each.masked_fill(without_key, 0).logsumexp(0).masked_fill(without_key, -torch.inf)
    return merge(torch.stack(outputs), each), whole


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
    without_key = log_sum_exps.amax(0).isneginf()
    weights = log_sum_exps.masked_fill(without_key, 0).softmax(0).unsqueeze(-1)
    weighted: Tensor = outputs * weights
    return weighted.sum(0)
