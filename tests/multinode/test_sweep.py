"""The main job: every pair of two nodes is swept in the guest, and what it proves is reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LABELS = {"c0m0", "c0m1", "c1m0", "c1m1", "c0m0~aa"}
RUN = Path("build/multinode/x86_64/two-nodes/run")


def numa_lab(*words):
    done = subprocess.run([sys.executable, "-m", "numa_lab", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.guest("two-nodes", seconds=2200)
def test_every_pair_of_nodes_is_measured_and_passes_the_gate():
    run_dir = Path(os.environ["NUMA_LAB_GUEST"], "run")
    subprocess.run(["rm", "-rf", run_dir], check=True)
    # Without notebook 01: a notebook's own imports take minutes here, and bandwidth means nothing.
    numa_lab("sweep", "--bindings", "matrix", "--profile", "smoke", "--no-probes", "-p", "kv_len=64", "--out", run_dir)
    outcomes = [json.loads(path.read_text()) for path in (run_dir / "executions").glob("*.json")]
    assert {outcome["label"] for outcome in outcomes} == LABELS
    assert {outcome["status"] for outcome in outcomes} == {"ok"}, outcomes


@pytest.mark.guest(None)
def test_each_receipt_matches_its_label():
    from numa_lab.measurement.results import load_run
    from numa_lab.placement.receipt import Receipt

    rows = load_run(RUN)
    assert set(rows["label"]) == LABELS
    for label, group in rows.groupby("label"):
        cpu, mem = int(label[1]), int(label[3])
        for _, row in group.iterrows():
            receipt = Receipt.from_columns(row)
            assert str(receipt.requested) == str(receipt.effective) == label.removesuffix("~aa")
            assert set(receipt.observed_cpus) <= {2 * cpu, 2 * cpu + 1}
            assert {thread.allowed for thread in receipt.threads} <= {(2 * cpu,), (2 * cpu + 1,)}
            assert receipt.pages_per_node().keys() == {mem}
            assert row["local_page_share"] == (cpu == mem)


@pytest.mark.guest(None)
def test_the_report_names_real_commands_and_trusts_no_time():
    printed = numa_lab("report", RUN)
    assert "This machine is emulated: its times mean nothing" in printed
    page = (RUN / "report.html").read_text()
    assert "numactl --cpunodebind=" in page
    assert "numactl --cpunodebind=2" not in page
    assert "Cross-node overhead" in page
    assert json.loads((RUN / "machine.json").read_text())["topology"]["emulated"]
