"""Attention of other libraries, for a benchmark that compares kernels: what each of them offers to a decode loop on CPUs.

A maker does once what a user does once (builds a session, compiles) and gives what computes attention of the query over
the K and V of one layer, without a mask. The libraries read K and V where they lie; what had to be copied is said. Two of
them append the new token's row to the cache: here it is the last row, which is written as it was; they would mask new tokens
from each other, so several of them pass as further heads. What a call gives may be overwritten by the next one.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from numa_lab.attention.shapes import AttentionShape

Layers = list[tuple[Tensor, Tensor]]  # K and V of each: [batch, kv_heads, kv_len, head_dim]
Peer = Callable[[int], Tensor]  # attention over the layer of this index: [batch, q_heads, q_len, head_dim]
Maker = Callable[[AttentionShape, Layers, Tensor, int], Peer]

COPY_BYTES = 256 << 20  # of K and V, where they have to be copied: more than a cache holds
PAGE_ROWS = 32  # of a page of OpenVINO's cache
GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
GGML_ALIGNMENT = 32
GGML_PRECISION_FLOAT32 = 10  # what llama.cpp asks for


class Unsupported(Exception):
    """The library isn't here, or does not serve this shape or dtype: why, in one line."""


def onnxruntime(shape: AttentionShape, layers: Layers, query: Tensor, threads: int) -> Peer:
    """ONNX Runtime: its operator GroupQueryAttention, with past and present in one buffer."""
    onnx, ort = _installed("onnx"), _installed("onnxruntime")
    helper, types = onnx.helper, onnx.TensorProto
    element = {"float32": types.FLOAT, "float16": types.FLOAT16, "bfloat16": types.BFLOAT16}[shape.dtype]
    heads = {"num_heads": shape.q_heads * shape.q_len, "kv_num_heads": shape.kv_heads}
    query_row, key_row = ([shape.batch, 1, n * shape.head_dim] for n in heads.values())
    cache = [shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim]
    inputs = {
        "query": (element, query_row),
        "key": (element, key_row),
        "value": (element, key_row),
        "past_key": (element, cache),
        "past_value": (element, cache),
        "last_rows": (types.INT32, [shape.batch]),
        "kv_len": (types.INT32, [1]),
    }
    outputs = {"output": (element, query_row), "present_key": (element, cache), "present_value": (element, cache)}
    node = helper.make_node("GroupQueryAttention", list(inputs), list(outputs), domain="com.microsoft", **heads)
    infos = [[helper.make_tensor_value_info(name, *of) for name, of in named.items()] for named in (inputs, outputs)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "decode", *infos), opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    output = torch.empty_like(query)
    last_rows = torch.full((shape.batch,), shape.kv_len - 1, dtype=torch.int32)
    kv_len = torch.full((1,), shape.kv_len, dtype=torch.int32)
    calls = []
    with _refusals():
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for key, value in layers:
            binding = session.io_binding()
            tensors = query, _last_row(key), _last_row(value), key, value, last_rows, kv_len
            for (name, of), tensor in zip(inputs.items(), tensors, strict=True):
                binding.bind_input(name, "cpu", 0, *of, tensor.data_ptr())
            for (name, of), tensor in zip(outputs.items(), (output, key, value), strict=True):
                binding.bind_output(name, "cpu", 0, *of, tensor.data_ptr())
            calls.append((binding, tensors))  # a binding knows addresses only
        session.run_with_iobinding(calls[0][0])

    def run(layer: int) -> Tensor:
        session.run_with_iobinding(calls[layer][0])
        return output

    return run


def openvino(shape: AttentionShape, layers: Layers, query: Tensor, threads: int) -> Peer:
    """OpenVINO: the paged attention that its LLM serving decodes with, the fastest of what its CPU plugin has.

    It comes as an operator that Python only knows by a private name. ScaledDotProductAttention was slower in each form:
    with its cache in a state of the model (which grows by a row in each call), and by a factor of four or more without.

    Each KV head is a sequence of its own here, so that K and V are pages as they lie; measured, that is as fast as pages
    which hold all heads. Only where kv_len fills no whole pages, some layers are copied, padded.
    """
    ov = _installed("openvino")
    types = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16, "float16": ov.Type.f16}
    type_ = types[shape.dtype]
    sequences, pages = shape.batch * shape.kv_heads, -(-shape.kv_len // PAGE_ROWS)
    output = torch.empty_like(query)

    with _refusals():
        compiled = _paged_attention(ov, shape, type_, sequences, pages, threads)
        counts = [
            np.full(sequences, shape.kv_len - 1, np.int32),  # rows before the new one
            np.arange(sequences + 1, dtype=np.int32),  # where each sequence's queries begin
            np.arange(sequences * pages, dtype=np.int32),  # its pages
            np.arange(sequences + 1, dtype=np.int32) * pages,  # and where their list begins
        ]
        calls = []
        padding = -shape.kv_len % PAGE_ROWS
        for key, value in _few(layers) if padding else layers:
            caches = [pad(tensor, (0, 0, 0, padding)) if padding else tensor for tensor in (key, value)]
            tensors = [tensor.view(sequences, -1) for tensor in (query, _last_row(key), _last_row(value))]
            tensors += [cache.view(sequences * pages, 1, PAGE_ROWS, shape.head_dim) for cache in caches]
            request = compiled.create_infer_request()
            for i, tensor in enumerate(tensors):
                request.set_input_tensor(i, _openvino_tensor(ov, tensor, type_))
            for i, numbers in enumerate(counts):
                request.set_input_tensor(len(tensors) + i, ov.Tensor(numbers, shared_memory=True))
            request.set_output_tensor(0, _openvino_tensor(ov, output.view(sequences, -1), type_))
            calls.append((request, tensors, counts))  # of which it may know addresses only
        calls[0][0].infer(share_outputs=True)

    def run(layer: int) -> Tensor:
        calls[layer % len(calls)][0].infer(share_outputs=True)
        return output

    return run


def jax(shape: AttentionShape, layers: Layers, query: Tensor, threads: int) -> Peer:
    """JAX: ``jax.nn.dot_product_attention``, compiled by XLA; its threads are as many as the process may run on.

    Its heads come after the tokens. Turned inside of what is compiled, K and V need no copy, and XLA is no slower.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    library = _installed("jax")

    @library.jit  # type: ignore[untyped-decorator]
    def attention(query: Any, key: Any, value: Any) -> Any:
        turned = (tensor.swapaxes(1, 2) for tensor in (query, key, value))
        return library.nn.dot_product_attention(*turned).swapaxes(1, 2)

    with _refusals():
        own_query, *own = (library.dlpack.from_dlpack(tensor, copy=False) for tensor in (query, *sum(layers, ())))
        attention(own_query, *own[:2]).block_until_ready()

    def run(layer: int) -> Tensor:
        output = attention(own_query, *own[2 * layer : 2 * layer + 2]).block_until_ready()
        return torch.utils.dlpack.from_dlpack(output)

    return run


def flex(shape: AttentionShape, layers: Layers, query: Tensor, threads: int) -> Peer:
    """torch's flex_attention, compiled for this shape and number of threads, which takes seconds and a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.nn.attention.flex_attention import flex_attention

    torch.set_num_threads(threads)
    compile_: Any = torch.compile  # its types leave isolate_recompiles out, without which the ninth shape is refused
    attention = compile_(flex_attention, dynamic=False, fullgraph=True, isolate_recompiles=True)

    def run(layer: int) -> Tensor:
        output = attention(query, *layers[layer], enable_gqa=shape.group > 1)
        assert isinstance(output, Tensor)
        return output

    with _refusals():
        get_cpp_compiler()
        run(0)
    return run


def ggml(shape: AttentionShape, layers: Layers, query: Tensor, threads: int) -> Peer:
    """ggml, the library under llama.cpp: its flash attention, as the wheel of xllamacpp exports it; the output is float32.

    The wheel is built for AVX2, FMA and F16C: ggml uses no AVX-512 in it, whatever the CPU has (``ggml_cpu_has_avx512`` and
    ``ggml_cpu_has_avx512_bf16`` say 0), so a build of one's own may be faster. With float16 it also sums in float16.
    """
    library = Path(_installed("xllamacpp").__file__).with_name("xllamacpp.abi3.so")
    output = torch.empty(shape.batch, shape.q_len, shape.q_heads, shape.head_dim)
    query = query.float()
    if any(tensor.data_ptr() % GGML_ALIGNMENT for tensor in (query, output, *sum(layers, ()))):
        raise Unsupported(f"ggml wants tensors at addresses that are multiples of {GGML_ALIGNMENT}")
    with _refusals():
        c = _Ggml(library)
        backend = c.ggml_backend_cpu_init()
        c.ggml_backend_cpu_set_n_threads(backend, threads)
        size = len(layers) * (4 * c.ggml_tensor_overhead() + c.ggml_graph_overhead())
        context = c.ggml_init(_GgmlInitParams(size, None, True))  # describes tensors, holds none; lives as the process

    def place(described: int, tensor: Tensor) -> int:
        buffer = c.ggml_backend_cpu_buffer_from_ptr(tensor.data_ptr(), tensor.nbytes)
        c.ggml_backend_tensor_alloc(buffer, described, tensor.data_ptr())
        return described

    def described(tensor: Tensor, dtype: str) -> int:
        return place(c.ggml_new_tensor_4d(context, GGML_TYPES[dtype], *reversed(tensor.shape)), tensor)

    calls = []
    for key, value in layers:
        parts = described(query, "float32"), described(key, shape.dtype), described(value, shape.dtype)
        node = c.ggml_flash_attn_ext(context, *parts, None, 1 / math.sqrt(shape.head_dim), 0.0, 0.0)
        c.ggml_flash_attn_ext_set_prec(node, GGML_PRECISION_FLOAT32)
        graph = c.ggml_new_graph(context)
        c.ggml_build_forward_expand(graph, place(node, output))
        calls.append((graph, query, key, value))  # a graph knows addresses only

    def run(layer: int) -> Tensor:
        if c.ggml_backend_graph_compute(backend, calls[layer][0]):
            raise RuntimeError("ggml computed no attention")
        return output.transpose(1, 2)

    return run


PEERS: dict[str, Maker] = {"onnxruntime": onnxruntime, "openvino": openvino, "jax": jax, "flex": flex, "ggml": ggml}
LIBRARIES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("openvino",), "jax": ("jax",), "ggml": ("xllamacpp",)}


def missing(name: str) -> str:
    """What to do to have a peer that isn't here; empty where it is, and for backends of this project."""
    if not all(map(importlib.util.find_spec, LIBRARIES.get(name, ()))):
        return "not installed; .venv/bin/pip install --constraint constraints.txt --editable '.[bench]'"
    if name == "flex" and not shutil.which(os.environ.get("CXX", "g++")):
        return "no C++ compiler; apt-get install g++ | dnf install gcc-c++"
    return ""


def _installed(name: str) -> Any:
    """The module of a library that a benchmark may do without."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unsupported(f"{name} can't be imported: {error}") from error


@contextmanager
def _refusals() -> Iterator[None]:
    """What a library says against a shape or dtype becomes the reason why it is left out."""
    try:
        yield
    except Exception as error:
        raise Unsupported(textwrap.shorten(str(error), 500)) from error


def _last_row(cache: Tensor) -> Tensor:
    """The newest token of each head, as a tensor of its own."""
    return cache[:, :, -1:].contiguous()


def _few(layers: Layers) -> Layers:
    """So many layers as are copied, where they have to be."""
    return layers[: COPY_BYTES // (2 * layers[0][0].nbytes) + 1]


def _openvino_tensor(ov: Any, tensor: Tensor, type_: Any) -> Any:
    """The same memory for OpenVINO; numpy has no bfloat16, so its bytes are passed."""
    return ov.Tensor(tensor.view(torch.uint8).view(-1).numpy(), ov.Shape(list(tensor.shape)), type_)


def _paged_attention(ov: Any, shape: AttentionShape, type_: Any, sequences: int, pages: int, threads: int) -> Any:
    """Compile OpenVINO's paged attention over sequences of one KV head each; the cache keeps the dtype."""
    op, paged = importlib.import_module("openvino.opset13"), importlib.import_module("openvino.op")
    page = [sequences * pages, 1, PAGE_ROWS, shape.head_dim]
    rows = [shape.group * shape.q_len * shape.head_dim, shape.head_dim, shape.head_dim]
    parameters = [op.parameter([sequences, width], type_) for width in rows]
    parameters += [op.parameter(page, ov.Type.dynamic) for _ in range(2)]  # what KV_CACHE_PRECISION says
    parameters += [op.parameter([n], ov.Type.i32) for n in (sequences, sequences + 1, sequences * pages, sequences + 1)]
    none = {kind: np.zeros(0, kind) for kind in (np.int32, np.float32, np.uint8)}
    constants = [
        np.float32(1 / math.sqrt(shape.head_dim)),
        np.int32(0),  # no sliding window
        none[np.float32],  # alibi
        np.int32(shape.kv_len),
        np.zeros(sequences, np.int32),  # no scores are asked for
        *(none[np.int32], none[np.int32], none[np.float32]),  # rotation of the cache
        *(none[np.float32], np.int32(64), np.int32(8)),  # sparse prefill
        none[np.float32],  # sinks
        *(np.int32(0), none[np.int32], none[np.int32], none[np.int32]),  # eviction
        none[np.int32],  # token types
        *(none[np.uint8], none[np.int32]),  # bias among the queries
    ]
    node = paged._PagedAttentionExtension([part.output(0) for part in (*parameters, *map(op.constant, constants))])
    about = node.get_rt_info()
    about["num_k_heads"] = about["num_v_heads"] = 1
    about["k_head_size"] = about["v_head_size"] = shape.head_dim
    model = ov.Model([node.output(0)], parameters)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": type_}
    # Where the CPU can't compute in the dtype, the cache may have it all the same.
    for precision in (type_, ov.Type.f32):
        with suppress(RuntimeError):
            compiled = ov.Core().compile_model(model, "CPU", settings | {"INFERENCE_PRECISION_HINT": precision})
            if compiled.input(3).element_type == type_:
                return compiled
    raise Unsupported(f"its CPU plugin keeps no cache of {shape.dtype} here")


class _GgmlInitParams(ctypes.Structure):
    """ggml_init_params: size of the memory of a context, that memory, and whether tensors have none."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Ggml:
    """The functions of ggml that are used, with the signatures of ggml.h and ggml-backend.h of 0.26."""

    def __init__(self, library: Path) -> None:
        pointer, size, integer, real = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
        self._library = ctypes.CDLL(str(library))
        signatures: tuple[tuple[Any, ...], ...] = (
            ("ggml_backend_cpu_buffer_from_ptr", pointer, pointer, size),
            ("ggml_backend_cpu_init", pointer),
            ("ggml_backend_cpu_set_n_threads", None, pointer, integer),
            ("ggml_backend_graph_compute", integer, pointer, pointer),
            ("ggml_backend_tensor_alloc", integer, pointer, pointer, pointer),
            ("ggml_build_forward_expand", None, pointer, pointer),
            ("ggml_flash_attn_ext", pointer, *[pointer] * 5, real, real, real),
            ("ggml_flash_attn_ext_set_prec", None, pointer, integer),
            ("ggml_graph_overhead", size),
            ("ggml_init", pointer, _GgmlInitParams),
            ("ggml_new_graph", pointer, pointer),
            ("ggml_new_tensor_4d", pointer, pointer, integer, *[ctypes.c_int64] * 4),
            ("ggml_tensor_overhead", size),
        )
        for name, result, *arguments in signatures:
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)
