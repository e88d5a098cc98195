"""Tells the node that is next to a GPU."""

from __future__ import annotations

import sys
from typing import Any

from numa_lab.errors import InvalidInput, NodeUnavailable
from numa_lab.machine.topology import Topology


def nearest_node(topology: Topology, gpu: int | str) -> int:
    """Return the node with CPUs that is next to a GPU.

    Parameters
    ----------
    topology
        The machine.
    gpu
        The number of the GPU as CUDA counts, or in the order of PCI addresses where torch has no CUDA; or its PCI address.

    Raises
    ------
    InvalidInput
        There is no such GPU; the message names those that exist.
    NodeUnavailable
        The firmware does not tell its node.
    """
    address = _pci_address(gpu) if isinstance(gpu, int) else gpu.lower()
    matching = [known for known in topology.gpus if address and known.pci.lower().endswith(address)]
    if not matching and isinstance(gpu, int) and 0 <= gpu < len(topology.gpus):
        matching = [topology.gpus[gpu]]  # without CUDA, numbers follow the order of PCI addresses
    if not matching:
        known = ", ".join(f"{g.pci} on node {g.node}" for g in topology.gpus) or "none"
        raise InvalidInput(f"near_gpu={gpu!r}: expected the number or the PCI address of a GPU; found: {known}")
    node = matching[0].node
    if node is not None and node in topology.node_ids:
        return topology.nearest_cpu_node(node)
    if len(topology.node_ids) == 1:
        return topology.node_ids[0]
    raise NodeUnavailable(
        f"near_gpu={gpu!r}: the firmware does not tell the node of {matching[0].pci}; name one by numa_node, "
        "`nvidia-smi topo -m` may know it"
    )


def _pci_address(number: int) -> str | None:
    """The PCI address of a GPU by CUDA's number, which depends on CUDA_VISIBLE_DEVICES; None without CUDA."""
    torch: Any = sys.modules.get("torch")  # a program that computes has loaded it; this room never does
    if not torch or not torch.cuda.is_available() or not 0 <= number < torch.cuda.device_count():
        return None
    properties: Any = torch.cuda.get_device_properties(number)
    if not hasattr(properties, "pci_bus_id"):  # older releases of torch do not tell
        return None
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
