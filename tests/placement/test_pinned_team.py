import ctypes
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from numa_lab.errors import InvalidInput, NodeUnavailable
from numa_lab.machine import libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import openmp, pinned_team


def masks():
    return {tid: os.sched_getaffinity(int(tid)) for tid in os.listdir("/proc/self/task")}


def policies(threads):
    return openmp.run_on_each(lambda _number: libnuma.get_mempolicy(), threads)


@pytest.fixture
def node():
    return read_topology().effective_nodes[0]


def test_workers_that_exist_are_pinned_and_restored_after_an_error():
    cpus = sorted(os.sched_getaffinity(0))
    workers, threads = openmp.team(), torch.get_num_threads()
    before = masks()
    with pytest.raises(ZeroDivisionError), pinned_team.pinned_team(cpus) as pinned:
        assert [thread.cpus for thread in pinned] == [{cpu} for cpu in cpus]
        torch.randn(512, 512) @ torch.randn(512, 512)
        with pinned_team.pinned_team(cpus[:1]) as inner:
            assert [thread.cpus for thread in inner] == [{cpus[0]}]
        assert [thread.cpus for thread in openmp.team()] == [{cpu} for cpu in cpus]
        raise ZeroDivisionError
    assert openmp.team() == workers
    assert all(before.get(tid, mask) == mask for tid, mask in masks().items())  # of other tests some may end meanwhile
    assert torch.get_num_threads() == threads


def test_every_thread_gets_the_policy_and_gives_it_back(node):
    libnuma.set_mempolicy(libnuma.MPOL_INTERLEAVE, [node])
    try:
        cpus = sorted(os.sched_getaffinity(0))
        outside = policies(len(cpus))
        with pinned_team.pinned_team(cpus, (libnuma.MPOL_BIND, [node])):
            assert policies(len(cpus)) == [(libnuma.MPOL_BIND, {node})] * len(cpus)
        assert policies(len(cpus)) == outside
        assert outside[0] == (libnuma.MPOL_INTERLEAVE, {node})
    finally:
        libnuma.set_mempolicy(libnuma.MPOL_DEFAULT)


def test_each_thread_may_get_a_policy_of_its_own(node):
    cpus = sorted(os.sched_getaffinity(0))[:2]
    given = [(libnuma.MPOL_BIND, {node}), (libnuma.MPOL_PREFERRED, {node})][: len(cpus)]
    with pinned_team.PinnedTeam(cpus, given) as before:
        assert before.granted == len(cpus)
        assert policies(len(cpus)) == given
    with pytest.raises(InvalidInput, match=r"one for each of the 3$"):
        pinned_team.PinnedTeam([0, 1, 2], given)


def test_what_mkl_computes_with_comes_back(node):
    told = getattr(ctypes.CDLL(torch._C.__file__), "MKL_Get_Max_Threads", torch.get_num_threads)
    before = told()
    with pinned_team.PinnedTeam([min(os.sched_getaffinity(0))] * 3):
        assert told() == 3
        torch.set_num_threads(5)
    try:
        assert told() == torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)  # of threads that are started later, too


def test_threads_born_inside_are_given_back_too():
    everywhere, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        with pinned_team.pinned_team([min(everywhere)]):
            torch.set_num_threads(4)
            openmp.team()
        assert [thread.cpus for thread in openmp.team(4)] == [everywhere] * 4
    finally:
        torch.set_num_threads(threads)  # of threads that are started later, too


def test_the_leader_may_keep_more_than_its_cpu():
    cpus = sorted(os.sched_getaffinity(0))
    placement = pinned_team.PinnedTeam(cpus, leader_cpus=cpus)
    before = placement.enter()
    try:
        assert [thread.cpus for thread in openmp.team()] == [set(cpus), *({cpu} for cpu in cpus[1:])]
    finally:
        placement.leave(before)


def test_a_cpu_that_is_not_allowed_raises_and_restores():
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with (
        pytest.raises(NodeUnavailable, match=r"CPU 4095\): Invalid argument.*CPUs .* by its mask"),
        pinned_team.pinned_team([4095]),
    ):
        pass
    assert os.sched_getaffinity(0) == before
    assert torch.get_num_threads() == threads


def test_a_refused_policy_is_told_and_the_threads_are_pinned_all_the_same():
    cpu = min(os.sched_getaffinity(0))
    placement = pinned_team.PinnedTeam([cpu], (libnuma.MPOL_BIND, [1023]))  # a node that no machine of the tests has
    before = placement.enter()
    try:
        assert "set_mempolicy" in before.refusal
        assert openmp.team(1)[0].cpus == {cpu}
    finally:
        placement.leave(before)


def test_without_the_library_only_the_caller_is_bound_and_a_warning_says_so(monkeypatch, node):
    monkeypatch.setattr(openmp, "runtime", lambda: None)
    before, cpu = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    with (
        pytest.warns(UserWarning, match="OpenMP library was not found"),
        pinned_team.pinned_team([cpu], (libnuma.MPOL_BIND, [node])) as pinned,
    ):
        assert pinned == []
        assert os.sched_getaffinity(0) == {cpu}
        assert libnuma.get_mempolicy() == (libnuma.MPOL_BIND, {node})
    assert os.sched_getaffinity(0) == before
    assert libnuma.get_mempolicy()[0] == libnuma.MPOL_DEFAULT


def test_a_thread_count_is_set_for_one_thread_alone():
    seen = []
    other = threading.Thread(target=lambda: seen.append(openmp.threads()))
    with pinned_team.pinned_team([min(os.sched_getaffinity(0))]):
        assert openmp.threads() == 1
        other.start()
        other.join()
    assert seen == [torch.get_num_threads()]


def test_a_forked_child_computes():
    torch.randn(512, 512) @ torch.randn(512, 512)
    child = os.fork()
    if not child:
        status = 1
        try:
            team_of_child = openmp.team(2)
            torch.randn(512, 512) @ torch.randn(512, 512)
            status = 0 if len(team_of_child) == 2 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


GIVEN_FEWER = """
import json
import torch
from numa_lab import NUMAOptimizedGQA, NUMAThreadPool
from numa_lab.machine import doctor
from numa_lab.placement import openmp, pinned_team
from numa_lab.errors import UntrustedResult
from numa_lab.nodes.kv_cache import NodeShardedKVCache
from numa_lab.experiments.execution import start

cpu = min(openmp.team(1)[0].cpus)
outside = openmp.team(1)
placement = pinned_team.PinnedTeam([cpu] * 3)
before = placement.enter()
granted = before.granted, [sorted(thread.cpus) == [cpu] for thread in openmp.team()]
placement.leave(before)
assert openmp.team(1) == outside
helper = NUMAOptimizedGQA(0, threads=2)
with helper:
    query, key = torch.ones(1, 4, 1, 64), torch.ones(1, 2, 999, 64)
    torch.testing.assert_close(helper.compute(query, key, key), query)
receipts = list(helper.receipts().values())
with NUMAThreadPool() as pool:
    receipts += pool.receipts().values()
cache = NodeShardedKVCache(1, 2, 64, capacity=9, dtype=torch.float32)
receipts += cache.receipts().values()
found = [receipt.contradictions(receipt.observed_cpus, receipt.effective.cpu_nodes) for receipt in receipts]
execution = start(profile="smoke", preset="llama-3-8b", kv_len=64)
try:
    refused = execution.finish(execution.measure())
except UntrustedResult as error:
    refused = str(error)
print(json.dumps([granted, found, refused, [finding.seen for finding in doctor.examine()]]))
"""


@pytest.mark.skipif(len(read_topology().cpus_for([0])) < 2, reason="a team of two needs two cores")
def test_a_team_that_openmp_makes_smaller_is_told_everywhere():
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_FEWER],
        env=os.environ | {"OMP_THREAD_LIMIT": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    granted, found, refused, seen = json.loads(done.stdout)
    assert granted == [1, [True]]
    assert len(found) == 1 + 2 * len(read_topology().effective_nodes)
    for told in (*map(" ".join, found), refused):
        assert re.search(r"\b\d+ threads were requested and 1 computed", told)
    assert "OMP_THREAD_LIMIT=1" in seen
