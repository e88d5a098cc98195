"""Writes commands so that they can be pasted where they are printed.

Limits: a shell's aliases and functions are not seen. A page or a file keeps the command of the folder that it was made from.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

# Programs of this environment, which a shell finds under other names where the environment is not activated.
OWN = ("numa-lab", "python")


def to_paste(*words: str | Path) -> str:
    """Return a command for the shell and the working directory in which this process was started.

    The first word that names a program of this environment becomes the name by which that shell finds it, or its path where the shell
    finds nothing, or another program, under the name. Other paths stay as they are given, since a user may have typed them elsewhere.
    """
    command = [str(word) for word in words]
    own = next((place for place, word in enumerate(command) if word in OWN), None)
    if own is not None:
        command[own : own + 1] = _program(command[own])
    return shlex.join(command)


def to_install(package: str) -> str:
    """Return the lines that install a system package, of which one is typed; a shell takes what follows a # for a comment."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return (
        f"{sudo}apt-get install {package}   # Debian, Ubuntu\n"
        f"{sudo}dnf install {package}   # Fedora, RHEL\n"
        f"conda install -c conda-forge {package}   # conda"
    )


def near(path: Path) -> str:
    """Return a path as it is typed in the working directory, if it lies below that; otherwise the path itself."""
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def _program(name: str) -> list[str]:
    """How a program of this environment is called: by its name, as this process was called, by its path, or as a module."""
    called, own = Path(sys.argv[0]), Path(sys.executable).with_name(name)
    as_called = called.name == name and len(called.parts) > 1
    in_path = shutil.which(name)
    if in_path and any(
        Path(in_path).parent.resolve() == ours.parent.resolve() for ours in (own, called) if ours.name == name
    ):
        return [name]
    if as_called:
        return [str(called)]
    if own.exists():
        return [near(own)]
    return [sys.executable, *(["-m", "numa_lab"] if name == "numa-lab" else [])]
