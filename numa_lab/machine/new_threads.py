"""Runs functions on new threads, whose masks and policies end with them, and waits for their results.

It is built on plain locks, which no exception of a signal's handler can leave held. ``threading.Thread.start`` waits on an Event and
``concurrent.futures`` on a Condition, which are Python code: where that is interrupted, a thread may wait for ever.

Limits: after such an exception the functions go on to their ends, and nobody waits for them.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def run(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Call functions at the same time, each on a new thread, and return their results in the order of the functions.

    Raises
    ------
    BaseException
        The first exception of a function, raised when all functions have ended.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    running = [_thread.allocate_lock() for _ in functions]

    def body(number: int) -> None:
        try:
            results[number] = functions[number]()
        except BaseException as error:  # the caller judges it
            errors.append(error)
        finally:
            running[number].release()

    for number, lock in enumerate(running):
        lock.acquire()
        _thread.start_new_thread(body, (number,))
    for lock in running:
        lock.acquire()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(functions))]
