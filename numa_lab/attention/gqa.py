"""A drop-in for torch's ``scaled_dot_product_attention`` that reads each KV head once for all its query heads.

A backend is an entry of ``BACKENDS``, called with tensors that were checked; ``choose_backend`` decides which one ``auto``
means. Every other caller learns its name from ``choose_backend``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from operator import is_

import torch
from torch import Tensor
from torch.compiler import is_compiling

from numa_lab.attention import addresses, autocast, backend_names, by_torch, decode, graphs
from numa_lab.attention.backend_names import require_backend
from numa_lab.attention.checks import check, require_options, require_tensors

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None, bool]
Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None, bool], Tensor]


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
    """Attention with the meaning of torch's ``scaled_dot_product_attention``, whatever is active.

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
        ``auto``, or a key of ``BACKENDS``; what ``numba`` does not serve is torch's.

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
    """
    if is_compiling():
        return _in_graph(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)
    return _compute(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)


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
    InvalidInput, WrongType
        As ``gqa_attention``.
    """
    return _choose(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)[0]


def _compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> Tensor:
    plain = (
        attn_mask is None and scale is None and is_causal is False and isinstance(dropout_p, float | int)
        and not dropout_p and type(enable_gqa) is bool and backend in ("auto", "numba")
    )  # fmt: skip
    if plain and (output := decode.plain(query, key, value, enable_gqa)) is not None:
        return output
    name, arguments = _choose(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)
    if plain and name == "numba" and all(map(is_, arguments, (query, key, value))):  # nothing was cast
        decode.remember(query, key, value, enable_gqa)
    return BACKENDS[name](*arguments)


def _choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> tuple[str, Arguments]:
    """The backend's name, and the arguments for it, checked where they can be, and cast where autocast does so."""
    require_backend(backend)
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    readable = addresses.readable(*tensors)
    if not readable and addresses.watched(*tensors):
        composed = backend not in ("auto", "numba") and addresses.usual(*tensors)
        name = backend if composed else "torch"
        return name, (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not readable:
        require_tensors(query=query, key=key, value=value, **({} if attn_mask is None else {"attn_mask": attn_mask}))
    require_options(dropout_p, is_causal, scale, enable_gqa)
    dropout_p, scale = float(dropout_p), None if scale is None else float(scale)
    if not readable:
        if any(one.layout != torch.strided or one.is_nested for one in tensors):  # without strides, or without a shape
            return "torch", (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        query, key, value = _with_memory(query), _with_memory(key), _with_memory(value)
        attn_mask = None if attn_mask is None else _with_memory(attn_mask)
    if autocast.dtype() is not None:
        query, key, value = autocast.cast(query), autocast.cast(key), autocast.cast(value)
        attn_mask = None if attn_mask is None else autocast.cast(attn_mask)
    arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if backend == "auto" and is_causal and query.size(-2) > 1:
        return "torch", arguments  # a prompt
    if backend in ("auto", "numba"):
        if not decode.refusal(query, key, value, attn_mask, dropout_p, scale, readable):
            return "numba", arguments
        if why := decode.unavailable():
            _warn_once(why)
        return _fastest_of_torch(query, key, is_causal, enable_gqa) if readable else "torch", arguments
    return backend, arguments


def _with_memory(one: Tensor) -> Tensor:
    """The same with numbers in memory where torch keeps none because all are zero: its fastest kernel doesn't look for that."""
    return torch.zeros(one.shape, dtype=one.dtype, device=one.device) if one._is_zerotensor() else one


def _in_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> Tensor:
    """What a graph records: one operator (``numa_lab.attention.graphs``), or torch's own where gradients or dropout are wanted."""
    require_backend(backend)
    if backend in ("auto", "numba") and graphs.serves(query, key, value, attn_mask, dropout_p, scale):
        query, key, value = autocast.cast(query), autocast.cast(key), autocast.cast(value)
        attn_mask = None if attn_mask is None else autocast.cast(attn_mask)
        output: Tensor = torch.ops.numa_lab.gqa_attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        return output
    name = "torch" if backend in ("auto", "numba") else backend
    return BACKENDS[name](query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


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


BACKENDS: dict[str, Backend] = dict(
    zip(backend_names.BACKENDS, (_numba, by_torch.plain, by_torch.folded, by_torch.guide), strict=True)
)


def _of_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return _compute(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, "auto")


graphs.define(_of_operator)
