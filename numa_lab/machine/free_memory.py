"""Asks how much a node can still hold, before memory is taken.

The kernel kills a process that outgrows the nodes to which it is bound, and one that outgrows its control group.

Limits: memory that is free now may be taken the next moment by another process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from numa_lab.errors import MissingDependency, NodeUnavailable
from numa_lab.machine import libnuma, page_maps
from numa_lab.machine.control_groups import ControlGroups, tightest
from numa_lab.machine.hardware import read_allowed, read_memory
from numa_lab.machine.shell_commands import to_paste
from numa_lab.machine.sysfs import Tree, format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology

_TREE = Tree(Path("/"))
_GROUPS = ControlGroups(_TREE)


def require(nbytes: int, weights: Mapping[int, int]) -> None:
    """Refuse nodes that can't hold their shares of so many bytes, which are in proportion to `weights`.

    Raises
    ------
    NodeUnavailable
        A node does not exist, its memory may not be used, or less of it is available than its share; or a control group
        leaves less than all the bytes.
    """
    _require_of_groups(nbytes)
    _, allowed = read_allowed(_TREE)
    for node, weight in weights.items():
        _machine().node(node)
        total, _, available = read_memory(_TREE, node, only=len(_machine().nodes) == 1)
        if not total or (allowed is not None and node not in allowed):
            serve = format_cpulist(read_topology().allowed_nodes) or "none"
            raise NodeUnavailable(f"node {node} has no memory that this process may use; nodes that have: {serve}")
        share = nbytes * weight // sum(weights.values())
        if share > available:
            raise NodeUnavailable(
                f"node {node} has {available / 2**20:,.0f} MiB available and {share / 2**20:,.0f} MiB were asked for: "
                "take a smaller shape or another node"
            )


def require_where_bound(nbytes: int) -> None:
    """Refuse so many bytes where the nodes to which the calling thread's memory is bound, or a control group, can't hold them.

    Raises
    ------
    NodeUnavailable
        All nodes of the binding together have less available, or a control group leaves less.
    """
    _require_of_groups(nbytes)
    nodes: Collection[int]
    try:
        mode, nodes = libnuma.get_mempolicy()
        bound = mode == libnuma.MPOL_BIND
    except (MissingDependency, PermissionError):
        policy, nodes = page_maps.thread_policy()
        bound = policy == "bind"
    if not bound:
        return
    available = sum(read_memory(_TREE, node, only=len(_machine().nodes) == 1)[2] for node in nodes)
    if nbytes > available:
        raise NodeUnavailable(
            f"memory is bound to nodes {format_cpulist(nodes)}, which have {available / 2**20:,.0f} MiB available, and "
            f"{nbytes / 2**20:,.0f} MiB were asked for: take a smaller shape or bind to other nodes too"
        )


def _require_of_groups(nbytes: int) -> None:
    limit = tightest(_GROUPS.memory_limits())
    if limit and nbytes > limit.available_bytes:
        raise NodeUnavailable(
            f"{limit.sentence()}, and {nbytes / 2**20:,.0f} MiB were asked for: take a smaller shape, or raise the limit as "
            f"`{to_paste('numa-lab', 'doctor')}` says"
        )


@cache
def _machine() -> Topology:
    """The machine, whose nodes stay; the memory that is free and the nodes that may be used are read anew each time."""
    return read_topology()
