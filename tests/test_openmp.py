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


def test_pinned_team_pins_workers_that_exist_and_restores_after_an_error():
    cpus = sorted(os.sched_getaffinity(0))
    openmp.team()
    before, threads = masks(), torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), openmp.pinned_team(cpus) as team:
        assert [thread.cpus for thread in team] == [{cpu} for cpu in cpus]
        torch.randn(512, 512) @ torch.randn(512, 512)
        with openmp.pinned_team(cpus[:1]) as inner:
            assert [thread.cpus for thread in inner] == [{cpus[0]}]
        assert [thread.cpus for thread in openmp.team()] == [{cpu} for cpu in cpus]
        raise ZeroDivisionError
    assert {tid: mask for tid, mask in masks().items() if tid in before} == before
    assert torch.get_num_threads() == threads


def test_a_cpu_that_is_not_allowed_raises_and_restores():
    before = os.sched_getaffinity(0)
    with pytest.raises(OSError, match="Invalid argument"), openmp.pinned_team([4095]):
        pass
    assert os.sched_getaffinity(0) == before


def test_an_error_on_one_thread_reaches_the_caller():
    def fail(number):
        raise KeyError(number)

    with pytest.raises(KeyError):
        openmp.run_on_each(fail, 2)
    assert openmp.run_on_each(lambda number: number * 10, 3) == [0, 10, 20]


def test_without_the_library_only_the_caller_is_bound_and_a_warning_says_so(monkeypatch):
    monkeypatch.setattr(openmp, "runtime", lambda: None)
    before, cpu = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    with pytest.warns(UserWarning, match="OpenMP library was not found"), openmp.pinned_team([cpu]) as team:
        assert team == []
        assert os.sched_getaffinity(0) == {cpu}
    assert os.sched_getaffinity(0) == before
