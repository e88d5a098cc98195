import json
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest

from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement.interrupt_safe import Entered, Exit, end, entered, ticket_for

STATE = []


class One(Entered):
    """Adds a number to STATE, and takes away what is there from its place on."""

    at = None

    def undo(self):
        if self.at is not None:
            del STATE[self.at :]
        self.at = None


class Block:
    def __init__(self, number):
        self.number = number

    def __enter__(self):
        one = One(self, ticket_for(self))
        one.begin()
        one.at, _ = len(STATE), STATE.append(self.number)
        return one

    @Exit
    def __exit__(self, ticket, *exception):
        end(self, ticket)


first, second = Block(1), Block(2)


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert STATE == []
    assert entered() == []


def test_one_object_is_nested_in_itself_and_in_others():
    with first, second, first:
        assert STATE == [1, 2, 1]
        with ExitStack() as stack:
            stack.enter_context(second)
            assert STATE == [1, 2, 1, 2]
        assert STATE == [1, 2, 1]


def test_what_is_entered_by_hand_is_left_by_hand_whatever_looks_at_its_exit():
    with first:
        assert hasattr(second, "__exit__")
        second.__enter__()
        second.__enter__()
        assert STATE == [1, 2, 2]
        second.__exit__(None, None, None)
        Block.__exit__(second, None, None, None)
        second.__exit__(None, None, None)  # of nothing
        assert STATE == [1]


def test_what_is_inside_is_left_too():
    with first:
        one = second.__enter__()
        first.__enter__()
        one.end()
        assert STATE == [1]
        second.__enter__()


def test_what_a_block_has_left_behind_is_undone_by_the_next():
    with first:
        found = second.__exit__  # as a block holds it
        second.__enter__()
        found = None  # and an exception has come before it was called
        assert found is None
        assert STATE == [1, 2]
        with second:
            assert STATE == [1, 2]
        assert STATE == [1]
        found = second.__exit__
        second.__enter__()
        found = None
    assert STATE == []


def test_a_thread_undoes_what_it_has_entered_itself():
    one = first.__enter__()
    other = threading.Thread(target=one.end)
    other.start()
    other.join()
    assert STATE == [1]
    with second:
        assert STATE == [2]


INTERRUPTED = """
import ctypes, dis, functools, gc, json, os, random, signal, sys
from contextlib import ExitStack
import torch
from numa_lab import NUMAOptimizedGQA
from numa_lab.machine import libnuma
from numa_lab.placement import openmp
from numa_lab.placement.interrupt_safe import entered
from numa_lab.placement.pinned_team import PinnedTeam, pinned_team

node, cpus, how = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
torch.set_num_threads(len(cpus))
libnuma.set_mempolicy(libnuma.MPOL_INTERLEAVE, [node])
helper, narrow = NUMAOptimizedGQA(node), NUMAOptimizedGQA(node, threads=1)
placement = PinnedTeam(cpus, [(libnuma.MPOL_BIND, [node])] * len(cpus))
query, key = torch.ones(1, 8, 1, 64), torch.ones(1, 2, 64, 64)
mkl_threads = getattr(ctypes.CDLL(torch._C.__file__), "MKL_Get_Max_Threads", int)

class Interrupt(BaseException):
    pass

def state():
    threads = openmp.threads()
    policies = openmp.run_on_each(lambda _: libnuma.get_mempolicy(), threads)
    masks = {tid: os.sched_getaffinity(int(tid)) for tid in os.listdir("/proc/self/task")}
    mine = [(thread, masks[str(thread.tid)]) for thread in openmp.team()]
    return threads, mkl_threads(), policies, mine

def placed():
    with placement:
        pass

def pinned():
    with pinned_team(cpus[:1], (libnuma.MPOL_BIND, [node])):
        pass

def nested():
    try:
        with helper, narrow, helper:
            with helper:
                pass
    except Interrupt:
        pass  # in the frame that held the blocks

def computed():
    with narrow:
        helper.compute(query, key, key)

def stacked():
    with ExitStack() as stack:
        stack.enter_context(helper)
        stack.enter_context(placement)

@functools.cache
def looks(code):
    "Where Python looks for signals: where a function begins, after a call, where a loop turns."
    found, before = set(), ""
    for one in dis.get_instructions(code):
        if before == "RESUME" or before.startswith("CALL"):
            found.add(one.offset)
        if one.opname.startswith("JUMP_BACKWARD"):
            found.add(one.argval)
        before = one.opname
    return found

def trace(frame, event, _argument):
    global look
    if frame.f_code.co_filename != __file__ and "numa_lab" not in frame.f_code.co_filename:
        return None
    frame.f_trace_opcodes = True
    if event == "opcode" and frame.f_lasti in looks(frame.f_code):
        look += 1
        if look == at:
            raise Interrupt
    return trace

def count(do):
    global look, at
    look, at = 0, -1
    sys.settrace(trace)
    do()
    sys.settrace(None)
    return look

def at_a_look(do):
    global look
    look = 0
    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(None)

def by_alarm(do):
    global fired
    fired = False
    signal.setitimer(signal.ITIMER_REAL, 1e-6 + random.random() * 1e-4)
    while not fired:
        do()

def ring(*_):
    global fired
    fired = True
    raise Interrupt

signal.signal(signal.SIGALRM, ring)
lost, after = [], 0
gc.freeze()
for do in (placed, pinned, nested, computed, stacked):
    do()
    outside, times = state(), 40 if how == "alarm" else count(do)
    for at in range(1, times + 1):
        try:
            (by_alarm if how == "alarm" else at_a_look)(do)
        except Interrupt as error:
            if do is not stacked:
                sys.last_exc = error  # as IPython does
        if do is stacked:
            gc.collect()  # what a stack held that an exception has left refers to itself
        after += state() != outside
        with placement:
            pass
        if state() != outside or entered():
            lost.append((do.__name__, at))
            break
        with helper:
            assert [thread.cpus for thread in openmp.team()][1:] == [{cpu} for cpu in helper.cpus[1:]]
print(json.dumps([lost, after]))
"""


@pytest.mark.guest(None)  # thousands of placements take minutes in a guest
@pytest.mark.parametrize("how", ["look", "alarm"])
def test_masks_policies_and_counts_survive_interrupts(how, tmp_path):
    node = read_topology().effective_nodes[0]
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, script, str(node), json.dumps(read_topology().cpus_for([node])), how],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lost, after = json.loads(done.stdout)
    assert lost == []
    assert how == "alarm" or after > 10, "nothing was left to the next placement: exceptions came elsewhere"
