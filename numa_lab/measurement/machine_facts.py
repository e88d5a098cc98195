"""Which machine a run was measured on: what is stored beside its rows, and what must agree before rows are mixed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from numa_lab import __version__
from numa_lab.errors import InvalidInput, RunDirectoryError
from numa_lab.machine.topology import Topology
from numa_lab.measurement.atomic_files import read_json

SCHEMA_VERSION = 1  # of all files of a run directory
MACHINE = "machine.json"


@dataclass(frozen=True)
class Machine:
    """A machine and its software, as ``machine.json`` of a run directory stores them.

    Attributes
    ----------
    fingerprint
        The hash of `identity`. Every file of rows holds it too.
    identity
        The values that must agree before rows of two runs may be mixed, by name.
    python, numa_lab
        The versions that measured.
    topology
        The machine as the process saw it that measured.
    findings
        What ``numa-lab doctor`` found before the run, as plain JSON values; None where it did not look.
    """

    fingerprint: str
    identity: Mapping[str, str]
    python: str
    numa_lab: str
    topology: Topology
    findings: Sequence[Mapping[str, Any]] | None = None

    def differences(self, other: Machine) -> list[str]:
        """Return the identifying values in which another machine differs, as ``name: value against value``."""
        return [
            f"{name}: {self.identity.get(name)} against {other.identity.get(name)}"
            for name in sorted({*self.identity, *other.identity})
            if self.identity.get(name) != other.identity.get(name)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, as ``machine.json`` stores them."""
        facts = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "identity": dict(self.identity),
            "python": self.python,
            "numa_lab": self.numa_lab,
            "topology": self.topology.to_json(),
        }
        return facts if self.findings is None else facts | {"findings": list(self.findings)}


def describe_machine(topology: Topology) -> Machine:
    """Describe the machine of a topology, with the software that runs now."""
    identity = {
        "machine": topology.fingerprint(),
        "model": topology.model_name,
        "nodes": " ".join(f"{n.id}:{len(n.cpus)}cpus{'+memory' * bool(n.memory_bytes)}" for n in topology.nodes),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        **{name: _version(name) for name in ("torch", "numba")},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Machine(digest[:16], identity, platform.python_version(), __version__, topology)


def _version(distribution: str) -> str:
    try:
        return version(distribution).split("+")[0]  # the local suffix names a build of the same release
    except PackageNotFoundError:
        return "not installed"


def load_machine(run_dir: str | os.PathLike[str]) -> Machine:
    """Read ``machine.json`` of a run directory.

    Returns
    -------
    The machine as it was described when the run was measured.

    Raises
    ------
    RunDirectoryError
        The file is missing, damaged or of another schema version.
    """
    path = Path(run_dir) / MACHINE
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("schema_version") != SCHEMA_VERSION:
        stored = facts.get("schema_version") if isinstance(facts, dict) else type(facts).__name__
        raise RunDirectoryError(
            f"{path} has schema version {stored!r}, expected {SCHEMA_VERSION}: measure again, "
            "or read it with the numa_lab that wrote it"
        )
    if missing := {"fingerprint", "identity", "python", "numa_lab", "topology"} - set(facts):
        raise RunDirectoryError(f"{path} is damaged, without {sorted(missing)}: measure again")
    try:
        topology = Topology.from_json(facts["topology"])
    except InvalidInput as error:
        raise RunDirectoryError(f"{path} is damaged, {error}: measure again") from error
    return Machine(
        facts["fingerprint"], facts["identity"], facts["python"], facts["numa_lab"], topology, facts.get("findings")
    )
