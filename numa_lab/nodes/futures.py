"""A future that an interrupt spoils for nobody: neither for the thread that waits for it, nor for the one that computes it.

The lock of ``concurrent.futures.Future`` is a ``threading.Condition``, which is entered and left in Python. Where a signal's handler
raises there, as that of Ctrl-C does, the lock stays held, and a thread that has a result waits for ever to hand it over. CPython runs
handlers between two instructions of the main thread, and never inside of a function that is written in C. So the lock here is
entered and left in C, and a thread that waits holds nothing.

Limits: this relies on CPython. ``concurrent.futures.wait`` and ``as_completed`` take the locks of all their futures, and wait for an
Event, in Python. An interrupt may leave those locks held: each of the futures then takes ``PATIENCE_SECONDS`` longer, once, and another
thread that asks whether it is ``done`` may wait for ever. Where the interrupt comes in the microseconds in which the Event's own lock is
held, the thread that computes one of the futures waits for ever. To wait for several futures, ask one after the other for its ``result``.
"""

from __future__ import annotations

from _thread import RLock
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures._base import FINISHED, PENDING, RUNNING
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 1.0  # far longer than any thread holds the lock that is going to give it back


class _Lock(RLock):  # type: ignore[misc]  # final to those who write stubs, not to CPython
    """What a ``Promise`` has in place of a Condition."""

    bells: list[Any]  # a held lock for each thread that waits; it is released when the future is done

    def wait(self, timeout: float | None = None) -> None:
        """Return at once: a thread that asks a ``Promise`` has waited before, and held nothing meanwhile."""

    def notify_all(self) -> None:
        for bell in tuple(self.bells):
            if bell.locked():
                bell.release()


class Promise(Future[T]):
    """A ``concurrent.futures.Future`` that survives whatever a signal's handler raises in one of its methods.

    Limits: ``cancel`` calls the callbacks in the thread that cancels, so that an interrupt of one keeps those behind it from being
    called. For ``concurrent.futures.wait`` see the module's limits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bells: list[Any] = []
        self._renew_lock()

    def _renew_lock(self) -> None:
        lock = _Lock()
        lock.bells = self._bells  # before others see it
        self._condition: Any = lock

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result and return it, as ``Future.result`` does."""
        try:
            self._await(timeout)
            return super().result(0)
        finally:
            del self  # which the traceback of an error would hold, and the error it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and return the exception, or None, as ``Future.exception`` does."""
        self._await(timeout)
        return super().exception(0)

    def _await(self, timeout: float | None) -> None:
        bell = Lock()
        bell.acquire()
        self._bells.append(bell)
        try:
            if self._state in (PENDING, RUNNING):  # a future that was done before this bell was added rings it no more
                bell.acquire(timeout=-1 if timeout is None else max(timeout, 0))
        finally:
            self._bells.remove(bell)

    def fulfil(self, function: Callable[..., T], *args: Any) -> None:
        """Call a function, and hand over what it returns or raises; where the future was cancelled, nothing is called.

        The thread that computes the future calls this, which is never the main thread.
        """
        with self._locked() as lock:
            if not self.set_running_or_notify_cancel():
                lock.notify_all()  # which an interrupt may have kept the canceller from
                return
        try:
            result = function(*args)
        except BaseException as error:  # for the thread that waits to handle, as in any executor
            self._end(None, error)
            del self  # which the traceback holds
        else:
            self._end(result, None)

    def _end(self, result: T | None, exception: BaseException | None) -> None:
        """Do what ``set_result`` and ``set_exception`` do, without waiting for a lock that may never be given back."""
        with self._locked() as lock:
            self._result, self._exception, self._state = result, exception, FINISHED
            for waiter in self._waiters:
                notify = waiter.add_result if exception is None else waiter.add_exception
                notify(self)
            lock.notify_all()
        self._invoke_callbacks()  # type: ignore[attr-defined]

    @contextmanager
    def _locked(self) -> Iterator[_Lock]:
        """Hold the lock, or a new one where the old one was left held; yield it."""
        if not self._condition.acquire(timeout=PATIENCE_SECONDS):
            self._renew_lock()
            self._condition.acquire()
        lock: _Lock = self._condition
        try:
            yield lock
        finally:
            lock.release()
