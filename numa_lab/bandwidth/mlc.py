"""Reads the output of Intel Memory Latency Checker (MLC), of which four machines' outputs come with the package.

Versions 3.1 to 3.11 were seen, which differ in titles and notes. MLC prints a row for each CPU node and a column for each memory
node, in MB/s of 10^6 bytes and in nanoseconds. A node without CPUs has no row, and memory without room is shown as "-". Decimals
follow the locale: 101000.5, or 101000,5. A matrix is taken for read bandwidths only where the output says that it was read.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from numa_lab.bandwidth.node_bandwidths import Matrix, NodeBandwidths
from numa_lab.errors import InvalidInput

FOLDER = Path(__file__).parent / "published"
PUBLISHED = ("broadwell", "cascadelake", "icelake", "sapphirerapids")
SOURCE = "github.com/gjbex/Code-optimization, folder info, commit d917fb88, CC BY 4.0"

_TOOL = re.compile(r"\s*Intel.*Memory Latency Checker", re.IGNORECASE)
_LATENCY = re.compile(r"\s*Measuring idle latencies(?!.*all cores)", re.IGNORECASE)
_UNIT = re.compile(r"\(in (\w+)\)", re.IGNORECASE)
_BANDWIDTH_UNIT = re.compile(r"\s*Bandwidths are in (\S+)", re.IGNORECASE)
_BANDWIDTH = re.compile(r"\s*Measuring Memory Bandwidths between nodes", re.IGNORECASE)
_ALL_READS = re.compile(r"\s*ALL Reads\s*:(.*)", re.IGNORECASE)
_COMMAND = re.compile(r"\s*Command line parameters:(.*)", re.IGNORECASE)
_HEADER = re.compile(r"\s*(?:Numa node|Socket)((?:\s+\d+)+)\s*", re.IGNORECASE)
_ROW = re.compile(r"\s*\d+(\s.*)?")
_NUMBER = re.compile(r"\d+(\.\d+|,\d\d?)?")  # MLC prints one decimal; a comma before three digits would group thousands
_TRAFFIC = re.compile(r"\s*Using (.*)\btraffic\b", re.IGNORECASE)
_READ_ONLY = re.compile(r"\s*(ALL )?reads?([- ]only)?\s*", re.IGNORECASE)
_WRITES = re.compile(r"(?:^|\s)-W\s*\d+")  # the number says how many reads for each write
_MAY_WRITE = re.compile(r"(?:^|\s)-[Wwo]")  # or a file that says what each thread does
_AGAIN = "run `mlc` again and keep all that it prints"
_READS_AGAIN = "run `mlc --bandwidth_matrix` without -W and keep all that it prints"


def published(name: str) -> NodeBandwidths:
    """Return what was measured on one of the machines ``PUBLISHED``; numa_lab/bandwidth/published/README.md names their source.

    Raises
    ------
    InvalidInput
        There is no such machine.
    """
    if name not in PUBLISHED:
        raise InvalidInput(f"machine {name!r}: expected one of {', '.join(PUBLISHED)}")
    return read_mlc(FOLDER / f"{name}_mlc.txt")


def read_mlc(path: str | os.PathLike[str]) -> NodeBandwidths:
    """Read a file with MLC's output; see ``parse_mlc``.

    Raises
    ------
    InvalidInput
        There is no such file, or it holds something else.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}; expected a file with the output of `mlc`") from error
    # PowerShell writes UTF-16 where output is redirected, and older terminals one byte for each sign.
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("utf-16" if utf16 else "latin-1", "replace")
    return parse_mlc(text, str(path))


def parse_mlc(text: str, source: str = "MLC output") -> NodeBandwidths:
    """Read MLC's matrices of bandwidth and latency, and its peak bandwidth of reads.

    The text is the output of ``mlc``, or those of ``mlc --bandwidth_matrix``, ``--latency_matrix`` and ``--peak_injection_bandwidth``
    one after the other. Without the last two, latencies and the peak are None. Where the output ends within its last row, the
    cells that are missing are None, since the output of a published machine ends so.

    Parameters
    ----------
    text
        What MLC printed.
    source
        Its name, for messages.

    Raises
    ------
    InvalidInput
        It is not MLC's output, has no matrix of bandwidths or two of them, does not say that this was read, or is damaged:
        the message names the line.
    """
    lines = _Lines(text.splitlines(), source)
    if not any(known.match(line) for line in lines.lines for known in (_TOOL, _LATENCY, _BANDWIDTH)):
        raise InvalidInput(f"{source} is no output of the Intel Memory Latency Checker: expected what `mlc` prints")
    latency, bandwidth = lines.matrix(_LATENCY, "latencies"), lines.matrix(_BANDWIDTH, "bandwidths")
    if bandwidth is None:
        raise InvalidInput(f"{source} has no bandwidths between nodes: run `mlc`, or `mlc --bandwidth_matrix`")
    if latency is not None and latency.keys() != bandwidth.keys():
        rows = [", ".join(map(str, sorted(matrix))) for matrix in (bandwidth, latency)]
        raise InvalidInput(f"{source} has bandwidths of nodes {rows[0]} and latencies of nodes {rows[1]}: {_AGAIN}")
    nodes = tuple(sorted({node for row in bandwidth.values() for node in row}))
    return NodeBandwidths(
        nodes,
        _square(bandwidth, nodes, 1e6),
        None if latency is None else _square(latency, nodes, 1.0),
        lines.all_reads(),
    )


Cells = dict[int, dict[int, float | None]]


def _square(cells: Cells, nodes: Sequence[int], scale: float) -> Matrix:
    """The cells as rows and columns of all nodes; None where nothing was measured."""

    def value(cpu: int, mem: int) -> float | None:
        cell = cells.get(cpu, {}).get(mem)
        return None if cell is None else round(cell * scale, 1)

    return tuple(tuple(value(cpu, mem) for mem in nodes) for cpu in nodes)


@dataclass(frozen=True)
class _Lines:
    """The lines of an output, and what its messages call it."""

    lines: list[str]
    source: str

    def refuse(self, number: int, why: str) -> InvalidInput:
        """The error that says what is wrong with a line; `number` counts from 0, and the message from 1."""
        return InvalidInput(f"{self.source}, line {number + 1}, {self.lines[number].strip()[:80]!r}: {why}")

    def matrix(self, title: re.Pattern[str], what: str) -> Cells | None:
        """The cells of a matrix by CPU node and memory node; None where the output has no such matrix."""
        titles = [number for number, line in enumerate(self.lines) if title.match(line)]
        if len(titles) > 1:
            raise self.refuse(titles[1], f"second matrix of {what}; keep one of them")
        if not titles:
            return None
        start = titles[0]
        header = next((n for n in range(start + 1, len(self.lines)) if _HEADER.fullmatch(self.lines[n])), None)
        following = next(
            (n for n in range(start + 1, len(self.lines)) if "Measuring" in self.lines[n]), len(self.lines)
        )
        if header is None or header > following:
            raise self.refuse(start, f"no line such as `Numa node 0 1` follows it; {_AGAIN}")
        if title is _BANDWIDTH:
            self.require_reads(start, header)
        elif (unit := _UNIT.search(self.lines[start])) and unit[1].lower() != "ns":
            raise self.refuse(start, f"latencies in {unit[1]}, expected ns; run `mlc --latency_matrix`")
        columns = [int(word) for word in self.lines[header].split() if word.isdecimal()]
        if len(set(columns)) != len(columns):
            raise self.refuse(header, "a node is named twice")
        cells: Cells = {}
        for number in range(header + 1, len(self.lines)):
            if not self.lines[number].strip():
                continue  # an empty line stands for a node without CPUs
            if not _ROW.fullmatch(self.lines[number]):
                break
            cpu, row = self.row(number, columns)
            if cpu in cells or cpu not in columns:
                raise self.refuse(number, f"expected a row for each of nodes {', '.join(map(str, columns))}, once")
            cells[cpu] = row
        if not cells:
            raise self.refuse(header, f"no rows follow it; {_AGAIN}")
        return cells

    def require_reads(self, start: int, header: int) -> None:
        """Refuse a matrix of bandwidths unless the lines from its title to its header say that memory was read.

        With -W, MLC measures reads and writes, or writes alone, and prints the same table without the line that names its traffic.
        """
        command = None
        for line in self.lines[start::-1]:
            if match := _COMMAND.match(line):
                command = match[1].strip()
            if match or _TOOL.match(line):
                break
        if command and _WRITES.search(command):
            raise self.refuse(start, f"measured with {command}, which writes; {_READS_AGAIN}")
        traffics = [
            (number, match[1]) for number in range(start, header) if (match := _TRAFFIC.match(self.lines[number]))
        ]
        for number, traffic in traffics:
            if not _READ_ONLY.fullmatch(traffic):
                raise self.refuse(number, f"this traffic is not reads alone; {_READS_AGAIN}")
        if not traffics and (command is None or _MAY_WRITE.search(command)):
            raise self.refuse(
                start,
                "neither a line `Using Read-only traffic type` nor MLC's line with its command line parameters says whether "
                f"this was read or written; {_READS_AGAIN}",
            )
        for number in range(start, header):
            if (unit := _BANDWIDTH_UNIT.match(self.lines[number])) and unit[1].lower() not in ("mb/sec", "mb/s"):
                raise self.refuse(number, f"bandwidths in {unit[1]}, expected MB/sec; {_READS_AGAIN}")

    def row(self, number: int, columns: Sequence[int]) -> tuple[int, dict[int, float | None]]:
        """The node and the cells of one row."""
        node, *texts = self.lines[number].split()
        values = [None if text == "-" else self.number(number, text) for text in texts]
        ends_here = self.is_last(number) and int(node) == columns[-1]  # of an earlier node, whole rows would be missing
        if not texts or len(texts) > len(columns) or (len(texts) < len(columns) and not ends_here):
            raise self.refuse(number, f"{len(texts)} values, expected {len(columns)}; {_AGAIN}")
        return int(node), dict(zip(columns, values + [None] * (len(columns) - len(texts)), strict=True))

    def number(self, number: int, text: str) -> float:
        """The value of a positive number that stands in a line."""
        if not _NUMBER.fullmatch(text) or not float(text.replace(",", ".")):
            raise self.refuse(number, f"{text!r} is not a positive number such as 101000.5 or 101000,5")
        # MLC prints a decimal everywhere: where the output ends without one, the number has lost digits.
        if text.isdecimal() and self.is_last(number) and self.lines[number].rstrip().endswith(text):
            raise self.refuse(number, f"the output ends within a number; {_AGAIN}")
        return float(text.replace(",", "."))

    def is_last(self, number: int) -> bool:
        """Whether nothing follows a line."""
        return not any(line.strip() for line in self.lines[number + 1 :])

    def all_reads(self) -> float | None:
        """The highest bandwidth of all nodes reading at once, in bytes per second; None where the output has none."""
        peaks = [
            1e6 * self.number(number, match[1].strip())
            for number, line in enumerate(self.lines)
            if (match := _ALL_READS.match(line)) and match[1].strip()
        ]
        return round(max(peaks), 1) if peaks else None
