"""What ``torch.autocast`` makes of the arguments of attention, and how a thread takes over the settings of another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor


def dtype() -> torch.dtype | None:
    """Return the dtype that autocast computes in on the CPU; None where it is off."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def cast(tensor: Tensor) -> Tensor:
    """Return an argument of attention as autocast casts it: numbers on the CPU that are narrower than float64 get autocast's dtype.

    Source: ``lower_precision_fp``, which torch's aten/src/ATen/autocast_mode.cpp gives to ``scaled_dot_product_attention``.
    """
    wanted = result(tensor.dtype) if tensor.is_cpu and tensor.is_floating_point() else tensor.dtype
    return tensor if wanted == tensor.dtype else tensor.to(wanted)


def result(given: torch.dtype) -> torch.dtype:
    """Return the dtype of the output of attention on the CPU, where its arguments have the floating-point dtype `given`."""
    return given if given == torch.float64 else dtype() or given


class Settings:
    """The settings that the calling thread has for its operators: gradients, inference mode and autocast."""

    def __init__(self) -> None:
        self._gradients, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._dtype = dtype()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the same settings hold on another thread, which calls this."""
        casting = nullcontext() if self._dtype is None else torch.autocast("cpu", self._dtype)
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._gradients), casting:
            yield
