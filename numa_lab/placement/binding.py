"""Binding: CPU nodes, memory nodes and a memory policy, as numactl would set them.

Both affinity and memory policy belong to a thread. ``bind`` moves the calling thread alone; threads that it starts
later inherit from it, and OpenMP workers that exist already keep what they had (see ``numa_lab.placement.openmp``).
A policy acts when a page is first touched: it moves no page that exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from numa_lab.errors import InvalidInput, MissingDependency, NodeUnavailable
from numa_lab.machine import affinity, libnuma, page_maps
from numa_lab.machine.sysfs import format_cpulist, parse_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.placement.numactl import cpu_options


class MemPolicy(Enum):
    """Where new pages go: see set_mempolicy(2). First touch is no policy of the kernel's: a program does it."""

    DEFAULT = "default"  # the node of the CPU that touches the page first
    LOCAL = "local"  # the same, set by name
    BIND = "bind"  # only these nodes; where they are full the kernel kills the process
    PREFERRED = "preferred"  # this node while it has room, then others
    PREFERRED_MANY = "preferred-many"  # these nodes, the nearest first, while they have room, then others
    INTERLEAVE = "interleave"  # round-robin over these nodes
    WEIGHTED_INTERLEAVE = "weighted-interleave"  # round-robin, as many pages in turn as each node's weight says
    FIRST_TOUCH = "first-touch"  # default, and one thread on this node touches K and V before all others
    UNKNOWN = "unknown"  # the kernel has it, and numa_lab does not know what it does


_LETTERS = {
    MemPolicy.DEFAULT: "m",
    MemPolicy.LOCAL: "l",
    MemPolicy.BIND: "m",
    MemPolicy.PREFERRED: "p",
    MemPolicy.PREFERRED_MANY: "P",
    MemPolicy.INTERLEAVE: "i",
    MemPolicy.WEIGHTED_INTERLEAVE: "w",
    MemPolicy.FIRST_TOUCH: "f",
    MemPolicy.UNKNOWN: "u",
}
_POLICIES = {letter: policy for policy, letter in _LETTERS.items()}  # m: bind, which comes after default
_LABEL = re.compile(r"c(?P<cpus>\*|[\d,-]+)(?P<letter>[mlpPiwf]|u(?P<mode>\d*)m)(?P<mems>\*|[\d,-]+)", re.ASCII)

_MODES = {
    MemPolicy.DEFAULT: libnuma.MPOL_DEFAULT,
    MemPolicy.LOCAL: libnuma.MPOL_LOCAL,
    MemPolicy.BIND: libnuma.MPOL_BIND,
    MemPolicy.PREFERRED: libnuma.MPOL_PREFERRED,
    MemPolicy.PREFERRED_MANY: libnuma.MPOL_PREFERRED_MANY,
    MemPolicy.INTERLEAVE: libnuma.MPOL_INTERLEAVE,
    MemPolicy.WEIGHTED_INTERLEAVE: libnuma.MPOL_WEIGHTED_INTERLEAVE,
}
_WITHOUT_NODES = (MemPolicy.DEFAULT, MemPolicy.LOCAL)
_NUMA_MAPS_NAMES = {  # where numa_maps writes another name than numactl
    "prefer": "preferred",
    "prefer (many)": "preferred-many",
    "weighted interleave": "weighted-interleave",
}


@dataclass(frozen=True)
class Binding:
    """CPU nodes, memory nodes and a memory policy, which a label names together.

    ``c3m0`` means CPUs of node 3 and memory bound to node 0. In place of ``m``, ``i`` interleaves memory (``c0-1i0-3``), ``w`` interleaves
    it by the nodes' weights (``c0w0,2``), ``p`` prefers one node (``c2p1``), ``P`` prefers several (``c2P0-1``), and ``f`` lets one
    thread on a node touch it first (``c0-3f0``). ``c0m*`` binds CPUs alone, ``c*m*`` binds nothing, and in ``c0l*`` memory is local to
    whichever thread touches it. ``c0u9m1`` is a policy that numa_lab does not know, by its number in the kernel: it can be granted, and
    can't be asked for.

    Parameters
    ----------
    cpu_nodes, mem_nodes
        Nodes in any order; none for any node.
    policy
        How memory is placed.
    mode
        The kernel's number of an unknown policy, where it is known.

    Raises
    ------
    InvalidInput
        The policy does not fit the nodes.
    """

    cpu_nodes: tuple[int, ...] = ()
    mem_nodes: tuple[int, ...] = ()
    policy: MemPolicy = MemPolicy.DEFAULT
    mode: int | None = None

    def __post_init__(self) -> None:
        for field in ("cpu_nodes", "mem_nodes"):
            object.__setattr__(self, field, tuple(sorted(set(getattr(self, field)))))
        if self.policy is not MemPolicy.UNKNOWN and bool(self.mem_nodes) == (self.policy in _WITHOUT_NODES):
            raise InvalidInput(
                f"policy={self.policy.value!r} with mem_nodes={self.mem_nodes}: name memory nodes for bind, preferred, "
                "preferred-many, interleave, weighted-interleave or first-touch, and none for default or local"
            )
        if self.policy in (MemPolicy.PREFERRED, MemPolicy.FIRST_TOUCH) and len(self.mem_nodes) != 1:
            raise InvalidInput(
                f"policy={self.policy.value!r} with mem_nodes={self.mem_nodes}: name exactly one node"
                + " (preferred-many takes several)" * (self.policy is MemPolicy.PREFERRED)
            )
        if self.policy is MemPolicy.FIRST_TOUCH and self.cpu_nodes and not set(self.mem_nodes) <= set(self.cpu_nodes):
            raise InvalidInput(
                f"policy='first-touch' with cpu_nodes={self.cpu_nodes} and mem_nodes={self.mem_nodes}: "
                "name one of the CPU nodes, since the thread that touches runs there"
            )
        if self.mode is not None and self.policy is not MemPolicy.UNKNOWN:
            raise InvalidInput(f"policy={self.policy.value!r} with mode={self.mode}: its number is known, give none")

    @classmethod
    def parse(cls, label: str) -> Binding:
        """Return the binding that a label such as ``c3m0`` names.

        Raises
        ------
        InvalidInput
            The text is not a label.
        """
        match = _LABEL.fullmatch(label)
        expected = (
            "expected CPU nodes, then memory nodes, as in c3m0, c0-1i0-3 (interleave), c0w0,2 (by weight), "
            "c2p1 (preferred), c2P0-1 (several preferred), c0-3f0 (first touch), c0l* (local) or c*m*"
        )
        if not match:
            raise InvalidInput(f"binding {label!r}: {expected}")
        try:
            cpus, mems = (() if match[part] == "*" else parse_cpulist(match[part]) for part in ("cpus", "mems"))
        except InvalidInput as error:
            raise InvalidInput(f"binding {label!r}: {expected} ({error})") from error
        policy = _POLICIES[match["letter"][0]]
        if policy is MemPolicy.UNKNOWN:
            return cls(cpus, mems, policy, int(match["mode"]) if match["mode"] else None)
        if mems and policy is MemPolicy.LOCAL:
            raise InvalidInput(f"binding {label!r}: l takes no memory nodes; {expected}")
        if not mems and match["letter"] not in "ml":
            raise InvalidInput(f"binding {label!r}: {match['letter']}* has no meaning; write m* for no memory policy")
        return cls(cpus, mems, policy if mems or policy is MemPolicy.LOCAL else MemPolicy.DEFAULT)

    def __str__(self) -> str:
        cpus, mems = (format_cpulist(nodes) or "*" for nodes in (self.cpu_nodes, self.mem_nodes))
        number = f"{'' if self.mode is None else self.mode}m" if self.policy is MemPolicy.UNKNOWN else ""
        return f"c{cpus}{_LETTERS[self.policy]}{number}{mems}"

    @property
    def memory_words(self) -> str:
        """The policy and memory nodes in words: ``bind:0-1``, ``default``, ``unknown policy 9:1``."""
        name = self.policy.value
        if self.policy is MemPolicy.UNKNOWN:
            name += " policy" if self.mode is None else f" policy {self.mode}"
        return f"{name}:{format_cpulist(self.mem_nodes)}" if self.mem_nodes else name

    def places_as(self, other: Binding) -> bool:
        """Whether the memory policies put new pages on the same nodes in the same way, as local and default do."""
        if self.policy in _WITHOUT_NODES:
            return other.policy in _WITHOUT_NODES
        return (self.policy, self.mem_nodes, self.mode) == (other.policy, other.mem_nodes, other.mode)

    @property
    def is_local(self) -> bool:
        """Whether all memory is bound to the one node of the CPUs."""
        return self.policy is MemPolicy.BIND and len(self.cpu_nodes) == 1 and self.cpu_nodes == self.mem_nodes

    @property
    def confines_memory(self) -> bool:
        """Whether all new pages lie on the memory nodes alone, whoever touches them, while these have room."""
        return self.policy in (MemPolicy.BIND, MemPolicy.INTERLEAVE, MemPolicy.WEIGHTED_INTERLEAVE)

    @property
    def asked_of_kernel(self) -> Binding:
        """What the kernel sets and grants: for first touch the CPUs alone, since a program does the rest."""
        return Binding(self.cpu_nodes) if self.policy is MemPolicy.FIRST_TOUCH else self

    def numactl(self, topology: Topology | None = None) -> list[str]:
        """Return the words to put before a command; there are none where nothing is bound.

        With a topology the command stays on the CPUs that this process may use, as ``numactl.cpu_options`` says.

        Raises
        ------
        InvalidInput
            The policy is one that numa_lab does not know.
        """
        self._require_known()
        node_cpus = topology.node_cpus if topology else {}
        usable = topology.cpus_of(self.cpu_nodes) if topology else ()
        options = cpu_options(self.cpu_nodes, node_cpus, usable) if self.cpu_nodes else []
        if self.policy is MemPolicy.LOCAL:
            options.append("--localalloc")
        elif self.asked_of_kernel.policy is not MemPolicy.DEFAULT:
            flag = "membind" if self.policy is MemPolicy.BIND else self.policy.value
            options.append(f"--{flag}={format_cpulist(self.mem_nodes)}")
        return ["numactl", *options] if options else []

    def _require_known(self) -> None:
        if self.policy is MemPolicy.UNKNOWN:
            raise InvalidInput(
                f"binding {self}: numa_lab does not know this memory policy of the kernel, so it can't ask for it; "
                f"policies to ask for: {', '.join(policy.value for policy in MemPolicy if policy is not self.policy)}"
            )

    def require(self, topology: Topology) -> None:
        """Refuse a binding that this machine, or this process's cpuset, can't grant as a whole.

        Raises
        ------
        NodeUnavailable
            A node does not exist, has no CPUs or memory, or is outside the cpuset; the message names those that serve.
        InvalidInput
            The policy is one that numa_lab does not know.
        MissingDependency
            The policy is weighted interleaving, and this Linux does not have it.
        """
        self._require_known()
        if self.policy is MemPolicy.WEIGHTED_INTERLEAVE:
            libnuma.interleave_weights(self.mem_nodes[:1])
        with_cpus = topology.cpu_nodes
        with_memory = tuple(
            node.id for node in topology.nodes if node.memory_bytes and node.id in topology.allowed_nodes
        )
        for nodes, usable, what in (
            (self.cpu_nodes, with_cpus, "CPUs"),
            (self.mem_nodes, with_memory, "memory"),
            (self.mem_nodes if self.policy is MemPolicy.FIRST_TOUCH else (), with_cpus, "CPUs"),
        ):
            for node in nodes:
                topology.node(node)
                if node not in usable:
                    raise NodeUnavailable(
                        f"binding {self}: node {node} has no {what} that this process may use"
                        f"{topology.isolation_note(node) * (what == 'CPUs')}; nodes with usable {what}: {format_cpulist(usable) or 'none'}"
                    )

    @contextmanager
    def bind(self, topology: Topology) -> Iterator[Binding]:
        """Bind the calling thread, and give its affinity and policy back on exit and on error.

        Threads that are started inside inherit the binding and keep it; other threads are not touched. For first touch the CPUs
        alone are bound: what is to lie on its node must be touched there.

        Yields
        ------
        Binding
            The effective one.

        Raises
        ------
        NodeUnavailable, InvalidInput, MissingDependency
            As ``require`` says; nothing has been changed then.
        NotPermitted
            The kernel refuses ``sched_setaffinity`` or ``set_mempolicy``; nothing is left changed.
        """
        self.require(topology)
        cpus = os.sched_getaffinity(0)
        policy = libnuma.get_mempolicy(flags=True) if self.asked_of_kernel.policy is not MemPolicy.DEFAULT else None
        if self.cpu_nodes:
            affinity.set_cpus(topology.cpus_of(self.cpu_nodes))
        try:
            if policy:
                libnuma.set_mempolicy(_MODES[self.policy], self.mem_nodes)
            yield effective(topology)
        finally:
            if self.cpu_nodes:
                affinity.give_back(cpus)
            if policy:
                libnuma.set_mempolicy(*policy)


def effective(topology: Topology) -> Binding:
    """Return what the kernel grants the calling thread now: the nodes that its affinity touches, and its memory policy."""
    cpu_nodes = tuple({topology.node_of_cpu(cpu) for cpu in os.sched_getaffinity(0)})
    try:
        mode_and_flags, nodes = libnuma.get_mempolicy(flags=True)
    except (PermissionError, MissingDependency):
        # The policy was set before the call was refused, or by whoever started this process.
        name, mem_nodes = page_maps.thread_policy()
        policies = {policy.value: policy for policy in _MODES}
        return Binding(cpu_nodes, mem_nodes, policies.get(_NUMA_MAPS_NAMES.get(name, name), MemPolicy.UNKNOWN))
    mode = mode_and_flags & ~libnuma.MPOL_MODE_FLAGS
    if mode == libnuma.MPOL_PREFERRED and not nodes:  # how Linux before 5.14 tells of local
        mode = libnuma.MPOL_LOCAL
    policy = next((policy for policy, number in _MODES.items() if number == mode), MemPolicy.UNKNOWN)
    if policy is MemPolicy.UNKNOWN:
        return Binding(cpu_nodes, tuple(nodes), policy, mode)
    if policy in _WITHOUT_NODES:
        return Binding(cpu_nodes, (), policy)
    return Binding(cpu_nodes, _granted(nodes, mode_and_flags, topology.allowed_nodes), policy)


def _granted(nodes: frozenset[int], mode_and_flags: int, allowed: tuple[int, ...]) -> tuple[int, ...]:
    """Return the nodes that a policy acts on.

    For static and relative nodes the kernel tells those that were asked for, and not those that it grants.
    """
    if mode_and_flags & libnuma.MPOL_F_RELATIVE_NODES and allowed:
        return tuple(allowed[node % len(allowed)] for node in nodes)
    if mode_and_flags & libnuma.MPOL_F_STATIC_NODES:
        return tuple(nodes.intersection(allowed)) or allowed
    return tuple(nodes)
