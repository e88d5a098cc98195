import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait

import pytest

from numa_lab.errors import NumaLabError
from numa_lab.limits import Limits
from numa_lab.measured import Measured, socket_groups
from numa_lab.node_team import NodeTeam
from numa_lab.queues import NodeQueues
from numa_lab.stealing import Reads
from numa_lab.topology import read_topology

NODE = read_topology().effective_nodes[0]
CORES = read_topology().cpus_for([NODE])
INPUT, MUCH = Reads(0, 1 << 30), Reads(1, 100 << 30)
SECONDS = 120  # that nothing here takes, on a busy machine either


class Two(NodeQueues):
    """Queues of two nodes that are parts of one, and what they look like from outside."""

    def __init__(self, bandwidth=None, leaders=1):
        cores = {0: CORES[0], 1: CORES[-1]}
        self.teams = {node: [NodeTeam(NODE, [core]) for _ in range(leaders)] for node, core in cores.items()}
        rows = bandwidth and tuple(tuple(cell * 1e9 for cell in row) for row in bandwidth)
        measured = rows and Measured((0, 1), rows, None, None)
        super().__init__(self.teams, measured and Limits(measured, socket_groups(measured)))

    def where(self):
        return next(node for node, teams in self.teams.items() if any(team.is_current() for team in teams))

    def block(self, node):
        """Keep a leader of the node busy until the event is set."""
        go, begun = threading.Event(), threading.Event()
        self.submit(lambda: (begun.set(), go.wait(SECONDS)), node=node)
        assert begun.wait(SECONDS)
        return go


@pytest.fixture
def queues():
    made = []

    def make(*arguments, **options):
        made.append(Two(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()


def test_tasks_of_a_node_begin_in_order(queues):
    two, began = queues(), []
    go = two.block(0)
    futures = [two.submit(began.append, (number,), node=0) for number in range(50)]
    go.set()
    wait(futures)
    assert began == list(range(50))


def test_leaders_of_a_node_share_its_queue(queues):
    two, together = queues(leaders=3), threading.Barrier(3)
    for future in [two.submit(together.wait, (SECONDS,), node=1) for _ in range(6)]:
        future.result()


def test_a_task_without_a_node_goes_where_least_is_left_and_what_was_cancelled_does_not_count(queues):
    two = queues()
    blocked = [two.block(0), two.block(1)]
    cancelled = [two.submit(print, node=0) for _ in range(3)]
    waiting = two.submit(int, node=1)
    assert all(future.cancel() for future in cancelled)
    assert not wait(cancelled, SECONDS).not_done
    free = two.submit(two.where)
    for go in blocked:
        go.set()
    assert (free.result(), waiting.result()) == (0, 0)
    with pytest.raises(CancelledError):
        cancelled[0].result()


def test_errors_of_any_kind_reach_the_caller_and_are_held_by_no_one_else(queues):
    two = queues()

    def fail(_argument):
        raise SystemExit(3)

    class Argument:
        pass

    argument = Argument()
    alive = weakref.ref(argument)
    gc.disable()
    try:
        future = two.submit(fail, (argument,), node=0)
        with pytest.raises(SystemExit):
            future.result()
        del argument, future
        two.submit(int, node=0).result()  # the leader has left the task that failed
        for _ in range(100):  # and so has pytest
            if alive() is None:
                break
            time.sleep(0.01)
        assert alive() is None
    finally:
        gc.enable()


def test_an_errand_is_not_starved_by_a_stream_of_tasks(queues):
    two, end = queues(leaders=2), threading.Event()

    def stream():
        if not end.is_set():
            two.submit(stream, node=0)

    for _ in range(20):
        two.submit(stream, node=0)
    looks = [future.result(SECONDS) for future in two.submit_to_each(0, threading.get_ident)]
    end.set()
    assert len(set(looks)) == 2, "each leader was asked"


def test_a_node_with_slow_cpus_is_helped_from_the_end_of_its_queue(queues):
    two, began = queues([[25, 25], [50, 100]]), []
    two.submit(int, node=1, reads=MUCH).result()
    go, other = two.block(0), two.block(1)
    assert two.submit(int, node=1, reads=MUCH).cancel(), "what is done with keeps node 1 from nothing"
    inputs = [two.submit(lambda n=n: began.append((n, two.where())), node=0, reads=INPUT) for n in range(4)]
    task = two.submit(two.where, node=0)
    other.set()  # node 1 looks when it has nothing else to do
    assert not wait(inputs, SECONDS).not_done
    assert began == [(3, 1), (2, 1), (1, 1), (0, 1)]
    assert not task.done(), "it is not known what it reads"
    late = two.submit(two.where, node=0, reads=INPUT)
    assert late.result(SECONDS) == 1, "an idle leader is woken"
    go.set()
    assert task.result() == 0


@pytest.mark.parametrize("bandwidth", [None, [[100, 60], [60, 100]]])
def test_a_node_that_reads_its_memory_at_full_speed_is_left_alone(queues, bandwidth):
    two = queues(bandwidth)
    go = two.block(0)
    inputs = [two.submit(two.where, node=0, reads=INPUT) for _ in range(4)]
    assert [two.submit(two.where, node=1).result() for _ in range(9)] == [1] * 9
    assert not any(future.done() for future in inputs)
    go.set()
    assert {future.result() for future in inputs} == {0}


def test_shutdown_finishes_everything_and_refuses_more(queues):
    two, go = queues(), threading.Event()
    futures = [two.submit(go.wait, (SECONDS,), node=n % 2) for n in range(20)]
    two.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="shutdown"):
        two.submit(int, node=0)
    with pytest.raises(RuntimeError, match="shutdown"):
        two.submit_to_each(1, int)
    go.set()
    assert all(future.result(SECONDS) for future in futures)


def test_a_forked_child_is_refused_whatever_the_parent_was_about(queues, monkeypatch):
    two, deciding = queues([[25, 25], [50, 100]]), threading.Event()
    go = two.block(0)
    waiting = two.submit(int, node=0)

    def decide(*_arguments):
        deciding.set()
        time.sleep(0.1)
        return 0.0

    monkeypatch.setattr("numa_lab.queues.seconds_saved", decide)
    other = threading.Thread(target=two.submit, args=(int,), kwargs={"node": 0, "reads": INPUT})
    other.start()
    assert deciding.wait(SECONDS)  # it is in the midst of a submission
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)  # ends a child that hangs
        refused = 0
        for ask in (lambda: two.submit(int, node=0), lambda: two.submit(int), lambda: two.submit_to_each(0, int)):
            try:
                ask()
            except NumaLabError as error:
                refused += "in the process that uses it" in str(error)
        cancelled = waiting.cancel()
        two.shutdown()
        os._exit(0 if refused == 3 and cancelled else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    other.join()
    go.set()


def test_an_interpreter_that_ends_finishes_what_waits():
    code = """
import time
from numa_lab.pool import NUMAThreadPool
threads = NUMAThreadPool()
for number in range(20):
    threads.submit(lambda number=number: (time.sleep(0.005), print(number, flush=True)), numa_node=threads.nodes[0])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200, check=True)
    assert ended.stdout.split() == [str(number) for number in range(20)]
    assert ended.stderr == ""


def test_random_play_runs_everything_once_or_cancels_it(queues):
    two, ran, futures = queues([[25, 25], [50, 100]], leaders=2), [], {}

    def play(seed):
        draw = random.Random(seed)
        for number in range(500):
            reads = draw.choice([None, INPUT, Reads(1, 1 << 20)])
            key = seed, number
            futures[key] = two.submit(ran.append, (key,), node=draw.choice([0, 0, 1, None]), reads=reads)
            if draw.random() < 0.3:
                futures[draw.choice(list(futures))].cancel()
            if draw.random() < 0.05:
                two.submit_to_each(draw.choice([0, 1]), int)[0].result(SECONDS)
            if draw.random() < 0.1:
                time.sleep(0.0005)

    players = [threading.Thread(target=play, args=(seed,)) for seed in range(4)]
    for player in players:
        player.start()
    for player in players:
        player.join()
    assert not wait(list(futures.values()), SECONDS).not_done
    assert sorted(ran) == sorted(key for key, future in futures.items() if not future.cancelled())
