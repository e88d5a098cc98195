"""A queue of tasks for each node, which the node's leaders serve; idle leaders of other nodes help where that pays.

A node's tasks begin in the order in which they were submitted. A leader without work sleeps, and is woken by the next task. Where
bandwidths are known, a leader whose queue is empty takes the last input that waits for another node, if it saves time as
``numa_lab.stealing`` says. It looks when it has nothing else to do, and when an input comes to a node without idle leaders.

Limits: a task runs to its end where it has begun, so that one which comes to a helping node's own queue waits for that.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from numa_lab.limits import Limits
from numa_lab.node_team import NodeTeam
from numa_lab.stealing import Reads, seconds_saved

T = TypeVar("T")

# One for all queues, so that no fork finds it held. The thread that holds it may need it again: a signal may cancel a future.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@dataclass(slots=True, eq=False)
class _Task:
    future: Future[Any]
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    node: int  # in whose queue it was put
    reads: Reads | None  # None where it may not be taken by another node

    def run(self, team: NodeTeam) -> None:
        try:
            team.hold()
            result = self.function(*self.args, **self.kwargs)
        except BaseException as error:  # the caller's to judge, as in any executor
            self.future.set_exception(error)
            del self  # the traceback of the error holds this frame, and would hold the error by it
        else:
            self.future.set_result(result)


@dataclass(slots=True, eq=False)
class _Leader:
    team: NodeTeam
    node: int
    errands: deque[_Task] = field(default_factory=deque)  # tasks for this leader alone
    serving: bool = False


class _Queue:
    """What waits for a node, and how much its unfinished inputs read. Whoever uses it holds the lock."""

    def __init__(self, node: int) -> None:
        self.node = node
        self.waiting: OrderedDict[Future[Any], _Task] = OrderedDict()
        self.inputs: OrderedDict[Future[Any], _Task] = OrderedDict()  # those of them that may be taken
        self.load: Counter[int] = Counter()  # bytes of inputs that wait or run, by the node where they lie
        self.readers: Counter[int] = Counter()  # by node, how many of its inputs run there

    def put(self, task: _Task) -> None:
        self.waiting[task.future] = task
        if task.reads:
            self.inputs[task.future] = task
            self.load[task.reads.home] += task.reads.nbytes

    def first(self) -> _Task | None:
        return next(iter(self.waiting.values()), None)

    def last_input(self) -> _Task | None:
        return next(reversed(self.inputs.values()), None)

    def begin(self, task: _Task, node: int) -> None:
        """Its turn has come, on this node or on another."""
        del self.waiting[task.future]
        if task.reads:
            del self.inputs[task.future]
            self.readers[node] += 1

    def end(self, task: _Task, node: int) -> None:
        """Count what was run no more; of other tasks nothing was counted."""
        if task.reads:
            self.readers[node] -= 1
            self.load[task.reads.home] -= task.reads.nbytes

    def drop(self, future: Future[Any]) -> bool:
        """Forget a task that shall not run; whether it was waiting here."""
        task = self.waiting.pop(future, None)
        if task and task.reads:
            del self.inputs[future]
            self.load[task.reads.home] -= task.reads.nbytes
        return task is not None


class NodeQueues:
    """A queue of tasks for each node.

    Parameters
    ----------
    teams
        The leaders that serve each node; they are this object's from now on, and are used by no one else.
    limits
        What memory allows; where None is given, nothing is taken from another node's queue.
    """

    def __init__(self, teams: Mapping[int, Sequence[NodeTeam]], limits: Limits | None = None) -> None:
        self._limits = limits
        self._closed = False
        self._queues = {node: _Queue(node) for node in teams}
        self._leaders = {node: [_Leader(team, node) for team in of] for node, of in teams.items()}
        # Futures hold this, and may live long: it holds no threads.
        self._drop_cancelled = partial(_drop_cancelled, tuple(self._queues.values()))

    def submit(
        self,
        function: Callable[..., T],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        node: int | None = None,
        reads: Reads | None = None,
    ) -> Future[T]:
        """Put a task into a queue.

        Parameters
        ----------
        function, args, kwargs
            The call.
        node
            In whose queue; None for the one with the fewest tasks per leader.
        reads
            What it reads, if another node may take it: of memory that `limits` knows.

        Raises
        ------
        RuntimeError
            The queues were shut down.
        NumaLabError
            The process was forked since: threads stay with the parent.
        """
        future: Future[T] = Future()
        future.add_done_callback(self._drop_cancelled)
        with _lock:
            self._require_open()
            node = min(self._queues, key=self._tasks_per_leader) if node is None else node
            task = _Task(future, function, args, kwargs or {}, node, reads if self._limits else None)
            queue = self._queues[node]
            queue.put(task)
            try:
                if leader := self._idle(node) or (self._idle_helper(queue) if task.reads else None):
                    self._wake(leader)
            except BaseException:
                queue.drop(future)  # who is told of an error, as where the threads end at this moment, has no future
                raise
        return future

    def submit_to_each(self, node: int, function: Callable[..., T], *args: Any) -> list[Future[T]]:
        """Run a function on each leader of a node, before what waits in the node's queue. Errors are those of ``submit``."""
        futures = []
        with _lock:
            self._require_open()
            for leader in self._leaders[node]:
                if not leader.serving:
                    self._wake(leader)
                leader.errands.append(_Task(Future(), function, args, {}, node, None))
                futures.append(leader.errands[-1].future)
        return futures

    def shutdown(self, *, wait: bool = True) -> None:
        """Finish what was submitted, and end the threads."""
        self._closed = True  # who submits at this moment is refused by the teams, or served before they end
        for leader in self._every_leader():
            leader.team.shutdown(wait=wait)

    def _every_leader(self) -> Iterable[_Leader]:
        return chain.from_iterable(self._leaders.values())

    def _require_open(self) -> None:
        next(iter(self._every_leader())).team.require_process()
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _tasks_per_leader(self, node: int) -> float:
        leaders = self._leaders[node]
        return (len(self._queues[node].waiting) + sum(leader.serving for leader in leaders)) / len(leaders)

    def _idle(self, node: int) -> _Leader | None:
        return next((leader for leader in self._leaders[node] if not leader.serving), None)

    def _wake(self, leader: _Leader) -> None:
        leader.team.submit(self._serve, leader)
        leader.serving = True

    def _serve(self, leader: _Leader) -> None:
        """On a leader: run what there is for it, until there is nothing."""
        while (task := self._next(leader)) is not None:
            task.run(leader.team)
            if task.reads:
                with _lock:
                    self._queues[task.node].end(task, leader.node)

    def _next(self, leader: _Leader) -> _Task | None:
        """The task whose turn it is on this leader; None where it may go idle, which it is from then on."""
        with _lock:
            while True:
                if leader.errands:
                    task = leader.errands.popleft()
                    if task.future.set_running_or_notify_cancel():
                        return task
                elif (found := self._queues[leader.node].first() or self._to_take(leader.node)) is not None:
                    queue = self._queues[found.node]
                    if found.future.set_running_or_notify_cancel():
                        queue.begin(found, leader.node)
                        return found
                    queue.drop(found.future)
                else:
                    leader.serving = False
                    return None

    def _to_take(self, thief: int) -> _Task | None:
        """Of the inputs that this node's leaders may take from another node, the one that saves most time."""
        saved = {queue: self._seconds_saved(queue, thief) for queue in self._queues.values()}
        best = max(saved, key=saved.__getitem__)
        return best.last_input() if saved[best] else None

    def _idle_helper(self, queue: _Queue) -> _Leader | None:
        """Of the idle leaders of other nodes, the one whose help with this queue saves most time; None where none does."""
        saved = {leader: self._seconds_saved(queue, node) for node in self._leaders if (leader := self._idle(node))}
        best = max(saved, key=saved.__getitem__, default=None)
        return best if best and saved[best] else None

    def _seconds_saved(self, queue: _Queue, thief: int) -> float:
        last = queue.last_input()
        if self._limits is None or last is None or last.reads is None or queue.node == thief:
            return 0.0
        readers = {queue.node, *(node for node, count in queue.readers.items() if count)}
        return seconds_saved(self._limits, queue.load, readers, thief, last.reads, self._queues[thief].load)


def _drop_cancelled(queues: Iterable[_Queue], future: Future[Any]) -> None:
    if future.cancelled():
        with _lock:
            if any(queue.drop(future) for queue in queues):
                future.set_running_or_notify_cancel()  # who waits for several futures waits for this
