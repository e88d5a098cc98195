"""Attention over a part of the keys by torch's operators, and the merge of such parts into attention over all keys.

These are the two steps of split-KV decoding (flash-decoding) in a form that torch can trace, transform and derive.

Limits: there is no dropout. A row that may look at no key gives zeros, as everywhere in this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096  # so many keys are converted to float32 at once


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention over some keys by matrix products, ``CHUNK`` keys at a time, in float32 or in the query's dtype if that is wider.

    Parameters
    ----------
    query
        ``[batch, q_heads, q_len, head_dim]``.
    key, value
        ``[batch, kv_heads, kv_len, head_dim]``, with kv_len at least 1.
    attn_mask
        Boolean, ``[q_len, kv_len]``: True where a query may look.
    scale
        A factor of the scores; 1 / sqrt(head_dim) where it is None.

    Returns
    -------
    output : Tensor
        ``[batch, q_heads, q_len, head_dim]``.
    lse : Tensor
        The log-sum-exp of each row's scores, ``[batch, q_heads, q_len]``, natural, ``-inf`` for rows that may look at no key.
    """
    group, q_len = query.size(1) // key.size(1), query.size(2)
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    # [batch, kv_heads, group * q_len, head_dim]
    rows = (query.to(wide) * scale).unflatten(1, (key.size(1), group)).flatten(2, 3)
    outputs, lses = [], []
    for begin in range(0, key.size(2), CHUNK):
        chunk = slice(begin, begin + CHUNK)
        scores = rows @ key[:, :, chunk].to(wide).mT
        if attn_mask is not None:
            seen = attn_mask[:, chunk].repeat(group, 1)
            without_key = ~seen.any(-1, keepdim=True)
            # A row of -inf throughout has no derivative, so one that may look at no key keeps its scores at first.
            scores = scores.masked_fill(~seen & ~without_key, -torch.inf)
        # Weights are not exp(scores - lse): beside scores of a hundred million the logarithm of the number of keys vanishes.
        lse, weights = scores.logsumexp(-1), scores.softmax(-1)
        if attn_mask is not None:
            lse = lse.masked_fill(without_key.squeeze(-1), -torch.inf)
            weights = weights.masked_fill(without_key, 0)
        output = weights @ value[:, :, chunk].to(wide)
        outputs.append(output.unflatten(2, (group, q_len)).flatten(1, 2))
        lses.append(lse.unflatten(2, (group, q_len)).flatten(1, 2))
    lse_of_chunks = torch.stack(lses)
    without_key = lse_of_chunks.amax(0).isneginf()
    whole_lse = lse_of_chunks.masked_fill(without_key, 0).logsumexp(0).masked_fill(without_key, -torch.inf)
    return merge(torch.stack(outputs), lse_of_chunks), whole_lse


def merge(outputs: Tensor, lse: Tensor) -> Tensor:
    """Merge attention over parts of the keys into attention over the keys of all parts together; each key belongs to one part.

    Parameters
    ----------
    outputs
        ``[parts, batch, q_heads, q_len, head_dim]``; zeros where a row may look at no key of a part.
    lse
        The log-sum-exp of each row's scores in each part, ``[parts, batch, q_heads, q_len]``.

    Returns
    -------
    Tensor
        ``[batch, q_heads, q_len, head_dim]``, of the wider dtype of both.

    Notes
    -----
    Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
    """
    # Where a row may look at no key of any part, all its outputs are zeros, so that any weights will do which are not NaN.
    without_key = lse.amax(0).isneginf()
    weights = lse.masked_fill(without_key, 0).softmax(0).unsqueeze(-1)
    weighted: Tensor = outputs * weights
    return weighted.sum(0)
