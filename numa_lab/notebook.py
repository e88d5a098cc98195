"""Run one notebook by papermill, in a process of its own, bound from its first instruction.

papermill 2.7 accepts an unknown or ill-typed parameter with a warning, can call an execution completed after its kernel
was killed, and its kernel has a session of its own. So names and types are checked before anything starts, the output
is deleted first, only exit status 0 counts, and whatever an execution leaves running is killed.
"""

from __future__ import annotations

import ast
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil
import yaml

from numa_lab.binding import Binding, MemPolicy
from numa_lab.commands import to_install
from numa_lab.errors import InvalidInput, MissingDependency

LIMIT_SECONDS = 3600  # an execution that takes longer hangs

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
}
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37  # linux/prctl.h


def find(notebook: str | os.PathLike[str]) -> Path:
    """Path of a notebook given by path, or by the name of one of this project's.

    Raises
    ------
    InvalidInput
        There is no such notebook.
    """
    given = Path(notebook)
    folders = (Path.cwd() / "notebooks", Path(__file__).parents[1] / "notebooks")
    for path in (given, *(folder / given.with_suffix(".ipynb").name for folder in folders)):
        if path.is_file() and path.suffix == ".ipynb":
            return path
    raise InvalidInput(
        f"notebook {notebook}: no such file, neither here nor in {' or '.join(str(f) for f in folders)}; "
        "give the path of an .ipynb file, or run from a checkout of numa_lab"
    )


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook file in the current format."""
    found: nbformat.NotebookNode = nbformat.read(path, as_version=4)
    return found


def parameters_of(path: Path) -> dict[str, dict[str, Any]]:
    """Name, type and default of each parameter of a notebook, as papermill reads its ``parameters`` cell.

    Raises
    ------
    InvalidInput
        It is no notebook, or has no cell with the tag ``parameters``.
    """
    from papermill.inspection import inspect_notebook  # half a second, needed only where notebooks run

    try:
        cells = read(path).cells
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} can't be read as a notebook ({error}); expected an .ipynb file") from error
    if not any("parameters" in cell.metadata.get("tags", ()) for cell in cells):
        raise InvalidInput(f"{path} has no cell tagged 'parameters': add the tag to the cell that sets its defaults")
    return dict(inspect_notebook(path))


def defaults(path: Path) -> dict[str, Any]:
    """Default value of each parameter of a notebook; parameters whose default is no literal are left out."""
    values = {}
    for name, parameter in parameters_of(path).items():
        with suppress(ValueError, SyntaxError):
            values[name] = ast.literal_eval(parameter["default"])
    return values


def parse_parameters(path: Path, pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` texts with the types that the notebook declares.

    Raises
    ------
    InvalidInput
        No ``=``, a name that the notebook does not have, or a value of another type.
    """
    given = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise InvalidInput(f"parameter {pair!r}: expected NAME=VALUE, as in kv_len=8192")
        declared = parameters_of(path).get(name, {}).get("inferred_type_name", "")
        try:
            given[name] = text if declared == "str" else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidInput(f"parameter {pair!r}: the value can't be read ({error})") from error
    check_parameters(path, given)
    return given


def check_parameters(path: Path, given: Mapping[str, Any]) -> None:
    """Refuse parameters that the notebook does not declare, or declares with another type.

    Raises
    ------
    InvalidInput
        Naming the parameter, its type, and those that there are.
    """
    declared = parameters_of(path)
    for name, value in given.items():
        if name not in declared:
            known = ", ".join(f"{n} ({p['inferred_type_name']})" for n, p in declared.items())
            raise InvalidInput(f"parameter {name!r}: {path.name} has {known}")
        kind = declared[name]["inferred_type_name"]
        allowed = _TYPES.get(kind)
        if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
            raise InvalidInput(f"parameter {name}={value!r}: expected {kind}, got {type(value).__name__}")


def command(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, Any],
    binding: Binding | None = None,
    *,
    python: str = "python",
) -> list[str]:
    """The words that execute `notebook` under a binding."""
    bind = binding.numactl() if binding else []
    papermill = [python, "-m", "papermill", str(notebook), str(output), "--cwd", str(notebook.parent)]
    options = ["--no-progress-bar", "--autosave-cell-every", "0"]
    return [*bind, *papermill, *options, "-y", json.dumps(parameters)]


@dataclass(frozen=True)
class Outcome:
    """How an execution ended; `exit_status` is negative for a signal and None past the time limit."""

    exit_status: int | None
    seconds: float


def execute(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, Any],
    *,
    log: Path,
    binding: Binding | None = None,
    limit_seconds: float = LIMIT_SECONDS,
) -> Outcome:
    """Execute a notebook by papermill in a process of its own; nothing that it started outlives the call.

    Raises
    ------
    InvalidInput
        A parameter is unknown or ill-typed.
    MissingDependency
        As ``require_tools`` says.
    """
    check_parameters(notebook, parameters)
    require_tools(binding)
    words = command(notebook.resolve(), output.resolve(), parameters, binding, python=sys.executable)
    output.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with open(log, "wb") as stream, _nothing_left_running():
        # pdeathsig: whoever kills this process, even with -9, ends papermill too; a kernel ends when papermill is gone.
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *words],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # a Ctrl-C in the terminal reaches us alone, and we end the rest in order
        )
        try:
            status: int | None = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            process.wait()
    return Outcome(status, time.monotonic() - begin)


def require_tools(binding: Binding | None = None) -> None:
    """Refuse a binding under which no notebook can be executed here, for want of a program.

    Raises
    ------
    MissingDependency
        numactl or setpriv is not installed, or numactl is too old for the binding.
    """
    needed = {"setpriv": "util-linux"} | ({"numactl": "numactl"} if binding and binding.numactl() else {})
    for tool, package in needed.items():
        if not shutil.which(tool):
            raise MissingDependency(f"{tool} is not installed; type the line for this system:\n{to_install(package)}")
    if binding and binding.policy is MemPolicy.WEIGHTED_INTERLEAVE and not _numactl_knows_weights():
        raise MissingDependency(
            f"binding {binding}: numactl 2.0.19 or later is needed for --weighted-interleave, and this one does not know it: "
            "conda install -c conda-forge 'numactl>=2.0.19', or interleave without weights (i instead of w)"
        )


def _numactl_knows_weights() -> bool:
    usage = subprocess.run(["numactl", "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    return "weighted-interleave" in usage


def failure(outcome: Outcome, log: Path) -> str:
    """Why an execution failed, as a sentence: its exit status and the last thing that papermill said."""
    if outcome.exit_status is None:
        return f"It did not end within {LIMIT_SECONDS} s and was killed."
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"papermill ended with exit status {outcome.exit_status}: {lines[-1] if lines else 'it printed nothing'}"


@contextmanager
def _nothing_left_running() -> Iterator[None]:
    """Kill on exit, also on an exception, every process that was started inside, orphans included."""
    libc = ctypes.CDLL(None, use_errno=True)
    was = ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(was), 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become our children, so that they can be found
    this = psutil.Process()
    before = set(this.children(recursive=True))
    try:
        yield
    finally:
        while started := [process for process in this.children(recursive=True) if process not in before]:
            for process in started:
                if process.is_running():
                    process.kill()
            psutil.wait_procs(started, timeout=5)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, was.value, 0, 0, 0)
