"""Leader threads that stay on a node, each with an OpenMP team that is pinned once and computes all that is submitted.

A *leader* is a Python thread with a team of its own: whatever a leader calls, its team computes. The leaders of a node take their tasks
from one queue. A leader survives whatever a signal's handler raises in a thread that submits or waits. Handlers run in the main thread
alone, and only between two calls of functions that are written in C; the queue is written in C, and so is the ``with`` of a plain lock.

Limits: threads share the interpreter lock, so the Python code of several leaders does not run at once; what torch and compiled kernels
compute does. A process that ends first finishes what was submitted. A process that ``multiprocessing`` ends does not, because it runs
no exit functions.
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
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.futures import Promise
from numa_lab.placement import observation, recycled_memory, team_replacement
from numa_lab.placement.binding import Binding, effective
from numa_lab.placement.pinned_team import PinnedTeam, TeamEntry
from numa_lab.placement.receipt import TeamSeen
from numa_lab.placement.thread_watch import threads_now

T = TypeVar("T")
_LOGGER = logging.getLogger(__name__)


class _Task(NamedTuple):
    promise: Promise[Any]
    call: Callable[[], Any]


class _Leader(threading.Thread):
    """A thread that enters its pinned team, and then calls one task after the other.

    It holds no strong reference to its ``NodeTeam``, which therefore ends once nobody else has one.
    """

    entry: TeamEntry  # into the pinned team
    cpus: tuple[int, ...]  # of the pinned team
    granted: Binding  # by the kernel, on these CPUs

    def __init__(self, name: str, team: NodeTeam, cpus: Sequence[int]) -> None:
        super().__init__(name=name, daemon=True)  # a process waits for all others before it calls ``_finish``
        self.busy = False
        self._serving = threading.Lock()  # held by the thread while it serves
        # It gets None once the thread has entered its pinned team, or what kept it from that.
        self.outcome: SimpleQueue[BaseException | None] = SimpleQueue()
        self._node, self._queue, self._topology = team.node, team._queue, team._topology
        self._pinned = PinnedTeam(cpus, (libnuma.MPOL_PREFERRED, [team.node]))
        # When the team is gone, this reference is put into the queue, by C code. It is no task, so it ends the thread.
        self.team = weakref.ref(team, team._queue.put)

    def start(self) -> None:
        try:
            super().start()
        except BaseException as error:
            self.outcome.put(error)

    def run(self) -> None:
        with self._serving:
            try:
                self._note(self._pinned.enter())  # never left: the OpenMP team ends with this thread
                # glibc may have given this thread the memory of one that ended, on another node.
                recycled_memory.give_back(self._node)
            except BaseException as error:
                self.outcome.put(error)
                return
            self.outcome.put(None)
            while isinstance(task := self._queue.get(), _Task):
                self.busy = True
                try:
                    task.promise.fulfil(self._call, task.call)
                except BaseException:  # of a callback, such as SystemExit, where Future logs Exceptions alone
                    _LOGGER.exception("exception calling callback for %r", task.promise)
                self.busy = False
                del task  # else a thread that waits keeps the last task's arguments alive

    def wait(self) -> None:
        """Wait until the thread has ended."""
        # This comes first, because Thread.join takes an interrupt for the end of the thread (CPython 3.11, 3.12).
        with self._serving:
            pass
        # After its last line the thread frees what torch keeps for it, in destructors which abort a process that ends meanwhile.
        if self.is_alive():
            self.join()

    def _note(self, entry: TeamEntry) -> None:
        assert entry.pinned is not None
        self.entry, self.cpus, self.granted = entry, entry.pinned.cpus, effective(self._topology)

    def _call(self, call: Callable[[], T]) -> T:
        if moved := team_replacement.hold(self.entry, self._node):
            self._note(self.entry)
            warnings.warn(moved, RuntimeWarning, stacklevel=2)
        return call()


class NodeTeam:
    """The leaders of a node, which begin what is submitted in the order of submission.

    The memory policy of their threads is *preferred*, for the reason that ``numa_lab.nodes.one_node`` gives. Before each task, a team
    whose threads the kernel has moved is placed again, with a RuntimeWarning (see ``numa_lab.placement.team_replacement``). The leaders
    end once the team is shut down, or once nobody has a reference to it any more; first they finish what was submitted.

    Parameters
    ----------
    node
        The node whose memory the threads prefer.
    cpus
        One thread is pinned to each; these are the node's physical cores where None is given.
    name
        The beginning of the leader threads' names; a number follows.
    leaders
        How many leaders there are, and thus how many tasks run at a time. `cpus` are divided among them, neighbours together.
    topology
        That of this machine; it is read where None is given.

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
                # Another thread than the main one starts it, because no signal's handler runs there: an interrupt of Thread.start
                # would leave a Condition held for which the new thread waits.
                _thread.start_new_thread(leader.start, ())
            for leader in self._leaders:
                if error := leader.outcome.get():
                    raise error
        except BaseException:
            self.shutdown(wait=False)
            raise

    @property
    def cpus(self) -> tuple[int, ...]:
        """The CPUs that its threads are on, leader by leader."""
        return tuple(cpu for leader in self._leaders for cpu in leader.cpus)

    @property
    def load(self) -> float:
        """The number of tasks that wait or run, per leader."""
        return (self._queue.qsize() + sum(leader.busy for leader in self._leaders)) / self.leaders

    @property
    def refusal(self) -> str:
        """Why the memory policy was not set; empty where it was."""
        return "; ".join(dict.fromkeys(leader.entry.refusal for leader in self._leaders if leader.entry.refusal))

    def is_current(self) -> bool:
        """Return whether the calling thread is one of the leaders."""
        return threading.current_thread() in self._leaders

    def look(self) -> TeamSeen:
        """Return what the kernel grants the threads and where they are now, as seen from outside, so that no task is waited for.

        Limits: the memory policy is the one that was granted when the first leader entered its team. Threads that have ended are left
        out, as where a task makes its OpenMP team smaller; the next task replaces them.
        """
        masks: list[tuple[int, frozenset[int]]] = []
        for entry in [leader.entry for leader in self._leaders]:
            tids = entry.exchange.thread_ids() if entry.exchange else []
            masks += [(tids[place], mask) for place, mask in entry.masks_now().items()]
        return TeamSeen(self._leaders[0].granted, threads_now(masks), observation.limitations())

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run a function on a leader. Where a signal's handler raises in this call, the function may run or not.

        Returns
        -------
        Future
            It survives interrupts (see ``numa_lab.nodes.futures``). To wait for several, ask each for its ``result``.

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
        """Finish what was submitted, and end the threads; in a forked process there are none to end.

        Parameters
        ----------
        wait
            Whether to return only once the threads have ended.

        Raises
        ------
        NumaLabError
            With `wait`, the caller is a leader: it would wait for itself, or for another leader that waits for it.
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
    """Return the team with the fewest tasks per leader, counting those that run and those that wait."""
    return min(teams, key=lambda team: team.load)


def run_each(calls: Iterable[tuple[NodeTeam, Callable[[], T]]]) -> list[T]:
    """Run functions on teams, and wait for all of them.

    Limits: where a signal's handler raises meanwhile, functions that have not begun never run, and those that run are not waited for.
    So a function has to hold references to all that it uses.

    Returns
    -------
    list
        What the functions return, in their order.

    Raises
    ------
    Exception
        The first exception of a function, once all are done; and whatever ``NodeTeam.submit`` raises.
    """
    given_up = False  # an interrupt may lose a future, so cancelling them is not enough

    def call(function: Callable[[], T]) -> T | None:
        return None if given_up else function()

    try:
        futures = [team.submit(call, function) for team, function in calls]
        # The last comes first: a thread that is woken for each result takes the interpreter lock from the leaders.
        for future in reversed(futures):
            future.exception()
    except BaseException:
        given_up = True
        raise
    return [future.result() for future in futures]  # type: ignore[misc]  # not given up, so none is None for that


@atexit.register
def _finish() -> None:
    """Finish what was submitted before the process ends."""
    leaders = [thread for thread in threading.enumerate() if isinstance(thread, _Leader)]
    for leader in leaders:
        if team := leader.team():
            team.shutdown(wait=False)
    for leader in leaders:
        leader.wait()
