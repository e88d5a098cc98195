"""Decode attention at the speed of memory: K and V are read once for all query heads of a group, by torch's own threads.

This is flash-decoding (split-KV decoding): the threads share the tokens of the cache, and their partial results are merged by the
log-sum-exp.

Limits: Linux on x86-64 with AVX2 or AVX-512, or on aarch64; CPU tensors of float32, bfloat16 or float16 with a head_dim that is
a multiple of 8 up to 256 and contiguous; up to 16 new tokens, because the work grows with them while the reading does not; no gradients
and no dropout. ``plan_for`` says which of these limits a call exceeds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.compiler import is_compiling

from numa_lab.attention import addresses, kernel_cache, known_calls, vectors
from numa_lab.attention.call import AttentionCall
from numa_lab.attention.checks import check, require_options, require_tensors
from numa_lab.attention.kernel_plan import KINDS, KernelPlan
from numa_lab.errors import CompilerUnusable, InvalidInput
from numa_lab.placement import openmp

MAX_HEAD_DIM = 256
MAX_Q_LEN = 16
LEAST_SCALE = 1e-30  # smaller ones vanish beside -inf in float32


def plan_for(
    call: AttentionCall, out: Tensor | None = None, *, threads: int | None = None, readable: bool | None = None
) -> KernelPlan | str:
    """Return the plan by which the decode kernel serves a call, or the reason why it does not, as a phrase.

    Nothing is compiled before the plan is run.

    Parameters
    ----------
    call
        Its arguments fit together (``numa_lab.attention.checks.check``).
    out
        The plan then writes to this tensor and to others with its strides: of the query's shape and dtype, with a contiguous
        head_dim. Where None is given, the plan writes to the tensor that ``KernelPlan.attend`` makes.
    threads
        How many threads compute; as many as torch's own operators use where None is given.
    readable
        What ``addresses.readable`` said of the call's tensors, if the caller has asked already.

    Returns
    -------
    KernelPlan or str
        The plan also serves other calls that differ in the addresses of tensors and in kv_len alone, unless they are causal.
    """
    reason = _refusal(call, addresses.readable(*call.tensors) if readable is None else readable)
    return reason or KernelPlan.of(call, out, torch.get_num_threads() if threads is None else threads)


def _refusal(call: AttentionCall, readable: bool) -> str:
    """Return why the decode kernel can't serve a call, as a phrase; empty where it can."""
    query, key, value, attn_mask, dropout_p, _, scale, _ = call
    if why := unavailable():
        return why
    if query.dtype not in KINDS or query.device.type != "cpu":
        return f"{query.dtype} on {query.device}"
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


def unavailable() -> str:
    """Return why the kernel can't run in this process, as a phrase; empty where it can, as far as is known before it is compiled."""
    try:
        kernel_cache.require_compiler()
    except CompilerUnusable as error:
        return str(error)
    return _lacking()


@cache
def warn_once(why: str) -> None:
    """Warn that torch computes in place of the kernel, once for each reason in a process."""
    warnings.warn(
        f"numa_lab's decode kernel can't run here ({why}): torch computes instead, several times slower; the backend that ran "
        "is named in each result",
        RuntimeWarning,
        stacklevel=5,
    )


@cache
def _lacking() -> str:
    """Return what this process lacks for the kernel; empty where it lacks nothing."""
    import numba

    if vectors.host() is None:
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
    """Compute the attention of few new tokens over a long cache.

    Nothing is allocated beside the output and the log-sum-exp: each calling thread keeps a workspace for its team.

    Parameters
    ----------
    query
        ``[batch, q_heads, q_len, head_dim]``, or without the batch.
    key, value
        ``[batch, kv_heads, kv_len, head_dim]``, with any strides but that of head_dim, which is 1; kv_len may be 0.
    attn_mask
        As ``gqa_attention`` takes it.
    is_causal
        Query i may look at the keys 0 to i, which are the first of the cache and not the last.
    scale
        A positive factor of the scores; 1 / sqrt(head_dim) where it is None.
    out
        The result is written to this tensor: of the query's shape and dtype, with a contiguous head_dim. It may not overlap the inputs.
    return_lse
        Return the log-sum-exp too.

    Returns
    -------
    output : Tensor
        Of the query's shape and dtype. Rows that may look at no key are zeros.
    lse : Tensor
        The log-sum-exp of each row's scores, ``[batch, q_heads, q_len]``, float32, natural, ``-inf`` for rows that may look at no key.
        It is returned only with `return_lse`.

    Raises
    ------
    InvalidInput
        The inputs don't fit together, or the kernel does not serve them.
    CompilerUnusable
        Numba or llvmlite, as they are installed here, can't compile the kernel.
    WrongType
        An argument is of a type that ``gqa_attention`` refuses.
    """
    if is_compiling():  # compiled kernels can't be looked into, so a graph ends here
        eager: Callable[..., Tensor | tuple[Tensor, Tensor]] = torch.compiler.disable(decode_attention)
        return eager(query, key, value, attn_mask, is_causal=is_causal, scale=scale, out=out, return_lse=return_lse)
    usual = attn_mask is None and scale is None and not is_causal and not return_lse
    if usual and (output := known_calls.attend(query, key, value, True, out)) is not None:
        return output
    call = AttentionCall(query, key, value, attn_mask, 0.0, is_causal, scale, True)
    require_tensors(**call.named_tensors)
    require_options(call)
    check(call)
    if out is not None and (
        not addresses.writable(out) or out.shape != query.shape or out.dtype != query.dtype or out.stride(-1) != 1
    ):
        raise InvalidInput(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()} on {out.device}: expected {query.dtype} "
            f"{tuple(query.shape)} in the CPU's memory, with a contiguous head_dim, and no tensor that gradients are asked of"
        )
    kernel_cache.require_compiler()
    plan = plan_for(call, out)
    if isinstance(plan, str):
        raise InvalidInput(f"decode_attention does not serve {plan}: use gqa_attention, which has other backends")
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device="cpu") if return_lse else None
    output = plan.attend(call, out, lse)
    if usual:
        known_calls.remember(call)
    return output if lse is None else (output, lse)
