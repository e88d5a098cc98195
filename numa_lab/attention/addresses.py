"""Whether raw addresses of tensors may be read; all compiled code asks here first.

Compiled code sees numbers in memory and nothing else. But a tensor may mean something else than what lies there (a view with the
other sign, a batch of ``vmap``, a fake), and others may want to see the operators (a tracer, a dispatch mode, forward AD). torch
keeps both in sets of dispatch keys, one for each tensor and one for each thread, by which it finds its own kernels. The keys that are
allowed are named here; where there is any other, also one that a later torch will have, torch computes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

Same = Callable[..., bool]

_keys, _bits = torch._C._dispatch_keys, DispatchKeySet.raw_repr
_included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
_overridden = torch._C._has_torch_function_variadic
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def _other_than(*allowed: DispatchKey) -> int:
    """Return all dispatch keys but these, as a mask."""
    bits = 0
    for key in allowed:
        bits |= DispatchKeySet(key).raw_repr()
    return ~bits


# Dense numbers in the CPU's memory; tensors of inference mode have no more than the first and the last.
_OTHER = _other_than(DispatchKey.CPU, DispatchKey.AutogradCPU, DispatchKey.ADInplaceOrView, DispatchKey.AutocastCPU)
_OTHER_OF_THREAD = _other_than(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView)


def readable(*tensors: object) -> bool:
    """Return whether all of these are numbers in the CPU's memory as they are, and nobody but the caller sees what is computed with them.

    Limits: the caller has to look after gradients and autocast, dtypes and strides. What is no tensor is not readable.
    """
    if watched(*tensors):
        return False
    bits = 0
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            return False
        bits |= _bits(_keys(tensor))
    return not bits & _OTHER


def as_stored(tensor: Tensor) -> bool:
    """Return whether a tensor is what lies in the CPU's memory: dense, on no other device, and no view that changes its numbers."""
    return not _bits(_keys(tensor)) & _OTHER


def writable(out: Tensor) -> bool:
    """Return whether numbers may be written to where a tensor lies, without torch's knowledge."""
    return as_stored(out) and not (out.requires_grad and torch.is_grad_enabled())


def watched(*values: Any) -> bool:
    """Return whether something else decides what operators on these mean: a mode, a tracer, a transform, or the type of one of them."""
    return (
        bool(_bits(_included()) & _OTHER_OF_THREAD)
        or forward_ad._current_level >= 0
        or (_overridden(*values) and not _for_new_tensors_only(values))
    )


def usual(*values: Any) -> bool:
    """Return whether these are torch's own tensors, and no subclasses or stand-ins that redefine functions."""
    return all(type(value) in (Tensor, torch.nn.Parameter) for value in values)


def unwatched(*values: Any) -> bool:
    """Return whether these are not ``watched``, except for what a guard (``guard``) compares anyway, in a fifth of the time."""
    return not (
        _dispatch_modes()
        or forward_ad._current_level >= 0
        or (_overridden(*values) and not _for_new_tensors_only(values))
    )


def _for_new_tensors_only(values: tuple[Any, ...]) -> bool:
    """Return whether only ``torch.set_default_device`` overrides functions; it changes those that make tensors, not attention."""
    modes = [torch._C._get_function_stack_at(place) for place in range(_function_modes())]
    return (
        bool(modes)
        and all(isinstance(mode, DeviceContext) for mode in modes)
        and all(usual(value) or not hasattr(value, "__torch_function__") for value in values)
    )


def guard(*tensors: Tensor, any_rows: Collection[int] = ()) -> Same:
    """Return a function that tells whether other tensors are to torch what these are now, except for their addresses.

    It compares types, dispatch keys together with the thread's, dtypes, sizes, strides and whether gradients are asked for: in
    one call by the guards of ``torch.compile``, where torch has them, and in five times as long by Python. Modes, forward AD and
    the settings of gradients and autocast are no part of it (``unwatched``).

    Parameters
    ----------
    *tensors
        At least two dimensions each.
    any_rows
        Places of those whose size in the second last dimension does not matter.
    """
    if same := _guard_of_torch(tensors, any_rows):
        return same
    now = _described(tensors, any_rows)
    return lambda *others: readable(*others) and _described(others, any_rows) == now


def _guard_of_torch(tensors: Sequence[Tensor], any_rows: Collection[int]) -> Same | None:
    sizes: list[list[int | None]] = [[*tensor.shape] for tensor in tensors]
    for place in any_rows:
        sizes[place][-2] = None
    try:
        guards: Any = importlib.import_module("torch._C._dynamo.guards")
        strides = [[*tensor.stride()] for tensor in tensors]
        same: Same = guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return same if same(*tensors) and not same(torch._neg_view(tensors[0]), *tensors[1:]) else None
    except (ImportError, AttributeError, TypeError):  # they are no public interface of torch
        return None


def _described(tensors: Sequence[Tensor], any_rows: Collection[int]) -> tuple[object, ...]:
    """Return what a guard compares, for any version of torch."""
    shapes = [
        (*tensor.shape[:-2], tensor.shape[-1]) if place in any_rows else tensor.shape
        for place, tensor in enumerate(tensors)
    ]
    return (
        _bits(_excluded()), *shapes,
        *(
            (type(tensor), _bits(_keys(tensor)), tensor.dtype, tensor.stride(), tensor.requires_grad) for tensor in tensors
        ),
    )  # fmt: skip
