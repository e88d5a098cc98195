"""Which machine a run was measured on: what is stored beside its rows, and what must agree before rows are mixed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from numa_lab import __version__
from numa_lab.errors import RunDirectoryError
from numa_lab.machine.topology import Topology
from numa_lab.measurement.atomic_files import read_json

SCHEMA_VERSION = 1  # of all files of a run directory
MACHINE = "machine.json"


def machine_facts(topology: Topology) -> dict[str, Any]:
    """Describe the machine and its software, as ``machine.json`` stores them.

    Returns
    -------
    Plain JSON values. ``identity`` holds those that must agree before rows of two runs may be mixed, and ``fingerprint``
    is their hash; ``topology`` is what ``Topology.to_json`` gives.
    """
    identity = {
        "machine": topology.fingerprint(),
        "model": topology.model_name,
        "nodes": " ".join(f"{n.id}:{len(n.cpus)}cpus{'+memory' * bool(n.memory_bytes)}" for n in topology.nodes),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        **{name: _version(name) for name in ("torch", "numba")},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": digest[:16],
        "identity": identity,
        "python": platform.python_version(),
        "numa_lab": __version__,
        "topology": topology.to_json(),
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution).split("+")[0]  # the local suffix names a build of the same release
    except PackageNotFoundError:
        return "not installed"


def load_machine(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``machine.json`` of a run directory.

    Returns
    -------
    What ``machine_facts`` gave when the run was measured.

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
    if missing := {"fingerprint", "identity", "topology"} - set(facts):
        raise RunDirectoryError(f"{path} is damaged, without {sorted(missing)}: measure again")
    return facts


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The identifying values in which two machines differ, as ``name: value against value``.

    Both arguments are what ``machine_facts`` or ``load_machine`` gives.
    """
    left, right = first["identity"], second["identity"]
    return [
        f"{key}: {left.get(key)} against {right.get(key)}"
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key)
    ]
