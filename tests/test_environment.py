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

import yaml
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import numa_lab

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch-cpu", "matplotlib": "matplotlib-base"}
CUDA = re.compile(r"(cuda|nvidia)-.*|triton")  # torch's builds for CUDA pin these themselves
NOT_FROM_PYPI = {"python", "pip", "numactl", "hatchling"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names_and_versions = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in names_and_versions}


def conda_specs() -> dict[str, str]:
    """Version that environment.yml asks for, by conda's name; empty where it takes any."""
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    specs = [re.fullmatch(r"([a-z0-9_-]+)(?: ((?:>=|=)[0-9.]+))?", line) for line in lines]
    assert None not in specs, lines
    return {spec[1]: spec[2] or "" for spec in specs if spec}


def direct_dependencies() -> set[str]:
    """What the package itself needs, with the notebook suite."""
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["lab"]
    return {canonicalize_name(Requirement(line).name) for line in lines}


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
    assert everything - pins().keys() == {"numa-lab"}  # its extra `dev` contains `lab`


def test_constraints_name_the_versions_installed_here() -> None:
    names = set(needed("numa_lab", frozenset(["dev"]), set())) - {"numa-lab"}
    installed = {name: metadata.version(name).split("+")[0] for name in names}
    pinned = pins()
    assert {name: (version, pinned[name]) for name, version in installed.items() if version != pinned[name]} == {}


def test_lowest_python_can_install_what_is_installed_here() -> None:
    lowest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    asked = {
        name: metadata.metadata(name).get("Requires-Python", "")
        for name in needed("numa_lab", frozenset(["dev"]), set())
    }
    assert lowest == "3.11.0"
    assert asked.keys() >= {"torch", "soupsieve"}
    assert {name: python for name, python in asked.items() if not SpecifierSet(python).contains(lowest)} == {}


def test_conda_environment_has_the_same_pins() -> None:
    pinned = pins()
    expected = {CONDA_NAMES.get(name, name): f"={pinned[name]}" for name in direct_dependencies()}
    found = {name: version for name, version in conda_specs().items() if name not in NOT_FROM_PYPI}
    assert found == expected


def test_conda_environment_brings_numactl_and_a_python_that_serves() -> None:
    specs = conda_specs()
    assert "numactl" in specs
    assert specs["python"] == PROJECT["requires-python"]


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


def test_script_beside_a_clone_imports_the_package(tmp_path: Path) -> None:
    # Python takes a folder named as the package, with no module in it, for a namespace package if it finds nothing better.
    (tmp_path / "numa_lab").mkdir()
    (tmp_path / "script.py").write_text("import numa_lab\nprint(numa_lab.__file__, numa_lab.load_run)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for words in (["script.py"], ["-c", (tmp_path / "script.py").read_text()]):
        printed = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert Path(printed.split()[0]).is_relative_to(ROOT)


def test_the_package_says_its_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", numa_lab.__version__)
    assert metadata.version("numa_lab") == numa_lab.__version__
