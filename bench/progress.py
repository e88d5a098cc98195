"""How far a benchmark is and how long it will take, on stderr: a bar on a terminal, and in a log a line every ten seconds.

Whoever waits for the measuring process tells, so that nothing runs beside what is measured.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from multiprocessing.context import BaseContext
from typing import TypeVar

from tqdm import tqdm

LINE_SECONDS = 10
BAR_SECONDS = 1
_TEXT_BYTES = 200

T = TypeVar("T")


class Progress:
    """What a measuring process has done, in memory that it shares with the one that waits for it."""

    def __init__(self, context: BaseContext) -> None:
        self._counts = context.RawArray("l", 2)
        self._text = context.RawArray("c", _TEXT_BYTES)

    def tell(self, done: int, total: int, doing: str) -> None:
        """So many of so many timings are done; what is done now."""
        self._text.value = doing.encode()[: _TEXT_BYTES - 1]
        self._counts[:] = done, total

    def wait(self, future: Future[T], name: str, seconds: float = math.inf) -> T:
        """What the process gives, which takes no longer than so many seconds; until then it is told how far it is."""
        with _Teller(name, seconds) as teller:
            while not wait([future], teller.pause).done:
                teller.tell(*self._counts, self._text.value.decode(errors="replace"))
        return future.result()


def turns(count: int, name: str) -> Iterator[int]:
    """The numbers of turns in this process, and how far they are."""
    with _Teller(name) as teller:
        last = time.monotonic()
        for turn in range(count):
            if time.monotonic() > last + teller.pause:
                last = time.monotonic()
                teller.tell(turn, count, "")
            yield turn


class _Teller:
    """A bar, or lines."""

    def __init__(self, name: str, seconds: float = math.inf) -> None:
        self._name, self._begin, self._seconds = name, time.monotonic(), seconds
        self._bar = tqdm(desc=name, unit="timing", disable=None, leave=False)
        self.pause = LINE_SECONDS if self._bar.disable else BAR_SECONDS

    def __enter__(self) -> _Teller:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tell(self, done: int, total: int, doing: str) -> None:
        """Show it."""
        passed = time.monotonic() - self._begin
        left = min(passed * (total - done) / done if done else math.inf, self._seconds - passed)
        text = f"about {tqdm.format_interval(max(0, left))} left" if left < math.inf else "time left not known yet"
        if not self._bar.disable:
            self._bar.total, self._bar.n = total or None, done
            self._bar.set_postfix_str(f"{text}; {doing}")
        else:
            far = f"{done} of {total} timings" if total else "starting"
            print(
                f"{self._name}: {far}, {tqdm.format_interval(passed)} passed, {text}; {doing}",
                file=sys.stderr,
                flush=True,
            )
