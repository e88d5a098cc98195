"""Where the project's notebooks lie: beside the package in a clone, within it as a wheel installs it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from numa_lab.errors import InvalidInput

_PACKAGE = Path(__file__).parents[1]


def clone() -> Path | None:
    """Return the folder of the clone that this package is part of; None where a wheel was installed."""
    return None if (_PACKAGE / "notebooks").is_dir() else _PACKAGE.parent


def folder() -> Path:
    """Return the folder that holds the project's notebooks."""
    return (clone() or _PACKAGE) / "notebooks"


def find(notebook: str | os.PathLike[str]) -> Path:
    """Path of a notebook given by path, or by the name of one of this project's.

    A copy in ``notebooks`` of the working directory comes before the project's own.

    Raises
    ------
    InvalidInput
        There is no such notebook.
    """
    given = Path(notebook)
    folders = (Path.cwd() / "notebooks", folder())
    for path in (given, *(parent / given.with_suffix(".ipynb").name for parent in folders)):
        if path.is_file() and path.suffix == ".ipynb":
            return path
    raise InvalidInput(
        f"notebook {notebook}: no such file, neither here nor in {' or '.join(map(str, folders))}; "
        f"give the path of an .ipynb file, or one of {', '.join(path.stem for path in sorted(folder().glob('*.ipynb')))}"
    )


def copy(destination: Path) -> list[Path]:
    """Copy the project's notebooks into a folder, which is made where it is missing; the copies that were written.

    A copy that is there already and holds the same is left as it is.

    Raises
    ------
    InvalidInput
        A file of the same name holds something else; nothing is written then.
    """
    sources = sorted(folder().glob("*.ipynb"))
    changed = [
        source.name
        for source in sources
        if (copied := destination / source.name).exists() and copied.read_bytes() != source.read_bytes()
    ]
    if changed:
        raise InvalidInput(
            f"{destination} holds other versions of {', '.join(changed)}, perhaps with your changes, so nothing was written: "
            "move them away, or name another folder"
        )
    destination.mkdir(parents=True, exist_ok=True)
    missing = [source for source in sources if not (destination / source.name).exists()]
    return [Path(shutil.copyfile(source, destination / source.name)) for source in missing]
