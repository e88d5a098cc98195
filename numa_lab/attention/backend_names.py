"""Names of the backends of ``gqa_attention``, for those who plan and don't load torch."""

from __future__ import annotations

import difflib

from numa_lab.errors import InvalidInput

AUTO = "auto"
BACKENDS = ("numba", "torch", "torch-folded", "guide")


def require_backend(name: str) -> None:
    """Refuse what is no backend.

    Raises
    ------
    InvalidInput
        Naming those that there are.
    """
    if name not in (AUTO, *BACKENDS):
        close = difflib.get_close_matches(str(name), (AUTO, *BACKENDS), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InvalidInput(f"backend {name!r}: {hint}expected {AUTO} or one of {', '.join(BACKENDS)}")
