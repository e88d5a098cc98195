"""A sweep: Ctrl-C at any moment of it ends all that it started, says so, and leaves what a resumed one goes on with."""

import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from interrupts.aim import FURTHEST, Shot
from numa_lab.experiments import sweep_lock
from numa_lab.experiments.sweep_plan import PLAN

NAME = "sweep"
SHARE = 0.002  # of the alarms: each takes two sweeps
SECONDS = 20.0  # that a sweep takes; where it ends earlier, its signal comes after the end
STARTS_SECONDS = 4.0  # before it measures: half of all signals come there
PATIENCE_SECONDS = 120.0
INTERRUPTED = {
    130,
    -signal.SIGINT,
}  # the second from Python itself, which was interrupted before or after all code of ours
OPTIONS = ("--profile", "smoke", "--executions", "1", "--bindings", "local", "--no-probes")
MARK = "NUMA_LAB_INTERRUPTED"  # in the environment of all that a sweep starts

# Its lock is its own: other sweeps on this machine are let be. A shell has what it starts in the background ignore Ctrl-C.
SWEEP = f"""
import os, signal
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from numa_lab import cli
from numa_lab.experiments import sweep_lock
own = "numa_lab.interrupted." + os.environ["{MARK}"]
sweep_lock.NAME, sweep_lock.FILE = "\\0" + own, sweep_lock.FILE.with_name(own)
cli.main()
"""


def shots(count: int) -> Iterator[Shot]:
    """Interrupt so many sweeps, each at another moment."""
    chance = random.Random(NAME)
    for number in range(count):
        delay = (STARTS_SECONDS if number % 2 else FURTHEST * SECONDS) * (number + chance.random()) / count
        shot = Shot(number, "inside", place=f"after {delay:.1f} s")
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder, "run")
            status, said = _sweep(["--out", str(run_dir), *OPTIONS], delay)
            if status == 0:
                shot.when = "after"
            elif status is None:
                shot.faults["hang"] = said
            elif status not in INTERRUPTED:
                shot.faults["exceptions"] = f"exit status {status}: {said}"
            if left := _left():
                shot.faults["threads"] = f"processes are left: {left}"
            begun = ["--resume", str(run_dir)] if (run_dir / PLAN).exists() else ["--out", str(run_dir), *OPTIONS]
            status, said = _sweep(begun)
            if status != 0:
                shot.faults["wrong"] = f"{begun[0]}: exit status {status}: {said}"
        (sweep_lock.FILE.parent / f"numa_lab.interrupted.{os.getpid()}").unlink(missing_ok=True)
        yield shot


def _sweep(options: Sequence[str], delay: float | None = None) -> tuple[int | None, str]:
    """Run a sweep, send SIGINT after a while where one is given: exit status, None where it did not end, and what it said."""
    words = [sys.executable, "-c", SWEEP, "sweep", *options]
    environment = os.environ | {MARK: str(os.getpid())}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            if delay is not None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(delay)
                process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            return None, f"it did not end within {PATIENCE_SECONDS:.0f} s"
        finally:
            process.kill()
    return process.returncode, said


def _left() -> list[str]:
    """What a sweep has started and left running."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it ends just now, or is another user's
            if process.environ().get(MARK) == str(os.getpid()):
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
    return found
