import asyncio
import signal
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed, wait

import pytest

from numa_lab.nodes import futures
from numa_lab.nodes.futures import Promise

SECONDS = 120  # that nothing here takes, on a busy machine either


@pytest.fixture
def interrupt():
    """Have an exception raised in the main thread, after so many seconds."""

    def raise_(*_):
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, raise_)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.signal(signal.SIGALRM, before)


def fulfilled_by(promises, function=int, seconds=0.0):
    """A thread that fulfils promises one after the other."""

    def fulfil():
        for promise in promises:
            time.sleep(seconds)
            promise.fulfil(function)

    thread = threading.Thread(target=fulfil)
    thread.start()
    return thread


def test_a_promise_is_a_future():
    promises = [Promise() for _ in range(20)]
    told = []
    promises[3].add_done_callback(told.append)
    thread = fulfilled_by(promises, seconds=0.001)
    assert isinstance(promises[0], Future)
    assert set(as_completed(promises, SECONDS)) == set(promises)
    assert not wait(promises).not_done
    assert [promise.result() for promise in promises] == [0] * 20
    assert promises[0].exception(0) is None
    thread.join()
    assert told == [promises[3]]


def test_errors_timeouts_and_cancelling():
    failing, never, cancelled = Promise(), Promise(), Promise()
    assert cancelled.cancel()
    fulfilled_by([failing, cancelled], lambda: 1 / 0).join()
    with pytest.raises(ZeroDivisionError):
        failing.result()
    with pytest.raises(CancelledError):
        cancelled.exception()
    for timeout in (-1, 0, 0.01):
        with pytest.raises(TimeoutError):
            never.result(timeout)
    assert not wait([cancelled], SECONDS).not_done


def test_asyncio_awaits_promises():
    async def total(promises):
        return sum(await asyncio.gather(*map(asyncio.wrap_future, promises)))

    promises = [Promise() for _ in range(5)]
    thread = fulfilled_by(promises, lambda: 2, 0.001)
    with ThreadPoolExecutor(1) as other:  # whose thread has no event loop
        assert other.submit(asyncio.run, total(promises)).result() == 10
    thread.join()


@pytest.mark.parametrize("ask", [Promise.result, Promise.exception])
def test_who_is_interrupted_while_waiting_keeps_nobody_from_the_result(interrupt, ask):
    promises = [Promise() for _ in range(10)]
    for promise in promises:
        with pytest.raises(InterruptedError):
            interrupt(0.002)
            ask(promise)
    thread = fulfilled_by(promises)
    assert [promise.result(SECONDS) for promise in promises] == [0] * 10
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_locks_that_an_interrupted_wait_has_left_held_hold_nobody_up_for_long(monkeypatch):
    monkeypatch.setattr(futures, "PATIENCE_SECONDS", 0.01)
    promises = [Promise() for _ in range(3)]
    for promise in promises:
        promise._condition.acquire()  # as concurrent.futures.wait does
    thread = fulfilled_by(promises)
    assert [promise.result(SECONDS) for promise in promises] == [0] * 3
    assert not wait(promises, SECONDS).not_done
    thread.join(SECONDS)
    assert not thread.is_alive()
