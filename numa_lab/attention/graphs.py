"""The operator ``numa_lab::gqa_attention``, which stands for attention in graphs of ``torch.compile`` and ``torch.export``.

Graphs can't look into compiled kernels. They know the shape of what the operator returns, and call it when they run. A call of the operator
costs some 15 us more than one of ``gqa_attention``, which therefore never goes through the operator outside of a graph. Whatever keeps
state (caches, pools, placements) is called between graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from numa_lab.attention.call import AttentionCall

P = ParamSpec("P")
T = TypeVar("T")
NAME = "numa_lab::gqa_attention"
SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, float? scale=None, "
    "bool enable_gqa=False) -> Tensor"
)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None, bool], Tensor]


def between_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that ``torch.compile`` calls between two graphs, without looking into it.

    ``torch.compiler.disable`` does the same, but loads the compiler, which takes a second or more, also where nothing is compiled.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            function_alone: Callable[P, T] = torch.compiler.disable(function)
            return function_alone(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def define(attention: Attention) -> None:
    """Define the operator, which calls `attention` on the CPU.

    Limits: no gradients, no dropout. The output has the layout that torch's own gives it on the CPU.
    """

    def kernel(query: Tensor, *others: Any) -> Tensor:
        output = attention(query, *others)
        promised = _promised(query, output)
        strides = zip(output.shape, output.stride(), promised.stride(), strict=True)
        return output if all(size < 2 or own == other for size, own, other in strides) else promised.copy_(output)

    operator = torch.library.custom_op(NAME, kernel, mutates_args=(), device_types="cpu", schema=SCHEMA)
    operator.register_fake(lambda query, *others: _promised(query, _torch(query, *others)))


def serves(call: AttentionCall) -> bool:
    """Return whether a graph may hold the operator: transforms, gradients, dropout, subclasses and other devices are torch's own."""
    tensors = call.tensors
    if call.dropout_p or isinstance(call.scale, Tensor):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if has_torch_function(tensors) or any(is_traceable_wrapper_subclass(tensor) for tensor in tensors):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(tensor.is_cpu and tensor.layout == torch.strided and not tensor.is_nested for tensor in tensors)


def _torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call torch's own, which knows what fits together and which shape the output has, also for tensors without numbers."""
    return scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _promised(query: Tensor, output: Tensor) -> Tensor:
    """Return memory for an output, in the layout of the query where it has the query's shape and the query's rows are contiguous."""
    alike = output.shape == query.shape and query.stride(-1) == 1
    return torch.empty_like(query) if alike else query.new_empty(output.shape)
