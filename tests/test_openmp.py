import os

import pytest
import torch

from numa_lab import openmp


def masks():
    return {tid: os.sched_getaffinity(int(tid)) for tid in os.listdir("/proc/self/task")}


def test_the_team_is_the_one_that_torch_computes_on():
    torch.randn(512, 512) @ torch.randn(512, 512)
    before = {int(tid) for tid in os.listdir("/proc/self/task")}
    team = openmp.team()
    assert len(team) == torch.get_num_threads()
    assert {thread.tid for thread in team} <= before, "new threads were made, so it is not torch's team"


def test_an_error_on_one_thread_reaches_the_caller():
    def fail(number):
        raise KeyError(number)

    with pytest.raises(KeyError):
        openmp.run_on_each(fail, 2)
    assert openmp.run_on_each(lambda number: number * 10, 3) == [0, 10, 20]
