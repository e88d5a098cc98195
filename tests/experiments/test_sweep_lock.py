import os
import re
import signal
import subprocess
import sys

import pytest

from numa_lab.errors import NumaLabError
from numa_lab.experiments import sweep_lock

HOLDS = (
    "import os, subprocess, sys, time\nfrom pathlib import Path\nfrom numa_lab.experiments import sweep_lock\n"
    "sweep_lock.NAME, sweep_lock.FILE = '\\0' + sys.argv[1], Path(sys.argv[2])\n"
)
WAITS = (
    HOLDS
    + "with sweep_lock.alone():\n    print('holds', flush=True)\n    sys.stdin.read()\nprint('ended', flush=True)\n"
)


@pytest.fixture
def start():
    """Start a Python program with the name and the file of this test; what still runs is killed at the end."""
    started = []

    def begin(code, *front):
        words = [*front, sys.executable, "-c", code, sweep_lock.NAME[1:], str(sweep_lock.FILE)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(words, text=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        with process:  # closes what leads to it
            process.wait()


def refused():
    with pytest.raises(NumaLabError, match="another sweep measures on this machine") as told, sweep_lock.alone():
        pass
    return str(told.value)


def free():
    with sweep_lock.alone():
        return True


def test_who_is_refused_is_told_who_holds_it(start):
    holder = start(WAITS)
    assert holder.stdout.readline() == "holds\n"
    told = refused()
    assert f"process {holder.pid} of user " in told
    assert f"{sys.executable} -c" in told
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d", told)
    holder.stdin.close()
    assert holder.stdout.readline() == "ended\n"
    assert free()


@pytest.mark.parametrize("lost", ["NAME", "FILE"])
def test_one_of_the_two_suffices(start, monkeypatch, lost):
    holder = start(WAITS)
    assert holder.stdout.readline() == "holds\n"
    # As in another network namespace, or with another /dev/shm.
    monkeypatch.setattr(sweep_lock, lost, f"\0{os.getpid()}" if lost == "NAME" else sweep_lock.FILE.with_name("other"))
    assert f"process {holder.pid} of user " in refused()


def test_a_holder_that_is_killed_holds_nothing_more(start):
    holder = start(WAITS)
    assert holder.stdout.readline() == "holds\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert free()


def test_neither_children_nor_a_second_attempt_keep_it(start):
    code = HOLDS + (
        "with sweep_lock.alone():\n"
        "    if (child := os.fork()) == 0:\n        time.sleep(60)\n        os._exit(0)\n"
        "    slept = subprocess.Popen(['sleep', '60'])\n"
        "    try:\n        sweep_lock.alone().__enter__()\n    except sweep_lock.NumaLabError as error:\n        print(error, flush=True)\n"
        "print('ended', flush=True)\nsys.stdin.read()\nos.kill(child, 9)\nslept.kill()\n"
    )
    holder = start(code)
    assert f"this process, {holder.pid}" in holder.stdout.readline()
    assert holder.stdout.readline() == "ended\n"
    assert free()
    holder.stdin.close()
    holder.wait()


def test_it_is_given_back_after_an_error():
    with pytest.raises(ZeroDivisionError), sweep_lock.alone():
        raise ZeroDivisionError
    assert free()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")
def test_users_share_it_whatever_their_temporary_folder(start):
    def of_user(uid):
        # What is imported stays, although a user may not read this Python's folders.
        changed = f"os.environ['TMPDIR'] = '/tmp/{uid}'\nos.setgroups([])\nos.setgid({uid})\nos.setuid({uid})\n"
        return start(WAITS.replace("with sweep_lock", changed + "with sweep_lock"))

    first = of_user(54321)
    assert first.stdout.readline() == "holds\n"
    assert f"process {first.pid} of user 54321" in refused()
    assert f"process {first.pid}" in of_user(54322).stderr.read()
    first.stdin.close()
    first.wait()
    assert free(), "what the first user has left keeps the next one away"
    assert of_user(54322).stdout.readline() == "holds\n"


def test_where_a_sandbox_refuses_both_a_sweep_runs_all_the_same(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(sweep_lock.socket, "socket", refuse)
    monkeypatch.setattr(sweep_lock, "FILE", tmp_path / "nowhere" / "lock")
    assert free()
