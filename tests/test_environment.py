"""What is declared, pinned and installed agree: pyproject.toml, constraints.txt, environment.yml and this environment."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import rattler
import yaml
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch-cpu", "matplotlib": "matplotlib-base"}
CUDA = re.compile(r"(cuda|nvidia)-.*|triton")  # torch's builds for CUDA pin these themselves
NOT_FROM_PYPI = {"python", "pip", "numactl", "setuptools"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names_and_versions = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in names_and_versions}


def conda_specs() -> dict[str, rattler.MatchSpec]:
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    specs = [rattler.MatchSpec(line, strict=True) for line in lines]
    return {spec.name.normalized: spec for spec in specs}


def direct_dependencies() -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """Every distribution that `name` with `extras` requires in this environment, but for CUDA."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        dependency, marker = canonicalize_name(requirement.name), requirement.marker
        if CUDA.fullmatch(dependency):
            continue
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield dependency
            yield from needed(dependency, frozenset(requirement.extras), seen)


def test_constraints_are_plain_sorted_pins() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert lines == sorted(lines, key=str.upper)
    assert len(lines) == len(pins())


def test_constraints_cover_all_that_is_needed() -> None:
    extras = PROJECT["optional-dependencies"]
    everything = set(needed("numa_lab", frozenset(["dev"]), set()))  # what `bench` needs in turn is not installed here
    assert everything > direct_dependencies()
    everything |= {canonicalize_name(Requirement(line).name) for lines in extras.values() for line in lines}
    assert everything - pins().keys() == set()


def test_constraints_name_the_versions_installed_here() -> None:
    installed = {name: metadata.version(name).split("+")[0] for name in needed("numa_lab", frozenset(["dev"]), set())}
    pinned = pins()
    assert {name: (version, pinned[name]) for name, version in installed.items() if version != pinned[name]} == {}


def test_conda_environment_has_the_same_pins() -> None:
    pinned = pins()
    expected = {CONDA_NAMES.get(name, name): f"{pinned[name]}.*" for name in direct_dependencies()}
    found = {name: spec.version for name, spec in conda_specs().items() if name not in NOT_FROM_PYPI}
    assert found == expected


def test_conda_environment_brings_numactl_and_a_python_that_serves() -> None:
    specs = conda_specs()
    assert "numactl" in specs
    assert specs["python"].version.startswith(PROJECT["requires-python"])


def test_every_import_of_the_package_is_declared() -> None:
    distributions = metadata.packages_distributions()
    imported: dict[str, str] = {}
    for path in sorted((ROOT / "numa_lab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            imported |= {module.partition(".")[0]: path.name for module in modules}
    foreign = imported.keys() - sys.stdlib_module_names - {"numa_lab"}
    undeclared = {
        module: imported[module]
        for module in foreign
        if direct_dependencies().isdisjoint(map(canonicalize_name, distributions.get(module, ())))
    }
    assert undeclared == {}


def test_notebooks_run_in_this_environment() -> None:
    # A python3 kernel that the user has registered elsewhere must not take over.
    assert Path(KernelSpecManager().get_kernel_spec("python3").resource_dir).is_relative_to(sys.prefix)
    manager = KernelManager(kernel_name="python3")
    assert manager.format_kernel_cmd()[0] == sys.executable


@pytest.fixture
def bare_system(tmp_path: Path) -> Path:
    """A folder of commands that has bash alone."""
    (tmp_path / "bash").symlink_to("/bin/bash")
    return tmp_path


def need(path: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "need.sh"), *arguments],
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("tool", ["numactl", "chromium"])
def test_missing_tool_without_package_manager_names_the_line_to_type(bare_system: Path, tool: str) -> None:
    result = need(bare_system, tool)
    assert result.returncode == 1
    for line in (f"apt-get install {tool}", f"dnf install {tool}", "conda"):
        assert line in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
@pytest.mark.parametrize("manager", ["apt-get", "dnf"])
def test_missing_tool_is_installed_and_said_so(bare_system: Path, manager: str) -> None:
    command(bare_system, manager, 'echo "$@" >> "${0%/*}/calls"')
    result = need(bare_system, "numactl")
    assert result.returncode == 0
    assert f"installing numactl with {manager}" in result.stderr
    assert " numactl" in (bare_system / "calls").read_text().splitlines()[-1]


def test_present_tool_needs_nothing(bare_system: Path) -> None:
    command(bare_system, "chromium-browser", "exit 9")
    result = need(bare_system, "chromium")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_no_python_that_serves_names_those_found(bare_system: Path) -> None:
    command(bare_system, "python3", "echo 3.9")
    result = need(bare_system, "python")
    assert result.returncode == 1
    assert "3.11 or newer; found: python3 (3.9)" in result.stderr


def test_python_without_ensurepip_names_the_line_to_type(bare_system: Path) -> None:
    command(bare_system, "python3", "[[ $2 == *print* ]] && echo 3.12")
    result = need(bare_system, "python")
    assert result.returncode == 1
    assert "apt-get install python3.12-venv" in result.stderr


def test_python_that_was_named_is_taken() -> None:
    result = need(os.environ["PATH"], "python", sys.executable)
    assert (result.returncode, result.stdout.strip()) == (0, sys.executable)
