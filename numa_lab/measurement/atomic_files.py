"""Files that appear under their name only when they are whole, and the JSON files among them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numa_lab.errors import RunDirectoryError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`, which takes the name `path` once the ``with`` block ends without an error.

    Raises
    ------
    RunDirectoryError
        The folder can't be written, or the disk is full. A file that had the name before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise RunDirectoryError(
            f"{path} can't be written: {error.strerror or error}. Free space or name another folder with --out"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_json(path: Path, value: object) -> None:
    """Write a value as strict JSON, whole or not at all.

    Raises
    ------
    RunDirectoryError
        The folder can't be written, or the disk is full.
    ValueError
        A number is NaN or infinite, which JSON does not have.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run directory.

    Returns
    -------
    The value that the file holds: dicts, lists, strings, numbers, booleans and None.

    Raises
    ------
    RunDirectoryError
        The file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunDirectoryError(
            f"{path.parent} has no {path.name}: expected a run directory as `numa-lab sweep` writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(
            f"{path} can't be read ({error}): the run directory is damaged; run the sweep again"
        ) from error
