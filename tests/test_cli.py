import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from numa_lab.bandwidth import mlc
from numa_lab.cli import main
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.rankings import RankedNode, Ranking
from numa_lab.placement.binding import Binding


def call(*words):
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["sweep", "--bindings", "c77m0", "--dry-run"], 2, "77"),
        (["sweep", "--bindings", "nonsense", "--dry-run"], 2, "local, matrix, all"),
        (["sweep", "--profile", "slow", "--dry-run"], 2, "smoke, quick, standard, full"),
        (["sweep", "-p", "kv_length=1", "--dry-run"], 2, "kv_len"),
        (["sweep", "-p", "kv_len=long", "--dry-run"], 2, "expected int"),
        (["sweep", "--notebook", "nowhere.ipynb", "--dry-run"], 2, "no such file"),
        (["sweep", "--executions", "0", "--dry-run"], 2, "executions"),
        (["sweep", "--resume", "nowhere"], 1, "plan.json"),
        (["topology", "--root", "nowhere"], 2, "nowhere"),
        (["verdict", "nowhere"], 1, "nowhere"),
        (["report", "nowhere"], 1, "nowhere"),
        (["detect", "--preset", "llama-3-9b"], 2, "llama-3-8b"),
        (["detect", "--shape", "llama-3-9b"], 2, "llama-3-8b"),  # as the option was named before
        (["notebooks", __file__], 1, "File exists"),
        (["predict"], 2, "exactly one of --mlc FILE, --run DIR and --machine NAME"),
        (["predict", "--machine", "icelake", "--run", "data/sample"], 2, "exactly one"),
        (["predict", "--machine", "skylake"], 2, "broadwell, cascadelake"),
        (["predict", "--machine", "icelake", "--preset", "llama-3-9b"], 2, "llama-3-8b"),
        (["predict", "--machine", "icelake", "--kv-len", "0"], 2, "kv_len=0"),
        (["predict", "--machine", "icelake", "--dtype", "int8"], 2, "bfloat16"),
        (["predict", "--mlc", "nowhere"], 2, "nowhere"),
        (["predict", "--mlc", __file__], 2, "Memory Latency Checker"),
        (["predict", "--run", "nowhere"], 1, "machine.json"),
        (["unknown"], 2, "No such command"),
    ],
)
def test_bad_input_is_one_message_on_stderr(words, status, message):
    result = call(*words)
    assert result.exit_code == status
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_ctrl_c_anywhere_is_no_failure_of_executions(monkeypatch):
    monkeypatch.setattr("numa_lab.machine.topology_reader.read_topology", mock.Mock(side_effect=KeyboardInterrupt))
    result = call("sweep", "--profile", "smoke")
    assert (result.exit_code, result.stderr) == (130, "numa-lab: stopped\n")


def test_a_folder_without_write_access_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    result = call("sweep", "--profile", "smoke", "--out", str(tmp_path / "file" / "run"))
    assert result.exit_code == 1
    assert "can't be written" in result.stderr


@pytest.mark.parametrize("command", ["topology", "doctor"])
def test_json_is_json_alone(command):
    result = call(command, "--json")
    assert result.exit_code == 0
    json.loads(result.stdout)


def test_looking_and_planning_never_load_torch_or_numba():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom numa_lab.cli import main\n"
        "for words in (['topology'], ['doctor'], ['sweep', '--dry-run'], ['predict', '--machine', 'broadwell']):\n"
        "    result = CliRunner().invoke(main, words)\n"
        "    assert result.exit_code == 0, result.output\n"
        "assert not {'torch', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dry_run_prints_commands_that_can_be_typed():
    lines = call("sweep", "--profile", "smoke", "--bindings", "c0m0", "--dry-run").stdout.splitlines()
    assert len(lines) == 2
    bound = Binding.parse("c0m0").numactl(read_topology())
    for line in lines:
        words = shlex.split(line)
        assert words[: len(bound)] == bound
        program, _, module, measured = words[len(bound) : len(bound) + 4]
        assert shutil.which(program)
        assert module == "papermill"
        assert Path(measured).is_file()


def test_a_sweep_that_lacks_numactl_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = call("sweep", "--profile", "smoke", "--bindings", "c0m0", "--out", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert "is not installed" in result.stderr
    assert not (tmp_path / "run").exists()


def test_predict_says_how_fast_each_placement_may_be():
    file = str(Path(mlc.__file__).parent / "published" / "broadwell_mlc.txt")
    shown = call("predict", "--machine", "broadwell", "--kv-len", "131072").stdout
    assert "CC BY 4.0" in shown
    assert "c0m0 14.72 3.97 memory of node 0, 36.5 GB/s" in " ".join(shown.split())
    assert "sharded 0-3 is predicted fastest: 3.71 ms" in shown
    told = json.loads(call("predict", "--mlc", file, "--kv-len", "131072", "--batch", "1", "--json").stdout)
    assert told["source"] == file
    assert told["read_bytes_per_s"][0][1] == 18909.5e6
    assert told["latency_ns"][3] == [184.8, 194.6, 141.1, 76.4]
    assert told["all_nodes_bytes_per_s"] == 144906.6e6
    assert told["best"] == told["strategies"][0]
    assert told["best"]["kind"] == "sharded"
    single = next(one for one in told["strategies"] if one["label"] == "c0m0")
    assert (single["kind"], single["nodes"]) == ("single", [0])
    assert single["seconds"] == told["kv_bytes"] / 36481.7e6


def test_predict_reads_the_probes_of_a_run():
    sample = str(Path(__file__).parents[1] / "data" / "sample")
    assert "One node: nothing to choose" in call("predict", "--run", sample).stdout
    assert "emulated" in call("predict", "--run", f"{sample}/guest").stdout
    table = call("predict", "--machine", "sapphirerapids").stdout
    assert "54 remote placements between these" in table
    assert len(table.splitlines()) < 30


def test_detect_names_a_node_in_a_sentence_or_in_json(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nodes = (
        RankedNode(2, 1e-3, 1.0, 1.0, 1.0, 1, "", 8),
        RankedNode(0, 1.125e-3, 1.125, 1.11, 1.14, 2, "fewer cores", 8),
    )
    monkeypatch.setattr("numa_lab.nodes.optimal_node.rank", lambda shape, refresh: Ranking(nodes, 0.01))
    said = "Node 2 is the best. Node 0 is slower by 11% to 14% (fewer cores)."
    shown = call("detect").stdout
    assert said in shown
    assert "numactl --cpunodebind=2 --membind=2" in shown
    told = json.loads(call("detect", "--json").stdout)
    assert (told["optimal_node"], told["sentence"]) == (2, said)
    assert [node["node"] for node in told["nodes"]] == [2, 0]
