import dataclasses
import json

import pytest

from numa_lab.errors import MachineMismatch, RunDirectoryError
from numa_lab.measurement import atomic_files, results


def row(**changed):
    values = {c.name: {"string": "x", "bool": False, "double": 1.0}.get(str(c.type), 1) for c in results.COLUMNS}
    return values | changed


def replace_in(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture
def run_dir(tmp_path, synthetic_machine):
    machine = dataclasses.replace(synthetic_machine(1), fingerprint="here", identity={"model": "A", "nodes": "0"})
    atomic_files.write_json(tmp_path / "machine.json", machine.to_json())
    results.write_rows(tmp_path / "executions" / "one.parquet", [row(execution_id="one", order=1)], "here")
    results.write_rows(tmp_path / "executions" / "two.parquet", [row(execution_id="two", order=0)], "here")
    return tmp_path


def test_rows_come_back_in_run_order_with_their_types(run_dir):
    frame = results.load_run(run_dir)
    assert list(frame["execution_id"]) == ["two", "one"]
    assert list(frame.columns) == [column.name for column in results.COLUMNS]
    assert frame["cold"].dtype == bool
    assert not list(run_dir.glob("executions/.*")), "a temporary file was left behind"


def test_a_row_without_a_column_is_refused(tmp_path):
    incomplete = row()
    del incomplete["observed"]
    with pytest.raises(ValueError, match="observed"):
        results.write_rows(tmp_path / "x.parquet", [incomplete], "here")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "machine.json").unlink(), RunDirectoryError, "has no machine.json"),
        (lambda d: (d / "machine.json").write_text("{"), RunDirectoryError, "damaged"),
        (lambda d: (d / "machine.json").write_text('{"schema_version": 1}'), RunDirectoryError, "without.*identity"),
        (lambda d: (d / "machine.json").write_text('{"schema_version": 99}'), RunDirectoryError, "schema version 99"),
        (
            lambda d: replace_in(d / "machine.json", '"gpus"', '"cards"'),
            RunDirectoryError,
            r"a topology \(KeyError\('gpus'\)\)",
        ),
        (lambda d: [f.unlink() for f in d.glob("executions/*")], RunDirectoryError, "--resume"),
        (lambda d: (d / "executions/one.parquet").write_bytes(b"PAR1"), RunDirectoryError, r"one\.parquet"),
        (
            lambda d: results.write_rows(d / "executions/one.parquet", [row()], "elsewhere"),
            MachineMismatch,
            "elsewhere.*here",
        ),
    ],
)
def test_a_damaged_run_directory_says_what_is_wrong(run_dir, damage, error, message):
    damage(run_dir)
    with pytest.raises(error, match=message):
        results.load_run(run_dir)


def test_rows_of_another_schema_version_are_refused(run_dir, monkeypatch):
    monkeypatch.setattr(results, "SCHEMA_VERSION", 2)
    results.write_rows(run_dir / "executions/one.parquet", [row()], "here")
    monkeypatch.undo()
    with pytest.raises(RunDirectoryError, match="schema version 2, expected 1"):
        results.load_run(run_dir)


def test_two_machines_are_mixed_on_request_only_and_keep_their_fingerprints(run_dir, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    facts = json.loads((run_dir / "machine.json").read_text())
    atomic_files.write_json(
        other / "machine.json", facts | {"fingerprint": "there", "identity": {"model": "B", "nodes": "0"}}
    )
    results.write_rows(other / "executions" / "x.parquet", [row()], "there")
    with pytest.raises(MachineMismatch, match="model: A against B"):
        results.load_runs([run_dir, other])
    mixed = results.load_runs([run_dir, other], mix_machines=True)
    assert mixed["machine"].value_counts().to_dict() == {"here": 2, "there": 1}


def test_runs_of_one_machine_with_different_cpus_are_not_mixed_silently(run_dir, tmp_path):
    facts = json.loads((run_dir / "machine.json").read_text())
    for name, cpus in (("wide", [0, 1]), ("narrow", [1])):
        atomic_files.write_json(
            tmp_path / name / "machine.json", facts | {"topology": facts["topology"] | {"allowed_cpus": cpus}}
        )
        results.write_rows(tmp_path / name / "executions" / "x.parquet", [row()], "here")
    with pytest.raises(MachineMismatch, match="allowed CPUs: 0-1 against 1"):
        results.load_runs([tmp_path / "wide", tmp_path / "narrow"])
    assert len(results.load_runs([tmp_path / "wide", tmp_path / "narrow"], mix_machines=True)) == 2


def test_a_run_of_which_nothing_passed_says_why(run_dir):
    for file in (run_dir / "executions").glob("*.parquet"):
        file.unlink()
    atomic_files.write_json(run_dir / "executions" / "one.json", {"status": "failed", "reasons": ["Node 1 is full."]})
    with pytest.raises(
        RunDirectoryError, match=r"1 failed, one because: Node 1 is full\. When that is mended, finish it"
    ):
        results.load_run(run_dir)
