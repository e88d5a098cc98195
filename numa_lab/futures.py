"""A future that an interrupt spoils for no one: neither for who waits for it, nor for the thread that computes it.

The lock of ``concurrent.futures.Future`` is a ``threading.Condition``, which is entered and left in Python. Where a signal's handler
raises there, as of Ctrl-C, it stays held, and whoever has a result waits for ever to tell it. CPython runs handlers between
two instructions of the main thread, and never inside of a function that is written in C. So what is held here is
entered and left in C, and who waits holds nothing.

Limits: CPython. ``concurrent.futures.wait`` and ``as_completed`` take the locks of all their futures in a loop in Python. An
interrupt there leaves them held: each of those futures then takes ``PATIENCE_SECONDS`` longer, once, and another thread that
asks whether it is ``done`` may wait for ever.
"""

from __future__ import annotations

from _thread import RLock
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures._base import FINISHED, PENDING, RUNNING
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 1.0  # far longer than anybody needs a lock who will give it back


class Promise(Future[T]):
    """A ``concurrent.futures.Future`` that survives whatever a signal's handler raises in one of its methods.

    Limits: callbacks that ``cancel`` calls are the canceller's, so that an interrupt of one keeps those behind it from being
    called. To wait for several, call ``result`` of one after the other; what ``concurrent.futures.wait`` does, see above.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bells: list[Any] = []  # a lock for each thread that waits, which it can take when the end has come
        self._condition: Any = _lock(self._bells)
        self._waiters: Any = _Waiters()

    def result(self, timeout: float | None = None) -> T:
        """As that of ``Future``."""
        try:
            self._await(timeout)
            return super().result(0)
        finally:
            del self  # which the traceback of an error would hold, and the error it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As that of ``Future``."""
        self._await(timeout)
        return super().exception(0)

    def _await(self, timeout: float | None) -> None:
        bell = Lock()
        bell.acquire()
        self._bells.append(bell)
        try:
            if self._state in (PENDING, RUNNING):  # else nobody may have rung this one
                bell.acquire(timeout=_seconds(timeout))
        finally:
            self._bells.remove(bell)

    def fulfil(self, function: Callable[..., T], *args: Any) -> None:
        """On the thread that computes it, never the main one: call a function, and tell what it returns or raises.

        Nothing is called where the future was cancelled.
        """
        lock = self._locked()
        try:
            if not self.set_running_or_notify_cancel():
                lock.notify_all()  # which an interrupt may have kept the canceller from
                return
        finally:
            lock.release()
        try:
            result = function(*args)
        except BaseException as error:  # the caller's to judge, as in any executor
            self._end("add_exception", exception=error)
            del self  # which the traceback holds
        else:
            self._end("add_result", result)

    def _end(self, tell: str, result: T | None = None, exception: BaseException | None = None) -> None:
        """What ``set_result`` and ``set_exception`` do, without waiting for a lock that may never be given back."""
        lock = self._locked()
        try:
            self._result, self._exception, self._state = result, exception, FINISHED
            for waiter in self._waiters:
                getattr(waiter, tell)(self)
            lock.notify_all()
        finally:
            lock.release()
        self._invoke_callbacks()  # type: ignore[attr-defined]

    def _locked(self) -> Any:
        """The lock, taken; a new one where the old one was left held."""
        lock = self._condition
        if not lock.acquire(timeout=PATIENCE_SECONDS):
            self._condition = lock = _lock(self._bells)
            lock.acquire()
        return lock


class _Lock(RLock):  # type: ignore[misc]  # final to those who write stubs, not to CPython
    """What a future has for its Condition."""

    bells: list[Any]

    def wait(self, timeout: float | None = None) -> None:
        """Not at all: who asks a ``Promise`` has waited, and held nothing meanwhile."""

    def notify_all(self) -> None:
        for bell in tuple(self.bells):
            if bell.locked():
                bell.release()


def _lock(bells: list[Any]) -> _Lock:
    lock = _Lock()
    lock.bells = bells
    return lock


class _Waiters(list[Any]):
    """Of ``concurrent.futures.wait`` and ``as_completed``; each gets an event that no interrupt keeps a thread from setting."""

    def append(self, waiter: Any) -> None:
        if not isinstance(waiter.event, _Event):
            waiter.event = _Event()
        super().append(waiter)


class _Event:
    """As much of ``threading.Event`` as waiters use: one thread waits, and looks what there is when it is woken."""

    def __init__(self) -> None:
        self._lock, self._bell = Lock(), Lock()
        self._bell.acquire()

    def set(self) -> None:
        with self._lock:
            if self._bell.locked():
                self._bell.release()

    def wait(self, timeout: float | None = None) -> bool:
        return self._bell.acquire(timeout=_seconds(timeout))

    def clear(self) -> None:
        """Nothing: who has waited has taken the bell, and one that rings again wakes for nothing."""


def _seconds(timeout: float | None) -> float:
    """For a lock, by which anybody can wait: ``SimpleQueue.get`` may wait for ever where its time is up early (CPython 3.11, 3.12)."""
    return -1 if timeout is None else max(timeout, 0)
