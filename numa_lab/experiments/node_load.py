"""Load on nodes: their cores read their own memory, so that another node's work is seen as it is on a busy machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from numa_lab.bandwidth.read_probe import read_once
from numa_lab.machine.topology import Topology
from numa_lab.nodes.node_threads import NodeTeam
from numa_lab.placement import memory

CACHE_MULTIPLE = 4  # what a node reads exceeds its caches so many times
LEAST_BYTES = 64 << 20  # and is at least so large
EMULATED_BYTES = 1 << 20
STARTS_SECONDS = 0.02


class NodeLoad:
    """Teams on some nodes that read their own memory as fast as they can, while that is wanted; a context manager that ends them."""

    def __init__(self, topology: Topology, nodes: Sequence[int]) -> None:
        self._topology, self._nodes = topology, nodes
        self._readers: dict[int, tuple[NodeTeam, Tensor]] = {}
        self._stop = [True]  # not empty where reading is to end; no Event, which an interrupt may leave locked

    def __enter__(self) -> NodeLoad:
        if len(self._nodes) > 1:  # else there is no other node
            for node in self._nodes:
                team = NodeTeam(node, name=f"numa-load-{node}")
                cache = self._topology.last_cache_bytes_of(team.cpus)
                nbytes = EMULATED_BYTES if self._topology.emulated else max(LEAST_BYTES, CACHE_MULTIPLE * cache)
                buffer = memory.empty((nbytes // 8 * 8,), torch.uint8, node)
                self._readers[node] = team, buffer
                team.submit(buffer.fill_, 1).result()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.append(True)
        for team, _ in self._readers.values():
            team.shutdown()

    @contextmanager
    def on(self, nodes: Sequence[int]) -> Iterator[None]:
        """Let some nodes read until the end of the block."""
        stop = self._stop = []

        def read(buffer: Tensor, threads: int) -> None:
            while not stop:
                read_once(buffer, threads)

        running = [team.submit(read, buffer, len(team.cpus)) for team, buffer in map(self._readers.__getitem__, nodes)]
        try:
            if running:
                time.sleep(STARTS_SECONDS)
            yield
        finally:
            stop.append(True)
            for future in running:
                future.result()
