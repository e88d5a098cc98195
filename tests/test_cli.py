import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from numa_lab.cli import main


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
        (["unknown"], 2, "No such command"),
    ],
)
def test_bad_input_is_one_message_on_stderr(words, status, message):
    result = call(*words)
    assert result.exit_code == status
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


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
        "for words in (['topology'], ['doctor'], ['sweep', '--dry-run']):\n"
        "    result = CliRunner().invoke(main, words)\n"
        "    assert result.exit_code == 0, result.output\n"
        "assert not {'torch', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dry_run_prints_commands_that_can_be_typed():
    lines = call("sweep", "--profile", "smoke", "--bindings", "c0m0", "--dry-run").stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("numactl --cpunodebind=0 --membind=0 python -m papermill") for line in lines)
