import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from numa_lab.machine import shell_commands
from numa_lab.machine.shell_commands import near, to_install, to_paste


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment in a folder `.venv` of the working directory, with one command, that nothing has activated."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("numa-lab", "python"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_command_is_named_by_its_path_until_the_shell_finds_it(environment, monkeypatch):
    assert to_paste("numa-lab", "doctor") == ".venv/bin/numa-lab doctor"
    assert to_paste("taskset", "-c", "0", "python", "-m", "papermill") == "taskset -c 0 .venv/bin/python -m papermill"
    monkeypatch.chdir("/usr")
    assert to_paste("numa-lab", "doctor") == f"{environment}/numa-lab doctor"
    monkeypatch.setenv("PATH", f"{environment}:{os.defpath}")
    assert to_paste("numa-lab", "doctor") == "numa-lab doctor"


def test_a_namesake_of_another_environment_is_not_meant(environment, monkeypatch, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "numa-lab").symlink_to(environment / "numa-lab")
    monkeypatch.setenv("PATH", str(other))
    assert to_paste("numa-lab", "doctor") == ".venv/bin/numa-lab doctor"


def test_a_command_that_was_called_by_a_path_keeps_it(environment, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{environment}/numa-lab", "sweep"])
    assert to_paste("numa-lab", "doctor") == f"{environment}/numa-lab doctor"


def test_without_a_command_the_module_is_called(environment):
    (environment / "numa-lab").unlink()
    assert to_paste("numa-lab", "doctor") == f"{environment}/python -m numa_lab doctor"


def test_paths_stay_as_they_were_given_and_are_quoted(environment, tmp_path):
    for given in (tmp_path / "my run", Path("a;b"), Path("../it's")):
        assert shlex.split(to_paste("numa-lab", "report", given))[1:] == ["report", str(given)]


def test_a_path_below_the_working_directory_is_told_from_there(environment, tmp_path):
    assert near(tmp_path / "notebooks" / "a.ipynb") == "notebooks/a.ipynb"
    assert near(tmp_path.parent / "a.ipynb") == str(tmp_path.parent / "a.ipynb")


def test_what_is_printed_runs_where_it_was_printed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.defpath)
    pasted = subprocess.run(to_paste("numa-lab", "--version"), shell=True, capture_output=True, text=True, check=True)
    assert "version" in pasted.stdout


@pytest.mark.parametrize(("user", "line"), [(0, "apt-get install numactl "), (1000, "sudo apt-get install numactl ")])
def test_lines_to_install_are_for_who_reads_them(monkeypatch, user, line):
    monkeypatch.setattr(shell_commands.os, "geteuid", lambda: user)
    assert to_install("numactl").startswith(line)
    assert all(" # " in told for told in to_install("numactl").splitlines())
