"""Decode attention at the speed of memory: K and V are read once for all query heads of a group, by torch's own threads.

Limits: Linux on x86-64 with AVX2 or AVX-512, or on aarch64; CPU tensors of float32, bfloat16 or float16 with a head_dim that is
a multiple of 8 up to 256 and contiguous; up to 16 new tokens, since work grows with them while reading does not; no gradients
and no dropout. ``refusal`` says which of them an input misses.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from numa_lab import openmp, simd
from numa_lab.attention.checks import check
from numa_lab.attention.plans import KINDS, Plan, layout, make_plan
from numa_lab.errors import InvalidInput

MAX_HEAD_DIM = 256
MAX_Q_LEN = 16
LEAST_SCALE = 1e-30  # smaller ones vanish beside -inf in float32

MAX_PLANS = 1024
_plans: dict[tuple[object, ...], Plan] = {}


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> str:
    """Why these inputs can't be served, as a phrase; empty where they can. They fit together (see ``gqa_attention``)."""
    head_dim = query.size(-1)
    if unavailable():
        return unavailable()
    if query.dtype not in KINDS or query.device.type != "cpu":
        return f"{query.dtype} on {query.device}"
    if not type(query) is type(key) is type(value) is Tensor:
        return "a subclass of Tensor"
    if dropout_p:
        return f"dropout_p={dropout_p}"
    if scale is not None and not LEAST_SCALE < scale < math.inf:
        return f"scale={scale}"
    if not 2 < query.dim() < 5 or not query.dim() == key.dim() == value.dim():
        return f"{query.dim()} dimensions"
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3] or key.size(-3) != value.size(-3):
        return "a batch that is broadcast"
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM or value.size(-1) != head_dim:
        return f"head_dim {head_dim} and {value.size(-1)}"
    if query.size(-2) > MAX_Q_LEN:
        return f"q_len {query.size(-2)}"
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return "elements of a head that are not contiguous"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients"
    if attn_mask is not None and attn_mask.requires_grad:
        return "gradients of the mask"
    return ""


@cache
def unavailable() -> str:
    """Why the kernel can't run in this process, as a phrase; empty where it can."""
    import numba

    if simd.host() is None:
        return "a CPU without AVX2, AVX-512 or NEON"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT"
    if openmp.runtime() is None:
        return "torch's OpenMP library was not found"
    return ""


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of few new tokens over a long cache.

    Beside `out` and the log-sum-exp nothing is allocated: each calling thread keeps a workspace for its team.

    Parameters
    ----------
    query
        ``[batch, q_heads, q_len, head_dim]``, or without the batch.
    key, value
        ``[batch, kv_heads, kv_len, head_dim]``, any strides but that of head_dim, which is 1; kv_len may be 0.
    attn_mask
        As ``gqa_attention`` takes it.
    is_causal
        Query i may look at the keys 0 to i: of a cache, the first q_len.
    scale
        Factor of the scores, positive; 1 / sqrt(head_dim) where it is None.
    out
        Where to put the result: shape and dtype of the query, with a contiguous head_dim. It may not overlap the inputs.
    return_lse
        Return the log-sum-exp too.

    Returns
    -------
    output : Tensor
        Of the query's shape and dtype. Rows that may look at no key are zeros.
    log_sum_exp : Tensor
        ``[batch, q_heads, q_len]``, float32, natural, ``-inf`` for rows that may look at no key. Only with `return_lse`.

    Raises
    ------
    InvalidInput
        The inputs don't fit together, or are none that the kernel serves.
    """
    usual = attn_mask is None and scale is None and not is_causal and not return_lse
    if usual and (output := plain(query, key, value, True, out)) is not None:
        return output
    check(query, key, value, attn_mask, 0.0, is_causal, enable_gqa=True)
    if why := refusal(query, key, value, attn_mask, 0.0, scale):
        raise InvalidInput(f"decode_attention does not serve {why}: use gqa_attention, which has other backends")
    if out is None:
        out = empty_output(query)
    elif out.shape != query.shape or out.dtype != query.dtype or out.stride(-1) != 1 or out.device.type != "cpu":
        raise InvalidInput(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}: expected {query.dtype} "
            f"{tuple(query.shape)} on the CPU with a contiguous head_dim"
        )
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device="cpu") if return_lse else None
    if is_causal:
        attn_mask, key, value = causal(query, key, value)
    run(query, key, value, attn_mask, scale, out, lse)
    if usual:
        remember(query, key, value, True)
    return out if lse is None else (out, lse)


def empty_output(query: Tensor) -> Tensor:
    """Memory for the result: contiguous, whatever the query's strides, and whatever dtype and device a program made the default."""
    return torch.empty(query.shape, dtype=query.dtype, device="cpu")


def causal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mask under which query i sees the keys 0 to i, and the keys and values that any query sees."""
    seen = min(query.size(-2), key.size(-2))
    mask = torch.ones(query.size(-2), seen, dtype=torch.bool, device="cpu").tril()
    return mask, key[..., :seen, :], value[..., :seen, :]


def plain(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, out: Tensor | None = None) -> Tensor | None:
    """Attention without mask and options, for shapes that were served before; None for others, which have to be checked.

    The layers of a model ask alike, and checking takes longer than attention to a short context.
    """
    plan = _plans.get(_signature(query, key, value, enable_gqa))
    if plan is None:
        return None
    if out is None:
        out = torch.empty_like(query)  # 1 us less than torch.empty
    elif layout(out) != plan.out:
        return None
    plan.run(query, key, value, None, out, None)
    return out


def remember(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Let ``plain`` serve inputs like these, which were checked."""
    signature = _signature(query, key, value, enable_gqa)
    if signature in _plans:  # it was the output that had to be checked
        return
    if len(_plans) >= MAX_PLANS:
        _plans.clear()
    out = torch.empty_like(query)
    if out.stride(-1) == 1:  # it isn't, where rows of the query overlap
        _plans[signature] = make_plan(query, key, value, None, None, out, torch.get_num_threads())


def _signature(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[object, ...]:
    """All that decides whether and how inputs are served, beside their numbers and addresses: not how many keys there are."""
    keys = key.shape
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return (
        type(query), type(key), type(value), query.dtype, key.dtype, value.dtype,
        query.is_cpu, key.is_cpu, value.is_cpu, learns, enable_gqa, torch.get_num_threads(),
        query.shape, keys[:-2], keys[-1], keys == value.shape, query.stride(), key.stride(), value.stride(),
    )  # fmt: skip


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Compute inputs that were checked into `out` and, where wanted, `lse`."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.size(-2))
    make_plan(query, key, value, attn_mask, scale, out, torch.get_num_threads()).run(
        query, key, value, attn_mask, out, lse
    )
