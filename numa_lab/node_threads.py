"""Threads that stay on a node, each with an OpenMP team that is pinned once, for all that is submitted.

A *leader* is a Python thread with its team: what it computes, its team computes. The leaders of a node begin what was submitted in
that order; one that finds nothing sleeps until there is something.

Limits: threads share the interpreter lock, so Python code of several leaders does not run at once; what torch and compiled kernels
compute does. When a process ends, what was submitted is finished before; not in one that ``multiprocessing`` ends, which
calls nobody.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import chain
from queue import SimpleQueue
from typing import Any, TypeVar

from numa_lab.errors import InvalidInput, NumaLabError
from numa_lab.futures import Promise
from numa_lab.leaders import Leader, Task, Waiting, current, require_no_leader, start
from numa_lab.topology import read_topology

T = TypeVar("T")


class NodeTeam:
    """Leaders on a node, each with its share of the cores, which run what is submitted in that order.

    The memory policy of its threads is *preferred*: see ``numa_lab.optimized``. They end after what was submitted, once the team
    is shut down or nobody has it any more.

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
        self, node: int, cpus: Sequence[int] | None = None, name: str | None = None, *, leaders: int = 1
    ) -> None:
        if cpus is None:
            topology = read_topology()
            topology.require_effective(node)
            cpus = topology.cpus_for([node])
        if not 1 <= leaders <= len(cpus):
            raise InvalidInput(f"leaders={leaders}: expected 1 to {len(cpus)}, as each needs a CPU of its own")
        self.node = node
        self._process = os.getpid()
        self._leaders = [Leader(node, share) for share in _shares(cpus, leaders)]
        self._waiting = Waiting(self._leaders)
        entered: SimpleQueue[BaseException | None] = SimpleQueue()
        self._threads = [
            threading.Thread(
                target=leader.serve,
                # The thread holds no more than a reference, which rings in C when the team has gone.
                args=(self._waiting, weakref.ref(self, leader.bell.put), entered),
                name=f"{name or f'numa-node-{node}'}_{number}",
                daemon=True,  # else a process would wait for it before it calls ``_finish``
            )
            for number, leader in enumerate(self._leaders)
        ]
        _teams.add(self)
        try:
            start(self._threads, entered)
            for _ in self._threads:
                if error := entered.get():
                    raise error
        except BaseException:
            self.shutdown(wait=False)
            raise

    @property
    def cpus(self) -> tuple[int, ...]:
        """Where its threads are, leader by leader."""
        return tuple(chain.from_iterable(leader.cpus for leader in self._leaders))

    @property
    def leaders(self) -> int:
        """How many tasks run at a time."""
        return len(self._leaders)

    @property
    def load(self) -> float:
        """Tasks that wait or run, per leader."""
        return self._waiting.load

    @property
    def refusal(self) -> str:
        """Why the memory policy was not set; empty where it was."""
        return "; ".join(dict.fromkeys(leader.refusal for leader in self._leaders if leader.refusal))

    def is_current(self) -> bool:
        """Whether the calling thread is one of its leaders."""
        return current() in self._leaders

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run a function on a leader.

        Limits: where a signal's handler raises in this call, the function may run or not.

        Returns
        -------
        A future that survives interrupts, as ``numa_lab.futures`` says: to wait for several, ask one after the other for its
        ``result``.

        Raises
        ------
        NumaLabError
            The process was forked since: threads stay with the parent.
        RuntimeError
            The team was shut down.
        """
        self._require_process()
        task = Task(Promise(), function, args, kwargs)
        self._waiting.put(task)
        return task.future

    def submit_to_each(self, function: Callable[..., T], *args: Any) -> list[Future[T]]:
        """Run a function once on each leader, before what waits. Limits and errors are those of ``submit``."""
        self._require_process()
        tasks = [Task(Promise(), function, args, {}) for _ in self._leaders]
        self._waiting.put_to_each(tasks)
        return [task.future for task in tasks]

    def shutdown(self, wait: bool = True) -> None:
        """Finish what was submitted, and end the threads; in a forked process there are none.

        Raises
        ------
        NumaLabError
            With `wait`, the caller leads a team.
        """
        if os.getpid() != self._process:
            return
        if wait:
            require_no_leader()
        self._waiting.close()
        if wait:
            for leader in self._leaders:
                with (
                    leader.serving
                ):  # not by Thread.join, which takes an interrupt for the end of the thread (CPython 3.11)
                    continue

    def _require_process(self) -> None:
        if os.getpid() != self._process:
            raise NumaLabError(
                f"this team's threads live in process {self._process}, and a fork does not copy them: make the pool "
                "in the process that uses it"
            )


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
    round_ = _Round()
    try:
        futures = [team.submit(round_.run, function) for team, function in calls]
        for future in reversed(futures):  # the last first: who is woken for each takes the interpreter from the leaders
            future.exception()
    except BaseException:
        round_.given_up = True
        raise
    return [future.result() for future in futures]


class _Round:
    """Whether somebody waits for what was submitted; cancelling can't tell, since an interrupt may lose a future."""

    given_up = False

    def run(self, function: Callable[[], Any]) -> Any:
        return None if self.given_up else function()


def _shares(cpus: Sequence[int], leaders: int) -> list[Sequence[int]]:
    """CPUs divided among leaders, neighbours together."""
    return [cpus[len(cpus) * i // leaders : len(cpus) * (i + 1) // leaders] for i in range(leaders)]


_teams: weakref.WeakSet[NodeTeam] = weakref.WeakSet()


@atexit.register
def _finish() -> None:
    """Before the process ends, finish what was submitted in it."""
    teams = [team for team in _teams if team._process == os.getpid()]
    for team in teams:
        team.shutdown(wait=False)
    for thread in chain.from_iterable(team._threads for team in teams):
        if thread.is_alive():
            thread.join()
