"""Numba and llvmlite as they are installed here: what is compiled by them says why it can't be, and which versions are tested."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata

from numa_lab.errors import CompilerUnusable, NumaLabError

TESTED = ("numba==0.68.1", "llvmlite==0.50.0", "numpy==2.4.6")  # as constraints.txt has them

# They are imported now, and not in a call that Ctrl-C may end, because half of an import can't be repeated. Where they can't be imported,
# the first call that needs them says so.
with suppress(Exception):
    import numba  # noqa: F401


@contextmanager
def needed() -> Iterator[None]:
    """Say what to install where the block can't import Numba or llvmlite, or where they can't compile what it asks for.

    Raises
    ------
    CompilerUnusable
        In place of any other error, which is its cause. Errors of numa_lab, timeouts, and a want of memory are raised as they are.
    """
    try:
        yield
    except (NumaLabError, MemoryError, TimeoutError):  # the last is what a signal's handler may raise in between
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        here = ", ".join(f"{name} {_version(name)}" for name in _NAMES)
        raise CompilerUnusable(
            f"{here} can't compile for numa_lab here ({reason}); type: pip install {' '.join(TESTED)}   # the versions that are tested"
        ) from error


_NAMES = tuple(requirement.partition("==")[0] for requirement in TESTED)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"
