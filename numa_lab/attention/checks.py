"""Checks whether the arguments of an attention call fit together, with errors that name the shapes and the fix."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from numa_lab.attention.call import AttentionCall
from numa_lab.errors import InvalidInput, WrongType


def require_tensors(**arguments: Any) -> None:
    """Refuse arguments that are not tensors.

    Raises
    ------
    WrongType
        Naming the argument, what it is, and how to make a tensor of it.
    """
    for name, given in arguments.items():
        if not isinstance(given, Tensor):
            fix = f"torch.from_numpy({name})" if isinstance(given, np.ndarray) else f"torch.as_tensor({name})"
            fix = "" if given is None else f"; make one of it with {fix}"
            raise WrongType(f"{name} is {_type(given)}: expected a torch.Tensor{fix}")


def require_options(call: AttentionCall) -> None:
    """Refuse those types of a call's other arguments that torch's own attention refuses too.

    Raises
    ------
    WrongType
        Naming the argument, what it is, and what was expected.
    """
    for name, flag in (("is_causal", call.is_causal), ("enable_gqa", call.enable_gqa)):
        if type(flag) is not bool:
            raise WrongType(f"{name} is {_type(flag)} {flag!r}: expected True or False")
    if as_number("dropout_p", call.dropout_p) is None:
        raise WrongType("dropout_p is None: expected a number")
    as_number("scale", call.scale)


def as_number(name: str, given: object) -> float | None:
    """Return a number, or None, as torch takes them: a tensor without dimensions and gradients may stand for a number.

    Raises
    ------
    WrongType
        It is neither.
    """
    if given is None or type(given) is float:
        return given
    single = isinstance(given, Tensor) and given.dim() == 0 and not given.requires_grad and not given.is_complex()
    if not single and not isinstance(given, numbers.Real):
        raise WrongType(f"{name} is {_type(given)} {given!r}: expected a number")
    return float(given)  # type: ignore[arg-type]


def _type(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def check(call: AttentionCall) -> None:
    """Refuse a call of ``gqa_attention`` whose arguments don't fit together; compiled code trusts those that passed.

    Raises
    ------
    InvalidInput
        Shapes, dtypes or devices don't fit together.
    """
    query, key, value, attn_mask, dropout_p, is_causal, _, enable_gqa = call
    _check_tensors(query, key, value)
    leading = _check_heads(query, key, value, enable_gqa)
    if attn_mask is not None:
        _check_mask(attn_mask, (*leading, query.size(-2), key.size(-2)), query, is_causal)
    if not 0 <= dropout_p <= 1:
        raise InvalidInput(f"dropout_p={dropout_p}: expected a share between 0 and 1")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise InvalidInput(
            f"query is {query.dtype}, key {key.dtype} and value {value.dtype}: expected one floating-point dtype; "
            "convert with .to(dtype)"
        )
    if not query.device == key.device == value.device:
        raise InvalidInput(
            f"query is on {query.device}, key on {key.device} and value on {value.device}: expected one device; "
            "move with .to(device)"
        )
    if min(query.dim(), key.dim(), value.dim()) < 2 or query.size(-1) != key.size(-1) or key.size(-2) != value.size(-2):
        raise InvalidInput(
            f"{_shapes(query, key, value)}: expected [..., q_heads, q_len, head_dim] and twice [..., kv_heads, kv_len, "
            "head_dim], with one head_dim for query and key and one kv_len for key and value"
        )


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """Return the output's dimensions in front of q_len, after broadcasting those of the batch as torch does."""
    last = -2
    if enable_gqa:
        last = -3
        if min(query.dim(), key.dim(), value.dim()) < 3:
            raise InvalidInput(
                f"{_shapes(query, key, value)}: enable_gqa=True expects a dimension of heads, third from last"
            )
        q_heads, kv_heads = query.size(-3), key.size(-3)
        if kv_heads != value.size(-3) or not q_heads or not kv_heads or q_heads % kv_heads:
            raise InvalidInput(
                f"{_shapes(query, key, value)}: {q_heads} query heads with {kv_heads} KV heads in key and {value.size(-3)} in value: "
                "enable_gqa=True expects as many in key as in value, and a multiple of them in query"
            )
    leading = query.shape[:last]
    if not leading == key.shape[:last] == value.shape[:last]:
        try:
            leading = torch.broadcast_shapes(leading, key.shape[:last], value.shape[:last])
        except RuntimeError as error:
            fix = "give all three the same batch"
            if not enable_gqa and query.dim() > 2 and query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
                fix = "set enable_gqa=True to let a group of query heads share a KV head"
            shapes = _shapes(query, key, value)
            raise InvalidInput(f"{shapes}: the dimensions in front of the last {-last} don't match; {fix}") from error
    return (*leading, query.size(-3)) if enable_gqa else tuple(leading)


def _check_mask(mask: Tensor, scores: tuple[int, ...], query: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise InvalidInput(
            "attn_mask together with is_causal=True: expected one of them; put the causal part into the mask "
            "(mask & torch.ones(q_len, kv_len, dtype=torch.bool).tril() for a boolean one)"
        )
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.device != query.device:
        raise InvalidInput(
            f"attn_mask is {mask.dtype} on {mask.device}: expected torch.bool (True: may look) or {query.dtype} "
            f"(added to the scores) on {query.device}; convert with .to(device, dtype)"
        )
    padded = (1,) * (len(scores) - mask.dim()) + tuple(mask.shape)
    fits = len(padded) == len(scores) and all(own in (1, full) for own, full in zip(padded, scores, strict=True))
    if mask.dim() < 2 or not fits:
        raise InvalidInput(
            f"attn_mask {tuple(mask.shape)}: expected at least two dimensions that broadcast to "
            f"[..., q_heads, q_len, kv_len] = {scores}"
        )


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
