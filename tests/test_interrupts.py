"""Ctrl-C and "Interrupt kernel" at any moment: see tests/interrupts, of which this is a small part (make stress-interrupts)."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

ALARMS = 20
INTERRUPTS = 8  # of each loop
REPLY_SECONDS = 60
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
}

SETUP = """
from interrupts import cases, caches, placements, threads
from numa_lab import NUMAOptimizedGQA

cases.warm_up()
given = caches.two_nodes()
filled, helper = caches.Filled(given.__enter__()), NUMAOptimizedGQA(cases.NODE)
before = threads.now()
"""
LOOPS = [
    """
print("begun", flush=True)
while True:
    filled.cache.truncate(caches.TOKENS)
    for until in range(caches.TOKENS + 1, caches.TOKENS + 10):
        filled.append(until)
        filled.require_right((until,))
""",
    """
print("begun", flush=True)
while True:
    with helper:
        placements.plain()
""",
]
CHECK = """
filled.cache.truncate(caches.TOKENS)
filled.require_right()
with helper:
    placements.plain()
after = threads.now()
assert (set(after.threads), after.counts) == (set(before.threads), before.counts), (after, before)
"""


def test_alarms_anywhere_in_any_call_leave_nothing_behind():
    words = [sys.executable, "-m", "interrupts", "--count", str(ALARMS)]
    done = subprocess.run(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def kernel():
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=ENVIRONMENT)
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=REPLY_SECONDS)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def ended(client):
    """How the running cell has ended: ok, or what it raised."""
    content = client.get_shell_msg(timeout=REPLY_SECONDS)["content"]
    return "ok" if content["status"] == "ok" else f"{content['ename']}: " + "\n".join(content["traceback"])


def await_output(client, cell):
    """Wait until a cell has printed, so that it has begun; an earlier one may still print what Python ignored."""
    while True:
        message = client.get_iopub_msg(timeout=REPLY_SECONDS)
        if message["msg_type"] == "stream" and message["parent_header"]["msg_id"] == cell:
            return


@pytest.mark.notebook
def test_a_kernel_is_interrupted_at_any_moment_and_goes_on(kernel):
    """IPython keeps the last traceback, and by it the frames of the loop with all that they hold."""
    manager, client = kernel
    client.execute(SETUP)
    assert ended(client) == "ok"
    chance = random.Random(0)
    for loop in LOOPS * INTERRUPTS:
        cell = client.execute(
            loop, stop_on_error=False
        )  # else the kernel drops what comes within .1 s of the interrupt
        await_output(client, cell)
        time.sleep(chance.uniform(0, 0.1))
        manager.interrupt_kernel()
        assert (end := ended(client)).startswith("KeyboardInterrupt"), end
        client.execute(CHECK)
        assert (end := ended(client)) == "ok", end
