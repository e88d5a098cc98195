"""All that kernels use of Numba and llvmlite beyond what their documentation promises: the one place to mend when these change.

Everything else that kernels use is documented: ``numba.cfunc``, ``njit``, ``types``, ``from_dtype`` and ``extending.intrinsic``, and the
builder, the passes and the execution engine of llvmlite. If a name is missing here, importing this module fails, and
``numa_lab.attention.kernel_cache`` tells why nothing can be compiled.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core.cgutils import alloca_once, alloca_once_value, for_range, for_range_slice, get_or_insert_function

__all__ = [
    "BFLOAT", "alloca_once", "alloca_once_value", "for_range", "for_range_slice", "get_or_insert_function", "no_value", "value_type",
]  # fmt: skip


class _BFloat(ir.HalfType):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()  # llvmlite's float types are one object each; without its own this one would be half
BFLOAT = _BFloat()


def no_value(context: Any) -> Any:
    """Return what the generator of an intrinsic without a result has to return, given Numba's target context."""
    return context.get_dummy_value()


def value_type(context: Any, type_: Any) -> Any:
    """Return the type in LLVM of values of a type of Numba's, given Numba's target context."""
    return context.get_value_type(type_)
