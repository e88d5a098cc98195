"""Commands that are printed, so that they can be pasted where they were printed.

Limits: a shell's aliases and functions are not seen. A page or a file keeps the command of the folder that it was made from.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

OWN = (
    "numa-lab",
    "python",
)  # this environment's programs, which a shell finds under other names where it is not activated


def to_paste(*words: str | Path) -> str:
    """A command for the shell and the working directory that this process was started from.

    The first word that names a program of this environment becomes what that shell calls it: its name, or its path where the
    name means nothing there, or something else. Paths stay as they were given: they may have been typed in another folder.
    """
    told = [str(word) for word in words]
    own = next((place for place, word in enumerate(told) if word in OWN), None)
    if own is not None:
        told[own : own + 1] = _program(told[own])
    return shlex.join(told)


def to_install(package: str) -> str:
    """The lines that install a system package, of which one is typed; the rest of a line in a shell is a comment."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return (
        f"{sudo}apt-get install {package}   # Debian, Ubuntu\n"
        f"{sudo}dnf install {package}   # Fedora, RHEL\n"
        f"conda install -c conda-forge {package}   # conda"
    )


def near(path: Path) -> str:
    """A path as it is typed in the working directory, where it lies below that."""
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def _program(name: str) -> list[str]:
    """How a program of this environment is called: by its name, as this process was called, by its path, or as a module."""
    called, own = Path(sys.argv[0]), Path(sys.executable).with_name(name)
    as_called = called.name == name and len(called.parts) > 1
    found = shutil.which(name)
    if found and any(
        Path(found).parent.resolve() == ours.parent.resolve() for ours in (own, called) if ours.name == name
    ):
        return [name]
    if as_called:
        return [str(called)]
    if own.exists():
        return [near(own)]
    return [sys.executable, *(["-m", "numa_lab"] if name == "numa-lab" else [])]
