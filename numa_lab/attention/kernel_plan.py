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

import torch
from torch import Tensor

from numa_lab.attention import decode_kernel, kernel_cache, merge_kernel, openmp_regions, simd
from numa_lab.attention.decode_kernel import CALL, FIELDS, LOG2_E, Spec
from numa_lab.attention.merge_kernel import MergeSpec
from numa_lab.attention.simd import Kind, Rows
from numa_lab.placement import openmp

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
ARGUMENT_BYTES = _CALL.size + _SHAPE.size
QUERY, OUT, KV_LEN = map(CALL.index, ("query", "out", "kv_len"))  # words of the arguments


class Room:
    """Working memory that begins at a page, and grows where it has to."""

    def __init__(self) -> None:
        self.nbytes = self.address = 0

    def at_least(self, nbytes: int) -> int:
        """Address of so many bytes; what was there is lost where it changes."""
        if self.nbytes < nbytes:
            # Up to a page may lie in front of where one begins.
            self._buffer = torch.empty(nbytes + mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
            self.address = -(-self._buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            self.nbytes = nbytes
        return self.address


class Arguments:
    """What a kernel gets. The counter of threads that are done has a line of its own; the kernel leaves it at 0."""

    def __init__(self) -> None:
        self._block = bytearray(ARGUMENT_BYTES + 2 * simd.LINE_BYTES)
        self.packed = memoryview(self._block)[:ARGUMENT_BYTES]
        self.words = self.packed.cast("q")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._block))
        self.counter = -(-(self.address + ARGUMENT_BYTES) // simd.LINE_BYTES) * simd.LINE_BYTES


class _OfThread(threading.local):
    """What the calling thread's own team gets, and its workspace."""

    def __init__(self) -> None:
        self.arguments, self.room = Arguments(), Room()


_of_thread = _OfThread()


@dataclass(frozen=True)
class Plan:
    """What calls of one shape have in common, whatever the number of keys."""

    kernel: int  # 0 where there is nothing to compute
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
        if not self.kernel or not kv_len:
            out.zero_()
            if lse is not None:
                lse.fill_(-math.inf)
            return
        arguments, threads = _of_thread.arguments, self.threads if kv_len >= self.least_shared else 1
        self.pack(
            arguments, _of_thread.room.at_least(threads * self.workspace_bytes),
            query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
            0 if lse is None else lse.data_ptr(), 0 if mask is None else mask.data_ptr(), kv_len,
        )  # fmt: skip
        openmp.run_on_team(_alone(), arguments.address, threads)

    def pack(self, arguments: Arguments, *call: int) -> None:
        """Write what the kernel gets: of ``decode_kernel.CALL`` all but the counter, and what calls of this shape share."""
        _CALL.pack_into(arguments.packed, 0, arguments.counter, *call)
        arguments.packed[_CALL.size :] = self.shape


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
    least_shared = -(-ALONE_BYTES // (2 * batch * kv_heads * head_dim * key.element_size()))
    shape = _SHAPE.pack(
        version.kernel, *openmp_regions.team_functions(), version.workspace_bytes, least_shared,
        batch, kv_heads, q_heads // kv_heads, q_len,
        *(stride for tensor in (query, key, value, out) for stride in _strides(tensor)),
        *((0, 0, 0, 0, decode_kernel.MASK_NONE) if mask is None else _mask_fields(mask)),
        LOG2_E * (head_dim**-0.5 if scale is None else scale),
    )  # fmt: skip
    return Plan(version.kernel, threads, least_shared, version.workspace_bytes, shape)


class Merge:
    """The merge of partial results of the decode kernel by one thread (``partial.merge`` says what it is).

    Parameters
    ----------
    dtype, head_dim
        Of the outputs.
    outputs, log_sum_exps
        Addresses of ``[parts, ..., head_dim]`` and, in float32, ``[parts, ...]``, both contiguous.
    parts, rows
        How many parts, and rows of each.
    """

    def __init__(
        self, dtype: torch.dtype, head_dim: int, outputs: int, log_sum_exps: int, parts: int, rows: int
    ) -> None:
        vectors = simd.host()
        assert vectors is not None  # refusal() has looked
        spec = MergeSpec(Rows(vectors, KINDS[dtype], head_dim))
        self.kernel, self._space = kernel_cache.address(spec), ctypes.create_string_buffer(spec.space_bytes)
        space = ctypes.addressof(self._space)
        self._words = (ctypes.c_int64 * len(merge_kernel.FIELDS))(outputs, log_sum_exps, 0, space, parts, rows)
        self.address = ctypes.addressof(self._words)

    def into(self, out: int) -> None:
        """Where the merged output goes, the address of ``[..., head_dim]``, contiguous."""
        self._words[2] = out


@cache
def _alone() -> int:
    return kernel_cache.address(openmp_regions.Alone())


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Bytes from one sequence, head and row to the next."""
    strides = [tensor.element_size() * stride for stride in tensor.stride()[:-1]]
    return tuple(strides) if len(strides) == 3 else (0, *strides)


def _mask_fields(mask: Tensor) -> tuple[int, ...]:
    return (*_strides(mask), mask.element_size() * mask.stride(-1), _MASK_KINDS[mask.dtype])


@dataclass(frozen=True)
class _Version:
    """A compiled version of the kernel, and what each thread needs for it."""

    kernel: int
    workspace_bytes: int


@cache
def _version(dtype: torch.dtype, head_dim: int, query_rows: int) -> _Version:
    vectors = simd.host()
    assert vectors is not None  # refusal() has looked
    kind = Kind.BFLOAT16_PAIRS if dtype is torch.bfloat16 and vectors.pairs else KINDS[dtype]
    spec = Spec.of(Rows(vectors, kind, head_dim), query_rows)
    return _Version(kernel_cache.address(spec), spec.workspace_bytes(query_rows))
