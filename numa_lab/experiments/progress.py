"""A progress bar whose clock goes on while one long step runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Thread
from typing import Any

TICK_SECONDS = 10.0
PATIENCE_SECONDS = 1.0


@contextmanager
def ticking(bar: Any, seconds: float = TICK_SECONDS) -> Iterator[None]:
    """Draw a bar of tqdm anew every few seconds, so that nobody takes a long step for a hung one."""
    going_on = Lock()

    def tick() -> None:
        while not going_on.acquire(timeout=seconds):
            bar.refresh()

    clock = Thread(target=tick, name="numa_lab progress", daemon=True)
    try:
        with going_on:  # whose end can't be interrupted
            clock.start()
            yield
    finally:
        if clock.is_alive():  # perhaps for good, where Ctrl-C came in a method of the bar and has left its lock held
            clock.join(PATIENCE_SECONDS)
