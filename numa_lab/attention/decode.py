"""Decode attention at the speed of memory: K and V are read once for all query heads of a group, by torch's own threads.

Limits: Linux on x86-64 with AVX2 or AVX-512, or on aarch64; CPU tensors of float32, bfloat16 or float16 with a head_dim that is
a multiple of 8 up to 256 and contiguous; up to 16 new tokens, since work grows with them while reading does not; no gradients
and no dropout. ``refusal`` says which of them an input misses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from numa_lab.attention import addresses, autocast, simd
from numa_lab.attention.addresses import Same, guard, unwatched
from numa_lab.attention.checks import check, require_options, require_tensors
from numa_lab.attention.kernel_plan import KINDS, Plan, make_plan
from numa_lab.errors import InvalidInput
from numa_lab.placement import openmp

MAX_HEAD_DIM = 256
MAX_Q_LEN = 16
LEAST_SCALE = 1e-30  # smaller ones vanish beside -inf in float32

MAX_PLANS = 1024
MAX_ALIKE = 8  # plans of calls that differ in nothing but what only a guard tells


class _Known(NamedTuple):
    """A plan that is ready for calls like one that was checked."""

    same: Same
    plan: Plan
    writes: Same  # for which outputs
    autocast: torch.dtype | None  # under which it was checked


_known: dict[tuple[object, ...], tuple[_Known, ...]] = {}


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    readable: bool | None = None,
) -> str:
    """Why these inputs can't be served, as a phrase; empty where they can. They fit together (see ``gqa_attention``).

    `readable` is what ``addresses.readable`` said of them, where it was asked already.
    """
    if unavailable():
        return unavailable()
    if query.dtype not in KINDS or query.device.type != "cpu":
        return f"{query.dtype} on {query.device}"
    if readable is None:
        readable = addresses.readable(query, key, value, *([] if attn_mask is None else [attn_mask]))
    if not readable:
        return "tensors that are more than numbers in memory, or a call that a mode, a tracer or a transform of torch watches"
    head_dim = query.size(-1)
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
    if is_compiling():  # a graph ends here, which can't look into compiled kernels
        eager: Callable[..., Tensor | tuple[Tensor, Tensor]] = torch.compiler.disable(decode_attention)
        return eager(query, key, value, attn_mask, is_causal=is_causal, scale=scale, out=out, return_lse=return_lse)
    usual = attn_mask is None and scale is None and not is_causal and not return_lse
    if usual and (output := plain(query, key, value, True, out)) is not None:
        return output
    require_tensors(query=query, key=key, value=value, **({} if attn_mask is None else {"attn_mask": attn_mask}))
    require_options(0.0, is_causal, scale, enable_gqa=True)
    check(query, key, value, attn_mask, 0.0, is_causal, enable_gqa=True)
    if why := refusal(query, key, value, attn_mask, 0.0, scale):
        raise InvalidInput(f"decode_attention does not serve {why}: use gqa_attention, which has other backends")
    if out is None:
        out = empty_output(query)
    elif not addresses.writable(out) or out.shape != query.shape or out.dtype != query.dtype or out.stride(-1) != 1:
        raise InvalidInput(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()} on {out.device}: expected {query.dtype} "
            f"{tuple(query.shape)} in the CPU's memory, with a contiguous head_dim, and no tensor that gradients are asked of"
        )
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device="cpu") if return_lse else None
    if is_causal:
        attn_mask, key, value = causal(query, key, value)
    run(query, key, value, attn_mask, scale, out, lse)
    if usual:
        remember(query, key, value, True)
    return out if lse is None else (out, lse)


def empty_output(query: Tensor) -> Tensor:
    """Memory for the result, in the layout of the query where its rows are contiguous, as torch's own has it on the CPU.

    Its dtype and device are the query's, whatever a program made the default.
    """
    out = torch.empty_like(query)
    # Where rows of the query overlap, the last dimension may not be the innermost one.
    return out if out.stride(-1) == 1 else torch.empty(query.shape, dtype=query.dtype, device="cpu")


def causal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mask under which query i sees the keys 0 to i, and the keys and values that any query sees."""
    seen = min(query.size(-2), key.size(-2))
    mask = torch.ones(query.size(-2), seen, dtype=torch.bool, device="cpu").tril()
    return mask, key[..., :seen, :], value[..., :seen, :]


def plain(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, out: Tensor | None = None) -> Tensor | None:
    """Attention without mask and options, for calls like those that were served before; None for others, which have to be checked.

    The layers of a model ask alike, and checking takes longer than attention to a short context.
    """
    if not unwatched(query, key, value):
        return None
    try:
        keys, alike = key.shape, _known.get(_signature(query, key, enable_gqa))
    except (AttributeError, RuntimeError):  # no tensor, or one without strides
        return None
    for same, plan, writes, autocasts in alike or ():
        if same(query, key, value) and keys == value.shape and (autocasts is None or autocasts == autocast.dtype()):
            if out is None:
                out = torch.empty_like(query)  # 1 us less than torch.empty
            elif not writes(out):
                return None
            plan.run(keys[-2], query, key, value, None, out, None)
            return out
    return None


def remember(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Let ``plain`` serve inputs like these, which were checked."""
    out, signature, under = torch.empty_like(query), _signature(query, key, enable_gqa), autocast.dtype()
    alike = _known.get(signature, ())
    # It is known where it was the output that had to be checked. It can't be where rows of the query overlap: see empty_output.
    if out.stride(-1) != 1 or any(one.autocast == under and one.same(query, key, value) for one in alike):
        return
    if len(_known) >= MAX_PLANS:
        _known.clear()
    plan = make_plan(query, key, value, None, None, out, torch.get_num_threads())
    known = _Known(guard(query, key, value, any_rows=(1, 2)), plan, guard(out), under)
    _known[signature] = (known, *alike[: MAX_ALIKE - 1])


def _signature(query: Tensor, key: Tensor, enable_gqa: bool) -> tuple[object, ...]:
    """What calls are looked up by; a guard tells whether they are alike in the rest."""
    return query.shape, key.stride(), enable_gqa, torch.get_num_threads(), torch.is_grad_enabled()


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
        key.size(-2), query, key, value, attn_mask, out, lse
    )
