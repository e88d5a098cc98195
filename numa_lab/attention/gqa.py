"""A drop-in for torch's ``scaled_dot_product_attention`` that reads each KV head once for all its query heads.

It computes by one of several backends (``numa_lab.attention.backend_names``): the decode kernel, or one that is made of torch's own
operators. ``choose_backend`` tells which one computes a call; nothing else decides that.
"""

from __future__ import annotations

from operator import is_
from types import NoneType

import torch
from torch import Tensor
from torch.compiler import is_compiling

from numa_lab.attention import addresses, autocast, by_torch, decode, graphs, kernel_cache, known_calls
from numa_lab.attention.backend_names import require_backend
from numa_lab.attention.call import AttentionCall
from numa_lab.attention.checks import check, require_options, require_tensors
from numa_lab.attention.kernel_plan import KernelPlan
from numa_lab.errors import CompilerUnusable


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
    """Compute attention with the meaning of torch's ``scaled_dot_product_attention``, whatever is active.

    The inputs are never changed. Rows that may look at no key give zeros, as torch gives them. Dropout is torch's:
    backends draw different random numbers. ``is_causal`` counts from the upper left corner, so with q_len 1 it leaves
    the first key alone: a decode step must not set it.

    Where tensors are more than numbers in the CPU's memory (subclasses, negated views, nested ones), or somebody watches the
    operators (``torch.func``, forward AD, tracers, modes), torch's own computes and decides what is right. Autocast casts as it casts
    torch's own. Graphs of ``torch.compile`` hold it as one operator, ``numa_lab::gqa_attention``, where no gradient is wanted.

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
        ``auto``, or one of ``backend_names.BACKENDS``; what ``numba`` does not serve is torch's. Where the kernel can't be compiled,
        ``auto`` means torch's, and a warning says why.

    Returns
    -------
    Tensor
        ``[..., q_heads, q_len, head_dim]``, of the query's dtype, or of autocast's.

    Raises
    ------
    InvalidInput
        Shapes, dtypes or devices don't fit together, or there is no such backend.
    WrongType
        An argument is of a type that torch's own refuses too, such as an array. It is a TypeError.
    CompilerUnusable
        The backend is ``numba``, and Numba or llvmlite, as they are installed here, can't compile the kernel.
    """
    if is_compiling():
        return _in_graph(AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa), backend)
    usual = (
        attn_mask is None and scale is None and is_causal is False and isinstance(dropout_p, float | int)
        and not dropout_p and type(enable_gqa) is bool and backend in ("auto", "numba")
    )  # fmt: skip
    if usual and (output := known_calls.attend(query, key, value, enable_gqa)) is not None:
        return output
    call = AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _compute(call, backend, usual)


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
    """Return the name of the backend that ``gqa_attention`` runs for these arguments, which it takes and checks alike.

    The answer for ``auto`` depends on ``torch.get_num_threads()`` of the calling thread.

    Raises
    ------
    InvalidInput, WrongType, CompilerUnusable
        As ``gqa_attention``.
    """
    return _choose(AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa), backend)[0]


def _compute(call: AttentionCall, backend: str, usual: bool) -> Tensor:
    """Compute a call that is not known; a `usual` one, which has no mask and no options, may become known."""
    name, prepared, plan = _choose(call, backend)
    if plan is not None:
        try:
            output = plan.attend(prepared)
        except CompilerUnusable:
            if backend == "numba":
                raise
        else:
            if usual and all(map(is_, prepared[:3], call[:3])):  # nothing was cast
                known_calls.remember(call)
            return output
        name, prepared, _ = _choose(call, backend)  # now the kernel is known not to serve
    return by_torch.BACKENDS[name](prepared)


def _choose(call: AttentionCall, backend: str) -> tuple[str, AttentionCall, KernelPlan | None]:
    """Return the backend that computes a call, the call for it, and its plan where the backend is the decode kernel.

    The call that is returned was checked where it can be, and cast where autocast casts.
    """
    require_backend(backend)
    tensors = call.tensors
    readable = addresses.readable(*tensors)
    if not readable and addresses.watched(*tensors):
        composed = backend not in ("auto", "numba") and addresses.usual(*tensors)
        return backend if composed else "torch", call, None
    if not readable:
        require_tensors(**call.named_tensors)
    require_options(call)
    if type(call.dropout_p) is not float or type(call.scale) not in (float, NoneType):
        call = call._replace(dropout_p=float(call.dropout_p), scale=None if call.scale is None else float(call.scale))
    if not readable:
        if any(tensor.layout != torch.strided or tensor.is_nested for tensor in tensors):  # no strides, or no shape
            return "torch", call, None
        call = call.converted(_with_memory)
    if autocast.dtype() is not None:
        call = call.converted(autocast.cast)
    check(call)
    if backend == "auto" and call.is_causal and call.query.size(-2) > 1:
        return "torch", call, None  # a prompt
    if backend not in ("auto", "numba"):
        return backend, call, None
    if backend == "numba":
        kernel_cache.require_compiler()
    plan = decode.plan_for(call, readable=readable)
    if not isinstance(plan, str):
        return "numba", call, plan
    if why := decode.unavailable():
        decode.warn_once(why)
    return _fastest_of_torch(call) if readable else "torch", call, None


def _with_memory(tensor: Tensor) -> Tensor:
    """Return the same tensor with its numbers in memory.

    torch keeps none of a tensor that it knows to be zeros, and its fastest kernel doesn't look for that.
    """
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) if tensor._is_zerotensor() else tensor


def _in_graph(call: AttentionCall, backend: str) -> Tensor:
    """Return what a graph records: one operator (``numa_lab.attention.graphs``), or torch's own where gradients or dropout are wanted."""
    require_backend(backend)
    if backend in ("auto", "numba") and graphs.serves(call):
        query, key, value, attn_mask, _, is_causal, scale, enable_gqa = call.converted(autocast.cast)
        output: Tensor = torch.ops.numa_lab.gqa_attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        return output
    return by_torch.BACKENDS["torch" if backend in ("auto", "numba") else backend](call)


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


def _fastest_of_torch(call: AttentionCall) -> str:
    """Return the backend that ``auto`` means where the decode kernel does not serve."""
    query, key, q_len = call.query, call.key, call.query.size(-2)
    if not call.enable_gqa or call.is_causal or q_len > _FOLDED_Q_LEN or query.device.type != "cpu":
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


def _of_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what the operator of graphs means, which has no dropout and no backend to choose."""
    usual = attn_mask is None and scale is None and not is_causal
    if usual and (output := known_calls.attend(query, key, value, enable_gqa)) is not None:
        return output
    return _compute(AttentionCall(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa), "auto", usual)


graphs.define(_of_operator)
