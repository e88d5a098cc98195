"""Run one notebook by papermill, in a process of its own, bound from its first instruction.

papermill 2.7 accepts an unknown or ill-typed parameter with a warning, can call an execution completed after its kernel
was killed, and its kernel has a session of its own. So names and types are checked before anything starts, the output
is deleted first, only exit status 0 counts, and whatever an execution leaves running is killed, by a supervisor that knows
its own children from all others (see ``numa_lab.experiments.supervisor``).
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from numa_lab.errors import InvalidInput, MissingDependency
from numa_lab.experiments.parameters import wrong_type
from numa_lab.machine.shell_commands import to_install
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement.binding import Binding, MemPolicy

LIMIT_SECONDS = 3600  # an execution that takes longer hangs

_SUPERVISOR = Path(__file__).with_name("supervisor.py")


def read(path: Path) -> nbformat.NotebookNode:
    """Return a notebook file in the current format."""
    found: nbformat.NotebookNode = nbformat.read(path, as_version=4)
    return found


def digest(path: Path) -> str:
    """Return a hash of what a notebook does: of its cells' sources, and not of their outputs."""
    cells = [(cell.cell_type, cell.source) for cell in read(path).cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


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
        if wrong := wrong_type(name, value, declared[name]["inferred_type_name"]):
            raise InvalidInput(wrong)


def command(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, Any],
    binding: Binding | None = None,
    *,
    python: str = "python",
    topology: Topology | None = None,
) -> list[str]:
    """Return the words that execute `notebook` under a binding, within the CPUs that `topology` says this process may use."""
    bind = binding.numactl(topology) if binding else []
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
    topology: Topology | None = None,
    limit_seconds: float = LIMIT_SECONDS,
) -> Outcome:
    """Execute a notebook by papermill in a process of its own; nothing that it started outlives the call.

    Other children of this process are let alone. Under a binding the execution stays within the CPUs that this process may
    use, which `topology` tells; it is read where None is given.

    Raises
    ------
    InvalidInput
        A parameter is unknown or ill-typed.
    MissingDependency
        As ``require_tools`` says.
    """
    check_parameters(notebook, parameters)
    require_tools(binding)
    topology = topology or (read_topology() if binding and binding.cpu_nodes else None)
    command_words = command(
        notebook.resolve(), output.resolve(), parameters, binding, python=sys.executable, topology=topology
    )
    output.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-IS", str(_SUPERVISOR), str(os.getpid()), *command_words],
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
            process.terminate()  # where it still runs, it ends what it started first
            process.wait()
    return Outcome(status, time.monotonic() - begin)


def require_tools(binding: Binding | None = None) -> None:
    """Refuse a binding under which no notebook can be executed here, for want of a program.

    Raises
    ------
    MissingDependency
        numactl is not installed, or too old for the binding.
    """
    if binding and binding.numactl() and not shutil.which("numactl"):
        raise MissingDependency(f"numactl is not installed; type the line for this system:\n{to_install('numactl')}")
    if binding and binding.policy is MemPolicy.WEIGHTED_INTERLEAVE and not _numactl_knows(binding.policy):
        raise MissingDependency(
            f"binding {binding}: numactl 2.0.19 or later is needed for --weighted-interleave, and this one does not know it: "
            "conda install -c conda-forge 'numactl>=2.0.19', or interleave without weights (i instead of w)"
        )
    if binding and binding.policy is MemPolicy.PREFERRED_MANY and not _numactl_knows(binding.policy):
        raise MissingDependency(
            f"binding {binding}: numactl 2.0.15 or later is needed for --preferred-many, and this one does not know it: "
            "conda install -c conda-forge 'numactl>=2.0.15', or prefer a single node (p instead of P)"
        )


def _numactl_knows(policy: MemPolicy) -> bool:
    usage = subprocess.run(["numactl", "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    return policy.value in usage


def failure(outcome: Outcome, log: Path) -> str:
    """Why an execution failed, as a sentence: its exit status, the last thing that papermill said, and where the rest is."""
    where = f"(all that it printed: {log.parent.name}/{log.name})"
    if outcome.exit_status is None:
        return f"It did not end within {LIMIT_SECONDS} s and was killed {where}."
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if any(line.startswith("usage: numactl") for line in lines):  # of which it then prints all
        warning = lines[0].removeprefix("libnuma: Warning: ")
        return (
            f"numactl refused the binding, since {warning}: were CPUs or nodes taken away meanwhile (taskset, cpuset, hotplug)? "
            f"Start a new sweep {where}."
        )
    last = lines[-1] if lines else "it printed nothing"
    how = f"papermill ended with exit status {outcome.exit_status}"
    if outcome.exit_status < 0:
        how = f"papermill was killed by signal {-outcome.exit_status}"
    if outcome.exit_status == -signal.SIGKILL or "DeadKernelError" in last:
        last += ", as happens where memory runs out (`dmesg` tells)"
    return f"{how}: {last} {where}."
