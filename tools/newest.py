"""Write constraints.txt anew: the newest versions that pyproject.toml allows on the lowest Python of its requires-python.

    build/newest/bin/python tools/newest.py       (`make constraints`; it needs `packaging`)

pip resolves for the first release of the lowest Python, 3.11.0, whichever 3.11 runs it; the markers of requirements, however, it
takes from the Python that runs it, so that has to be a 3.11. What can't be installed there is refused by name.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from install import attempt, say
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
BUILDS_FOR_CUDA = re.compile(r"pip|triton|(cuda|nvidia)-.*")  # torch's builds for CUDA pin these themselves


def lowest_python(requires_python: str) -> Version:
    """The first release that ">=3.11" allows: 3.11.0."""
    minor = next(specifier.version for specifier in SpecifierSet(requires_python) if specifier.operator == ">=")
    return Version(".".join([*minor.split("."), "0", "0"][:3]))


def resolve(report: Path, *options: str) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The metadata of all that numa_lab[dev,bench] needs in its newest versions, or none and what pip says instead."""
    status, said = attempt("--dry-run", "--ignore-installed", f"--report={report}", *options, f"{ROOT}[dev,bench]")
    return ([] if status else [item["metadata"] for item in json.loads(report.read_text())["install"]]), said


def refused(pins: Iterable[Mapping[str, Any]], python: Version) -> list[str]:
    """Each pin that a Python can't install, with the Python that it asks for."""
    return [
        f"{pin['name']}=={pin['version']} asks for Python {pin['requires_python']}"
        for pin in pins
        if not SpecifierSet(pin.get("requires_python") or "").contains(python)
    ]


def lines(pins: Iterable[Mapping[str, Any]]) -> list[str]:
    """The pins as constraints.txt holds them: no numa_lab, nothing of CUDA, and any build of a version."""
    kept = [pin for pin in pins if not BUILDS_FOR_CUDA.fullmatch(pin["name"].lower()) and pin["name"] != "numa_lab"]
    return sorted((f"{pin['name']}=={pin['version'].partition('+')[0]}" for pin in kept), key=str.upper)


def main() -> None:
    """Resolve, check and write."""
    lowest = lowest_python(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    if sys.version_info[:2] != lowest.release[:2]:
        sys.exit(
            f"make: this is Python {sys.version.split()[0]}, and the pins have to serve {lowest}; type: "
            f"make constraints PYTHON=python{lowest.major}.{lowest.minor}"
        )
    say(f"looking for the newest versions that Python {lowest} can install ...")
    report = ROOT / "build" / "newest.json"
    wheels_for_lowest = (f"--python-version={lowest}", "--only-binary=:all:", f"--target={ROOT / 'build' / 'nowhere'}")
    pins, said = resolve(report, *wheels_for_lowest)
    if not pins:
        say("there are none; looking for what asks for a newer Python ...")
        pins, _ = resolve(report)
    if wrong := refused(pins, lowest):
        unchanged = f"make: constraints.txt is as it was; pyproject.toml allows Python {lowest}, but"
        sys.exit(
            "\n    ".join([unchanged, *wrong, "Ask for an older version in pyproject.toml, or for a newer Python."])
        )
    if not pins:
        sys.exit("".join(said) + "make: constraints.txt is as it was; see above")
    constraints = ROOT / "constraints.txt"
    header = [line for line in constraints.read_text().splitlines() if line.startswith("#")]
    constraints.write_text("\n".join([*header, *lines(pins), ""]))
    say(f"constraints.txt holds {len(lines(pins))} versions")


if __name__ == "__main__":
    main()
