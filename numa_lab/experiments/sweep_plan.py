"""The plan of a sweep: which bindings, how often, in which order, and what of it is still missing.

An execution's key is the hash of notebook, parameters, binding, machine, CPUs and block, so that a resumed sweep repeats
nothing and notices a changed notebook.
"""

from __future__ import annotations

import hashlib
import json
import random
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numa_lab.attention.backend_names import require_backend
from numa_lab.errors import InvalidInput, MachineMismatch, MissingDependency, NodeUnavailable, RunDirectoryError
from numa_lab.experiments import notebook_runner
from numa_lab.machine import doctor
from numa_lab.machine.shell_commands import to_paste
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.measurement.atomic_files import read_json, write_json
from numa_lab.measurement.blocks import randomized_blocks
from numa_lab.measurement.labels import AA_SUFFIX
from numa_lab.measurement.machine_facts import MACHINE, SCHEMA_VERSION, describe_machine, load_machine
from numa_lab.measurement.results import EXECUTIONS
from numa_lab.measurement.workloads import PROFILES, Case, usable_bytes, workload
from numa_lab.placement.binding import Binding, MemPolicy
from numa_lab.placement.numactl import taskset_words

PLAN = "plan.json"
OVERHEAD_SECONDS = 10  # of one execution before and after its cases: papermill, imports, first compilation


def choose_bindings(spec: str, topology: Topology) -> list[Binding]:
    """Bindings by name, or of a list of labels.

    ``local``: each node with its own memory; ``matrix``: every CPU node with every memory node; ``all``: besides these
    the CPUs of all nodes with memory interleaved over all nodes, also by weight where Linux and numactl can, and touched
    first by one thread on the first node; and nothing bound.

    Raises
    ------
    InvalidInput, NodeUnavailable
        A label can't be read, or this process can't be bound so.
    """
    cpu_nodes = [node for node in topology.node_ids if topology.cpus_of([node])]
    mem_nodes = [node for node in topology.allowed_nodes if topology.node(node).memory_bytes]
    local = [Binding((node,), (node,), MemPolicy.BIND) for node in cpu_nodes if node in mem_nodes]
    matrix = [Binding((cpu,), (mem,), MemPolicy.BIND) for cpu in cpu_nodes for mem in mem_nodes]
    if spec == "local":
        bindings = local
    elif spec == "matrix":
        bindings = matrix
    elif spec == "all":
        bindings = [*matrix, *(_of_all(cpu_nodes, mem_nodes, topology) if len(mem_nodes) > 1 else ()), Binding()]
    else:
        bindings = [Binding.parse(label) for label in _labels(spec)]
    if not bindings:
        try:
            topology.require_effective_nodes()
        except NodeUnavailable as error:
            raise NodeUnavailable(f"bindings {spec!r}: {error}, or try matrix, or name labels") from error
    for binding in bindings:
        binding.require(topology)
    return list(dict.fromkeys(bindings))


def _of_all(cpu_nodes: list[int], mem_nodes: list[int], topology: Topology) -> list[Binding]:
    """What most programs do with all nodes, on purpose or by accident."""
    cpus, mems = tuple(cpu_nodes), tuple(mem_nodes)
    found = [Binding(cpus, mems, MemPolicy.INTERLEAVE)]
    weighted = Binding(cpus, mems, MemPolicy.WEIGHTED_INTERLEAVE)
    with suppress(MissingDependency):  # who names the label is told what is missing
        weighted.require(topology)
        notebook_runner.require_tools(weighted)
        found.append(weighted)
    touchers = [node for node in cpu_nodes if node in mem_nodes][:1]
    return [*found, *(Binding(cpus, (node,), MemPolicy.FIRST_TOUCH) for node in touchers)]


def _labels(spec: str) -> list[str]:
    # Node lists hold commas too (c0,2m0): a label ends before the next c.
    labels = ["c" + part.rstrip(",") for part in spec.split("c") if part]
    if not labels or not spec.startswith("c"):
        raise InvalidInput(f"bindings {spec!r}: expected local, matrix, all, or labels such as c0m0,c0m1")
    return labels


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
class Plan:
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
) -> Plan:
    """Plan a sweep: in each block every label once, in random order, and the first local binding twice (the A/A pair).

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
    content, machine = _content(measured), describe_machine(topology).fingerprint
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
        told = {"execution": {"binding": str(binding)}} if binding.asked_of_kernel != binding else {}
        words = notebook_runner.command(
            Path("notebooks") / measured.name, Path(f"{label}.ipynb"), given | told, binding, topology=topology
        )
        # Without CPU nodes a command takes the CPUs of who types it.
        command_line = shlex.join(words) if binding.cpu_nodes else typed(words, topology)
        planned.append(Planned(key, block, len(planned), label, command_line))
    return Plan(
        SCHEMA_VERSION, run_id, datetime.now(UTC).isoformat(timespec="seconds"), profile, tuple(labels), measured.name,
        content, given, command, tuple(planned), round(sum(seconds[str(p.binding)] for p in planned)),
    )  # fmt: skip


def _content(path: Path) -> str:
    """Hash of what a notebook does: its cells' sources, not their outputs."""
    cells = notebook_runner.read(path).cells
    return hashlib.sha256(json.dumps([(cell.cell_type, cell.source) for cell in cells]).encode()).hexdigest()


def expected_cases(parameters: Mapping[str, Any], binding: Binding, topology: Topology) -> list[Case]:
    """The cases that an execution must hold; none where its notebook does not take the parameters of a workload.

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


def load_plan(run_dir: Path) -> Plan:
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
        return Plan(**stored | {"bindings": tuple(stored["bindings"]), "executions": executions})
    except (KeyError, TypeError) as error:
        raise RunDirectoryError(f"{run_dir / PLAN} is damaged ({error}): start a new sweep") from error


def prepare(plan: Plan, run_dir: Path, topology: Topology) -> None:
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


def check_resumable(plan: Plan, run_dir: Path, topology: Topology, measured: Path) -> None:
    """Refuse to finish a run on another machine, with other CPUs or nodes of it, or with another notebook than it began.

    Raises
    ------
    MachineMismatch
        Naming the values that differ.
    RunDirectoryError
        The notebook has changed.
    """
    begun = load_machine(run_dir)
    differing = begun.differences(describe_machine(topology))
    if differing:
        raise MachineMismatch(f"{run_dir} was begun on another machine: {'; '.join(differing)}. Start a new sweep here")
    if other := _other_share(begun.topology, topology, run_dir):
        raise MachineMismatch(f"{run_dir} was begun {other}, or start a new sweep")
    if _content(measured) != plan.notebook_sha256:
        raise RunDirectoryError(
            f"{measured.name} has changed since {run_dir} was begun: start a new sweep, or restore the notebook"
        )


def _other_share(begun: Topology, topology: Topology, run_dir: Path) -> str:
    """What this process may use otherwise than the one that began, and how to go on; empty where it is the same."""
    cpus, now = set(begun.allowed_cpus), set(topology.allowed_cpus)
    if cpus != now:
        again = f"type `{to_paste('taskset', '-c', format_cpulist(cpus), 'numa-lab', 'sweep', '--resume', run_dir)}`"
        return (
            f"on CPUs {format_cpulist(cpus)}, and this process may use {format_cpulist(now)}: that would be another "
            f"measurement. To go on {again if cpus < now else 'let it use the same (taskset, cpuset)'}"
        )
    nodes, now = set(begun.allowed_nodes), set(topology.allowed_nodes)
    if nodes != now:
        return (
            f"with memory of nodes {format_cpulist(nodes)}, and this process may use that of {format_cpulist(now)}: that "
            "would be another measurement. To go on let it use the same (cpuset)"
        )
    return ""


def typed(words: Sequence[object], topology: Topology) -> str:
    """A command as it is typed to run on the CPUs of this process, wherever it is typed."""
    return shlex.join([*taskset_words(topology), *map(str, words)])


def resume_command(run_dir: Path, topology: Topology) -> str:
    """What to type to run what is missing in a run directory."""
    return to_paste(*taskset_words(topology), "numa-lab", "sweep", "--resume", run_dir)


def missing(plan: Plan, run_dir: Path) -> list[Planned]:
    """Executions that have not passed the gate yet, in run order."""
    return [
        planned
        for planned in plan.executions
        if not (run_dir / EXECUTIONS / f"{planned.execution_id}.parquet").exists()
    ]
