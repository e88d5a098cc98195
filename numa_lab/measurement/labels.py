"""Labels of bindings, as rows and figures name them: c0m1 computes on node 0 with memory of node 1."""

from __future__ import annotations

import re

AA_SUFFIX = "~aa"  # ends the label of the second half of the A/A pair: one binding, measured under two labels


def by_number(label: str) -> list[str | int]:
    """Sort key that puts c2m2 before c10m10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", label)]


def is_local(label: str) -> bool:
    """Return whether a label binds the CPUs of one node to the memory of that node, as c3m3 does."""
    cpus, _, memory = label.removesuffix(AA_SUFFIX).removeprefix("c").partition("m")
    return cpus == memory and cpus.isdecimal()
