"""The threads of ``numa_lab.node_threads``: what each does all its life, and what waits for them.

Whatever a signal's handler raises in the calling thread, no leader is lost. What is held here is held by ``with`` of Lock
and RLock, which CPython enters and leaves in C, and threads are started where no handler runs.
"""

from __future__ import annotations

import _thread
import logging
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from numa_lab import libnuma, recycled, replacement
from numa_lab.errors import NumaLabError
from numa_lab.futures import Promise
from numa_lab.team import Before, Placement

T = TypeVar("T")
_LOGGER = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Task:
    """A call, and who is told what becomes of it."""

    future: Promise[Any]
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class Leader:
    """What a thread of a team has. It knows nothing of the team, which ends when nobody else has it."""

    def __init__(self, node: int, cpus: Sequence[int]) -> None:
        self.cpus, self.refusal = tuple(cpus), ""
        self.bell: SimpleQueue[object] = SimpleQueue()  # who puts anything in wakes the thread
        self.errands: deque[Task] = deque()  # tasks for this leader alone
        self.serving = threading.Lock()  # held by the thread
        self.busy = False  # with a task
        self._node = node
        self._before: Before | None = None

    def serve(self, waiting: Waiting, wanted: Callable[[], object], entered: SimpleQueue[BaseException | None]) -> None:
        """What the thread does.

        Parameters
        ----------
        waiting
            Where it takes its tasks from.
        wanted
            Called to learn whether anybody may still give it one: None where nobody can.
        entered
            Told once that the thread is in its place, or why it can't be.
        """
        with self.serving:
            try:
                self._enter()
            except BaseException as error:  # who makes the team raises it
                entered.put(error)
                return
            entered.put(None)
            while True:
                last = (
                    waiting.closed or wanted() is None
                )  # asked before it takes what there is: nothing comes after that
                while task := waiting.next(
                    self
                ):  # no frame but this one has it: those that an error's traceback knows would keep it
                    try:
                        task.future.fulfil(self._call, task.function, task.args, task.kwargs)
                    except (
                        BaseException
                    ):  # that a callback has raised; a Future itself keeps but the Exceptions of those
                        _LOGGER.exception("exception calling callback for %r", task.future)
                if last:
                    return
                self.bell.get()

    def _enter(self) -> None:
        """Go to the place. The OpenMP team ends with its leader, so nothing has to be given back."""
        _of_thread.leader = self
        self._before = Placement(self.cpus, (libnuma.MPOL_PREFERRED, [self._node])).enter()
        self.refusal = self._before.refusal
        recycled.give_back(self._node)  # glibc may give a new thread the memory of one that ended, on another node

    def _call(self, function: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
        """Call a function in the place, to which the team is brought back first where the kernel has moved it.

        A node that has no CPUs left is served by those of the nearest one, so that what lies on it stays in use.

        Warns
        -----
        RuntimeWarning
            It was moved; the message names the CPUs.

        Raises
        ------
        NodeUnavailable
            No CPU of any node may be used.
        """
        assert self._before is not None
        self._before, told = replacement.hold(self._before, self._node)
        self.cpus = self._before.placement.cpus
        if told:
            warnings.warn(told, RuntimeWarning, stacklevel=2)
        return function(*args, **kwargs)


class Waiting:
    """The tasks that wait for leaders, and which of those sleep."""

    def __init__(self, leaders: Sequence[Leader]) -> None:
        self._lock = (
            threading.RLock()
        )  # who holds it may need it again, for a signal or the garbage collector may submit something
        self._tasks: deque[Task] = deque()
        self._leaders, self._asleep = leaders, list[Leader]()
        self.closed = False

    def put(self, task: Task) -> None:
        """Add a task, and wake a leader for it.

        Raises
        ------
        RuntimeError
            It was closed.
        """
        with self._lock:
            self._require_open()
            # In this order, as an interrupt may come after each line: a leader may be woken for nothing, or twice, but none sleeps
            # that counts as awake.
            for leader in self._asleep[-1:]:
                leader.bell.put(None)
            self._tasks.append(task)
            del self._asleep[-1:]

    def put_to_each(self, tasks: Sequence[Task]) -> None:
        """Give each leader a task of its own, before those that wait for any of them. Errors are those of ``put``."""
        with self._lock:
            self._require_open()
            for leader, task in zip(self._leaders, tasks, strict=True):
                leader.errands.append(task)
                leader.bell.put(None)

    def next(self, leader: Leader) -> Task | None:
        """On a leader: the task whose turn it is; None where it may sleep."""
        with self._lock:
            if leader not in self._asleep:
                self._asleep.append(leader)  # before it looks, so that it is rung for what comes after that
            found = leader.errands or self._tasks
            leader.busy = bool(found)
            if not found:
                return None
            if leader in self._asleep:
                self._asleep.remove(leader)
            return found.popleft()

    @property
    def load(self) -> float:
        """Tasks that wait or run, per leader."""
        return (len(self._tasks) + sum(leader.busy for leader in self._leaders)) / len(self._leaders)

    def close(self) -> None:
        """Take nothing more; leaders end when nothing is left."""
        with self._lock:
            self.closed = True
        for leader in self._leaders:
            leader.bell.put(None)

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError("cannot schedule new futures after shutdown")


def start(threads: Sequence[threading.Thread], failed: SimpleQueue[BaseException | None]) -> None:
    """Start threads, and tell for each that can't be why.

    From a thread of its own, in which no signal's handler runs: an interrupt of ``Thread.start`` would leave a Condition held, for
    which the new thread would wait for ever.
    """

    def start_each() -> None:
        for thread in threads:
            try:
                thread.start()
            except BaseException as error:
                failed.put(error)

    _thread.start_new_thread(start_each, ())


class _OfThread(threading.local):
    """Which leader a thread is."""

    leader: Leader | None = None


_of_thread = _OfThread()


def current() -> Leader | None:
    """The leader that the calling thread is."""
    return _of_thread.leader


def require_no_leader() -> None:
    """Refuse a thread that leads a team, where teams are waited for.

    Raises
    ------
    NumaLabError
        The caller is a leader: it would wait for itself, or for another leader that waits for it.
    """
    if current():
        raise NumaLabError(
            f"{threading.current_thread().name} leads a team, and would wait for teams: it might wait for itself. "
            "Call from a thread that leads none"
        )
