"""How the decode kernel is called: the plan of a call, the kernel's arguments, and the workspace of a team.

Nothing is checked here: ``numa_lab.attention.decode`` looks whether the kernel serves a call.
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

from numa_lab.attention import decode_spec, kernel_cache, merge_kernel, openmp_regions, vectors
from numa_lab.attention.call import AttentionCall
from numa_lab.attention.decode_spec import CALL, FIELDS, LOG2_E, DecodeSpec
from numa_lab.attention.merge_kernel import MergeSpec
from numa_lab.attention.vectors import Kind, Rows
from numa_lab.placement import openmp

ALONE_BYTES = 32 * 1024  # of K and V: below that, waking the team takes longer than computing without it

KINDS = {torch.float32: Kind.FLOAT32, torch.float16: Kind.FLOAT16, torch.bfloat16: Kind.BFLOAT16}
_MASK_KINDS = {
    torch.bool: decode_spec.MASK_BOOL,
    torch.float32: decode_spec.MASK_FLOAT,
    torch.float16: decode_spec.MASK_HALF,
    torch.bfloat16: decode_spec.MASK_BFLOAT,
}
_NO_MASK = (0, 0, 0, 0, decode_spec.MASK_NONE)
_CALL = struct.Struct(f"{len(CALL)}q")
_LAYOUT = struct.Struct(f"{len(FIELDS) - len(CALL)}qd")
_BEHIND_CALL = slice(_CALL.size, None)
ARGUMENT_BYTES = _CALL.size + _LAYOUT.size
QUERY, OUT, KV_LEN = map(CALL.index, ("query", "out", "kv_len"))  # places of these fields in the arguments


class Workspace:
    """Working memory that begins at a page, and grows when more is needed."""

    def __init__(self) -> None:
        self.nbytes = self.address = 0

    def at_least(self, nbytes: int) -> int:
        """Return the address of at least `nbytes` bytes; where the address changes, what was there is lost."""
        if self.nbytes < nbytes:
            # Up to a page of the buffer may lie in front of the first page that begins in it.
            self._buffer = torch.empty(nbytes + mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
            self.address = -(-self._buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            self.nbytes = nbytes
        return self.address


class KernelArguments:
    """The arguments of the decode kernel, in memory of their own.

    The counter of threads that are done lies behind them, in a cache line of its own; the kernel leaves it at 0.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(ARGUMENT_BYTES + 2 * vectors.LINE_BYTES)
        self.packed = memoryview(self._buffer)[:ARGUMENT_BYTES]
        self.fields = self.packed.cast("q")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self.counter = -(-(self.address + ARGUMENT_BYTES) // vectors.LINE_BYTES) * vectors.LINE_BYTES


class _OfThread(threading.local):
    """The arguments and the workspace of the calling thread's own team."""

    def __init__(self) -> None:
        self.arguments, self.workspace = KernelArguments(), Workspace()


_of_thread = _OfThread()


class _CompiledKernel:
    """One compiled version of the decode kernel, which is loaded or compiled when it first runs."""

    def __init__(self, spec: DecodeSpec, query_rows: int) -> None:
        self._spec, self.workspace_bytes = spec, spec.workspace_bytes(query_rows)
        self.address = 0  # until it is loaded

    def load(self) -> int:
        """Return the kernel's address; the first time on a machine compiling takes seconds."""
        self.address = kernel_cache.address(self._spec)
        return self.address


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """How the decode kernel computes a call, and others that differ in the addresses of tensors and in kv_len alone.

    ``decode.plan_for`` makes one for a call that the kernel serves.
    """

    kernel: _CompiledKernel | None  # None where there is nothing to compute
    threads: int
    least_shared: int  # the team computes from so many keys on; over fewer keys the calling thread computes alone
    workspace_bytes: int  # of each thread
    layout: bytes  # the arguments of the kernel behind ``decode_spec.CALL``
    causal_mask: Tensor | None = None  # [q_len, keys that any query sees], of a causal call

    @classmethod
    def of(cls, call: AttentionCall, out: Tensor | None, threads: int) -> KernelPlan:
        """Return the plan of a call that the kernel serves (``decode.plan_for`` looks whether it does)."""
        query, key, value = call.query, call.key, call.value
        if not query.numel():
            return cls(None, 0, 0, 0, b"")
        *leading, q_heads, q_len, head_dim = query.shape
        kv_len, kv_heads, batch = key.shape[-2], key.shape[-3], leading[0] if leading else 1
        causal_mask, mask = None, call.attn_mask
        if call.is_causal:
            kv_len = min(q_len, kv_len)
            mask = causal_mask = torch.ones(q_len, kv_len, dtype=torch.bool, device="cpu").tril()
        if out is None:  # that of ``attend``; only strides matter here, and those of a contiguous query are its own
            out = query if query.is_contiguous() else empty_output(query)
        kernel = _compiled_kernel(query.dtype, head_dim, q_heads // kv_heads * q_len)
        element_bytes = query.element_size()
        least_shared = -(-ALONE_BYTES // (2 * batch * kv_heads * head_dim * element_bytes))
        layout = _LAYOUT.pack(
            *openmp_regions.team_functions(), kernel.workspace_bytes, least_shared,
            batch, kv_heads, q_heads // kv_heads, q_len,
            *_strides(query, element_bytes), *_strides(key, element_bytes),
            *_strides(value, element_bytes), *_strides(out, element_bytes),
            *(_NO_MASK if mask is None else _mask_fields(mask.expand(*query.shape[:-1], kv_len))),
            LOG2_E * (head_dim**-0.5 if call.scale is None else call.scale),
        )  # fmt: skip
        return cls(kernel, threads, least_shared, kernel.workspace_bytes, layout, causal_mask)

    def attend(self, call: AttentionCall, out: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
        """Compute a call on the calling thread's team.

        Parameters
        ----------
        call
            The call for which the plan was made, or one like it.
        out
            The tensor, or one with its strides, for which the plan was made; a new tensor where it was made for None.
        lse
            A contiguous float32 ``[batch, q_heads, q_len]``, to which the log-sum-exp is written where it is given.

        Returns
        -------
        Tensor
            The output, of the query's shape and dtype.
        """
        out = empty_output(call.query) if out is None else out
        mask, kv_len = call.attn_mask, call.key.size(-2)
        if self.causal_mask is not None:  # keys that no query sees are left out
            mask, kv_len = self.causal_mask, self.causal_mask.size(-1)
        self.run(kv_len, call.query, call.key, call.value, mask, out, lse)
        return out

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
        """Compute over the first `kv_len` keys on the calling thread's team, as ``attend`` does; only addresses are read off tensors."""
        if self.kernel is None or not kv_len:
            out.zero_()
            if lse is not None:
                lse.fill_(-math.inf)
            return
        arguments, threads = _of_thread.arguments, self.threads if kv_len >= self.least_shared else 1
        self.pack(
            arguments, _of_thread.workspace.at_least(threads * self.workspace_bytes),
            query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
            0 if lse is None else lse.data_ptr(), 0 if mask is None else mask.data_ptr(), kv_len,
        )  # fmt: skip
        openmp.run_on_team(_team_region(), arguments.address, threads)

    def pack(self, arguments: KernelArguments, *call: int) -> None:
        """Write the kernel's arguments: `call` has those of ``decode_spec.CALL`` between the counter and the kernel's own address."""
        kernel = self.kernel
        assert kernel is not None  # who has nothing to compute packs nothing
        _CALL.pack_into(arguments.packed, 0, arguments.counter, *call, kernel.address or kernel.load())
        arguments.packed[_BEHIND_CALL] = self.layout


def empty_output(query: Tensor) -> Tensor:
    """Return memory for the output, in the layout of the query where the query's rows are contiguous, as torch's own has it on the CPU.

    Its dtype and device are the query's, whatever a program has made the default.
    """
    out = torch.empty_like(query)
    # Where rows of the query overlap, the last dimension may not be the innermost one.
    return out if out.stride(-1) == 1 else torch.empty(query.shape, dtype=query.dtype, device="cpu")


class Merge:
    """The merge of partial results of the decode kernel by one thread; it computes what ``partial.merge`` does.

    Parameters
    ----------
    dtype, head_dim
        Of the outputs.
    outputs, lse
        The addresses of ``[parts, ..., head_dim]`` and of the log-sum-exp, ``[parts, ...]`` in float32, both contiguous.
    parts, rows
        How many parts there are, and how many rows each of them has.
    """

    def __init__(self, dtype: torch.dtype, head_dim: int, outputs: int, lse: int, parts: int, rows: int) -> None:
        cpu_vectors = vectors.host()
        assert cpu_vectors is not None  # decode.plan_for has looked
        spec = MergeSpec(Rows(cpu_vectors, KINDS[dtype], head_dim))
        self.kernel, self._space = kernel_cache.address(spec), ctypes.create_string_buffer(spec.space_bytes)
        space = ctypes.addressof(self._space)
        self._arguments = (ctypes.c_int64 * len(merge_kernel.FIELDS))(outputs, lse, 0, space, parts, rows)
        self.address = ctypes.addressof(self._arguments)

    def into(self, out: int) -> None:
        """Set the address to which the merged output is written, a contiguous ``[..., head_dim]``."""
        self._arguments[2] = out


@cache
def _team_region() -> int:
    return kernel_cache.address(openmp_regions.TeamRegion())


def _strides(tensor: Tensor, element_bytes: int) -> tuple[int, int, int]:
    """Return the bytes from one sequence, head and row to the next."""
    *batch, head, row, _ = tensor.stride()
    return batch[0] * element_bytes if batch else 0, head * element_bytes, row * element_bytes


def _mask_fields(mask: Tensor) -> tuple[int, ...]:
    element_bytes = mask.element_size()
    return (*_strides(mask, element_bytes), mask.stride(-1) * element_bytes, _MASK_KINDS[mask.dtype])


@cache
def _compiled_kernel(dtype: torch.dtype, head_dim: int, query_rows: int) -> _CompiledKernel:
    cpu_vectors = vectors.host()
    assert cpu_vectors is not None  # decode.plan_for has looked
    kind = Kind.BFLOAT16_PAIRS if dtype is torch.bfloat16 and cpu_vectors.pairs else KINDS[dtype]
    return _CompiledKernel(DecodeSpec.of(Rows(cpu_vectors, kind, head_dim), query_rows), query_rows)
