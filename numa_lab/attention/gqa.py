"""A drop-in for torch's ``scaled_dot_product_attention`` that reads each KV head once for all its query heads.

A backend is an entry of ``BACKENDS``, called with tensors that were checked; ``choose_backend`` decides which one ``auto``
means. Every other caller learns its name from ``choose_backend``.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from numa_lab.attention import decode
from numa_lab.errors import InvalidInput


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
    if backend != "auto" and backend not in BACKENDS:
        close = difflib.get_close_matches(backend, ("auto", *BACKENDS), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InvalidInput(f"backend {backend!r}: {hint}expected auto or one of {', '.join(BACKENDS)}")
    _check_tensors(query, key, value)
    leading = _check_heads(query, key, value, enable_gqa)
    if attn_mask is not None:
        _check_mask(attn_mask, (*leading, query.size(-2), key.size(-2)), query, is_causal)
    if not 0 <= dropout_p <= 1:
        raise InvalidInput(f"dropout_p={dropout_p}: expected a share between 0 and 1")
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


# Measured with torch 2.13 on two Zen 3 cores (AVX2, no bfloat16 instructions), head_dim 128, kv_len 4096, medians of
# interleaved calls; time of torch-folded / time of torch:
#
#   threads 1, q_len 1       group 2   group 4   group 8   group 32        threads 2, group 4   q_len 2   8    16    64
#     bfloat16                 .17       .10       .06       .04             bfloat16            .42     .61   .81   .75
#     float16                  .53       .28       .15       .06             float32             .42     .51   .74   .87
#     float32                  .78       .51       .40       .24
#
# torch reads K and V of a KV head again for each query head, and its products of a single row hardly use the vector
# units: folding gives them group rows. With 512 queries there are rows enough (.89 to .97; with is_causal .95 to 1.5),
# and at 2048 the explicit causal mask costs a factor of 2, because torch skips what is_causal hides. The guide's
# method took .9 to 2.5 times as long as torch, and was never the fastest, so it is never chosen.
_FOLDED_Q_LEN = 8


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
    out = torch.empty(query.shape, dtype=query.dtype)
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
BACKENDS: dict[str, Backend] = {"numba": _numba, "torch": _torch, "torch-folded": _folded, "guide": _guide}


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise InvalidInput(
            f"query is {query.dtype}, key {key.dtype} and value {value.dtype}: expected one floating-point dtype; "
            "convert with .to(dtype)"
        )
    if not query.device == key.device == value.device:
        raise InvalidInput(
            f"query is on {query.device}, key on {key.device} and value on {value.device}: expected one device; "
            "move with .to(device)"
        )
    if min(query.dim(), key.dim(), value.dim()) < 2 or query.size(-1) != key.size(-1) or key.size(-2) != value.size(-2):
        raise InvalidInput(
            f"{_shapes(query, key, value)}: expected [..., q_heads, q_len, head_dim] and twice [..., kv_heads, kv_len, "
            "head_dim], with one head_dim for query and key and one kv_len for key and value"
        )


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The output's dimensions in front of q_len, after broadcasting those of the batch as torch does."""
    shapes = _shapes(query, key, value)
    last = -2
    if enable_gqa:
        last = -3
        if min(query.dim(), key.dim(), value.dim()) < 3:
            raise InvalidInput(f"{shapes}: enable_gqa=True expects a dimension of heads, third from last")
        q_heads, kv_heads = query.size(-3), key.size(-3)
        if kv_heads != value.size(-3) or not q_heads or not kv_heads or q_heads % kv_heads:
            raise InvalidInput(
                f"{shapes}: {q_heads} query heads with {kv_heads} KV heads in key and {value.size(-3)} in value: "
                "enable_gqa=True expects as many in key as in value, and a multiple of them in query"
            )
    leading = query.shape[:last]
    if not leading == key.shape[:last] == value.shape[:last]:
        try:
            leading = torch.broadcast_shapes(leading, key.shape[:last], value.shape[:last])
        except RuntimeError as error:
            fix = "give all three the same batch"
            if not enable_gqa and query.dim() > 2 and query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
                fix = "set enable_gqa=True to let a group of query heads share a KV head"
            raise InvalidInput(f"{shapes}: the dimensions in front of the last {-last} don't match; {fix}") from error
    return (*leading, query.size(-3)) if enable_gqa else tuple(leading)


def _check_mask(mask: Tensor, scores: tuple[int, ...], query: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise InvalidInput(
            "attn_mask together with is_causal=True: expected one of them; put the causal part into the mask "
            "(mask & torch.ones(q_len, kv_len, dtype=torch.bool).tril() for a boolean one)"
        )
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.device != query.device:
        raise InvalidInput(
            f"attn_mask is {mask.dtype} on {mask.device}: expected torch.bool (True: may look) or {query.dtype} "
            f"(added to the scores) on {query.device}; convert with .to(device, dtype)"
        )
    padded = (1,) * (len(scores) - mask.dim()) + tuple(mask.shape)
    fits = len(padded) == len(scores) and all(own in (1, full) for own, full in zip(padded, scores, strict=True))
    if mask.dim() < 2 or not fits:
        raise InvalidInput(
            f"attn_mask {tuple(mask.shape)}: expected at least two dimensions that broadcast to "
            f"[..., q_heads, q_len, kv_len] = {scores}"
        )


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
