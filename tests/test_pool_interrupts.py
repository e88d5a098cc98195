"""Signals whose handler raises, at any moment of a call: nothing hangs, no thread is lost, and what is computed afterwards is right."""

import subprocess
import sys

import pytest

ALARMS = 20  # at each call, of which 1500 were tried
SECONDS = 600  # for all of them, which take some

POOL = """
import os, random, signal, statistics, sys, threading, time
import torch
from numa_lab.pool import NUMAThreadPool
from numa_lab.topology import read_topology

class Alarm(Exception):
    pass

def ring(*_):
    if armed:
        raise Alarm

def use():
    with NUMAThreadPool() as other:
        return other.submit(int).result()

def leaders():
    return sum(thread.name.startswith("numa-node") for thread in threading.enumerate())

armed = False
signal.signal(signal.SIGALRM, ring)
sys.unraisablehook = lambda _told: None  # of an alarm in a callback of the garbage collector
random.seed(0)
query, key, value = torch.randn(3, 6, 1, 8, 99, 64)
batch = [list(one) for one in (query[..., :1, :], key[:, :, :2], value[:, :, :2])]
threads = NUMAThreadPool()
node, mask = threads.nodes[0], os.sched_getaffinity(0)
expected, count = threads.parallel_gqa_compute(*batch), leaders()
calls = [
    lambda: threads.parallel_gqa_compute(*batch),
    lambda: threads.submit(int).result(),
    lambda: threads.execute_on_numa(int, numa_node=node),
    lambda: threads.scatter(batch[1]),
    threads.receipt,
    NUMAThreadPool,
    use,
]
for call in calls:
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    for alarm in range(int(sys.argv[1])):
        again = 5e-5 if alarm % 4 == 3 else 0  # a handler may raise while the exception of another is handled
        armed = True
        try:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, random.random() * statistics.median(seconds)), again)
            call()
        except Alarm:
            pass
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert all(map(torch.equal, threads.parallel_gqa_compute(*batch), expected))
        for at, receipt in threads.receipt().items():
            assert len(receipt.threads) == len(read_topology().cpus_for([at]))
while leaders() > count:  # of pools that nobody has any more
    time.sleep(0.01)
assert os.sched_getaffinity(0) == mask
threads.shutdown()
while leaders():
    time.sleep(0.01)
print("as before")
"""


@pytest.mark.guest(None)  # to begin Python anew takes most of a minute in a guest
def test_the_pool_survives_interrupts_of_every_call():
    done = subprocess.run(
        [sys.executable, "-c", POOL, str(ALARMS)], capture_output=True, text=True, timeout=SECONDS
    )  # one that hangs fails here
    assert (done.returncode, done.stdout) == (0, "as before\n"), done.stderr
