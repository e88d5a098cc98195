"""What the running notebook was given: values of the declared types, and a run directory that is there.

papermill sets whatever it is given, None and the text ``false`` included, and starts a notebook in the folder of who calls it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numa_lab.errors import InvalidInput
from numa_lab.experiments import notebook_files

SAMPLE = Path("data", "sample")

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
}
_HOW_TO_GIVE = {  # of papermill's options only -r takes a text as it is, and for -p `true` is a text
    "int": "-p NAME 1",
    "float": "-p NAME 1.5",
    "str": "-r NAME TEXT",
    "bool": "-p NAME True, or False",
}


def wrong_type(name: str, value: object, kind: str) -> str:
    """Return what is wrong with a value for a parameter that was declared as `kind`; empty where it fits."""
    allowed = _TYPES.get(kind)
    if allowed is None or (isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))):
        return ""
    return f"parameter {name}={value!r}: expected {kind}, got {'None' if value is None else type(value).__name__}"


def check(namespace: Mapping[str, Any]) -> None:
    """Refuse a parameter of the running notebook whose value has another type than its parameters cell declares.

    To be called with ``globals()``. What was declared is read from the cells that have run. Whether a value of the right type
    makes sense is checked where it is used.

    Raises
    ------
    InvalidInput
        Naming the parameter, its value, its type, what it means, and how to give it.
    """
    for cell in namespace.get("In", ()):
        for name, (kind, default, meaning) in _declared(cell).items():
            if wrong := wrong_type(name, namespace.get(name), kind):
                how = _HOW_TO_GIVE.get(kind, "-y '{NAME: VALUE}'").replace("NAME", name)
                raise InvalidInput(
                    f"{wrong} ({meaning}). Leave it out for its default, {default}, or give papermill {how}"
                )


def _declared(source: str) -> dict[str, tuple[str, str, str]]:
    """Type, default and comment of each name that a cell declares with a type and a default."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a cell with a shell command
        return {}
    lines = source.splitlines()
    return {
        statement.target.id: (
            ast.unparse(statement.annotation),
            ast.unparse(statement.value),
            lines[statement.lineno - 1].partition("#")[2].strip(),
        )
        for statement in statements
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and statement.value is not None
    }


def find_run(run_dir: str) -> Path:
    """Return the run directory that a notebook was given; for the empty text the sample that is committed with this project.

    A relative path starts in the folder where the notebook runs. Where it leads nowhere from there, it is taken from the
    clone's notebooks, then from the clone.

    Raises
    ------
    InvalidInput
        There is no such folder.
    """
    clone = notebook_files.clone()
    if not run_dir:
        if clone and (clone / SAMPLE).is_dir():
            return clone / SAMPLE
        raise InvalidInput(
            f"run_dir='': the sample is part of a checkout of numa_lab, and {notebook_files.folder().parent} is none; give a run "
            "directory that `numa-lab sweep` wrote"
        )
    given = Path(run_dir).expanduser()
    folders = (Path.cwd(), clone / "notebooks", clone) if clone else (Path.cwd(),)
    for folder in folders:
        if (folder / given).is_dir():
            return folder / given
    looked = "no such folder" if given.is_absolute() else f"no such folder in {', '.join(map(str, folders))}"
    raise InvalidInput(
        f"run_dir={run_dir!r}: {looked}. Give the absolute path of a run directory that `numa-lab sweep` wrote, or start "
        "papermill with --cwd and the folder that the path starts in"
    )
