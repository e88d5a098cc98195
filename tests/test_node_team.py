import ctypes
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from numba import cfunc, types

from numa_lab import openmp
from numa_lab.errors import InvalidInput, NodeUnavailable, NumaLabError
from numa_lab.node_team import NodeTeam, run_compiled, run_on_leaders, teams
from numa_lab.topology import read_topology

NODE = read_topology().effective_nodes[0]
CPUS = read_topology().cpus_for([NODE])


usleep = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint)(("usleep", ctypes.CDLL(None)))


@cfunc(types.void(types.CPointer(types.int64)))
def count(number):
    number[0] += 1


@cfunc(types.void(types.CPointer(types.int64)))
def count_slowly(number):
    usleep(2_000)
    number[0] += 1


@pytest.fixture
def node():
    return NODE


@pytest.fixture
def two():
    """Two teams of one thread each, on two cores where there are."""
    found = [NodeTeam(NODE, [cpu]) for cpu in (CPUS[0], CPUS[-1])]
    yield found
    for team in found:
        team.shutdown()


class Counters:
    def __init__(self, number):
        self.words = (ctypes.c_int64 * number)()

    def job(self, number, function=count):
        return function.address, ctypes.addressof(self.words) + 8 * number, 1


def test_a_node_team_computes_on_its_cpus_and_belongs_to_its_process(node):
    own = NodeTeam(node)
    cpus = read_topology().cpus_for([node])
    try:
        assert [thread.cpus for thread in own.submit(openmp.team).result()] == [{cpu} for cpu in cpus]
        with pytest.raises(ZeroDivisionError):
            own.submit(lambda: 1 / 0).result()
        own._process += 1  # as a forked child sees it
        with pytest.raises(NumaLabError, match="in the process that uses it"):
            own.submit(openmp.team)
    finally:
        own.shutdown()


def test_teams_are_made_once_in_each_process_and_leave_cores_to_others(node):
    first = teams()
    assert first == teams([node]) if len(first) == 1 else first.keys() == set(read_topology().effective_nodes)
    assert teams([node])[node] is first[node]
    cores = len(first[node].cpus)
    with pytest.raises(InvalidInput, match=f"reserve={cores}: expected 0 to {cores - 1}"):
        teams([node], reserve=cores)
    if cores > 1:
        assert teams([node], reserve=1)[node].cpus == first[node].cpus[1:]
    child = os.fork()
    if not child:
        fresh = teams([node])[node]
        os._exit(fresh is first[node] or fresh.submit(openmp.threads).result() != cores)
    assert os.waitpid(child, 0)[1] == 0


def test_a_thread_that_may_use_fewer_cpus_gets_teams_of_those():
    found = []

    def ask():
        os.sched_setaffinity(0, CPUS[:1])
        found.append(teams([NODE])[NODE].cpus)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [CPUS[:1]]
    assert teams([NODE])[NODE].cpus == CPUS


def test_compiled_and_other_work_of_several_threads_is_done_once_each(two):
    counters, posted, called = Counters(2), [0, 0], itertools.count()

    def play(seed):
        chance = random.Random(seed)
        for _ in range(300):
            if chance.random() < 0.3:
                chance.choice(two).submit(next, called).result()
                continue
            work = {number: chance.choice([1, 3]) for number in chance.choice([[0], [1], [0, 1], [1, 0]])}
            run_compiled({two[number]: [counters.job(number)] * times for number, times in work.items()})
            with lock:
                calls.append(1)
                for number, times in work.items():
                    posted[number] += times

    lock, calls = threading.Lock(), []
    players = [threading.Thread(target=play, args=[seed]) for seed in range(3)]
    for player in players:
        player.start()
    for player in players:
        player.join()
    assert list(counters.words) == posted
    assert next(called) + len(calls) == 3 * 300


def test_compiled_work_is_refused_where_it_would_hang(two):
    counters = Counters(1)
    for team in two:  # also one that has nothing to do with the work: two such would wait for each other
        with pytest.raises(NumaLabError, match="leads a team"):
            team.submit(run_compiled, {two[0]: [counters.job(0)]}).result()
    two[1].shutdown()
    with pytest.raises(RuntimeError, match="shutdown"):
        run_compiled({team: [counters.job(0)] for team in two})
    assert counters.words[0] == 0
    with pytest.raises(NumaLabError, match="leads a team"):
        two[0].submit(two[0].shutdown).result()
    run_compiled({two[0]: [counters.job(0)]})
    assert counters.words[0] == 1


def test_a_leader_that_cant_enter_its_node_is_no_team():
    with pytest.raises(NodeUnavailable, match="CPU 4095"):
        NodeTeam(NODE, [4095])


def test_an_interrupt_is_raised_when_no_leader_writes_any_more(two):
    def interrupt(*_):
        if next(rings, False):
            raise TimeoutError

    rings = itertools.repeat(True)
    run_compiled(
        {team: [Counters(1).job(0)] for team in two}
    )  # an exception while a thread starts is Python's own matter
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(20):
            counters = Counters(2)
            work = {team: [counters.job(number, count_slowly)] * 3 for number, team in enumerate(two)}
            with pytest.raises(TimeoutError):
                signal.setitimer(signal.ITIMER_REAL, 0.003)
                run_compiled(work)
                time.sleep(1)
            assert counters.words[0] == counters.words[1] in (0, 3)
            run_compiled(work)
            assert counters.words[0] == counters.words[1] in (3, 6)
        begun, ended = [], []

        def slow():
            begun.append(1)
            time.sleep(0.05)
            ended.append(1)

        rings = iter([True] * 3)
        with pytest.raises(TimeoutError):
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.01)
            run_on_leaders([(two[0], slow), (two[0], slow)])
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert len(begun) == len(ended)
        two[0].submit(int).result()
        assert len(ended) <= 1, "what had not begun was not given up"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_stream_of_compiled_work_keeps_nobody_out_and_ends_with_the_team(two):
    counters, ended = Counters(2), []

    def stream():
        try:
            while True:
                run_compiled({team: [counters.job(number, count_slowly)] for number, team in enumerate(two)})
        except RuntimeError as error:
            ended.append(str(error))

    thread = threading.Thread(target=stream)
    thread.start()
    while not counters.words[0]:
        time.sleep(0.001)
    for _ in range(50):
        two[0].submit(int).result(timeout=600)
    two[0].shutdown()
    thread.join()
    assert ended == ["cannot schedule new futures after shutdown"]
    assert counters.words[0] == counters.words[1] > 0


def test_a_team_that_nobody_has_any_more_ends():
    team = NodeTeam(NODE, name="numa-forgotten")
    run_compiled({team: [Counters(1).job(0)]})
    (leader,) = (thread for thread in threading.enumerate() if thread.name.startswith("numa-forgotten"))
    del team
    gc.collect()
    leader.join(timeout=600)
    assert not leader.is_alive()


def test_a_child_has_teams_of_its_own(two):
    counters = Counters(1)
    run_compiled({two[0]: [counters.job(0)]})
    child = os.fork()
    if not child:
        status = 1
        try:
            with pytest.raises(NumaLabError, match="in the process that uses it"):
                run_compiled({two[0]: [counters.job(0)]})
            for _ in range(100):
                run_compiled({teams([NODE])[NODE]: [counters.job(0)]})
            status = 0 if counters.words[0] == 101 else 2
        finally:
            os._exit(status)
    for _ in range(100):
        run_compiled({two[0]: [counters.job(0)]})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert counters.words[0] == 101


@pytest.mark.guest(None)  # to begin Python anew takes most of a minute in a guest
def test_a_spawned_process_has_teams_of_its_own():
    program = f"""
from numa_lab import node_team, openmp
assert len(node_team.teams([{NODE}])[{NODE}].submit(openmp.team).result()) == {len(CPUS)}
"""
    with ProcessPoolExecutor(1, get_context("spawn")) as spawned:
        spawned.submit(exec, program).result()


@pytest.mark.guest(None)
def test_a_process_ends_beside_teams_that_wait_for_work():
    program = f"""
import ctypes, math
from numba import cfunc, types
from numa_lab.node_team import run_compiled, teams
nothing = cfunc(types.void(types.int64))(lambda _: None)
run_compiled({{teams([{NODE}])[{NODE}]: [(nothing.address, 0, 1)]}})
print("done")
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1200)
    assert (found.returncode, found.stdout, found.stderr) == (0, "done\n", "")
