"""The plan of a sweep: what is executed, how often and in which order, and what of it is still missing.

An execution's key is the hash of notebook, parameters, binding, machine, CPUs and block, so that a resumed sweep repeats
nothing and notices a changed notebook.
"""

from __future__ import annotations

import hashlib
import json
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numa_lab.attention.backend_names import require_backend
from numa_lab.errors import InvalidInput, RunDirectoryError
from numa_lab.experiments import notebook_runner, sweep_bindings
from numa_lab.machine import doctor
from numa_lab.machine.shell_commands import near, to_paste
from numa_lab.machine.topology import Topology
from numa_lab.measurement.atomic_files import read_json, write_json
from numa_lab.measurement.blocks import randomized_blocks
from numa_lab.measurement.labels import AA_SUFFIX
from numa_lab.measurement.machine_facts import MACHINE, SCHEMA_VERSION, describe_machine
from numa_lab.measurement.results import EXECUTIONS
from numa_lab.measurement.workloads import PROFILES, Case, usable_bytes, workload
from numa_lab.placement.binding import Binding
from numa_lab.placement.numactl import taskset_words

PLAN = "plan.json"
OVERHEAD_SECONDS = 10  # of one execution before and after its cases: papermill, imports, first compilation


@dataclass(frozen=True)
class Planned:
    """One execution of a plan."""

    execution_id: str
    block: int
    order: int
    label: str  # with the suffix of the A/A twin
    command: str  # what is run, to be read and typed

    @property
    def binding(self) -> Binding:
        """The binding that the label names."""
        return Binding.parse(self.label.removesuffix(AA_SUFFIX))


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will run, as stored in ``plan.json``."""

    schema_version: int
    run_id: str
    created: str
    profile: str
    bindings: tuple[str, ...]
    notebook: str
    notebook_sha256: str
    parameters: Mapping[str, Any]
    command: str
    executions: tuple[Planned, ...]
    estimated_seconds: float


def make_plan(
    *,
    profile: str,
    bindings: Sequence[Binding],
    topology: Topology,
    measured: Path,
    parameters: Mapping[str, Any],
    run_id: str,
    command: str,
    executions: int = 0,
    seed: int | None = None,
) -> SweepPlan:
    """SweepPlan a sweep: in each block every label once, in random order, and the first local binding twice (the A/A pair).

    Raises
    ------
    InvalidInput
        An unknown profile or backend, no executions, or parameters that the notebook does not have.
    """
    if profile not in PROFILES:
        raise InvalidInput(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
    blocks = executions or PROFILES[profile].executions
    if blocks < 1:
        raise InvalidInput(f"executions={executions}: expected 1 or more per binding")
    if "profile" in parameters:
        raise InvalidInput(f"parameter profile={parameters['profile']!r}: give it as --profile")
    given = {"profile": profile, **parameters}
    notebook_runner.check_parameters(measured, {**given, "execution": {}})
    if "backend" in given:
        require_backend(given["backend"])
    twin = next((binding for binding in bindings if binding.is_local), bindings[0])
    labels = [*map(str, bindings), f"{twin}{AA_SUFFIX}"]
    content, machine = notebook_runner.digest(measured), describe_machine(topology).fingerprint
    case_seconds = PROFILES[profile].case_seconds
    all_given = notebook_runner.defaults(measured) | given
    seconds = {
        str(b): OVERHEAD_SECONDS + 1.5 * case_seconds * len(expected_cases(all_given, b, topology)) for b in bindings
    }
    planned: list[Planned] = []
    for block, label in randomized_blocks(labels, blocks, order=random.Random(seed)):
        binding = Binding.parse(label.removesuffix(AA_SUFFIX))
        cpus = topology.cpus_of(binding.cpu_nodes or topology.node_ids)
        identity = json.dumps([content, given, label, machine, cpus, block], sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()[:12]
        # numactl can't say who touches first, so who types the command tells the notebook.
        to_notebook = {"execution": {"binding": str(binding)}} if binding.asked_of_kernel != binding else {}
        words = notebook_runner.command(
            Path("notebooks") / measured.name, Path(f"{label}.ipynb"), given | to_notebook, binding, topology=topology
        )
        # Without CPU nodes a command takes the CPUs of who types it.
        command_line = shlex.join(words) if binding.cpu_nodes else typed(words, topology)
        planned.append(Planned(key, block, len(planned), label, command_line))
    return SweepPlan(
        SCHEMA_VERSION, run_id, datetime.now(UTC).isoformat(timespec="seconds"), profile, tuple(labels), measured.name,
        content, given, command, tuple(planned), round(sum(seconds[str(p.binding)] for p in planned)),
    )  # fmt: skip


def plan_run(
    *,
    profile: str,
    bindings: str | None,
    executions: int | None,
    notebook: str | None,
    parameters: Sequence[str],
    out: Path | None,
    measured: Path,
    topology: Topology,
) -> tuple[SweepPlan, Path]:
    """Plan a new run as ``numa-lab sweep`` is asked for it.

    Parameters
    ----------
    profile, bindings, executions
        A profile, and what takes the place of its bindings and of its number of executions.
    notebook
        What the user named as the measured notebook; None for the project's own.
    parameters
        Parameters of the measured notebook, as ``NAME=VALUE``.
    out
        The run directory; a new one in ``data/runs`` where None is given.
    measured
        The measured notebook.
    topology
        The machine.

    Returns
    -------
    tuple[SweepPlan, Path]
        The plan, and the run directory, which is not made yet.

    Raises
    ------
    InvalidInput, NodeUnavailable
        As ``make_plan`` and ``sweep_bindings.choose_bindings`` say.
    """
    if profile not in PROFILES:
        raise InvalidInput(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
    run_id = out.name if out else f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{profile}"
    again: list[object] = ["numa-lab", "sweep", "--profile", profile]
    for option, value in (("--bindings", bindings), ("--executions", executions), ("--notebook", notebook)):
        again += [option, value] if value else []
    again += [word for pair in parameters for word in ("-p", pair)]
    plan = make_plan(
        profile=profile,
        bindings=sweep_bindings.choose_bindings(bindings or PROFILES[profile].bindings, topology),
        topology=topology,
        measured=measured,
        parameters=notebook_runner.parse_parameters(measured, parameters),
        run_id=run_id,
        command=typed(again, topology),
        executions=executions or 0,
    )
    return plan, out or Path("data") / "runs" / run_id


def expected_cases(parameters: Mapping[str, Any], binding: Binding, topology: Topology) -> list[Case]:
    """Return the cases that an execution must hold; none where its notebook does not take the parameters of a workload.

    `parameters` are all of the notebook's, its defaults included.

    Raises
    ------
    InvalidInput
        An unknown profile or preset, or a length that makes no sense.
    """
    if not parameters.keys() >= {"profile", "preset", "kv_len", "batch"}:
        return []
    cores = topology.physical_cores(topology.cpus_of(binding.cpu_nodes or topology.node_ids))
    asked = (parameters[name] for name in ("profile", "preset", "kv_len", "batch"))
    chosen = workload(*asked, memory_bytes=usable_bytes(topology, binding))
    return chosen.cases(len(cores))


def load_plan(run_dir: Path) -> SweepPlan:
    """``plan.json`` of a run directory.

    Raises
    ------
    RunDirectoryError
        It is missing, damaged or of another schema version.
    """
    stored = read_json(run_dir / PLAN)
    if not isinstance(stored, dict) or stored.get("schema_version") != SCHEMA_VERSION:
        raise RunDirectoryError(f"{run_dir / PLAN}: expected schema version {SCHEMA_VERSION}; start a new sweep")
    try:
        executions = tuple(Planned(**planned) for planned in stored["executions"])
        return SweepPlan(**stored | {"bindings": tuple(stored["bindings"]), "executions": executions})
    except (KeyError, TypeError) as error:
        raise RunDirectoryError(f"{run_dir / PLAN} is damaged ({error}): start a new sweep") from error


def prepare(plan: SweepPlan, run_dir: Path, topology: Topology) -> None:
    """Create the run directory with its plan and the facts of the machine, before anything is measured.

    Raises
    ------
    RunDirectoryError
        The directory holds a run already, or can't be written.
    """
    if (run_dir / PLAN).exists():
        raise RunDirectoryError(
            f"{run_dir} holds a run already: finish it with --resume {run_dir}, or name another --out"
        )
    findings = doctor.to_json(doctor.examine(topology=topology))
    write_json(run_dir / MACHINE, replace(describe_machine(topology), findings=findings).to_json())
    write_json(run_dir / PLAN, asdict(plan))


def typed(words: Sequence[object], topology: Topology) -> str:
    """Return a command as it is typed to run on the CPUs of this process, wherever it is typed."""
    return shlex.join([*taskset_words(topology), *map(str, words)])


def commands(plan: SweepPlan, run_dir: Path, measured: Path) -> list[str]:
    """Return the commands of the executions that are missing, each to be pasted where one is."""
    places = {"notebooks": near(measured.parent), f"notebooks/{measured.name}": near(measured)}
    return [
        to_paste(*(places.get(word, word) for word in shlex.split(planned.command)))
        for planned in missing(plan, run_dir)
    ]


def missing(plan: SweepPlan, run_dir: Path) -> list[Planned]:
    """Executions that have not passed the gate yet, in run order."""
    return [
        planned
        for planned in plan.executions
        if not (run_dir / EXECUTIONS / f"{planned.execution_id}.parquet").exists()
    ]
