import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, as_completed, wait

import pytest

from numa_lab.errors import InvalidInput, NodeUnavailable, NumaLabError
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.node_threads import NodeTeam, least_busy, run_each
from numa_lab.placement import openmp

NODE = read_topology().effective_nodes[0]
CORES = read_topology().cpus_for([NODE])
SECONDS = 120  # that nothing here takes, on a busy machine either
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


@pytest.fixture
def team():
    made = NodeTeam(NODE)
    yield made
    made.shutdown()


@pytest.fixture
def pair():
    """A team of two leaders."""
    made = NodeTeam(NODE, CORES[:2], leaders=2)
    yield made
    made.shutdown()


def block(team):
    """Keep a leader busy until the event is set."""
    go, begun = threading.Event(), threading.Event()
    team.submit(lambda: (begun.set(), go.wait(SECONDS)))
    assert begun.wait(SECONDS)
    return go


def test_a_team_computes_on_its_cpus(team):
    assert team.cpus == CORES
    assert [thread.cpus for thread in team.submit(openmp.team).result()] == [{cpu} for cpu in CORES]
    assert team.submit(team.is_current).result()
    assert not team.is_current()


@needs_two_cores
def test_leaders_share_cpus_and_queue(pair):
    together = threading.Barrier(2)

    def masks():
        together.wait(SECONDS)
        return [thread.cpus for thread in openmp.team()]

    for futures in [[pair.submit(masks) for _ in range(2)] for _ in range(3)]:
        seen = [future.result() for future in futures]
        assert sorted(seen, key=str) == [[{cpu}] for cpu in CORES[:2]]


def test_what_can_be_no_team_is_told():
    with pytest.raises(NodeUnavailable, match="CPU 4095"):
        NodeTeam(NODE, [4095])
    with pytest.raises(InvalidInput, match=f"leaders=99: expected 1 to {len(CORES)}"):
        NodeTeam(NODE, leaders=99)


def test_tasks_begin_in_order_and_those_cancelled_do_not(team):
    go, began = block(team), []
    futures = [team.submit(began.append, number) for number in range(50)]
    assert futures[7].cancel()
    go.set()
    for future in futures[:7] + futures[8:]:
        future.result()
    assert began == [*range(7), *range(8, 50)]
    with pytest.raises(CancelledError):
        futures[7].result()


@needs_two_cores
def test_the_least_busy_team_has_the_fewest_tasks_per_leader(pair, team):
    ends = [block(team), block(pair), block(pair)]
    waiting = [pair.submit(int)]
    assert least_busy([pair, team]) is team
    waiting.append(team.submit(int))
    assert least_busy([pair, team]) is pair
    for end in ends:
        end.set()
    for future in waiting:
        future.result()


def test_errors_of_any_kind_reach_the_caller_and_are_held_by_no_one_else(team):
    def fail(_argument):
        raise SystemExit(3)

    class Argument:
        pass

    argument = Argument()
    alive = weakref.ref(argument)
    gc.disable()
    try:
        future = team.submit(fail, argument)
        with pytest.raises(SystemExit):
            future.result()
        del argument, future
        team.submit(int).result()  # the leader has left the task that failed
        for _ in range(100):  # and so has pytest
            if alive() is None:
                break
            time.sleep(0.01)
        assert alive() is None
    finally:
        gc.enable()


def test_no_callback_takes_a_leader_along(team, caplog):
    def fail(_future):
        raise SystemExit(3)

    future, go = team.submit(int), block(team)
    waiting = team.submit(int)
    waiting.add_done_callback(fail)
    go.set()
    assert future.result() == waiting.result() == team.submit(int).result() == 0
    assert "exception calling callback" in caplog.text


@needs_two_cores
def test_a_look_waits_for_no_task_and_leaves_out_what_a_task_has_ended(team):
    go = block(team)
    granted, threads, _notes = team.look()
    assert (granted.cpu_nodes, [thread.allowed for thread in threads]) == ((NODE,), [(cpu,) for cpu in CORES])
    go.set()
    team.submit(openmp._end_team).result()  # as a fork does
    for _ in range(100):
        if len(team.look()[1]) == 1:
            break
        time.sleep(0.01)
    assert [thread.allowed for thread in team.look()[1]] == [(CORES[0],)]
    assert [thread.cpus for thread in team.submit(openmp.team).result()] == [{cpu} for cpu in CORES]
    assert len(team.look()[1]) == len(CORES)


def test_shutdown_finishes_everything_and_refuses_more(team):
    go = block(team)
    futures = [team.submit(go.wait, SECONDS) for _ in range(20)]
    by_leader = team.submit(team.shutdown)
    team.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="shutdown"):
        team.submit(int)
    go.set()
    team.shutdown()
    with pytest.raises(NumaLabError, match="leads a team"):
        by_leader.result()
    assert all(future.done() and future.result() for future in futures)


def test_who_waits_for_the_end_waits_for_what_is_freed_at_the_end_of_a_thread(team):
    class Freed:
        def __del__(self):
            time.sleep(0.01)  # as who frees a tensor lets other threads run
            freed.append(True)

    freed, of_thread = [], threading.local()
    team.submit(setattr, of_thread, "kept", Freed()).result()
    team.shutdown()
    assert freed


def test_a_team_that_nobody_has_any_more_ends_when_all_is_done():
    team = NodeTeam(NODE, name="numa-forgotten")
    go, (leader,) = block(team), (one for one in threading.enumerate() if one.name.startswith("numa-forgotten"))
    last = team.submit(int)
    del team
    gc.collect()
    go.set()
    assert last.result(SECONDS) == 0
    leader.join(SECONDS)
    assert not leader.is_alive()


def test_a_forked_child_is_refused_and_has_teams_of_its_own(team):
    go = block(team)
    waiting = team.submit(int)
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)  # ends a child that hangs
        refused = ""
        try:
            team.submit(int)
        except NumaLabError as error:
            refused = str(error)
        team.shutdown()
        own = NodeTeam(NODE).submit(openmp.threads).result()
        as_wanted = "in the process that uses it" in refused and waiting.cancel() and own == len(CORES)
        os._exit(0 if as_wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go.set()
    assert waiting.result() == 0


@pytest.mark.guest(None)  # to begin Python anew takes most of a minute in a guest
def test_an_interpreter_that_ends_finishes_what_waits():
    code = f"""
import time
from numa_lab.nodes.node_threads import NodeTeam
team, idle = NodeTeam({NODE}), NodeTeam({NODE})
for number in range(20):
    team.submit(lambda number=number: (time.sleep(0.005), print(number, flush=True)))
nobody_has_it = NodeTeam({NODE})
last = nobody_has_it.submit(lambda: (time.sleep(0.2), print(20, flush=True)))
del nobody_has_it
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200, check=True)
    assert ended.stdout.split() == [str(number) for number in range(21)]
    assert ended.stderr == ""


@needs_two_cores
def test_random_play_runs_everything_once_or_cancels_it(pair):
    ran, futures = [], {}

    def play(seed):
        draw = random.Random(seed)
        for number in range(500):
            key = seed, number
            futures[key] = pair.submit(ran.append, key)
            if draw.random() < 0.3:
                futures[draw.choice(list(futures))].cancel()
            if draw.random() < 0.05:
                pair.submit(int).result(SECONDS)
            if draw.random() < 0.1:
                time.sleep(0.0005)

    players = [threading.Thread(target=play, args=(seed,)) for seed in range(4)]
    for player in players:
        player.start()
    for player in players:
        player.join()
    half = list(futures.values())[::2]
    assert not wait(list(futures.values()), SECONDS).not_done
    assert set(as_completed(half, SECONDS)) == set(half)
    assert sorted(ran) == sorted(key for key, future in futures.items() if not future.cancelled())


def test_each_is_run_or_none_that_has_not_begun(team):
    assert run_each((team, lambda number=number: number) for number in range(9)) == list(range(9))
    ran = []
    with pytest.raises(ZeroDivisionError):
        run_each([(team, lambda: 1 / 0), (team, lambda: ran.append(1))])
    assert ran == [1], "one that fails keeps no other from being run"
    go = block(team)

    def calls():
        yield team, lambda: ran.append(2)
        raise TimeoutError  # as a signal's handler may

    with pytest.raises(TimeoutError):
        run_each(calls())
    go.set()
    team.submit(int).result()
    assert ran == [1]
