"""A drop-in for torch's ``scaled_dot_product_attention`` that reads each KV head once for all its query heads.

A backend is an entry of ``BACKENDS``, called with tensors that were checked; ``choose_backend`` decides which one ``auto``
means. Every other caller learns its name from ``choose_backend``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from numa_lab.attention import decode, names
from numa_lab.attention.checks import check
from numa_lab.attention.names import require_backend


def gqa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attention with the meaning of torch's ``scaled_dot_product_attention``.

    The inputs are never changed. Rows that may look at no key give zeros, as torch gives them. Dropout is torch's:
    backends draw different random numbers. ``is_causal`` counts from the upper left corner, so with q_len 1 it leaves
    the first key alone: a decode step must not set it.

    Parameters
    ----------
    query
        ``[..., q_heads, q_len, head_dim]``, floating point.
    key, value
        ``[..., kv_heads, kv_len, head_dim]``, of the query's dtype and on its device. Any strides: a cache
        ``[batch, kv_len, kv_heads, head_dim]`` can be passed as its transposed view.
    attn_mask
        Broadcastable to ``[..., q_heads, q_len, kv_len]``: boolean (True: may look), or float32 or the query's dtype
        (added to the scores). Not together with ``is_causal``.
    dropout_p
        Share of the weights that is set to zero.
    is_causal
        Query i may look at the keys 0 to i.
    scale
        Factor of the scores; 1 / sqrt(head_dim) where it is None.
    enable_gqa
        q_heads may be a multiple of kv_heads; query head h then uses KV head h // group.
    backend
        ``auto``, or a key of ``BACKENDS``.

    Returns
    -------
    Tensor
        ``[..., q_heads, q_len, head_dim]``, of the query's dtype.

    Raises
    ------
    InvalidInput
        Shapes, dtypes or devices don't fit together, or there is no such backend.
    """
    plain = attn_mask is None and scale is None and not dropout_p and not is_causal and backend in ("auto", "numba")
    if plain and (output := decode.plain(query, key, value, enable_gqa)) is not None:
        return output
    name = choose_backend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend)
    if plain and name == "numba":
        decode.remember(query, key, value, enable_gqa)
    return BACKENDS[name](query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def choose_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str = "auto",
) -> str:
    """The name of the backend that ``gqa_attention`` runs for these arguments, which it takes and checks alike.

    The answer for ``auto`` depends on ``torch.get_num_threads()`` of the calling thread.

    Raises
    ------
    InvalidInput
        As ``gqa_attention``.
    """
    require_backend(backend)
    check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if backend == "auto" and is_causal and query.size(-2) > 1:
        return "torch"  # a prompt
    if backend in ("auto", "numba"):
        if not decode.refusal(query, key, value, attn_mask, dropout_p, scale):
            return "numba"
        if why := decode.unavailable():
            _warn_once(why)
        return _fastest_of_torch(query, key, is_causal, enable_gqa)
    return backend


@cache
def _warn_once(why: str) -> None:
    warnings.warn(
        f"numa_lab's decode kernel can't run here ({why}): torch computes instead, several times slower; the backend that ran "
        "is named in each result",
        RuntimeWarning,
        stacklevel=4,
    )


# Measured with torch 2.13, head_dim 128, kv_len 4096, medians of interleaved calls; time of torch-folded / time of torch. On
# two Zen 3 cores (AVX2, no bfloat16 instructions):
#
#   threads 1, q_len 1       group 2   group 4   group 8   group 32        threads 2, group 4   q_len 2   8    16    64
#     bfloat16                 .17       .10       .06       .04             bfloat16            .42     .61   .81   .75
#     float16                  .53       .28       .15       .06             float32             .42     .51   .74   .87
#     float32                  .78       .51       .40       .24
#
# torch reads K and V of a KV head again for each query head, and its products of a single row hardly use the vector
# units: folding gives them group rows. On two Zen 4 cores (`make bench-prefill`), groups 4 and 8, q_len 17 to 512, both
# thread counts, it is .66 to .79 in float16, .79 to .99 in float32, .76 to 1.03 in bfloat16. A prompt is torch's: the explicit
# causal mask costs a factor of 2 to 5, because torch skips what is_causal hides; and 16 tokens on themselves, which the
# decode kernel takes too, last up to 2.3 times as long there. The guide's method took .9 to 2.5 times as long as torch, and was
# never the fastest, so it is never chosen.
_FOLDED_Q_LEN = 512


def _fastest_of_torch(query: Tensor, key: Tensor, is_causal: bool, enable_gqa: bool) -> str:
    """What ``auto`` means where the decode kernel does not serve."""
    q_len = query.size(-2)
    if not enable_gqa or is_causal or q_len > _FOLDED_Q_LEN or query.device.type != "cpu":
        return "torch"
    batch, q_heads, kv_heads = query.shape[:-3].numel(), query.size(-3), key.size(-3)
    group = q_heads // kv_heads
    if group == 1:
        return "torch"
    # torch computes heads in parallel, so folding leaves threads idle where they outnumber the KV heads of the batch.
    # It has to gain more than that. Two threads on one KV head were measured (float32, group 32: .31); more threads
    # follow from the table, from below: a gain of 2 x group up to 24 for one row of bfloat16, else the fourth root of group.
    threads = torch.get_num_threads()
    loss = min(threads, batch * q_heads) / max(1, min(threads, batch * kv_heads))
    gain = min(2 * group, 24) if q_len == 1 and query.dtype == torch.bfloat16 else group**0.25
    return "torch-folded" if loss < gain else "torch"


def _numba(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The decode kernel: K and V are read once, at the speed of memory."""
    out = decode.empty_output(query)
    if is_causal:
        attn_mask, key, value = decode.causal(query, key, value)
    decode.run(query, key, value, attn_mask, scale, out, None)
    return out


def _torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """torch's own, in one call."""
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _folded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The query heads of a group as further rows of one head, so that each KV head is read once and never expanded.

    A causal mask becomes an explicit one of group x q_len x kv_len, since rows are no longer positions.
    """
    if not enable_gqa:  # equal heads: nothing to fold
        return _torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    kv_heads, q_len, kv_len = key.size(-3), query.size(-2), key.size(-2)
    group = query.size(-3) // kv_heads
    if is_causal:
        attn_mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        attn_mask = _fold_mask(attn_mask, kv_heads, group, q_len)
    rows = query.unflatten(-3, (kv_heads, group)).flatten(-3, -2)  # [..., kv_heads, group * q_len, head_dim]
    output = scaled_dot_product_attention(rows, key, value, attn_mask, dropout_p, scale=scale)
    unfolded: Tensor = output.unflatten(-2, (group, q_len)).flatten(-4, -3)
    return unfolded


def _fold_mask(mask: Tensor, kv_heads: int, group: int, q_len: int) -> Tensor:
    """The mask for folded rows: a view where its strides allow, the mask itself where it is the same for all rows."""
    mask = mask if mask.dim() > 2 else mask.unsqueeze(0)
    if mask.shape[-3:-1] == (1, 1):
        return mask
    mask = mask.unsqueeze(-3) if mask.size(-3) == 1 else mask.unflatten(-3, (kv_heads, group))
    return mask.expand(*mask.shape[:-3], group, q_len, mask.size(-1)).flatten(-3, -2)


def _guide(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """One call per query head of a group: K and V are read group times."""
    if not enable_gqa:
        return _torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    kv_heads = key.size(-3)
    queries = query.unflatten(-3, (kv_heads, -1)).unbind(-3)  # group times [..., kv_heads, q_len, head_dim]
    masks = [attn_mask] * len(queries)
    if attn_mask is not None and attn_mask.dim() > 2 and attn_mask.size(-3) > 1:  # one for each query head
        masks = list(attn_mask.unflatten(-3, (kv_heads, -1)).unbind(-3))
    outputs = [
        scaled_dot_product_attention(one, key, value, mask, dropout_p, is_causal, scale=scale)
        for one, mask in zip(queries, masks, strict=True)
    ]
    return torch.stack(outputs, -3).flatten(-4, -3)


Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None, bool], Tensor]
BACKENDS: dict[str, Backend] = dict(zip(names.BACKENDS, (_numba, _torch, _folded, _guide), strict=True))
