"""One sweep at a time for a machine, whoever its user is and whatever TMPDIR says.

A sweep holds two things that vanish with its process, even one that is killed: a name in the abstract namespace of sockets
(unix(7)), which all processes of a network namespace share, and a lock on a file of /dev/shm, which those of a mount
namespace share. Batch systems give each job a /tmp and a /dev/shm of its own, and sandboxes refuse sockets: one of the two
is mostly left.

Limits: containers that share neither their network nor their /dev/shm do not see each other's sweeps.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shlex
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import psutil

from numa_lab.errors import NumaLabError

NAME = "\0numa_lab.sweep"  # abstract: no file, so nobody's permissions and nothing that is left over
FILE = Path("/dev/shm/numa_lab.sweep")
_MOST_SHOWN = 200  # characters of the holder's command

_held: set[int] = set()  # file descriptors


@contextmanager
def alone() -> Iterator[None]:
    """Refuse to measure beside another sweep on this machine.

    Raises
    ------
    NumaLabError
        Another sweep measures; the message says which process, whose it is and what it runs, as far as that can be seen.
    """
    with ExitStack() as stack:
        for take in (_take_name, _take_file):
            if (descriptor := take()) is not None:
                _held.add(descriptor)
                stack.callback(_give_back, descriptor)
        yield


def _give_back(descriptor: int) -> None:
    if descriptor in _held:  # a forked child has let go of it
        _held.remove(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    """A forked child would go on holding what its parent gives back."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def _take_name() -> int | None:
    """Listen under the name, so that who is refused can ask for this process; None where a sandbox refuses sockets."""
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        return None
    with listener:
        try:
            listener.bind(NAME)
            listener.listen(socket.SOMAXCONN)  # one that was refused takes up a place for good
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _refusal(*_listener()) from None
            return None
        return listener.detach()


def _listener() -> tuple[int, int | None]:
    """Process and user of who listens under the name, the process 0 where it can't be seen from here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(NAME)
        except OSError:  # it begins or ends just now, or too many have asked
            return 0, None
        pid, uid, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid


def _take_file() -> int | None:
    """Lock the file, which may be another user's; None where there is no such folder or no way to read it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            descriptor = os.open(FILE, flags)
        except FileNotFoundError:
            descriptor = os.open(FILE, flags | os.O_CREAT | os.O_EXCL, 0o444)
            os.fchmod(descriptor, 0o444)  # whatever umask says
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = _locker(descriptor)
        os.close(descriptor)
        raise _refusal(pid, None) from None
    return descriptor


def _locker(descriptor: int) -> int:
    """Return the process that holds the lock on a file, 0 where it can't be seen from here (proc_locks(5))."""
    file = os.fstat(descriptor)
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    try:
        listed = Path("/proc/locks").read_text()
    except OSError:
        return 0
    for line in listed.splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[-3] == place:
            return int(words[-4])
    return 0


def _refusal(pid: int, uid: int | None) -> NumaLabError:
    who = "a process that can't be seen from here, perhaps of another container"
    if pid == os.getpid():
        who = f"this process, {pid}"
    elif pid > 0:
        who = f"process {pid}" + (_seen(pid) or (f" of {_user(uid)}" if uid is not None else ""))
    elif uid is not None:
        who += f", of {_user(uid)}"
    return NumaLabError(
        f"another sweep measures on this machine: {who}. Wait until it has ended: two would disturb each other"
    )


def _seen(pid: int) -> str:
    """User, command and begin of a process, as far as they are told."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            command = shlex.join(process.cmdline())
            begun = datetime.fromtimestamp(process.create_time())
            shown = command if len(command) <= _MOST_SHOWN else command[:_MOST_SHOWN] + " ..."
            return f" of {_user(process.uids().real)}, `{shown}`, since {begun:%Y-%m-%d %H:%M}"
    except psutil.Error:  # it has ended, or /proc hides other users' processes
        return ""


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
