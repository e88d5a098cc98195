import dataclasses
import os
import threading

import pytest
import torch

from numa_lab.errors import NodeUnavailable
from numa_lab.machine.hardware import Cpu
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.one_node import NUMAOptimizedGQA
from numa_lab.nodes.thread_pool import NUMAThreadPool
from numa_lab.placement import openmp, pinned_team, team_replacement
from numa_lab.placement.interrupt_safe import entered

NODE = read_topology().effective_nodes[0]
CPUS = read_topology().cpus_for([NODE])
ALL = frozenset(read_topology().allowed_cpus)
MOVED = f"node {NODE}'s team.* was placed on CPUs .*, ran on CPUs .*, and is placed again on CPUs "

pytestmark = pytest.mark.skipif(len(ALL) < 2, reason="a thread can only be moved where there are two CPUs")


def move(tid, cpus=ALL):
    """Give a thread another mask from outside of it, as the kernel does where a cpuset is rewritten."""
    other = threading.Thread(target=os.sched_setaffinity, args=(tid, cpus))
    other.start()
    other.join()


def masks():
    return [thread.cpus for thread in openmp.team()]


def inputs():
    return torch.ones(1, 8, 1, 64), torch.ones(1, 2, 999, 64), torch.ones(1, 2, 999, 64)


@pytest.mark.parametrize("which", range(min(2, len(CPUS))))
def test_the_helper_inside_its_block_notices_each_thread_that_was_moved_and_places_it_again(which):
    helper, outside, threads = NUMAOptimizedGQA(NODE), masks(), torch.get_num_threads()
    with helper:
        placed = openmp.team()
        helper.compute(*inputs())  # nothing to say
        move(placed[which].tid, {max(ALL - {CPUS[1]})} if which else {max(ALL)})
        with pytest.warns(RuntimeWarning, match=MOVED) as warned:
            output = helper.compute(*inputs())
        assert len(warned) == 1
        assert output.allclose(torch.ones(()))
        assert openmp.team() == placed
        helper.compute(*inputs())
    assert masks() == outside
    assert torch.get_num_threads() == threads


def test_a_pool_notices_it_before_it_computes():
    with NUMAThreadPool() as pool:
        placed = pool.execute_on_numa(openmp.team, numa_node=NODE)
        move(placed[0].tid)
        with pytest.warns(RuntimeWarning, match=MOVED):
            assert pool.execute_on_numa(openmp.team, numa_node=NODE) == placed
        assert pool.execute_on_numa(openmp.team, numa_node=NODE) == placed


def test_a_team_whose_threads_a_task_has_replaced_is_placed_again_without_a_word():
    with NUMAThreadPool() as pool:
        placed = [{cpu} for cpu in CPUS]
        pool.execute_on_numa(lambda: (openmp.run_on_each(int, len(CPUS) + 2), torch.ones(9).sum()), numa_node=NODE)
        assert [thread.cpus for thread in pool.execute_on_numa(openmp.team, numa_node=NODE)] == placed


@pytest.mark.parametrize("threads", [1, 3])
def test_how_many_threads_compute_inside_the_helper_is_the_callers_to_say(threads):
    helper, outside, before = NUMAOptimizedGQA(NODE), masks(), torch.get_num_threads()
    try:
        with helper:
            for count in (5, threads):  # the second ends threads of the first
                torch.set_num_threads(count)
                helper.compute(*inputs())
                assert len(openmp.team()) == count
        assert masks() == outside
    finally:
        torch.set_num_threads(before)  # of threads that are started later, too


def test_a_placement_inside_is_no_move():
    helper = NUMAOptimizedGQA(NODE)
    with helper, pinned_team.pinned_team([CPUS[-1]]):
        helper.compute(*inputs())
        assert masks() == [{CPUS[-1]}]
        with helper:  # who says so goes there
            assert len(masks()) == len(CPUS)
        assert masks() == [{CPUS[-1]}]


def test_what_the_cpuset_took_away_is_replaced_when_the_helper_is_entered(monkeypatch):
    helper = NUMAOptimizedGQA(NODE)
    helper._pinned = pinned_team.PinnedTeam([4094, 4095], None, [4094, 4095])  # as of before
    with pytest.warns(RuntimeWarning, match=r"CPUs 4094-4095 of node .* placed on CPUs"), helper:
        assert set(helper.cpus) <= set(CPUS)
        assert masks()[1:] == [{cpu} for cpu in helper.cpus[1:]]
    none = dataclasses.replace(read_topology(), allowed_cpus=())
    helper._pinned = pinned_team.PinnedTeam([4095])
    monkeypatch.setattr(team_replacement, "read_topology", lambda: none)
    before = masks()
    with pytest.raises(NodeUnavailable, match=f"node {NODE} has no CPU left .* placed on CPUs 4095"):
        helper.__enter__()
    assert not entered()
    assert masks() == before


def test_where_no_cpu_is_left_each_use_says_so(monkeypatch):
    none = dataclasses.replace(read_topology(), allowed_cpus=())

    def on_all():
        return pool.parallel_gqa_compute(*([tensor] for tensor in inputs()))

    with NUMAThreadPool() as pool, NUMAOptimizedGQA(NODE) as helper:
        move(pool.execute_on_numa(threading.get_native_id, numa_node=NODE))
        move(threading.get_native_id(), {max(ALL)})
        monkeypatch.setattr(team_replacement, "read_topology", lambda: none)
        with pytest.raises(NodeUnavailable, match="no node has CPUs that this process may use"):
            on_all()
        with pytest.raises(NodeUnavailable, match=f"node {NODE} has no CPU left"):
            helper.compute(*inputs())
        monkeypatch.undo()
        for use in (on_all, lambda: helper.compute(*inputs())):
            with pytest.warns(RuntimeWarning, match=MOVED):
                use()


def test_a_node_without_cpus_is_served_by_the_nearest_or_refused(monkeypatch, four_nodes):
    """As where a cpuset hides a node on which tokens of a cache lie."""
    left = dataclasses.replace(four_nodes, allowed_cpus=four_nodes.node_cpus[1])
    monkeypatch.setattr(team_replacement, "read_topology", lambda: left)
    monkeypatch.setattr(team_replacement, "cpus_outside", lambda: set(range(6)))
    placement = pinned_team.PinnedTeam(four_nodes.node_cpus[0])
    assert team_replacement.placed_again(placement, 0, elsewhere=True).cpus == four_nodes.node_cpus[1]
    with pytest.raises(NodeUnavailable, match="node 0 has no CPU left"):
        team_replacement.placed_again(placement, 0)


@pytest.mark.parametrize(
    ("allowed", "old", "outside", "expected"),
    [
        ((0, 1, 2, 3), (0, 1), range(8), (0, 1)),  # all still there
        ((2, 3), (0, 1), range(8), (2, 3)),
        ((1, 2, 3), (0, 1), range(8), (2, 1)),  # one is gone, and the other keeps its thread
        ((3,), (0, 1, 2), range(8), (3,)),
        ((0, 1, 2, 3), (0, 3), (0, 1), (0, 1)),  # the process was given two of them by taskset
        ((2, 3), (0, 1), (0, 1), (2, 3)),  # of which the cpuset has left none
        ((4, 5), (0, 1), range(8), ()),  # those of another node
        ((0, 2), (4, 2), range(8), (0, 2)),
    ],
)
def test_a_team_keeps_its_cpus_and_takes_the_next_free_cores(four_nodes, allowed, old, outside, expected):
    cpus = tuple(Cpu(cpu, cpu, 0, cpu // 4) for cpu in range(8))
    topology = dataclasses.replace(four_nodes, cpus=cpus, allowed_cpus=allowed)
    assert team_replacement.cpus_now(topology, 0, old, outside) == expected


def test_a_sibling_of_a_kept_cpu_is_no_free_core(four_nodes):
    cpus = tuple(Cpu(cpu, cpu % 2, 0, 0) for cpu in range(4))
    topology = dataclasses.replace(four_nodes, cpus=cpus, allowed_cpus=(0, 1, 2))
    assert team_replacement.cpus_now(topology, 0, (2, 3), range(4)) == (2, 1)
