"""Finds the folder that keeps compiled kernels and rankings of nodes.

Nothing in it is needed. Where there is no such folder, as for a user without a home, each process makes its contents again.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

NAME = "numa_lab"


def path() -> Path | None:
    """Return the folder of this user; None where nothing names one, as for a user id without HOME and without an account.

    It need not exist, and need not be writable; ``unusable`` says whether it can be used.
    """
    try:
        folder = platformdirs.user_cache_path(NAME)
    except RuntimeError:  # neither HOME nor XDG_CACHE_HOME is set, and the user id is in no passwd
        return None
    return (
        folder if folder.is_absolute() else None
    )  # older releases of platformdirs leave a ~ in front where there is no home


def unusable() -> str:
    """Return a clause that says why nothing can be kept; empty where it can. Nothing is written to find out."""
    folder = path()
    if folder is None:
        return "there is no HOME, and no account of this user id that names one"
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:  # missing folders would be made in this one
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is no folder"
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        return f"{existing} can't be written"
    return ""
