"""Read bandwidths and latencies between the nodes of a machine, as they were measured, and the nodes that share a socket."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from numa_lab.errors import InvalidInput, RunDirectoryError
from numa_lab.measurement.atomic_files import read_json

Matrix = tuple[tuple[float | None, ...], ...]
Groups = tuple[tuple[int, ...], ...]

PROBES = "probes.json"  # where a run directory keeps what notebook 01 measured
LEAST_GAP = (
    1.15  # latencies across sockets are 1.27 to 1.54 times those within on published machines; other gaps are 1.05
)
ONE_SOCKET = 1.4  # remote over local latency: 1.2 between clusters of one socket, 1.6 between two sockets


@dataclass(frozen=True)
class NodeBandwidths:
    """Read bandwidths and latencies between nodes; a matrix has a row for each CPU node and a column for each memory node.

    A node without CPUs has a row of None, and a node without memory a column of None. None elsewhere was not measured.

    Raises
    ------
    InvalidInput
        A matrix does not fit the nodes, or a value is not a positive number.
    """

    nodes: tuple[int, ...]
    read_bytes_per_s: Matrix  # while one CPU node reads alone
    latency_ns: Matrix | None  # of a dependent load; None where no latency is known
    all_nodes_bytes_per_s: float | None  # of all nodes together, while each reads its own memory

    def __post_init__(self) -> None:
        """Refuse what no machine can measure."""
        if not self.nodes or len(set(self.nodes)) != len(self.nodes):
            raise InvalidInput(f"nodes {list(self.nodes)}: expected at least one, and each once")
        for name in ("read_bytes_per_s", "latency_ns"):
            matrix = getattr(self, name)
            if matrix is None and name == "latency_ns":
                continue
            if [len(row) for row in matrix] != [len(self.nodes)] * len(self.nodes):
                raise InvalidInput(
                    f"{name} with rows of {[len(row) for row in matrix]} values: expected a row and a column for each "
                    f"of {len(self.nodes)} nodes"
                )
            for cell in (cell for row in matrix for cell in row):
                _require_positive(name, cell)
        _require_positive("all_nodes_bytes_per_s", self.all_nodes_bytes_per_s)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read what ``numa-lab probe --json`` prints, and leave further keys alone.

        Raises
        ------
        InvalidInput
            It is something else; the message says what is wrong.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or not value.keys() >= set(names):
            missing = sorted(set(names) - set(value)) if isinstance(value, Mapping) else names
            raise InvalidInput(f"probes without {', '.join(missing)}: expected what `numa-lab probe --json` prints")
        try:
            values = {name: _READERS[name](value[name]) if name in _READERS else value[name] for name in names}
        except (AttributeError, TypeError, ValueError) as error:
            raise InvalidInput(f"probes ({error}): expected what `numa-lab probe --json` prints") from error
        return cls(**values)

    def bandwidth(self, cpu: int, mem: int) -> float | None:
        """Return the bytes per second that a node's CPUs read from a node's memory; None where that was not measured."""
        return self.read_bytes_per_s[self._index[cpu]][self._index[mem]]

    def latency(self, cpu: int, mem: int) -> float | None:
        """Return the nanoseconds that a load takes from a node's CPUs to a node's memory; None where that was not measured."""
        return self.latency_ns[self._index[cpu]][self._index[mem]] if self.latency_ns else None

    @cached_property
    def _index(self) -> dict[int, int]:
        return {node: index for index, node in enumerate(self.nodes)}

    @cached_property
    def cpu_nodes(self) -> tuple[int, ...]:
        """Nodes whose CPUs were seen reading."""
        return tuple(cpu for cpu in self.nodes if any(self.bandwidth(cpu, mem) for mem in self.nodes))

    @cached_property
    def mem_nodes(self) -> tuple[int, ...]:
        """Nodes whose memory was read."""
        return tuple(mem for mem in self.nodes if any(self.bandwidth(cpu, mem) for cpu in self.nodes))

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """The pairs of CPU node and memory node that were not measured although each of the two was, with another node."""
        return tuple((c, m) for c in self.cpu_nodes for m in self.mem_nodes if self.bandwidth(c, m) is None)

    def only(self, cpu_nodes: Iterable[int], mem_nodes: Iterable[int]) -> NodeBandwidths:
        """Return a copy that holds the bandwidths between these CPU nodes and these memory nodes alone."""
        cpus, mems = set(cpu_nodes), set(mem_nodes)
        kept = tuple(
            tuple(self.bandwidth(cpu, mem) if cpu in cpus and mem in mems else None for mem in self.nodes)
            for cpu in self.nodes
        )
        return replace(self, read_bytes_per_s=kept)


@dataclass(frozen=True)
class NodeProbes(NodeBandwidths):
    """What ``node_probes.probe_nodes`` measured on a machine, with how it was measured.

    Its latencies are those from the first core of a CPU node. With one node, ``all_nodes_bytes_per_s`` is that of this node,
    measured again.
    """

    latency_ns: Matrix
    threads: tuple[int, ...]  # for each node: how many threads of its CPUs read; 0 without CPUs
    pages: dict[int, dict[int, int]]  # where the buffer of each memory node lay: its pages by node
    notes: tuple[str, ...]
    seconds: float  # that measuring took

    def __post_init__(self) -> None:
        """Refuse what no machine can measure, and probes without latencies."""
        super().__post_init__()
        if self.latency_ns is None:
            raise InvalidInput("latency_ns of null: expected a row and a column for each node")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; the keys of ``pages`` become text."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain


def load_probes(run_dir: Path) -> NodeProbes | None:
    """Read ``probes.json`` of a run directory; None where the run was measured without.

    Raises
    ------
    RunDirectoryError
        The file is damaged.
    """
    path = run_dir / PROBES
    if not path.exists():
        return None
    try:
        return NodeProbes.from_json(read_json(path))
    except InvalidInput as error:
        raise RunDirectoryError(f"{path} is damaged, {error}: measure again") from error


def _numbers(stored: Any) -> tuple[int, ...]:
    return tuple(map(operator.index, stored))


def _matrix(stored: Any) -> Matrix | None:
    return None if stored is None else tuple(map(tuple, stored))


# How a field is read from JSON, by its name; other fields are taken as they are.
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "nodes": _numbers,
    "read_bytes_per_s": lambda stored: _matrix(stored) or (),
    "latency_ns": _matrix,
    "threads": _numbers,
    "pages": lambda stored: {int(n): {int(m): count for m, count in pages.items()} for n, pages in stored.items()},
    "notes": tuple,
}


def _require_positive(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InvalidInput(f"{name} of {value!r}: expected a positive number, or null where nothing was measured")


def socket_groups(bandwidths: NodeBandwidths, socket_of: Mapping[int, int] | None = None) -> Groups:
    """Group the nodes by socket.

    Where the kernel tells the socket of each node, that decides. Elsewhere the latencies do. The distance of two nodes is the mean
    of the two latencies between them. In the sorted list of all distances, a gap separates near pairs from far ones. The widest
    gap is taken that divides the nodes into groups, where each node is near to all of its group and to no other; a gap
    narrower than ``LEAST_GAP`` does not count. Where no gap divides them, all nodes are one socket if they are nearly as near to each
    other as to their own memory (``ONE_SOCKET``); otherwise each node is a socket of its own.

    Limits: the two halves of a single cluster-on-die socket lie so far apart that they are taken for two sockets.

    Parameters
    ----------
    bandwidths
        The bandwidths and latencies; without latencies, each node is taken for a socket of its own.
    socket_of
        The socket of each node with CPUs, as far as it is known.

    Returns
    -------
    Groups of node ids, in ascending order. A node without CPUs belongs to the socket that reaches it fastest.
    """
    cpu_nodes = bandwidths.cpu_nodes
    if socket_of is not None and set(cpu_nodes) <= set(socket_of):
        ids = sorted({socket_of[node] for node in cpu_nodes})
        groups = [{node for node in cpu_nodes if socket_of[node] == socket} for socket in ids]
    else:
        groups = _by_latency(bandwidths, cpu_nodes)

    def farness(cpu: int, mem: int) -> tuple[float, float]:
        return bandwidths.latency(cpu, mem) or math.inf, -(bandwidths.bandwidth(cpu, mem) or 0)

    for mem in bandwidths.mem_nodes:
        if mem not in cpu_nodes:
            nearest = min(cpu_nodes, key=lambda cpu: farness(cpu, mem))
            next(group for group in groups if nearest in group).add(mem)
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _by_latency(bandwidths: NodeBandwidths, nodes: tuple[int, ...]) -> list[set[int]]:
    """The nodes of each socket as the latencies tell them; each node alone where a latency is missing."""
    alone = [{node} for node in nodes]
    pairs: dict[frozenset[int], float] = {}
    for a, b in combinations(nodes, 2):
        there, back = bandwidths.latency(a, b), bandwidths.latency(b, a)
        if there is None or back is None:
            return alone
        pairs[frozenset((a, b))] = (there + back) / 2
    gaps = sorted(((far / near, near) for near, far in pairwise(sorted(pairs.values()))), reverse=True)
    for ratio, cut in gaps:
        near = {a: {b for b in nodes if a == b or pairs[frozenset((a, b))] <= cut} for a in nodes}
        if ratio >= LEAST_GAP and all(near[b] == near[a] for a in nodes for b in near[a]):
            return [set(group) for group in {frozenset(group) for group in near.values()}]
    local = [ns for ns in (bandwidths.latency(node, node) for node in nodes) if ns is not None]
    if pairs and local and fmean(pairs.values()) < ONE_SOCKET * fmean(local):
        return [set(nodes)]
    return alone
