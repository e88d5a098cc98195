"""What the decode kernel gets: its arguments, the version that serves a shape, and the workspace of a team.

Nothing is checked here (see ``numa_lab.attention.decode``).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import struct
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from numa_lab import openmp, simd
from numa_lab.attention import compiled, decode_kernel, merge_kernel
from numa_lab.attention.decode_kernel import CALL, FIELDS, LOG2_E, Spec
from numa_lab.attention.merge_kernel import MergeSpec
from numa_lab.simd import Kind, Rows

ALONE_BYTES = 32 * 1024  # of K and V: below, waking the team takes longer than what it would save

KINDS = {torch.float32: Kind.FLOAT32, torch.float16: Kind.FLOAT16, torch.bfloat16: Kind.BFLOAT16}
_MASK_KINDS = {
    torch.bool: decode_kernel.MASK_BOOL,
    torch.float32: decode_kernel.MASK_FLOAT,
    torch.float16: decode_kernel.MASK_HALF,
    torch.bfloat16: decode_kernel.MASK_BFLOAT,
}
_CALL = struct.Struct(f"{len(CALL)}q")
_SHAPE = struct.Struct(f"{len(FIELDS) - len(CALL)}qd")


class Memory:
    """What a team needs for a call: its arguments, the counter of threads that arrived, and a workspace, touched by the team."""

    def __init__(self) -> None:
        self._room = self.workspace = 0
        # The counter has a line of its own; the kernel leaves it at the number of threads.
        self._block = bytearray(_CALL.size + _SHAPE.size + 2 * simd.LINE_BYTES)
        self.arguments = memoryview(self._block)[: _CALL.size + _SHAPE.size]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._block))
        self.counter = -(-(self.address + len(self.arguments)) // simd.LINE_BYTES) * simd.LINE_BYTES
        self._count: Any = ctypes.c_int64.from_address(self.counter)

    def ready(self, workspace_bytes: int) -> None:
        """Make ready for a call."""
        if self._room < workspace_bytes:
            # Up to a page may lie in front of where one begins.
            self._buffer = torch.empty(workspace_bytes + mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
            self.workspace = -(-self._buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            self._room = workspace_bytes
        self._count.value = 0


class _OfThread(threading.local):
    """The memory of the calling thread's own team."""

    def __init__(self) -> None:
        self.memory = Memory()


_of_thread = _OfThread()


@dataclass(frozen=True)
class Plan:
    """What calls of one shape have in common, whatever the number of keys."""

    function: int  # 0 where there is nothing to compute
    threads: int
    least_shared: int  # from so many keys on the team computes; fewer are the calling thread's alone
    workspace_bytes: int  # of each thread
    shape: bytes  # the fields behind those of the call

    def run(
        self,
        kv_len: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        """Compute on the calling thread's team."""
        if not self.function or not kv_len:
            out.zero_()
            if lse is not None:
                lse.fill_(-math.inf)
            return
        job = self.job(
            _of_thread.memory, kv_len, query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
            0 if lse is None else lse.data_ptr(), 0 if mask is None else mask.data_ptr(),
        )  # fmt: skip
        openmp.run_on_team(*job)

    def job(
        self, memory: Memory, kv_len: int, query: int, key: int, value: int, out: int, lse: int = 0, mask: int = 0
    ) -> tuple[int, int, int]:
        """What ``openmp.run_on_team`` takes to compute over what lies at these addresses; valid until `memory` is used again."""
        threads = self.threads if kv_len >= self.least_shared else 1
        memory.ready(threads * self.workspace_bytes)
        _CALL.pack_into(
            memory.arguments, 0, memory.counter, memory.workspace, query, key, value, out, lse, mask, kv_len
        )
        memory.arguments[_CALL.size :] = self.shape
        return self.function, memory.address, threads


def make_plan(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, out: Tensor, threads: int
) -> Plan:
    """The plan of inputs that ``decode.refusal`` lets pass, for a team of so many threads; a mask has all its dimensions."""
    *leading, q_heads, q_len, head_dim = query.shape
    kv_heads, batch = key.shape[-3], leading[0] if leading else 1
    if not out.numel():
        return Plan(0, 0, 0, 0, b"")
    query_rows = q_heads // kv_heads * q_len
    version = _version(query.dtype, head_dim, query_rows)
    shape = _SHAPE.pack(
        *_team_functions(), version.workspace_bytes,
        batch, kv_heads, q_heads // kv_heads, q_len,
        *(stride for tensor in (query, key, value, out) for stride in _strides(tensor)),
        *((0, 0, 0, 0, decode_kernel.MASK_NONE) if mask is None else _mask_fields(mask)),
        LOG2_E * (head_dim**-0.5 if scale is None else scale),
    )  # fmt: skip
    least_shared = -(-ALONE_BYTES // (2 * batch * kv_heads * head_dim * key.element_size()))
    return Plan(version.function, threads, least_shared, version.workspace_bytes, shape)


class Merge:
    """The merge of partial results of the decode kernel by the calling thread alone (``partial.merge`` says what it is)."""

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        vectors = simd.host()
        assert vectors is not None  # refusal() has looked
        spec = MergeSpec(Rows(vectors, KINDS[dtype], head_dim))
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_size_t)(compiled.address(spec))
        self._space = bytearray(spec.space_bytes)
        self._arguments = (ctypes.c_int64 * len(merge_kernel.FIELDS))()
        self._arguments[3] = ctypes.addressof(ctypes.c_char.from_buffer(self._space))
        self._address = ctypes.addressof(self._arguments)

    def __call__(self, outputs: Tensor, log_sum_exps: Tensor, out: Tensor) -> None:
        """All contiguous: ``[parts, ..., head_dim]``, ``[parts, ...]`` in float32, and ``[..., head_dim]``."""
        words = self._arguments
        words[0], words[1], words[2] = outputs.data_ptr(), log_sum_exps.data_ptr(), out.data_ptr()
        words[4], words[5] = len(outputs), log_sum_exps.numel() // len(outputs)
        self._function(self._address)


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
    kind = Kind.BFLOAT16_PAIRS if dtype is torch.bfloat16 and vectors.pairs else KINDS[dtype]
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
