"""Whether raw addresses of tensors may be read: the one predicate in front of all compiled code.

Compiled code sees numbers in memory and nothing else. A tensor may mean something else than what lies there (a view with the
other sign, a batch of ``vmap``, a fake), and somebody may want to see the operators (a tracer, a dispatch mode, forward AD). torch
keeps both in sets of dispatch keys, one of each tensor and one of each thread, by which it finds its own kernels. So what is
allowed is named here, and whatever torch knows or will know beside it is torch's to compute.
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
    """All dispatch keys but these, as a mask."""
    bits = 0
    for key in allowed:
        bits |= DispatchKeySet(key).raw_repr()
    return ~bits


# Dense numbers in the CPU's memory; tensors of inference mode have no more than the first and the last.
_OTHER = _other_than(DispatchKey.CPU, DispatchKey.AutogradCPU, DispatchKey.ADInplaceOrView, DispatchKey.AutocastCPU)
_OTHER_OF_THREAD = _other_than(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView)


def readable(*tensors: object) -> bool:
    """Whether these are numbers in the CPU's memory as they are, and nobody but the caller sees how they are computed with.

    Limits: gradients and autocast are the caller's to look after, and so are dtypes and strides. What is no tensor is not readable.
    """
    if watched(*tensors):
        return False
    bits = 0
    for one in tensors:
        if not isinstance(one, Tensor):
            return False
        bits |= _bits(_keys(one))
    return not bits & _OTHER


def as_stored(tensor: Tensor) -> bool:
    """Whether a tensor is what lies in the CPU's memory: dense, on no other device, and no view that changes its numbers."""
    return not _bits(_keys(tensor)) & _OTHER


def writable(out: Tensor) -> bool:
    """Whether numbers may be written to where a tensor lies, without torch's knowledge."""
    return as_stored(out) and not (out.requires_grad and torch.is_grad_enabled())


def watched(*values: Any) -> bool:
    """Whether somebody else decides what operators on these mean: a mode, a tracer, a transform, or the type of one of them."""
    return (
        bool(_bits(_included()) & _OTHER_OF_THREAD)
        or forward_ad._current_level >= 0
        or (_overridden(*values) and not _for_new_tensors_only(values))
    )


def usual(*values: Any) -> bool:
    """Whether these are torch's own tensors, and no subclass or stand-in that has its own mind about functions."""
    return all(type(one) in (Tensor, torch.nn.Parameter) for one in values)


def unwatched(*values: Any) -> bool:
    """Whether they are not ``watched``, but for what a guard (``guard``) compares anyway: asked in a fifth of the time."""
    return not (
        _dispatch_modes()
        or forward_ad._current_level >= 0
        or (_overridden(*values) and not _for_new_tensors_only(values))
    )


def _for_new_tensors_only(values: tuple[Any, ...]) -> bool:
    """Whether ``torch.set_default_device`` alone overrides functions: those that make tensors, and attention is none of them."""
    modes = [torch._C._get_function_stack_at(place) for place in range(_function_modes())]
    return (
        bool(modes)
        and all(isinstance(mode, DeviceContext) for mode in modes)
        and all(usual(one) or not hasattr(one, "__torch_function__") for one in values)
    )


def guard(*tensors: Tensor, any_rows: Collection[int] = ()) -> Same:
    """What tells whether other tensors are to torch what these are now, but for their addresses.

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
    sizes: list[list[int | None]] = [[*one.shape] for one in tensors]
    for place in any_rows:
        sizes[place][-2] = None
    try:
        guards: Any = importlib.import_module("torch._C._dynamo.guards")
        strides = [[*one.stride()] for one in tensors]
        same: Same = guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return same if same(*tensors) and not same(torch._neg_view(tensors[0]), *tensors[1:]) else None
    except (ImportError, AttributeError, TypeError):  # they are no public interface of torch
        return None


def _described(tensors: Sequence[Tensor], any_rows: Collection[int]) -> tuple[object, ...]:
    """The same for any torch."""
    shapes = [(*one.shape[:-2], one.shape[-1]) if at in any_rows else one.shape for at, one in enumerate(tensors)]
    return (
        _bits(_excluded()), *shapes,
        *((type(one), _bits(_keys(one)), one.dtype, one.stride(), one.requires_grad) for one in tensors),
    )  # fmt: skip
