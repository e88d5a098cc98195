"""The bindings of a sweep: those that a name such as ``matrix`` stands for on this machine, or that labels name."""

from __future__ import annotations

from contextlib import suppress

from numa_lab.errors import InvalidInput, MissingDependency, NodeUnavailable
from numa_lab.experiments import notebook_runner
from numa_lab.machine.topology import Topology
from numa_lab.placement.binding import Binding, MemPolicy


def choose_bindings(spec: str, topology: Topology) -> list[Binding]:
    """Return the bindings that a name stands for, or a list of labels.

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
    """Return the bindings by which most programs use all nodes, on purpose or by accident."""
    cpus, mems = tuple(cpu_nodes), tuple(mem_nodes)
    bindings = [Binding(cpus, mems, MemPolicy.INTERLEAVE)]
    weighted = Binding(cpus, mems, MemPolicy.WEIGHTED_INTERLEAVE)
    with suppress(MissingDependency):  # who names the label is told what is missing
        weighted.require(topology)
        notebook_runner.require_tools(weighted)
        bindings.append(weighted)
    touchers = [node for node in cpu_nodes if node in mem_nodes][:1]
    return [*bindings, *(Binding(cpus, (node,), MemPolicy.FIRST_TOUCH) for node in touchers)]


def _labels(spec: str) -> list[str]:
    # Node lists hold commas too (c0,2m0): a label ends before the next c.
    labels = ["c" + part.rstrip(",") for part in spec.split("c") if part]
    if not labels or not spec.startswith("c"):
        raise InvalidInput(f"bindings {spec!r}: expected local, matrix, all, or labels such as c0m0,c0m1")
    return labels
