import ctypes.util
import os
import signal
import subprocess
import sys

import pytest
import torch

from numa_lab.placement import openmp


def masks():
    return {tid: os.sched_getaffinity(int(tid)) for tid in os.listdir("/proc/self/task")}


def test_the_team_is_the_one_that_torch_computes_on():
    torch.randn(512, 512) @ torch.randn(512, 512)
    before = {int(tid) for tid in os.listdir("/proc/self/task")}
    team = openmp.team()
    assert len(team) == torch.get_num_threads()
    assert {thread.tid for thread in team} <= before, "new threads were made, so it is not torch's team"


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("on", [0, 1])
def test_an_error_on_one_thread_reaches_the_caller(error, on):
    ran = []

    def fail(number):
        ran.append(number)
        if number == on:
            raise error

    with pytest.raises(error):
        openmp.run_on_each(fail, 3)
    assert sorted(ran) == [0, 1, 2]
    assert openmp.run_on_each(lambda number: number * 10, 3) == [0, 10, 20]


def test_what_a_signals_handler_raises_reaches_the_caller(capfd):
    class Interrupt(BaseException):
        pass

    def ring(*_):
        raise Interrupt

    def call(number):
        if number:
            signal.raise_signal(signal.SIGALRM)  # whose handler the main thread runs as soon as it may

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for _ in range(100):
            with pytest.raises(Interrupt):
                openmp.run_on_each(call, 2)
            assert openmp.run_on_each(int, 2) == [0, 1]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert capfd.readouterr().err == ""


ON_ANOTHER_RUNTIME = """
import os, torch
from numa_lab.placement import openmp
from numa_lab.attention import decode
torch.set_num_threads(2)
torch.ones(1 << 22).sum()
before = set(os.listdir("/proc/self/task"))
query, key = torch.ones(1, 4, 1, 64), torch.ones(1, 2, 999, 64)
torch.testing.assert_close(decode.decode_attention(query, key, key), query)
assert {str(thread.tid) for thread in openmp.team()} <= before, "not the threads on which torch computes"
print(openmp.runtime().name)
"""


def test_the_kernel_runs_on_llvms_runtime_where_torch_does():
    """As with conda's torch, which is built for libomp."""
    library = ctypes.util.find_library("omp")
    if library is None:
        pytest.fail("libomp is not installed: apt-get install libomp5 | dnf install libomp")
    done = subprocess.run(
        [sys.executable, "-c", ON_ANOTHER_RUNTIME],
        env=os.environ | {"LD_PRELOAD": library}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "libomp\n", done.stderr
