import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from numa_lab.bandwidth.node_bandwidths import NodeProbes
from numa_lab.cli import main
from numa_lab.errors import InvalidInput, MachineMismatch, NodeUnavailable, RunDirectoryError, UntrustedResult
from numa_lab.experiments import (
    execution,
    notebook_files,
    notebook_runner,
    sweep,
    sweep_bindings,
    sweep_lock,
    sweep_plan,
    sweep_resume,
)
from numa_lab.machine import libnuma
from numa_lab.machine.sysfs import parse_cpulist
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement import atomic_files, comparison, machine_facts, results
from numa_lab.report import receipts

MEASURED = notebook_files.find(sweep.MEASURED_NOTEBOOK)


def planned_sweep(executions=2, bindings="local", parameters=None, seed=1, measured=MEASURED):
    topology = read_topology()
    return sweep_plan.make_plan(
        profile="smoke", bindings=sweep_bindings.choose_bindings(bindings, topology), topology=topology, measured=measured,
        parameters=parameters or {}, run_id="test", command="numa-lab sweep", executions=executions, seed=seed,
    )  # fmt: skip


def test_each_block_holds_every_label_once_and_an_aa_pair():
    planned = planned_sweep(executions=5).executions
    for block in range(5):
        labels = Counter(p.label for p in planned if p.block == block)
        assert set(labels.values()) == {1}
        assert sum(label.endswith("~aa") for label in labels) == 1
    assert [p.order for p in planned] == list(range(len(planned)))
    assert len({p.execution_id for p in planned}) == len(planned)


def test_orders_differ_between_seeds_and_keys_between_what_is_measured():
    orders = {tuple(p.label for p in planned_sweep(executions=8, seed=seed).executions) for seed in range(5)}
    assert len(orders) > 1
    keys = {p.execution_id for p in planned_sweep().executions}
    assert keys == {p.execution_id for p in planned_sweep(seed=9).executions}
    assert keys.isdisjoint(p.execution_id for p in planned_sweep(parameters={"kv_len": 128}).executions)


def test_bindings_by_name_and_by_label(four_nodes):
    assert [str(b) for b in sweep_bindings.choose_bindings("local", four_nodes)] == ["c0m0", "c1m1", "c2m2"]
    assert len(sweep_bindings.choose_bindings("matrix", four_nodes)) == 3 * 4
    assert [str(b) for b in sweep_bindings.choose_bindings("c0,2m0,c1p3,c0m0", four_nodes)] == [
        "c0,2m0",
        "c1p3",
        "c0m0",
    ]
    with pytest.raises(NodeUnavailable, match="node 3 has no CPUs"):
        sweep_bindings.choose_bindings("c3m0", four_nodes)
    with pytest.raises(NodeUnavailable, match="9"):
        sweep_bindings.choose_bindings("c9m0", four_nodes)
    for wrong in ("", "everything", "m0", "c0m0;c1m1"):
        with pytest.raises(InvalidInput):
            sweep_bindings.choose_bindings(wrong, four_nodes)


@pytest.mark.parametrize("usage", ["--interleave=nodes", "--weighted-interleave=nodes"])
@pytest.mark.parametrize("linux_has_it", [False, True])
def test_all_compares_with_what_programs_do_and_with_weights_where_they_can_be_had(
    monkeypatch, tmp_path, four_nodes, usage, linux_has_it
):
    (tmp_path / "numactl").write_text(f"#!/bin/sh\necho 'usage: numactl {usage}'\n")
    (tmp_path / "numactl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "node0").write_text("1\n")
    monkeypatch.setattr(libnuma, "WEIGHTS", tmp_path if linux_has_it else tmp_path / "absent")
    weighted = ["c0-2w0-3"] if linux_has_it and "weighted" in usage else []
    labels = [str(binding) for binding in sweep_bindings.choose_bindings("all", four_nodes)]
    assert labels[3 * 4 :] == ["c0-2i0-3", *weighted, "c0-2f0", "c*m*"]
    one = dataclasses.replace(four_nodes, nodes=four_nodes.nodes[:1], allowed_nodes=(0,))
    assert [str(binding) for binding in sweep_bindings.choose_bindings("all", one)] == ["c0m0", "c*m*"]


def test_a_command_to_type_says_who_touches_first():
    node = read_topology().effective_nodes[0]
    planned = planned_sweep(bindings=f"c{node}f{node},c{node}m{node}", executions=1)
    told = {p.label: "execution" in p.command for p in planned.executions}
    assert told == {f"c{node}f{node}": True, f"c{node}m{node}": False, f"c{node}m{node}~aa": False}
    command = next(p.command for p in planned.executions if p.label == f"c{node}f{node}")
    parameters = json.loads(shlex.split(command)[-1])
    assert parameters["execution"] == {"binding": f"c{node}f{node}"}
    assert execution.start(preset="llama-3-8b", **parameters).label == f"c{node}f{node}"


def test_profile_as_a_parameter_and_unknown_parameters_are_refused():
    with pytest.raises(InvalidInput, match="--profile"):
        planned_sweep(parameters={"profile": "quick"})
    with pytest.raises(InvalidInput, match="kv_length"):
        planned_sweep(parameters={"kv_length": 1})
    with pytest.raises(InvalidInput, match="llama-3-8b"):
        planned_sweep(parameters={"preset": "llama-9"})
    with pytest.raises(InvalidInput, match="did you mean 'torch-folded'"):
        planned_sweep(parameters={"backend": "torch-fold"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory in which one of two executions is finished."""
    run_dir, topology = tmp_path_factory.mktemp("sweep") / "run", read_topology()
    planned = planned_sweep(executions=1)
    sweep_plan.prepare(planned, run_dir, topology)
    assert sweep.execute(planned, planned.executions[0], run_dir, MEASURED, topology) == []
    return run_dir


@pytest.mark.notebook
def test_an_execution_leaves_rows_with_a_receipt_that_names_its_binding(finished):
    rows = results.load_run(finished)
    planned = sweep_plan.load_plan(finished).executions[0]
    assert set(rows["label"]) == {planned.label}
    assert set(rows["requested"]) == set(rows["effective"]) == {str(planned.binding)}
    assert (rows["local_page_share"] == 1).all()
    assert (rows.groupby([*comparison.CASE])["cold"].sum() == 1).all()
    outcome = json.loads((finished / "executions" / f"{planned.execution_id}.json").read_text())
    assert (outcome["status"], outcome["reasons"]) == ("ok", [])


@pytest.mark.notebook
def test_resuming_runs_what_is_missing_and_nothing_else(finished):
    planned = sweep_plan.load_plan(finished)
    assert sweep_plan.missing(planned, finished) == list(planned.executions[1:])
    sweep_resume.check_resumable(planned, finished, read_topology(), MEASURED)
    with pytest.raises(RunDirectoryError, match="--resume"):
        sweep_plan.prepare(planned, finished, read_topology())


@pytest.mark.notebook
def test_a_changed_notebook_and_another_machine_are_not_resumed(finished, tmp_path):
    changed = tmp_path / MEASURED.name
    changed.write_text(MEASURED.read_text().replace("What does the first call cost?", "What else?"))
    with pytest.raises(RunDirectoryError, match="has changed"):
        sweep_resume.check_resumable(sweep_plan.load_plan(finished), finished, read_topology(), changed)
    elsewhere = shutil.copytree(finished, tmp_path / "elsewhere")
    facts = json.loads((elsewhere / "machine.json").read_text())
    facts["identity"]["model"] = "another processor"
    atomic_files.write_json(elsewhere / "machine.json", facts)
    with pytest.raises(MachineMismatch, match="model: another processor against"):
        sweep_resume.check_resumable(sweep_plan.load_plan(elsewhere), elsewhere, read_topology(), MEASURED)


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda rows: rows.assign(label="c7m7"), r"Rows have label c7m7, expected c\d+m\d+(~aa)?: the notebook must hand"),
        (lambda rows: rows.assign(effective="c0m*"), "the kernel granted default.*this was not c.*numa-lab doctor`"),
        (lambda rows: rows[rows["attention"] != "mqa"], r"2 of \d+ cases were not measured, the first of them MQA decode in bfloat16"),
        (lambda rows: rows.assign(threads=rows["threads"] + 90), r"It computed with up to \d+ threads, and the CPUs .* have \d+ physical"),
        (lambda rows: rows.assign(observed=rows["observed"].map(on_cpu_4000)), r"computed on CPUs 4000, outside the requested CPUs"),
        (lambda rows: rows[rows["sample"] < 3], "fewer than 5 steady samples, the first of them GQA decode"),
        (lambda rows: rows.assign(seconds=0.0), "not positive"),
        (lambda rows: rows.iloc[:0], "holds no rows"),
    ],
)  # fmt: skip
def test_the_gate_refuses_rows_that_can_not_be_trusted(finished, tmp_path, spoil, reason):
    planned, topology = sweep_plan.load_plan(finished), read_topology()
    first = planned.executions[0]
    rows, fingerprint = results.read_rows(finished / "executions" / f"{first.execution_id}.parquet")
    results.write_rows(tmp_path / "rows.parquet", spoil(rows), fingerprint)
    (tmp_path / "log").write_text("")
    expected = sweep_plan.expected_cases(
        notebook_runner.defaults(MEASURED) | planned.parameters, first.binding, topology
    )
    refused = sweep.gate(
        notebook_runner.Outcome(0, 1.0), tmp_path / "rows.parquet", first, topology, tmp_path / "log", expected
    )
    assert re.search(reason, " ".join(refused))
    assert len(refused) <= 6
    assert not re.search(r"\(['\"]|\['|None", " ".join(refused)), "a message shows Python's own form of a value"


def on_cpu_4000(observed):
    told = json.loads(observed)
    return json.dumps(told | {"threads": [thread | {"seen": "4000"} for thread in told["threads"]]})


@pytest.mark.notebook
def test_threads_outside_the_mask_that_a_sweep_was_given_are_refused(finished, tmp_path):
    """As if numactl had widened an execution to its whole node."""
    topology = read_topology()
    first = sweep_plan.load_plan(finished).executions[0]
    masked = dataclasses.replace(topology, allowed_cpus=topology.cpus_of(first.binding.cpu_nodes)[:1])
    rows = finished / "executions" / f"{first.execution_id}.parquet"
    (tmp_path / "log").write_text("")
    refused = " ".join(sweep.gate(notebook_runner.Outcome(0, 1.0), rows, first, masked, tmp_path / "log", []))
    seen = {cpu for text in results.read_rows(rows)[0]["observed_cpus"] for cpu in parse_cpulist(text)}
    assert bool(seen - set(masked.allowed_cpus)) == ("outside the requested CPUs" in refused)
    assert receipts.found_contradictions(results.read_rows(rows)[0], machine_facts.load_machine(finished)) == []


def test_the_gate_names_the_exit_status_and_a_missing_result(tmp_path):
    first, machine = planned_sweep(executions=1).executions[0], read_topology()
    log = tmp_path / "executions" / "key.log"
    log.parent.mkdir()
    log.write_text("Traceback\nValueError: the reason\n\n")

    def told(status):
        return sweep.gate(notebook_runner.Outcome(status, 1.0), tmp_path / "none", first, machine, log, [])

    where = "(all that it printed: executions/key.log)"
    assert told(138) == [
        f"papermill ended with exit status 138: ValueError: the reason {where}.",
        "The notebook wrote no result file.",
    ]
    assert told(-9)[0].startswith(
        "papermill was killed by signal 9: ValueError: the reason, as happens where memory runs"
    )
    assert told(None)[0] == f"It did not end within {notebook_runner.LIMIT_SECONDS} s and was killed {where}."
    log.write_text(
        "libnuma: Warning: cpu argument 7 is out of range\n\n<7> is invalid\nusage: numactl [--all | -a]\n<length> can have g\n"
    )
    assert told(1)[0].startswith(
        "numactl refused the binding, since cpu argument 7 is out of range: were CPUs or nodes taken"
    )
    log.write_text("nbclient.exceptions.DeadKernelError: Kernel died\n")
    assert "Kernel died, as happens where memory runs out" in told(1)[0]
    assert told(0) == ["The notebook wrote no result file. Its last cell must call `finish` with all rows."]


def failing(monkeypatch, tmp_path, reasons):
    """Sweep a plan of which no execution does anything but fail for the next of the reasons; how many were begun."""
    begun = []

    def execute(plan, planned, run_dir, measured, topology):
        begun.append(planned)
        return reasons(planned, len(begun))

    monkeypatch.setattr(sweep, "execute", execute)
    for _ in sweep.run(planned_sweep(executions=4), tmp_path, read_topology(), MEASURED):
        pass
    return len(begun)


def test_a_sweep_whose_first_executions_all_fail_alike_stops_and_says_why(monkeypatch, tmp_path):
    def alike(planned, number):
        return [f"Nodes of {planned.label} have {number}.5 MiB: see executions/{planned.execution_id}.log"]

    with pytest.raises(UntrustedResult, match=r"first 3 executions all failed alike.* 3\.5 MiB: .*--resume"):
        failing(monkeypatch, tmp_path, alike)


@pytest.mark.parametrize(
    "reasons",
    [
        lambda planned, number: ["No memory."] if number != 2 else ["No CPUs."],
        lambda planned, number: ["No memory."] if number != 3 else [],
    ],
    ids=["different causes", "one passes"],
)
def test_a_sweep_goes_on_where_not_all_fail_alike(monkeypatch, tmp_path, reasons):
    assert failing(monkeypatch, tmp_path, reasons) == len(planned_sweep(executions=4).executions)


def test_a_run_of_another_mask_is_not_resumed_and_has_other_keys(tmp_path, four_nodes):
    masked = dataclasses.replace(four_nodes, allowed_cpus=(1, 2, 3))

    def made(topology):
        return sweep_plan.make_plan(
            profile="smoke", bindings=sweep_bindings.choose_bindings("c0m0,c*m*", topology), topology=topology, measured=MEASURED,
            parameters={}, run_id="test", command="numa-lab sweep",
        )  # fmt: skip

    planned = made(masked)
    keys = {one.execution_id for one in planned.executions}
    assert keys.isdisjoint(one.execution_id for one in made(four_nodes).executions)
    commands = {one.label: one.command for one in planned.executions}
    assert commands["c0m0"].startswith("numactl --physcpubind=1 --membind=0 python")
    assert commands["c*m*"].startswith("taskset -c 1-3 python")
    sweep_plan.prepare(planned, tmp_path, masked)
    sweep_resume.check_resumable(planned, tmp_path, masked, MEASURED)
    with pytest.raises(
        MachineMismatch, match=f"begun on CPUs 1-3, .* 0-5.* `taskset -c 1-3 .*numa-lab sweep --resume {tmp_path}`"
    ):
        sweep_resume.check_resumable(planned, tmp_path, four_nodes, MEASURED)
    for changed in ({"allowed_cpus": (1, 2)}, {"allowed_cpus": (1, 2, 3), "allowed_nodes": (0, 1)}):
        with pytest.raises(MachineMismatch, match="let it use the same"):
            sweep_resume.check_resumable(planned, tmp_path, dataclasses.replace(four_nodes, **changed), MEASURED)


@pytest.mark.notebook
def test_ctrl_c_leaves_what_has_finished_usable_and_no_kernel_behind(tmp_path):
    run_dir = tmp_path / "run"
    code = (  # a shell has what it starts in the background ignore Ctrl-C, and what that starts
        "import signal\nfrom pathlib import Path\nfrom numa_lab import cli\nfrom numa_lab.experiments import sweep_lock\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sweep_lock.NAME, sweep_lock.FILE = {sweep_lock.NAME!r}, Path({str(sweep_lock.FILE)!r})\ncli.main()"
    )
    options = ["--profile", "smoke", "--executions", "9", "--no-probes", "--out", str(run_dir)]
    words = [sys.executable, "-c", code, "sweep", *options]
    sweeping = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    try:
        while not list(run_dir.glob("executions/*.parquet")):
            assert sweeping.poll() is None, sweeping.stderr.read()
            assert time.monotonic() < end, "no execution has finished"
            time.sleep(0.2)
        time.sleep(3)  # into the next execution
        started = psutil.Process(sweeping.pid).children(recursive=True)
        sweeping.send_signal(signal.SIGINT)
        _, said = sweeping.communicate(timeout=120)
    finally:
        sweeping.kill()
    assert sweeping.returncode == 130
    assert f"numa-lab sweep --resume {run_dir}" in said
    assert not [process for process in started if process.is_running()]
    assert len(results.load_run(run_dir)["execution_id"].unique()) >= 1
    assert not (run_dir / sweep.PROBES).exists()


def test_what_is_predicted_is_stored_before_anything_is_measured(tmp_path):
    planned, machine, measured = planned_sweep(), read_topology(), notebook_files.find(sweep.MEASURED_NOTEBOOK)
    assert sweep.predict(planned, tmp_path, measured, machine) == []
    assert results.load_prediction(tmp_path).empty, "nothing can be predicted without probes"
    nodes = machine.node_ids
    pairs = [[20e9 if cpu == mem else 10e9 for mem in nodes] for cpu in nodes]
    probes = NodeProbes(machine.node_ids, pairs, pairs, None, (1,) * len(nodes), {}, (), 1.0).to_json()
    atomic_files.write_json(tmp_path / sweep.PROBES, probes)
    assert sweep.predict(planned, tmp_path, measured, machine) == []
    predicted = results.load_prediction(tmp_path)
    assert set(predicted["label"]) == {label for label in planned.bindings if "~" not in label}
    assert {"gqa", "mha", "mqa"} == set(predicted["attention"])
    size = 2 * predicted[["batch", "kv_heads", "kv_len", "head_dim"]].prod(axis=1)
    size *= predicted["dtype"].map({"bfloat16": 2, "float16": 2, "float32": 4})
    assert (predicted["seconds"] / (size / 20e9)).between(0.999, 1.001).all()
    atomic_files.write_json(tmp_path / sweep.PROBES, probes | {"nodes": [999]})
    assert sweep.predict(planned, tmp_path, measured, machine) == []
    assert results.load_prediction(tmp_path).equals(predicted), "a resumed sweep predicted anew"
    (tmp_path / results.PREDICTION).unlink()
    assert "the machine has" in sweep.predict(planned, tmp_path, measured, machine)[0]


def test_a_damaged_plan_is_said_to_be_damaged(tmp_path):
    sweep_plan.prepare(planned_sweep(), tmp_path, read_topology())
    stored = json.loads((tmp_path / "plan.json").read_text())
    for damaged in (stored | {"executions": [{}]}, stored | {"unknown": 1}, {"schema_version": 1}, [], {}):
        atomic_files.write_json(tmp_path / "plan.json", damaged)
        with pytest.raises(RunDirectoryError, match="new sweep"):
            sweep_plan.load_plan(tmp_path)


def test_a_sweep_is_refused_while_another_measures_and_leaves_nothing(tmp_path):
    with sweep.alone():
        result = CliRunner().invoke(main, ["sweep", "--profile", "smoke", "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert f"another sweep measures on this machine: this process, {os.getpid()}" in result.stderr
    assert not (tmp_path / "run").exists()


def test_plan_survives_its_file_without_a_path_of_this_machine(tmp_path):
    planned = planned_sweep()
    sweep_plan.prepare(planned, tmp_path, read_topology())
    assert sweep_plan.load_plan(tmp_path) == planned
    assert str(Path.cwd()) not in (tmp_path / "plan.json").read_text()
