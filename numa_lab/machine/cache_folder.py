"""Where is kept what can be made again: compiled kernels, and rankings of nodes.

Nothing of it is needed. Where there is no such folder, as for a user without a home, it is made again by each process.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

NAME = "numa_lab"


def path() -> Path | None:
    """The folder for this user; None where nothing tells one, as for a user id without HOME and without an account.

    It need not exist, and need not be writable: ``unusable`` tells.
    """
    try:
        found = platformdirs.user_cache_path(NAME)
    except RuntimeError:  # neither HOME nor XDG_CACHE_HOME is set, and the user id is in no passwd
        return None
    return found if found.is_absolute() else None  # older platformdirs then leave a ~ in front


def unusable() -> str:
    """Why nothing can be kept, as a phrase; empty where it can. Nothing is written to find out."""
    folder = path()
    if folder is None:
        return "there is no HOME, and no account of this user id that names one"
    at = folder
    while not os.path.lexists(at) and at != at.parent:  # what is missing would be made in the first that exists
        at = at.parent
    if not at.is_dir():
        return f"{at} is no folder"
    if not os.access(at, os.R_OK | os.W_OK | os.X_OK):
        return f"{at} can't be written"
    return ""
