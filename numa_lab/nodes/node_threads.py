"""Threads that stay on a node, each with an OpenMP team that is pinned once, for all that is submitted.

A *leader* is a Python thread with its team: what it computes, its team computes. The leaders of a node share one queue. No leader is
lost to what a signal's handler raises in a thread that submits or waits: handlers run in the main thread alone, between two calls
of C, and the queue is C, as is ``with`` of a plain lock.

Limits: threads share the interpreter lock, so Python code of several leaders does not run at once; what torch and compiled kernels
compute does. A process that ends finishes first what was submitted; not one that ``multiprocessing`` ends, which calls nobody.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from numa_lab.errors import InvalidInput, NumaLabError
from numa_lab.machine import libnuma
from numa_lab.machine.topology import Topology, read_topology
from numa_lab.nodes.futures import Promise
from numa_lab.placement import observation, recycled_memory, team_replacement
from numa_lab.placement.binding import Binding, effective
from numa_lab.placement.pinned_team import Before, Placement
from numa_lab.placement.receipt import ThreadSeen, threads_now

T = TypeVar("T")
_LOGGER = logging.getLogger(__name__)


class _Task(NamedTuple):
    promise: Promise[Any]
    call: Callable[[], Any]


class _Leader(threading.Thread):
    """Takes its place, and then one task after the other. It does not know its team, which ends when nobody else has it."""

    before: Before  # the placement that it is in
    cpus: tuple[int, ...]  # of that
    granted: Binding  # by the kernel, in that placement

    def __init__(self, name: str, team: NodeTeam, cpus: Sequence[int]) -> None:
        super().__init__(name=name, daemon=True)  # a process waits for all others before it calls ``_finish``
        self.busy = False
        self._serving = threading.Lock()  # held by the thread while it serves
        self.entered: SimpleQueue[BaseException | None] = SimpleQueue()  # is told what kept it from its place
        self._node, self._queue, self._topology = team.node, team._queue, team._topology
        self._placement = Placement(cpus, (libnuma.MPOL_PREFERRED, [team.node]))
        # When the team has gone, this reference is put into the queue. That is done in C, and it is no task.
        self.team = weakref.ref(team, team._queue.put)

    def start(self) -> None:
        try:
            super().start()
        except BaseException as error:
            self.entered.put(error)

    def run(self) -> None:
        with self._serving:
            try:
                self._stay(self._placement.enter())  # never left: the OpenMP team ends with this thread
                # glibc may have given this thread the memory of one that ended, on another node.
                recycled_memory.give_back(self._node)
            except BaseException as error:
                self.entered.put(error)
                return
            self.entered.put(None)
            while isinstance(task := self._queue.get(), _Task):
                self.busy = True
                try:
                    task.promise.fulfil(self._call, task.call)
                except BaseException:  # of a callback, such as SystemExit, where Future logs Exceptions alone
                    _LOGGER.exception("exception calling callback for %r", task.promise)
                self.busy = False
                del task  # else a thread that waits keeps the last task's arguments alive

    def wait(self) -> None:
        """Until the thread has ended."""
        with self._serving:  # first, as Thread.join takes an interrupt for the end of the thread (CPython 3.11, 3.12)
            pass
        # After its last line the thread frees what torch keeps for it, in destructors which abort a process that ends meanwhile.
        if self.is_alive():
            self.join()

    def _stay(self, before: Before) -> None:
        assert before.placement is not None
        self.before, self.cpus, self.granted = before, before.placement.cpus, effective(self._topology)

    def _call(self, call: Callable[[], T]) -> T:
        before, moved = team_replacement.hold(self.before, self._node)
        if moved:
            self._stay(before)
            warnings.warn(moved, RuntimeWarning, stacklevel=2)
        return call()


class NodeTeam:
    """Leaders on a node, which begin what is submitted in that order.

    The memory policy of their threads is *preferred*: see ``numa_lab.nodes.one_node``. Before each task they are brought back
    where the kernel has moved them, with a RuntimeWarning (see ``numa_lab.placement.team_replacement``). They end after what was
    submitted, once the team is shut down or nobody has it any more.

    Parameters
    ----------
    node
        Whose memory its threads prefer.
    cpus
        One thread is pinned to each; the node's physical cores where None is given.
    name
        Of the leader threads, in front of a number.
    leaders
        So many tasks run at a time; `cpus` are divided among them, neighbours together.
    topology
        Of this machine; read where None is given.

    Raises
    ------
    InvalidInput
        There are fewer CPUs than leaders.
    NodeUnavailable
        The node does not exist, or its CPUs or memory may not be used.
    NotPermitted
        Threads can't be pinned, as ``sched_setaffinity`` is refused.
    """

    def __init__(
        self, node: int, cpus: Sequence[int] | None = None, name: str | None = None, *, leaders: int = 1,
        topology: Topology | None = None,
    ) -> None:  # fmt: skip
        self.node, self.leaders, self._topology = node, leaders, topology or read_topology()
        if cpus is None:
            self._topology.require_effective(node)
            cpus = self._topology.cpus_for([node])
        if not 1 <= leaders <= len(cpus):
            raise InvalidInput(f"leaders={leaders}: expected 1 to {len(cpus)}, as each needs a CPU of its own")
        self._queue: SimpleQueue[object] = SimpleQueue()
        self._process, self._ended = os.getpid(), False
        shares = [cpus[len(cpus) * i // leaders : len(cpus) * (i + 1) // leaders] for i in range(leaders)]
        self._leaders = [_Leader(f"{name or f'numa-node-{node}'}_{i}", self, share) for i, share in enumerate(shares)]
        try:
            for leader in self._leaders:
                # From another thread than the main one, where no handler runs: an interrupt of Thread.start would leave a Condition
                # held for which the new thread waits.
                _thread.start_new_thread(leader.start, ())
            for leader in self._leaders:
                if error := leader.entered.get():
                    raise error
        except BaseException:
            self.shutdown(wait=False)
            raise

    @property
    def cpus(self) -> tuple[int, ...]:
        """Where its threads are, leader by leader."""
        return tuple(cpu for leader in self._leaders for cpu in leader.cpus)

    @property
    def load(self) -> float:
        """Tasks that wait or run, per leader."""
        return (self._queue.qsize() + sum(leader.busy for leader in self._leaders)) / self.leaders

    @property
    def refusal(self) -> str:
        """Why the memory policy was not set; empty where it was."""
        return "; ".join(dict.fromkeys(leader.before.refusal for leader in self._leaders if leader.before.refusal))

    def is_current(self) -> bool:
        """Whether the calling thread is one of its leaders."""
        return threading.current_thread() in self._leaders

    def look(self) -> tuple[Binding, tuple[ThreadSeen, ...], tuple[str, ...]]:
        """As ``proof.look`` of all its threads, from outside, so that it waits for no task.

        Limits: the memory policy is that which was granted when the first leader took its place. Threads that have ended are left
        out, as where a task makes its OpenMP team smaller; the next task replaces them.
        """
        masks: list[tuple[int, frozenset[int]]] = []
        for before in [leader.before for leader in self._leaders]:
            tids = before.exchange.thread_ids() if before.exchange else []
            masks += [(tids[place], mask) for place, mask in before.where().items()]
        return self._leaders[0].granted, threads_now(masks), observation.lost()

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run a function on a leader; where a signal's handler raises in this call, it may run or not.

        Returns
        -------
        A future that survives interrupts (see ``numa_lab.nodes.futures``): to wait for several, ask each for its ``result``.

        Raises
        ------
        NumaLabError
            The process was forked since: threads stay with the parent.
        RuntimeError
            The team was shut down.
        """
        if os.getpid() != self._process:
            raise NumaLabError(
                f"this team's threads live in process {self._process}, and a fork does not copy them: make the pool "
                "in the process that uses it"
            )
        task = _Task(Promise(), partial(function, *args, **kwargs))
        if not self._ended:
            self._queue.put(task)
        if self._ended and task.promise.cancel():  # shut down meanwhile, the leaders may end before they come to it
            raise RuntimeError("cannot schedule new futures after shutdown")
        return task.promise

    def shutdown(self, wait: bool = True) -> None:
        """Finish what was submitted, and end the threads; in a forked process there are none.

        Raises
        ------
        NumaLabError
            With `wait`, the caller is a leader: it would wait for itself, or for another that waits for it.
        """
        if os.getpid() != self._process:
            return
        if wait and isinstance(caller := threading.current_thread(), _Leader):
            raise NumaLabError(f"{caller.name} leads a team, and would wait for itself: shut down from another thread")
        self._ended = True
        for _ in self._leaders:
            self._queue.put(None)
        for leader in self._leaders if wait else ():
            leader.wait()


def least_busy(teams: Iterable[NodeTeam]) -> NodeTeam:
    """The team with the fewest tasks per leader, those that run and those that wait."""
    return min(teams, key=lambda team: team.load)


def run_each(calls: Iterable[tuple[NodeTeam, Callable[[], T]]]) -> list[T]:
    """Run functions on teams, and wait for all: what they return, in order.

    Limits: where a signal's handler raises meanwhile, what has not begun never runs, and what runs is not waited for. So
    functions hold all that they use.

    Raises
    ------
    Exception
        The first that a function raises, when all are done; and what ``NodeTeam.submit`` raises.
    """
    given_up = False  # an interrupt may lose a future, so cancelling them is not enough

    def call(function: Callable[[], T]) -> T | None:
        return None if given_up else function()

    try:
        futures = [team.submit(call, function) for team, function in calls]
        for future in reversed(futures):  # the last first: who is woken for each takes the interpreter from the leaders
            future.exception()
    except BaseException:
        given_up = True
        raise
    return [future.result() for future in futures]  # type: ignore[misc]  # not given up, so none is None for that


@atexit.register
def _finish() -> None:
    """Before the process ends, finish what was submitted in it."""
    leaders = [thread for thread in threading.enumerate() if isinstance(thread, _Leader)]
    for leader in leaders:
        if team := leader.team():
            team.shutdown(wait=False)
    for leader in leaders:
        leader.wait()
