"""A team that stays on a node: a leader thread and its OpenMP threads, pinned once, for all that is submitted.

Limits: the leader does one thing at a time. Threads share the interpreter lock, so Python code of several leaders does not run
at once; what torch and compiled kernels compute does.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from numa_lab import libnuma
from numa_lab.errors import InvalidInput, NodeUnavailable, NumaLabError
from numa_lab.handover import Desk, Job
from numa_lab.team import Placement
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
        self._leader_id = 0
        self._desk: Desk | None = None  # made when there is compiled work
        self._serving = False
        self._posting = threading.Lock()  # held while compiled work is under way
        self._state = threading.Lock()  # of _serving
        # The team ends with its leader, so nothing has to be given back.
        self._leader = ThreadPoolExecutor(1, name or f"numa-node-{node}", initializer=self._enter)

    def _enter(self) -> None:
        self._leader_id = threading.get_ident()
        self.refusal = self._placement.enter().refusal

    def is_current(self) -> bool:
        """Whether the calling thread is this team's leader."""
        return self._leader_id == threading.get_ident()

    def submit(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """Run a function on the leader thread.

        Raises
        ------
        NumaLabError
            As ``require_process`` says.
        """
        self.require_process()
        with self._state:
            if self._serving and self._desk:
                self._desk.leave()
        return self._leader.submit(function, *args, **kwargs)

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

    def _post(self, jobs: Sequence[Job], done: int) -> None:
        with self._state:
            self._desk = self._desk or Desk()
            if not self._serving:
                self._leader.submit(self._serve)
                self._serving = True
            self._desk.post(jobs, done)

    def _serve(self) -> None:
        """On the leader: run compiled work until there is no more of it, or other work waits."""
        assert self._desk is not None
        while True:
            self._desk.serve()
            with self._state:
                if self._desk.left():
                    self._serving = False
                    return

    def shutdown(self, *, wait: bool = True) -> None:
        """Finish what was submitted, and end the threads."""
        self._leader.shutdown(wait=wait)


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


def run_compiled(work: Mapping[NodeTeam, Sequence[Job]]) -> None:
    """Run compiled functions on several teams at once, and wait for all.

    Parameters
    ----------
    work
        For each team what ``openmp.run_on_team`` takes, one after the other: function, data, threads.

    Raises
    ------
    NumaLabError
        The process was forked since a team was made, or the caller is the leader of one of them.
    RuntimeError
        A team was shut down.
    """
    for team in work:
        team.require_process()
        if team.is_current():
            raise NumaLabError(f"the leader of node {team.node} would wait for itself: call from another thread")
    ear, posted = _of_thread.ear, 0
    taken = sorted(work, key=id)  # always in one order, as two callers may want the same teams
    for team in taken:
        team._posting.acquire()
    try:
        here = _current_cpu()
        for team in sorted(work, key=lambda team: here in team.cpus):  # that leader takes this CPU from us
            team._post(work[team], ear.eventfd)
            posted += 1
    finally:
        ear.wait(posted)
        for team in taken:
            team._posting.release()


_current_cpu = ctypes.CDLL(None).sched_getcpu


class _Ear:
    """Where a calling thread hears from leaders."""

    def __init__(self) -> None:
        self.eventfd = os.eventfd(0)
        weakref.finalize(self, os.close, self.eventfd)

    def wait(self, count: int) -> None:
        """Wait for so many; an interrupt is raised after them, since until then they write into the caller's memory."""
        interrupt: KeyboardInterrupt | None = None
        while count:
            try:
                count -= os.eventfd_read(self.eventfd)
            except KeyboardInterrupt as signal:
                interrupt = signal
        if interrupt:
            raise interrupt


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.ear = _Ear()


_of_thread = _OfThread()


def _deafen() -> None:
    """In a forked child: what it inherited hears from the parent's teams."""
    global _of_thread
    _of_thread = _OfThread()


os.register_at_fork(after_in_child=_deafen)
