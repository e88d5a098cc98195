"""Functions on new threads, whose masks and policies end with them, and a wait for what they return.

Built on plain locks, which no exception that a signal's handler raises can leave held. ``threading.Thread.start`` waits on an Event,
``concurrent.futures`` on a Condition: these are Python code, and where it is interrupted, a thread may wait for them for ever.

Limits: after such an exception the functions go on to their ends, and nobody waits for them.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def run(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Call functions at once, each on a new thread: what they return, in their order.

    Raises
    ------
    BaseException
        The first that one of them raised, when all have ended.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    running = [_thread.allocate_lock() for _ in functions]

    def body(number: int) -> None:
        try:
            results[number] = functions[number]()
        except BaseException as error:  # the caller's to judge
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
