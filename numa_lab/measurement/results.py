"""The tidy schema, and the Parquet files that hold rows of it, one per execution.

A run directory holds ``machine.json`` (see ``numa_lab.measurement.machine_facts``), ``plan.json`` (see
``numa_lab.experiments.sweep_plan``) and ``executions/*.parquet``. A file appears under its name only when it is whole. Rows of
two machines are never mixed silently: each file carries the fingerprint of its machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from numa_lab.errors import MachineMismatch, RunDirectoryError
from numa_lab.machine.shell_commands import to_paste
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.measurement.atomic_files import atomic_file, read_json
from numa_lab.measurement.comparison import CASE
from numa_lab.measurement.machine_facts import MACHINE, SCHEMA_VERSION, load_machine

EXECUTIONS = "executions"
PREDICTION = "prediction.json"


@dataclass(frozen=True)
class Column:
    """One column of the tidy schema."""

    name: str
    type: pa.DataType
    meaning: str


COLUMNS = (
    Column("run_id", pa.string(), "the sweep that the execution belongs to; 'by-hand' outside a sweep"),
    Column("execution_id", pa.string(), "the process that measured: the unit of statistics"),
    Column("block", pa.int32(), "block of the plan; within one, every label runs once, in random order"),
    Column("order", pa.int32(), "place of the execution in the order in which the run took them"),
    Column("label", pa.string(), "binding, with the suffix ~aa for the second half of the A/A pair"),
    Column("cpu_nodes", pa.string(), "requested CPU nodes as a list like 0,2-3; empty: any"),
    Column("mem_nodes", pa.string(), "requested memory nodes; empty: any"),
    Column(
        "policy",
        pa.string(),
        "requested memory policy, as binding.MemPolicy has it: default, bind, interleave, first-touch (by one thread), ...",
    ),
    Column("observed_cpus", pa.string(), "CPUs on which computing threads were seen"),
    Column("local_page_share", pa.float64(), "share of the pages of query, key, value and output on the CPUs' nodes"),
    Column("attention", pa.string(), "gqa, mha or mqa"),
    Column("phase", pa.string(), "decode or prefill"),
    Column("batch", pa.int32(), "sequences"),
    Column("q_heads", pa.int32(), "query heads"),
    Column("kv_heads", pa.int32(), "key and value heads"),
    Column("q_len", pa.int32(), "query tokens per sequence"),
    Column("kv_len", pa.int32(), "cached tokens per sequence"),
    Column("head_dim", pa.int32(), "elements of a head"),
    Column("dtype", pa.string(), "float32, bfloat16 or float16"),
    Column("backend", pa.string(), "what computed the attention"),
    Column("threads", pa.int32(), "computing threads, one per physical core"),
    Column("sample", pa.int32(), "number of the sample within its case; 0 is the cold one"),
    Column("cold", pa.bool_(), "whether it is the first call after the tensors were placed"),
    Column("seconds", pa.float64(), "seconds per call"),
    Column("kv_bytes", pa.int64(), "bytes of K and V, counted once"),
    Column("flops", pa.int64(), "floating-point operations of the two matrix products, masked ones included"),
    Column(
        "limit_bytes_per_s",
        pa.float64(),
        "read bandwidth of the same CPUs, memory and threads, measured right before and after the case",
    ),
    Column("requested", pa.string(), "receipt: the binding that was asked for"),
    Column("effective", pa.string(), "receipt: what the kernel granted"),
    Column("observed", pa.string(), "receipt: threads with masks and CPUs, pages per tensor and node (JSON)"),
)

_SCHEMA = pa.schema([pa.field(c.name, c.type, metadata={"meaning": c.meaning}) for c in COLUMNS])


def write_rows(path: Path, rows: pd.DataFrame | Sequence[Mapping[str, object]], fingerprint: str) -> None:
    """Write the rows of one execution as one Parquet file, whole or not at all.

    Parameters
    ----------
    path
        The file.
    rows
        What ``numa_lab.measurement.case_timing.sample_case`` gave, of all cases.
    fingerprint
        That of the machine, as ``numa_lab.measurement.machine_facts`` computes it.

    Raises
    ------
    RunDirectoryError
        The folder can't be written, or the disk is full.
    ValueError
        A column is missing, unknown or of another type than ``COLUMNS`` says.
    """
    frame = pd.DataFrame(rows)
    expected = [column.name for column in COLUMNS]
    if set(frame.columns) != set(expected):
        missing, unknown = sorted(set(expected) - set(frame.columns)), sorted(set(frame.columns) - set(expected))
        raise ValueError(
            f"rows with columns missing {missing} and unknown {unknown}; expected those of results.COLUMNS"
        )
    table = pa.Table.from_pandas(frame[expected], schema=_SCHEMA, preserve_index=False)
    table = table.replace_schema_metadata({"numa_lab.schema": str(SCHEMA_VERSION), "numa_lab.machine": fingerprint})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_rows(path: Path) -> tuple[pd.DataFrame, str]:
    """Read the rows of one execution, and the fingerprint of the machine that they were measured on.

    Raises
    ------
    RunDirectoryError
        The file is damaged, or of another schema version.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunDirectoryError(f"{path} can't be read ({error}): delete it and run the sweep with --resume") from error
    metadata = table.schema.metadata or {}
    stored_version = metadata.get(b"numa_lab.schema", b"none").decode()
    if stored_version != str(SCHEMA_VERSION):
        raise RunDirectoryError(
            f"{path} has schema version {stored_version}, expected {SCHEMA_VERSION}: measure again, "
            "or read it with the numa_lab that wrote it"
        )
    return table.to_pandas(), metadata[b"numa_lab.machine"].decode()


def load_prediction(run_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Read what was predicted before a run was measured.

    Returns
    -------
    A row for each decode case and binding, with the columns `label`, `attention`, `threads`, the sizes and `dtype` of the case,
    `seconds` per call, and `limit`: what bounds it. Empty where nothing was predicted.

    Raises
    ------
    RunDirectoryError
        The prediction is damaged or of another schema version.
    """
    path = Path(run_dir) / PREDICTION
    if not path.exists():
        return pd.DataFrame()
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("schema_version") != SCHEMA_VERSION or "rows" not in stored:
        raise RunDirectoryError(f"{path} is damaged, or of another version than {SCHEMA_VERSION}: measure again")
    return pd.DataFrame(stored["rows"])


def load_run(run_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Read all rows of a run directory.

    Returns
    -------
    Tidy rows, one per sample, with the columns of ``COLUMNS``, in the order in which executions ran.

    Raises
    ------
    RunDirectoryError
        There is no such directory, nothing is finished in it, or a file is damaged or of another schema version.
    MachineMismatch
        A file was measured on another machine than ``machine.json`` describes.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise RunDirectoryError(f"{folder} is not a directory: expected a run directory as `numa-lab sweep` writes it")
    machine = load_machine(folder)
    files = sorted((folder / EXECUTIONS).glob("*.parquet"))
    if not files:
        outcomes = [read_json(path) for path in sorted((folder / EXECUTIONS).glob("*.json"))]
        failed = [outcome["reasons"] for outcome in outcomes if outcome["reasons"]]
        why = f"{len(failed)} failed, one because: {' '.join(failed[0])} When that is mended, " if failed else ""
        raise RunDirectoryError(
            f"{folder} holds no finished execution: {why}finish it with `{to_paste('numa-lab', 'sweep', '--resume', folder)}`"
        )
    frames = []
    for file in files:
        frame, fingerprint = read_rows(file)
        if fingerprint != machine.fingerprint:
            raise MachineMismatch(
                f"{file.name} was measured on machine {fingerprint}, and {MACHINE} describes {machine.fingerprint}: "
                "move the file into a run directory of its own"
            )
        frames.append(frame)
    return pd.concat(frames, ignore_index=True).sort_values(["order", *CASE, "sample"], ignore_index=True)


def load_runs(run_dirs: Sequence[str | os.PathLike[str]], *, mix_machines: bool = False) -> pd.DataFrame:
    """Read the rows of several run directories of one machine.

    Parameters
    ----------
    run_dirs
        The directories, one or more.
    mix_machines
        Load them although they come from several machines, or from different CPUs of one.

    Returns
    -------
    The rows of ``load_run``, one run after another, with the column ``machine``: the fingerprint.

    Raises
    ------
    RunDirectoryError
        As in ``load_run``.
    MachineMismatch
        The machines, or the CPUs that were allowed, differ and `mix_machines` is false; the message names what differs.
    """
    machines = [load_machine(run_dir) for run_dir in run_dirs]
    for run_dir, machine in zip(run_dirs[1:], machines[1:], strict=True):
        differing = machines[0].differences(machine)
        first, other = (format_cpulist(each.topology.allowed_cpus) for each in (machines[0], machine))
        differing += [f"allowed CPUs: {first} against {other}"] if first != other else []
        if differing and not mix_machines:
            raise MachineMismatch(
                f"{run_dirs[0]} and {run_dir} come from different machines or parts of one: {'; '.join(differing)}. "
                "Load them apart, or with mix_machines=True"
            )
    return pd.concat(
        [
            load_run(run_dir).assign(machine=machine.fingerprint)
            for run_dir, machine in zip(run_dirs, machines, strict=True)
        ],
        ignore_index=True,
    )
