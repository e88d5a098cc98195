"""A team that stays on a node: a leader thread and its OpenMP threads, pinned once, for all that is submitted.

Limits: the leader does one thing at a time. Threads share the interpreter lock, so Python code of several leaders does not run
at once; what torch and compiled kernels compute does. An exception that a signal's handler raises inside the locks of
``concurrent.futures``, which are Python, may leave one held: after Ctrl-C, use new teams.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from numa_lab import descriptors, handover, libnuma, recycled, replacement
from numa_lab.errors import InvalidInput, NodeUnavailable, NumaLabError
from numa_lab.handover import Desk, Job
from numa_lab.team import Before, Placement
from numa_lab.thread_state import Exchange
from numa_lab.topology import read_topology

T = TypeVar("T")


class NodeTeam:
    """A leader thread with a team of its own, pinned to a node once for good: what is submitted runs on it, in order.

    The memory policy of its threads is *preferred*: see ``numa_lab.optimized``.

    Parameters
    ----------
    node
        Whose memory its threads prefer.
    cpus
        One thread is pinned to each; the node's physical cores where None is given.
    name
        Of the leader thread.

    Raises
    ------
    NodeUnavailable
        The node does not exist, or its CPUs or memory may not be used.
    NotPermitted
        Threads can't be pinned, as ``sched_setaffinity`` is refused.
    """

    def __init__(self, node: int, cpus: Sequence[int] | None = None, name: str | None = None) -> None:
        if cpus is None:
            topology = read_topology()
            topology.require_effective(node)
            cpus = topology.cpus_for([node])
        self.node, self.cpus = node, tuple(cpus)
        self._process = os.getpid()
        self._placement = Placement(cpus, (libnuma.MPOL_PREFERRED, [node]))
        self.refusal = ""  # why the memory policy was not set; empty where it was
        self._before: Before | None = None
        self._leader_id = 0
        self._desk: Desk | None = None  # made when there is compiled work
        # Held by who posts compiled work, until it is done. Work is put on a desk without the other lock, so that a leader
        # which finds this one held stays.
        self._posting = threading.Lock()
        # Of the two below, of the desk's wish that the leader leaves, and of what is queued.
        self._state = threading.Lock()
        self._serving = False  # whether the leader is at its desk, or on its way there
        self._services = 0  # how often it was sent there
        self._closed = False
        # The team ends with its leader, so nothing has to be given back. The thread holds no more than a weak reference:
        # it ends with a team that nobody has any more.
        self._leader = ThreadPoolExecutor(1, name or f"numa-node-{node}")
        # A leader that can't enter its node raises here, and one whose start a signal interrupts belongs to no team.
        try:
            self._leader.submit(_enter, weakref.ref(self), self._placement, node).result()
        except BaseException:
            self._leader.shutdown(wait=False)
            raise

    def is_current(self) -> bool:
        """Whether the calling thread is this team's leader."""
        return self._leader_id == threading.get_ident()

    def hold(self) -> None:
        """On the leader: see that the team is where it was placed, and place it again where the kernel has moved it.

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
        if told := self._hold():
            warnings.warn(told, RuntimeWarning, stacklevel=2)

    def _hold(self) -> str:
        """The same, with what it has to say."""
        if self._before is None:
            return ""
        self._before, told = replacement.hold(self._before, self.node)
        assert self._before.placement
        self.cpus = self._before.placement.cpus
        return told

    def submit(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """Run a function on the leader thread.

        Raises
        ------
        NumaLabError
            As ``require_process`` says.
        """
        self.require_process()
        with self._state:
            future = self._leader.submit(function, *args, **kwargs)
            if self._serving and self._desk:
                self._desk.leave()  # after it was queued, as the leader goes there and comes back
        return future

    def require_process(self) -> None:
        """Refuse a process that is not the team's own.

        Raises
        ------
        NumaLabError
            The process was forked since: threads stay with the parent.
        """
        if os.getpid() != self._process:
            raise NumaLabError(
                f"this team's threads live in process {self._process}, and a fork does not copy them: make the pool "
                "in the process that uses it"
            )

    def _ready(self, jobs: Sequence[Job], done: int) -> int:
        """Let the leader serve, and lay jobs out for ``handover.run``; the caller holds ``_posting``."""
        with self._state:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._desk = self._desk or Desk()
            if not self._serving:
                self._services += 1
                self._leader.submit(self._serve, self._services)
                self._serving = True
            return self._desk.lay_out(jobs, done)

    def _serve(self, number: int) -> None:
        """On the leader: run compiled work until none comes for a while, or other work waits."""
        assert self._desk is not None
        while True:
            self._desk.serve()
            with self._state:
                if number != self._services:
                    return  # a signal came before this one was noted, and another was sent
                if self._desk.idle() and not self._posting.locked():
                    self._serving = False
                    return
                try:
                    self._leader.submit(self._serve, number)  # behind what waits
                    return
                except RuntimeError:  # shut down, or the process ends: what was laid out until now is done before
                    self._closed = True

    def shutdown(self, *, wait: bool = True) -> None:
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
        with self._state:
            self._closed = True
            if self._serving and self._desk:
                self._desk.leave()
        self._leader.shutdown(wait=wait)


def _enter(reference: weakref.ref[NodeTeam], placement: Placement, node: int) -> None:
    """On a new leader: go to the team's place, also for what was submitted to a team that nobody has any more."""
    _of_thread.leads = True
    if team := reference():
        team._leader_id = threading.get_ident()
    before = placement.enter()
    recycled.give_back(node)  # glibc may give a new thread the memory of one that ended, on another node
    if team:
        team._before, team.refusal = before, before.refusal


def require_no_leader() -> None:
    """Refuse a thread that leads a team, where teams are waited for.

    Raises
    ------
    NumaLabError
        The caller is a leader: it would wait for itself, or for another leader that waits for it.
    """
    if _of_thread.leads:
        raise NumaLabError(
            f"{threading.current_thread().name} leads a team, and would wait for teams: it might wait for itself. "
            "Call from a thread that leads none"
        )


def teams(nodes: Sequence[int] | None = None, *, reserve: int = 0) -> dict[int, NodeTeam]:
    """A team for each node, made once in a process and used by all who ask; they end with it.

    After a fork the child gets teams of its own.

    Parameters
    ----------
    nodes
        All effective nodes where None is given. Of a node whose memory alone may be used, the team of the nearest node.
    reserve
        Physical cores of each node that are left to others.

    Raises
    ------
    NodeUnavailable
        A node does not exist, or may not be used.
    InvalidInput
        A node has no core left.
    """
    topology = read_topology()
    found = {}
    for node in topology.effective_nodes if nodes is None else nodes:
        home = node if topology.cpus_of([node]) else topology.nearest_cpu_node(node)
        topology.require_effective(home)
        cores = topology.cpus_for([home])
        if not 0 <= reserve < len(cores):
            raise InvalidInput(
                f"reserve={reserve}: expected 0 to {len(cores) - 1}, as node {home} has {len(cores)} cores"
            )
        key = os.getpid(), home, cores[reserve:]  # a thread that may use fewer CPUs gets another team
        with _lock:
            if key not in _shared:
                _shared[key] = NodeTeam(home, key[-1])
            found[node] = _shared[key]
    if not found:
        raise NodeUnavailable("no node has both CPUs and memory that this process may use")
    return found


_shared: dict[tuple[int, int, tuple[int, ...]], NodeTeam] = {}
_lock = threading.Lock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def run_on_leaders(calls: Iterable[tuple[NodeTeam, Callable[[], T]]]) -> list[T]:
    """Call functions on the leaders of teams, and wait for all: what they return, in order.

    In torch's inference mode, which is a setting of each thread: they may write into whatever the caller made.

    Raises
    ------
    NumaLabError
        The process was forked since a team was made, or the caller leads a team.
    Exception
        The first that a function raises, or that a signal's handler raises here; when nothing runs any more.
    """
    require_no_leader()
    futures: list[Future[T]] = []
    try:
        for team, function in calls:
            futures.append(Future())  # before it is queued, so that none is lost from sight
            team.submit(_fulfil, team, futures[-1], function)
        wait(futures)
    finally:
        _outlast([future for future in futures if not future.cancel()])
    return [future.result() for future in futures]


def _fulfil(team: NodeTeam, future: Future[T], function: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            team.hold()
            with torch.inference_mode():
                result = function()
        except BaseException as error:  # the caller's to judge
            future.set_exception(error)
        else:
            future.set_result(result)


def _outlast(futures: Sequence[Future[Any]]) -> None:
    """Wait for all, however often a signal's handler raises meanwhile: what still runs uses what the caller made."""
    raised: BaseException | None = None
    while not all(future.done() for future in futures):
        try:
            wait(futures)
        except BaseException as error:
            raised = error
    if raised:
        raise raised


def run_compiled(work: Mapping[NodeTeam, Sequence[Job]]) -> None:
    """Run compiled functions on several teams at once, and wait for all.

    Parameters
    ----------
    work
        For each team what ``openmp.run_on_team`` takes, one after the other: function, data, threads.

    Raises
    ------
    NumaLabError
        The process was forked since a team was made, or the caller leads a team.
    RuntimeError
        A team was shut down; nothing was run then.

    Warns
    -----
    RuntimeWarning
        The kernel had moved threads of a team, which is placed again for what comes next.

    Notes
    -----
    An exception that a signal's handler raises, as of Ctrl-C, comes when all is done: until then teams write into memory of the
    caller.
    """
    require_no_leader()
    for team in work:
        team.require_process()
    # Locks are taken in one order, as two callers may want the same teams.
    if moved := _run_holding(sorted(work, key=id), work):
        futures = [team.submit(team._hold) for team in moved]
        wait(futures)
        if told := "; ".join(filter(None, (future.result() for future in futures))):
            warnings.warn(told, RuntimeWarning, stacklevel=2)


def _run_holding(to_take: Sequence[NodeTeam], work: Mapping[NodeTeam, Sequence[Job]]) -> list[NodeTeam]:
    """Take the teams one by one, and run; those whose threads the kernel has moved.

    By nested ``with``, since a signal leaves no lock of those held.
    """
    if to_take:
        with to_take[0]._posting:
            return _run_holding(to_take[1:], work)
    ear, here = _of_thread.ear.eventfd, _current_cpu()
    in_turn = sorted(work, key=lambda team: here in team.cpus)  # last the leader that takes this CPU from us
    # The caller looks while the teams compute, since it would only wait.
    looking = [
        (team, team._before.exchange)
        for team in in_turn
        if team._before and isinstance(team._before.exchange, Exchange)
    ]
    desks = [team._ready(work[team], ear) for team in in_turn]
    seen = handover.run(desks, ear, [exchange.looking() for _, exchange in looking])
    return [team for (team, _), moved in zip(looking, seen, strict=True) if moved]


_current_cpu = ctypes.CDLL(None).sched_getcpu


class _Ear:
    """Where a calling thread hears from leaders."""

    def __init__(self) -> None:
        with descriptors.told("a thread that calls teams"):
            self.eventfd = os.eventfd(0)
        weakref.finalize(self, os.close, self.eventfd)


class _OfThread(threading.local):
    """Of a thread: whether it leads a team, and its ear."""

    leads = False

    def __init__(self) -> None:
        self.ear = _Ear()


_of_thread = _OfThread()


def _deafen() -> None:
    """In a forked child: what it inherited hears from the parent's teams."""
    global _of_thread
    _of_thread = _OfThread()


os.register_at_fork(after_in_child=_deafen)
