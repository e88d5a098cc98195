"""How fast several nodes can read memory at once, from the bandwidths that pairs of nodes reached alone.

Bytes take as long as the slowest of these limits lets them: each path from CPUs to memory, the memory of each node, the CPUs of
each node, the link from each socket to each other, and all nodes together. ``numa_lab.bandwidth.roofline`` says how each is known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from numa_lab.bandwidth.node_bandwidths import Groups, NodeBandwidths
from numa_lab.machine.sysfs import format_cpulist

Traffic = Mapping[tuple[int, int], float]  # bytes, by node of the CPUs and node of the memory
_Limit = tuple[str, int, int]  # its kind, with the two nodes of a path, one node twice, or the two sockets of a link


@dataclass(frozen=True)
class Contention:
    """The limits that the paths between the nodes of a machine share.

    Parameters
    ----------
    bandwidths
        Bandwidths between its nodes: traffic may be between those that were measured with any other.
    groups
        The nodes of each socket, as ``node_bandwidths.socket_groups`` finds them.
    """

    bandwidths: NodeBandwidths
    groups: Groups

    def seconds(self, traffic: Traffic) -> float:
        """Return the time that this traffic takes, all of it at once."""
        return max((seconds for seconds, _ in self._limits(traffic)), default=0.0)

    def slowest(self, traffic: Traffic) -> tuple[float, str]:
        """Return seconds and name of the limit that bounds this traffic; of limits that are equal, the first is named.

        Raises
        ------
        ValueError
            There is no traffic.
        """
        seconds, limit = max(self._limits(traffic), key=lambda bound: bound[0])
        return seconds, self._name(*limit)

    def rate(self, cpu: int, mem: int) -> float:
        """Return the bandwidth of a path from the CPUs of one node to the memory of another, or of the same.

        A path that was not measured counts as the median of those alike: to a node's own memory, within a socket, or between two.
        """
        return self._rates[cpu, mem]

    @cached_property
    def _socket(self) -> dict[int, int]:
        return {node: number for number, group in enumerate(self.groups) for node in group}

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        return [(cpu, mem) for cpu in self.bandwidths.cpu_nodes for mem in self.bandwidths.mem_nodes]

    @cached_property
    def _rates(self) -> dict[tuple[int, int], float]:
        def likeness(c: int, m: int) -> tuple[bool, bool]:
            return c == m, self._socket[c] == self._socket[m]

        known = {pair: rate for pair in self._pairs if (rate := self.bandwidths.bandwidth(*pair)) is not None}
        alike: dict[tuple[bool, bool], list[float]] = defaultdict(list)
        by_cpu: dict[int, list[float]] = defaultdict(list)
        for pair, rate in known.items():
            alike[likeness(*pair)].append(rate)
            by_cpu[pair[0]].append(rate)
        usual = {kind: median(rates) for kind, rates in alike.items()}
        rates = {}
        for cpu in self.bandwidths.cpu_nodes:
            guess = median(by_cpu[cpu])
            for mem in self._socket:
                rates[cpu, mem] = known.get((cpu, mem), usual.get(likeness(cpu, mem), guess))
        return rates

    @cached_property
    def _shared(self) -> dict[_Limit, float]:
        """The bandwidth of each limit that several paths share: the best that any of them reached alone."""
        best: dict[_Limit, float] = defaultdict(float)
        for cpu, mem in self._pairs:
            for limit in self._shared_by(cpu, mem):
                best[limit] = max(best[limit], self.rate(cpu, mem))
        return best

    def _shared_by(self, cpu: int, mem: int) -> list[_Limit]:
        sockets = self._socket[cpu], self._socket[mem]
        link = [("link", *sockets)] if sockets[0] != sockets[1] else []
        return [("cpu", cpu, cpu), ("mem", mem, mem), *link]

    def _limits(self, traffic: Traffic) -> Iterator[tuple[float, _Limit]]:
        """The seconds that each limit needs for this traffic."""
        through: dict[_Limit, float] = defaultdict(float)
        for (cpu, mem), count in traffic.items():
            yield count / self.rate(cpu, mem), ("path", cpu, mem)
            for limit in self._shared_by(cpu, mem):
                through[limit] += count
        for limit, count in through.items():
            yield count / self._shared[limit], limit
        together = self.bandwidths.all_nodes_bytes_per_s
        if together and len({cpu for cpu, _ in traffic}) > 1:
            yield sum(traffic.values()) / together, ("all", 0, 0)

    def _name(self, kind: str, first: int, second: int) -> str:
        if kind == "path":
            measured = self.bandwidths.bandwidth(first, second) is not None
            guessed = "" if measured else " (not measured: median of alike pairs)"
            across = "another socket's " if self._socket[first] != self._socket[second] else ""
            memory = f"memory of node {second}"
            name = memory if first == second else f"node {first} reading {across}{memory}"
            return f"{name}, {gb(self.rate(first, second))}/s{guessed}"
        if kind == "all":
            return f"all nodes reading at once, {gb(self.bandwidths.all_nodes_bytes_per_s or 0)}/s"
        if kind == "link":
            ends = (f"nodes {format_cpulist(self.groups[socket])}" for socket in (second, first))
            name = f"socket link from {' to '.join(ends)}"
        else:
            name = f"CPUs of node {first}" if kind == "cpu" else f"memory of node {first}"
        return f"{name}, {gb(self._shared[kind, first, second])}/s"


def gb(count: float) -> str:
    """Write a number of bytes in gigabytes of 10^9."""
    return f"{count / 1e9:.1f} GB"
