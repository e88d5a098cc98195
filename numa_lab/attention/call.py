"""The arguments of one call of attention as one value, which checks, plans and backends take as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class AttentionCall(NamedTuple):
    """The arguments of one call of ``gqa_attention``, which says what each of them means.

    It is a named tuple because most decode steps make one: a frozen dataclass takes 0.65 us to make, and this 0.23 us.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The query, the key, the value and, where there is one, the mask."""
        return self[:3] if self.attn_mask is None else self[:4]  # type: ignore[return-value]

    @property
    def named_tensors(self) -> dict[str, Tensor]:
        """The same tensors by the names of the arguments."""
        return dict(zip(self._fields, self.tensors, strict=False))

    def converted(self, convert: Callable[[Tensor], Tensor]) -> AttentionCall:
        """Return the same call with each of its tensors converted."""
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = self
        mask = None if attn_mask is None else convert(attn_mask)
        return AttentionCall(
            convert(query), convert(key), convert(value), mask, dropout_p, is_causal, scale, enable_gqa
        )
