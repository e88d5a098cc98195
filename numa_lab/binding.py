"""Binding: CPU nodes, memory nodes and a memory policy, as numactl would set them.

Both affinity and memory policy belong to a thread. ``bind`` moves the calling thread alone; threads that it starts
later inherit from it, and OpenMP workers that exist already keep what they had (see ``numa_lab.openmp``).
A policy acts when a page is first touched: it moves nothing that exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from numa_lab import affinity, libnuma
from numa_lab.errors import InvalidInput, MissingDependency, NodeUnavailable
from numa_lab.sysfs import format_cpulist, parse_cpulist
from numa_lab.topology import Topology


class MemPolicy(Enum):
    """Where new pages go: see set_mempolicy(2). First touch is none of the kernel's policies: a program does it."""

    DEFAULT = "default"  # the node of the CPU that touches the page first
    BIND = "bind"  # only these nodes; where they are full the kernel kills the process
    PREFERRED = "preferred"  # this node while it has room, then others
    INTERLEAVE = "interleave"  # round-robin over these nodes
    WEIGHTED_INTERLEAVE = "weighted-interleave"  # round-robin, as many pages in turn as each node's weight says
    FIRST_TOUCH = "first-touch"  # default, and one thread on this node touches K and V before all others


_LETTERS = {
    MemPolicy.DEFAULT: "m",
    MemPolicy.BIND: "m",
    MemPolicy.PREFERRED: "p",
    MemPolicy.INTERLEAVE: "i",
    MemPolicy.WEIGHTED_INTERLEAVE: "w",
    MemPolicy.FIRST_TOUCH: "f",
}
_POLICIES = {letter: policy for policy, letter in _LETTERS.items()}  # m: bind, which comes after default
_LABEL = re.compile(r"c(?P<cpus>\*|[\d,-]+)(?P<letter>[mpiwf])(?P<mems>\*|[\d,-]+)", re.ASCII)

_MODES = {
    MemPolicy.DEFAULT: libnuma.MPOL_DEFAULT,
    MemPolicy.BIND: libnuma.MPOL_BIND,
    MemPolicy.PREFERRED: libnuma.MPOL_PREFERRED,
    MemPolicy.INTERLEAVE: libnuma.MPOL_INTERLEAVE,
    MemPolicy.WEIGHTED_INTERLEAVE: libnuma.MPOL_WEIGHTED_INTERLEAVE,
}


@dataclass(frozen=True)
class Binding:
    """CPU nodes (empty: any), memory nodes (empty: any) and policy.

    The label names all three: ``c3m0`` CPUs of node 3 and memory bound to node 0, ``c0-1i0-3`` interleaved,
    ``c0w0,2`` interleaved by weight, ``c2p1`` preferred, ``c0-3f0`` touched first by one thread on node 0, ``c*m*``
    nothing bound, ``c0m*`` CPUs alone.
    """

    cpu_nodes: tuple[int, ...] = ()
    mem_nodes: tuple[int, ...] = ()
    policy: MemPolicy = MemPolicy.DEFAULT

    def __post_init__(self) -> None:
        for field in ("cpu_nodes", "mem_nodes"):
            object.__setattr__(self, field, tuple(sorted(set(getattr(self, field)))))
        if bool(self.mem_nodes) == (self.policy is MemPolicy.DEFAULT):
            raise InvalidInput(
                f"policy={self.policy.value!r} with mem_nodes={self.mem_nodes}: "
                "name memory nodes for bind, preferred, interleave, weighted-interleave or first-touch, and none for default"
            )
        if self.policy in (MemPolicy.PREFERRED, MemPolicy.FIRST_TOUCH) and len(self.mem_nodes) != 1:
            raise InvalidInput(f"policy={self.policy.value!r} with mem_nodes={self.mem_nodes}: name exactly one node")
        if self.policy is MemPolicy.FIRST_TOUCH and self.cpu_nodes and not set(self.mem_nodes) <= set(self.cpu_nodes):
            raise InvalidInput(
                f"policy='first-touch' with cpu_nodes={self.cpu_nodes} and mem_nodes={self.mem_nodes}: "
                "name one of the CPU nodes, since the thread that touches runs there"
            )

    @classmethod
    def parse(cls, label: str) -> Binding:
        """Read a label such as ``c3m0``.

        Raises
        ------
        InvalidInput
            The text is not a label.
        """
        match = _LABEL.fullmatch(label)
        expected = (
            "expected CPU nodes, then memory nodes, as in c3m0, c0-1i0-3 (interleave), c0w0,2 (by weight), "
            "c2p1 (preferred), c0-3f0 (first touch) or c*m*"
        )
        if not match:
            raise InvalidInput(f"binding {label!r}: {expected}")
        try:
            cpus, mems = (() if match[part] == "*" else parse_cpulist(match[part]) for part in ("cpus", "mems"))
        except InvalidInput as error:
            raise InvalidInput(f"binding {label!r}: {expected} ({error})") from error
        if not mems and match["letter"] != "m":
            raise InvalidInput(f"binding {label!r}: {match['letter']}* has no meaning; write m* for no memory policy")
        return cls(cpus, mems, _POLICIES[match["letter"]] if mems else MemPolicy.DEFAULT)

    def __str__(self) -> str:
        cpus, mems = (format_cpulist(nodes) or "*" for nodes in (self.cpu_nodes, self.mem_nodes))
        return f"c{cpus}{_LETTERS[self.policy]}{mems}"

    @property
    def is_local(self) -> bool:
        """Whether all memory is bound to the one node of the CPUs."""
        return self.policy is MemPolicy.BIND and len(self.cpu_nodes) == 1 and self.cpu_nodes == self.mem_nodes

    @property
    def confines_memory(self) -> bool:
        """Whether all new pages lie on the memory nodes alone, whoever touches them, while these have room."""
        return self.policy not in (MemPolicy.DEFAULT, MemPolicy.PREFERRED, MemPolicy.FIRST_TOUCH)

    @property
    def asked_of_kernel(self) -> Binding:
        """What the kernel sets and grants: of first touch the CPUs alone, since a program does the rest."""
        return Binding(self.cpu_nodes) if self.policy is MemPolicy.FIRST_TOUCH else self

    def numactl(self) -> list[str]:
        """The words to put before a command, empty where nothing is bound."""
        words = [f"--cpunodebind={format_cpulist(self.cpu_nodes)}"] if self.cpu_nodes else []
        if self.asked_of_kernel.policy is not MemPolicy.DEFAULT:
            flag = "membind" if self.policy is MemPolicy.BIND else self.policy.value
            words.append(f"--{flag}={format_cpulist(self.mem_nodes)}")
        return ["numactl", *words] if words else []

    def require(self, topology: Topology) -> None:
        """Refuse a binding that this machine or this process's cpuset can't grant whole.

        Raises
        ------
        NodeUnavailable
            A node does not exist, has no CPUs or memory, or is outside the cpuset; the message names those that serve.
        MissingDependency
            The policy is weighted interleaving, and this Linux does not have it.
        """
        if self.policy is MemPolicy.WEIGHTED_INTERLEAVE:
            libnuma.interleave_weights(self.mem_nodes[:1])
        with_cpus = tuple(node.id for node in topology.nodes if topology.cpus_of([node.id]))
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
                        f"binding {self}: node {node} has no {what} that this process may use; "
                        f"nodes with usable {what}: {format_cpulist(usable) or 'none'}"
                    )

    @contextmanager
    def bind(self, topology: Topology) -> Iterator[Binding]:
        """Bind the calling thread, and give back affinity and policy on exit and on error.

        Yields the effective binding. Threads started inside inherit it and keep it; other threads are not touched.
        For first touch the CPUs alone are bound: what is to lie on its node must be touched there.

        Raises
        ------
        NodeUnavailable, MissingDependency
            As ``require`` says; nothing has been changed then.
        NotPermitted
            The kernel refuses ``sched_setaffinity`` or ``set_mempolicy``; nothing is left changed.
        """
        self.require(topology)
        cpus = os.sched_getaffinity(0)
        policy = libnuma.get_mempolicy() if self.asked_of_kernel.policy is not MemPolicy.DEFAULT else None
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
    """What the kernel grants the calling thread now: the nodes that its affinity touches, and its memory policy."""
    cpu_nodes = tuple({topology.node_of_cpu(cpu) for cpu in os.sched_getaffinity(0)})
    try:
        mode, nodes = libnuma.get_mempolicy()
    except (PermissionError, MissingDependency):
        # Profiles refuse it together with set_mempolicy: then this process can have set nothing, nor can it without libnuma.
        return Binding(cpu_nodes)
    policy = next((policy for policy, number in _MODES.items() if number == mode), MemPolicy.DEFAULT)
    return Binding(cpu_nodes, tuple(nodes) if policy is not MemPolicy.DEFAULT else (), policy)
