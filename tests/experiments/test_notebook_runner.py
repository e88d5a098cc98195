import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import nbformat
import psutil
import pytest

from numa_lab.errors import InvalidInput, MissingDependency
from numa_lab.experiments import notebook_runner
from numa_lab.experiments import supervisor as supervisor_module
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement.binding import Binding


@pytest.fixture
def book(tmp_path):
    """Write a notebook with a parameters cell and one more cell."""

    def write(source, parameters="steps: int = 3  # how many\nname: str = 'x'\nflag: bool = False\nextra: dict = {}"):
        document = nbformat.v4.new_notebook()
        document.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
        document.cells = [nbformat.v4.new_code_cell(text) for text in (parameters, source)]
        document.cells[0].metadata.tags = ["parameters"]
        path = tmp_path / "book.ipynb"
        nbformat.write(document, path)
        return path

    return write


def test_parameters_are_read_with_the_types_that_the_notebook_declares(book):
    path = book("")
    given = notebook_runner.parse_parameters(path, ["steps=7", "name=12", "flag=true", "extra={a: 1}"])
    assert given == {"steps": 7, "name": "12", "flag": True, "extra": {"a": 1}}
    assert notebook_runner.defaults(path) == {"steps": 3, "name": "x", "flag": False, "extra": {}}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("stepz=1", r"stepz.*steps \(int\)"),
        ("steps=many", "steps='many': expected int, got str"),
        ("steps=true", "expected int, got bool"),
        ("flag=1", "expected bool, got int"),
        ("steps", "expected NAME=VALUE"),
        ("extra={", "can't be read"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_starts(book, pair, message):
    with pytest.raises(InvalidInput, match=message):
        notebook_runner.parse_parameters(book(""), [pair])


def test_a_notebook_without_parameters_or_none_at_all_is_refused(tmp_path):
    bare = tmp_path / "bare.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), bare)
    with pytest.raises(InvalidInput, match="no cell tagged 'parameters'"):
        notebook_runner.parameters_of(bare)
    (tmp_path / "text.ipynb").write_text("no json")
    with pytest.raises(InvalidInput, match="can't be read as a notebook"):
        notebook_runner.parameters_of(tmp_path / "text.ipynb")


@pytest.mark.notebook
def test_parameters_arrive_and_a_stale_output_is_gone(book, tmp_path):
    output, log = tmp_path / "out.ipynb", tmp_path / "log"
    output.write_text("stale")
    outcome = notebook_runner.execute(
        book("print(steps * 2, extra)"), output, {"steps": 21, "extra": {"a": True}}, log=log
    )
    assert outcome.exit_status == 0
    assert nbformat.read(output, as_version=4).cells[-1].outputs[0].text == "42 {'a': True}\n"


@pytest.mark.notebook
def test_an_execution_stays_inside_the_mask_of_who_starts_it(book, tmp_path):
    node, allowed = read_topology().effective_nodes[0], os.sched_getaffinity(0)
    cpu = max(read_topology().cpus_of([node]))
    path = book("import os\nprint(sorted(os.sched_getaffinity(0)))")
    os.sched_setaffinity(0, {cpu})
    try:
        binding = Binding.parse(f"c{node}m{node}")
        outcome = notebook_runner.execute(path, tmp_path / "out.ipynb", {}, log=tmp_path / "log", binding=binding)
    finally:
        os.sched_setaffinity(0, allowed)
    assert outcome.exit_status == 0
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].outputs[0].text == f"[{cpu}]\n"


@pytest.mark.notebook
def test_a_killed_kernel_is_a_failure_although_papermill_may_say_completed(book, tmp_path):
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    outcome = notebook_runner.execute(book(source), tmp_path / "out.ipynb", {}, log=tmp_path / "log")
    assert outcome.exit_status not in (0, None)


def seconds(number):
    """So many, and a fraction that tells what sleeps for this test process from what does for another."""
    return f"{number}.{os.getpid()}"


def asleep(number):
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", seconds(number)]]


@pytest.mark.notebook
def test_nothing_outlives_the_time_limit_and_nothing_else_is_ended(book, tmp_path):
    ready, outcomes, others = tmp_path / "ready", [], []
    path = book(
        f"import subprocess\nsubprocess.Popen(['setsid', '--fork', 'sleep', '{seconds(601)}'])\n"
        f"subprocess.Popen(['sleep', '{seconds(602)}'], start_new_session=True)\nopen({str(ready)!r}, 'w').close()\nwhile True: pass"
    )
    for limit in (10, 30, 90):  # a kernel may take long to start
        execute = partial(
            notebook_runner.execute, path, tmp_path / "out.ipynb", {}, log=tmp_path / "log", limit_seconds=limit
        )
        executing = threading.Thread(target=lambda execute=execute: outcomes.append(execute()))
        executing.start()
        while executing.is_alive() and not ready.exists():
            time.sleep(0.1)
        if ready.exists():
            break
        executing.join()
    try:
        # Started meanwhile: a child, and an orphan, which would become a child of this process if it took in orphans.
        others.append(psutil.Popen(["sleep", seconds(603)]))
        subprocess.run(["setsid", "--fork", "sleep", seconds(604)], check=True)
        wait_for(lambda: asleep(604), 30)
        others += asleep(604)
        executing.join()
        assert outcomes[-1].exit_status is None
        assert not running(tmp_path)
        assert not asleep(601)
        assert not asleep(602)
        assert all(other.is_running() and other.status() != psutil.STATUS_ZOMBIE for other in others)
    finally:
        executing.join()
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.notebook
def test_a_busy_kernel_ends_when_its_sweep_is_killed(book, tmp_path):
    ready = tmp_path / "ready"
    path = book(f"open({str(ready)!r}, 'w').close()\nwhile True: pass")
    code = (
        "import sys; from pathlib import Path; from numa_lab.experiments import notebook_runner\n"
        "notebook_runner.execute(Path(sys.argv[1]), Path(sys.argv[2]), {}, log=Path(sys.argv[3]))"
    )
    words = [sys.executable, "-c", code, str(path), str(tmp_path / "out.ipynb"), str(tmp_path / "log")]
    parent = subprocess.Popen(words)
    wait_for(ready.exists, 30)
    kernels = [
        p for p in psutil.Process(parent.pid).children(recursive=True) if "ipykernel_launcher" in " ".join(p.cmdline())
    ]
    assert kernels
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(kernel.is_running() and kernel.status() != psutil.STATUS_ZOMBIE for kernel in kernels), 15)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -TERM $$"], -signal.SIGTERM),
        (["sh", "-c", "kill -KILL $$"], -signal.SIGKILL),
        (["no-such-program"], 127),
        (["sh", "-c", f"setsid --fork sleep {seconds(605)}; sleep {seconds(606)} & exit 0"], 0),
    ],
)
def test_a_supervised_command_ends_as_it_ends_with_all_that_it_started(words, status):
    supervisor = [sys.executable, "-IS", supervisor_module.__file__, str(os.getpid())]
    assert subprocess.run([*supervisor, *words], stderr=subprocess.DEVNULL).returncode == status
    assert not asleep(605)
    assert not asleep(606)


def test_a_supervisor_whose_starter_is_gone_starts_nothing(tmp_path):
    words = [sys.executable, "-IS", supervisor_module.__file__, "1", "touch", str(tmp_path / "started")]
    assert subprocess.run(words).returncode == 1
    assert not (tmp_path / "started").exists()


def running(folder):
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(p.info["cmdline"] or ()) and p.pid != os.getpid()
    ]


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.parametrize("usage", ["usage: numactl [--interleave= | -i <nodes>]", "  --weighted-interleave=nodes"])
def test_a_numactl_without_weights_is_told_before_anything_starts(monkeypatch, tmp_path, book, usage):
    (tmp_path / "numactl").write_text(f"#!/bin/sh\necho '{usage}' >&2\nexit 1\n")
    (tmp_path / "numactl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    output = tmp_path / "out.ipynb"
    run = partial(notebook_runner.execute, book(""), output, {}, log=tmp_path / "log", binding=Binding.parse("c0w0"))
    if "weighted" in usage:
        assert run().exit_status == 1
    else:
        with pytest.raises(MissingDependency, match=r"binding c0w0: numactl 2\.0\.19 or later is needed"):
            run()
        assert not (tmp_path / "log").exists()
