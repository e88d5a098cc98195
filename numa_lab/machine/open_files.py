"""Compares the files that are needed with the number that this process may have open; pipes and shared tensors count among them.

Source: getrlimit(2), RLIMIT_NOFILE.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from numa_lab.errors import LimitReached

RESERVE = 32  # open files that are left to everything else


def require(count: int, what: str) -> None:
    """Refuse to open so many files where the limit leaves fewer.

    Raises
    ------
    LimitReached
        The message holds the limit, how many are open, and the fix.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    with explained(what):
        used = sum(int(number) < limit for number in os.listdir("/proc/self/fd"))
    if used + count + RESERVE > limit:
        raise LimitReached(
            f"{what} needs {count} open files beside the {used} that are open: {_fix(used + count + RESERVE)}"
        )


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Give an error of the block that comes from too many open files a message with the fix.

    Raises
    ------
    LimitReached
        In place of the ``OSError``.
    """
    try:
        yield
    except OSError as error:
        refuse(error, what)
        raise


def refuse(error: OSError, what: str) -> None:
    """Raise an error that says the fix where another came because too many files are open; other errors are left alone.

    Raises
    ------
    LimitReached
        Too many files are open, in this process or on the machine.
    """
    if error.errno == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise LimitReached(f"{what}: {os.strerror(error.errno)}. {_fix(2 * limit)}") from error
    if error.errno == errno.ENFILE:
        raise LimitReached(f"{what}: {os.strerror(error.errno)}. Raise sysctl fs.file-max") from error


def _fix(wanted: int) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or wanted <= hard
    inside = f"`ulimit -n {wanted}` in the shell that starts it" if enough else f"as root (the hard limit is {hard})"
    return (
        f"this process may have {soft} files open. Raise the limit: {inside}, `docker run --ulimit nofile={wanted}:{wanted} IMAGE`, or "
        f"LimitNOFILE={wanted} in a systemd unit"
    )
