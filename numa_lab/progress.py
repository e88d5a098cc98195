"""A progress bar whose clock goes on while one long step runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

TICK_SECONDS = 10.0


@contextmanager
def ticking(bar: Any, seconds: float = TICK_SECONDS) -> Iterator[None]:
    """Draw a bar of tqdm anew every few seconds, so that nobody takes a long step for a hung one."""
    ended = Event()

    def tick() -> None:
        while not ended.wait(seconds):
            bar.refresh()

    clock = Thread(target=tick, name="numa_lab progress", daemon=True)
    clock.start()
    try:
        yield
    finally:
        ended.set()
        clock.join()
