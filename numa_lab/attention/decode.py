"""Decode attention at the speed of memory: K and V are read once for all query heads of a group, by torch's own threads.

Limits: Linux on x86-64 with AVX2 or AVX-512, or on aarch64; CPU tensors of float32, bfloat16 or float16 with a head_dim that is
a multiple of 8 up to 256 and contiguous; up to 16 new tokens, since work grows with them while reading does not; no gradients
and no dropout. ``refusal`` says which of them an input misses.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from numa_lab import openmp, simd
from numa_lab.attention import compiled, decode_kernel
from numa_lab.attention.checks import check
from numa_lab.attention.decode_kernel import FIELDS, LOG2_E, POINTERS, Spec
from numa_lab.errors import InvalidInput
from numa_lab.simd import Kind, Rows

MAX_HEAD_DIM = 256
MAX_Q_LEN = 16
ALONE_BYTES = 32 * 1024  # of K and V: below, waking the team takes longer than what it would save
LEAST_SCALE = 1e-30  # smaller ones vanish beside -inf in float32

_KINDS = {torch.float32: Kind.FLOAT32, torch.float16: Kind.FLOAT16, torch.bfloat16: Kind.BFLOAT16}
_MASK_KINDS = {
    torch.bool: decode_kernel.MASK_BOOL,
    torch.float32: decode_kernel.MASK_FLOAT,
    torch.float16: decode_kernel.MASK_HALF,
    torch.bfloat16: decode_kernel.MASK_BFLOAT,
}
_POINTERS = struct.Struct(f"{len(POINTERS)}q")
_SIZES = struct.Struct(f"{len(FIELDS) - len(POINTERS)}qd")
MAX_PLANS = 1024
_plans: dict[tuple[object, ...], _Plan] = {}


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
    if query.dtype not in _KINDS or query.device.type != "cpu":
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
        out = torch.empty(query.shape, dtype=query.dtype)
    elif out.shape != query.shape or out.dtype != query.dtype or out.stride(-1) != 1 or out.device.type != "cpu":
        raise InvalidInput(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}: expected {query.dtype} "
            f"{tuple(query.shape)} on the CPU with a contiguous head_dim"
        )
    lse = torch.empty(query.shape[:-1], dtype=torch.float32) if return_lse else None
    if is_causal:
        attn_mask, key, value = causal(query, key, value)
    run(query, key, value, attn_mask, scale, out, lse)
    if usual:
        remember(query, key, value, True)
    return out if lse is None else (out, lse)


def causal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mask under which query i sees the keys 0 to i, and the keys and values that any query sees."""
    seen = min(query.size(-2), key.size(-2))
    mask = torch.ones(query.size(-2), seen, dtype=torch.bool).tril()
    return mask, key[..., :seen, :], value[..., :seen, :]


def plain(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, out: Tensor | None = None) -> Tensor | None:
    """Attention without mask and options, for shapes that were served before; None for others, which have to be checked.

    The layers of a model ask alike, and checking takes longer than attention to a short context.
    """
    plan = _plans.get(_signature(query, key, value, enable_gqa))
    if plan is None:
        return None
    if out is None:
        out = torch.empty_like(query)
    elif _layout(out) != plan.out:
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
    _plans[signature] = _plan(query, key, value, None, None, torch.empty_like(query))


def _layout(out: Tensor) -> tuple[object, ...]:
    return out.shape, out.stride(), out.dtype, out.is_cpu


def _signature(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[object, ...]:
    """All that decides whether and how inputs are served, beside their numbers and addresses."""
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return (
        type(query), type(key), type(value), query.dtype, key.dtype, value.dtype,
        query.is_cpu, key.is_cpu, value.is_cpu, learns, enable_gqa, torch.get_num_threads(),
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(),
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
    _plan(query, key, value, attn_mask, scale, out).run(query, key, value, attn_mask, out, lse)


@dataclass(frozen=True)
class _Plan:
    """What calls of one shape have in common."""

    function: int  # 0 where there is nothing to compute
    threads: int
    workspace_bytes: int
    sizes: bytes  # the fields behind the pointers
    out: tuple[object, ...]  # the layout of the output

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor | None
    ) -> None:
        if not self.function:
            out.zero_()
            if lse is not None:
                lse.fill_(-math.inf)
            return
        memory = _memory.here(self.workspace_bytes)
        _POINTERS.pack_into(
            memory.arguments, 0, memory.counter, memory.workspace,
            query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
            0 if lse is None else lse.data_ptr(), 0 if mask is None else mask.data_ptr(),
        )  # fmt: skip
        memory.arguments[_POINTERS.size :] = self.sizes
        openmp.run_on_team(self.function, memory.address, self.threads)


def _plan(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, out: Tensor) -> _Plan:
    *leading, q_heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[-3], key.shape[-2]
    batch = leading[0] if leading else 1
    if not kv_len or not out.numel():
        return _Plan(0, 0, 0, b"", _layout(out))
    query_rows = q_heads // kv_heads * q_len
    version = _version(query.dtype, head_dim, query_rows)
    threads = torch.get_num_threads()
    if key.element_size() * (key.numel() + value.numel()) < ALONE_BYTES:
        threads = 1
    sizes = _SIZES.pack(
        *_team_functions(), version.workspace_bytes,
        batch, kv_heads, q_heads // kv_heads, q_len, kv_len,
        *(stride for tensor in (query, key, value, out) for stride in _strides(tensor)),
        *((0, 0, 0, 0, decode_kernel.MASK_NONE) if mask is None else _mask_fields(mask)),
        LOG2_E * (head_dim**-0.5 if scale is None else scale),
    )  # fmt: skip
    return _Plan(version.function, threads, threads * version.workspace_bytes, sizes, _layout(out))


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Bytes from one sequence, head and row to the next."""
    strides = [tensor.element_size() * stride for stride in tensor.stride()[:-1]]
    return tuple(strides) if len(strides) == 3 else (0, *strides)


def _mask_fields(mask: Tensor) -> tuple[int, ...]:
    return (*_strides(mask), mask.element_size() * mask.stride(-1), _MASK_KINDS[mask.dtype])


@dataclass(frozen=True)
class _Version:
    """A compiled version of the kernel, and what each thread needs for it."""

    function: int
    workspace_bytes: int


@cache
def _version(dtype: torch.dtype, head_dim: int, query_rows: int) -> _Version:
    vectors = simd.host()
    assert vectors is not None  # refusal() has looked
    kind = Kind.BFLOAT16_PAIRS if dtype is torch.bfloat16 and vectors.pairs else _KINDS[dtype]
    spec = Spec.of(Rows(vectors, kind, head_dim), query_rows)
    return _Version(compiled.address(spec), spec.workspace_bytes(query_rows))


@cache
def _team_functions() -> tuple[int, int]:
    """Addresses of the functions that tell a thread its number and the size of its team."""
    library = openmp.require().library
    number, size = (
        ctypes.cast(function, ctypes.c_void_p).value
        for function in (library.omp_get_thread_num, library.omp_get_num_threads)
    )
    return int(number or 0), int(size or 0)


class _Memory(threading.local):
    """What a calling thread keeps for its team: the workspace, the arguments, and the counter of those that arrived."""

    def __init__(self) -> None:
        self._room = self.workspace = 0
        # The counter has a line of its own; the kernel leaves it at the number of threads.
        self._block = bytearray(_POINTERS.size + _SIZES.size + 2 * simd.LINE_BYTES)
        self.arguments = memoryview(self._block)[: _POINTERS.size + _SIZES.size]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._block))
        self.counter = -(-(self.address + len(self.arguments)) // simd.LINE_BYTES) * simd.LINE_BYTES
        self._count: Any = ctypes.c_int64.from_address(self.counter)

    def here(self, workspace_bytes: int) -> _Memory:
        """Make ready for a call."""
        if self._room < workspace_bytes:
            # Up to a page may lie in front of where one begins.
            self._buffer = torch.empty(workspace_bytes + 4096, dtype=torch.uint8)
            self.workspace = -(-self._buffer.data_ptr() // 4096) * 4096
            self._room = workspace_bytes
        self._count.value = 0
        return self


_memory = _Memory()
