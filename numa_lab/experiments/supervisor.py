"""Run a command and end everything that it started: a program of its own, run by its path with nothing but Python.

Orphans become children of this process, which no process outside it does: so it ends its own children until there are none,
and never another's. It does so when the command ends, when it is told to (SIGTERM) and when the process that started it is
gone. Limits: what another user's rights protect, and what a service manager starts on demand, stays.
"""

import ctypes
import os
import resource
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
PATIENCE_SECONDS = 30  # for a killed process that waits for a disk


def main() -> None:
    """Run ``sys.argv[2:]`` for the process ``sys.argv[1]``, and end as it ends."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it was gone before this process asked to be told
        sys.exit(1)
    status = 0
    try:
        command = start(sys.argv[2:])
        while (ended := os.wait())[0] != command:
            pass  # an orphan that came here and has ended
        status = ended[1]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_children()
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if (number := os.WTERMSIG(status)) != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def start(words: list[str]) -> int:
    """Start a command that ends with this process; its process id."""
    this = os.getpid()
    if command := os.fork():
        return command
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        if os.getppid() == this:
            os.execvp(words[0], words)
    except OSError as error:
        print(f"{words[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(127)


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_children() -> None:
    """Kill the children of this process, and those that become its children by that, until there are none."""
    spared: set[int] = set()
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        for child in children() - spared:
            try:
                os.kill(child, signal.SIGKILL)
            except PermissionError:
                spared.add(child)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if children() <= spared:
            break
        time.sleep(0.01)
    if left := children():
        print(f"processes {sorted(left)} could not be ended", file=sys.stderr, flush=True)


def children() -> set[int]:
    """Process ids of the children of this process, those that have ended included."""
    process_ids = set()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                parent = int(stat.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid():
            process_ids.add(int(name))
    return process_ids


if __name__ == "__main__":
    main()
