"""Aim alarms whose handler raises at a call, and see what each of them leaves behind."""

import dataclasses
import faulthandler
import gc
import os
import random
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numa_lab
from interrupts import threads

TURNS = 15  # of the call, before alarms are aimed at it: to warm up, and to know how long it takes
WARM_UP_SECONDS = 2.0  # after which there are no more of them
FURTHEST = 1.2  # times the duration of the call, up to which delays are spread evenly
EDGE = 16  # one alarm of so many comes at once, and one long after the call
AT_ONCE_SECONDS = 30e-6
AFTERMATH_SECONDS = 0.1  # for threads that end
STACKS = signal.SIGUSR1  # tells a process that hangs to print the stacks of its threads


class Alarm(BaseException):
    """What nothing in between may take for an error of its own; half of all alarms raise it, the others KeyboardInterrupt."""


class Target(NamedTuple):
    """A call, and the one that follows it."""

    call: Callable[[], object]
    # Calls the same uninterrupted, raises where anything is wrong, and leaves what the next call needs.
    right: Callable[[], object]


class Case(NamedTuple):
    """A target in the context that it needs."""

    name: str
    made: Callable[[], AbstractContextManager[Target]]
    share: float  # of the alarms, for calls that take long


@dataclasses.dataclass
class Shot:
    """What came of one alarm."""

    number: int
    # Inside the call, after it, or elsewhere: where it was lost in another package; empty where none came.
    when: str = ""
    faults: dict[str, str] = dataclasses.field(default_factory=dict)  # from a column of the table to what was seen
    place: str = ""  # where the handler ran


class Gun:
    """Fires at a target."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._kept: BaseException | None = None
        self._ignored: list[str] = []
        self._thrown: BaseException | None = None
        self._frame: FrameType | None = None
        signal.signal(signal.SIGALRM, self._ring)
        sys.unraisablehook = lambda said: self._ignored.append(f"{said.exc_type.__name__} in {said.object!r}")
        taken, end = [self._timed()], time.perf_counter() + WARM_UP_SECONDS
        while len(taken) < TURNS and time.perf_counter() < end:
            taken.append(self._timed())
        self.seconds = statistics.median(taken[len(taken) // 2 :])
        gc.collect()  # what a compiler leaves in circles has finalizers, which no alarm is to find in a call that compiles nothing
        time.sleep(AFTERMATH_SECONDS)
        self._before = threads.now()

    def _timed(self) -> float:
        begin = time.perf_counter()
        self._target.call()
        taken = time.perf_counter() - begin
        self._target.right()
        return taken

    def _ring(self, _number: int, frame: FrameType | None) -> None:
        self._frame = frame
        assert self._thrown is not None
        raise self._thrown

    def delays(self, count: int, seed: str) -> list[float]:
        """Seconds from setting each alarm to its ringing, in random order."""
        chance = random.Random(seed)
        spread = [FURTHEST * self.seconds * (i + chance.random()) / count for i in range(count)]
        chance.shuffle(spread)
        for i in range(0, count, EDGE):
            spread[i] = chance.uniform(0, AT_ONCE_SECONDS)
        for i in range(EDGE // 2, count, EDGE):
            spread[i] = chance.uniform(FURTHEST, 2) * self.seconds
        return [max(delay, 1e-6) for delay in spread]  # 0 sets no alarm

    def shoot(self, number: int, delay: float, tell: Callable[[str], object]) -> Shot:
        """Call once with an alarm, then without, and say what was found; `tell` hears where the alarm came.

        What was raised is kept as IPython keeps it, with all frames of its traceback, until the next alarm.
        """
        shot = Shot(number)
        self._thrown, self._frame = KeyboardInterrupt() if number % 2 else Alarm(), None
        raised = self._fire(delay)
        if self._frame is not None:
            shot.when = "after" if self._frame.f_code is Gun._fire.__code__ else "inside"
            shot.place = _place(self._frame)
            tell(shot.place)
        if raised is None and self._frame and _clears_errors(self._frame):
            shot.when = "elsewhere"
        elif raised is not self._thrown:
            shot.faults["exceptions"] = _told(raised) if raised else "nothing was raised"
        self._kept, self._frame, self._thrown = raised, None, None
        try:
            self._target.right()
        except BaseException as error:  # also an alarm that comes late
            shot.faults["wrong"] = _told(error)
        differences = threads.settled(self._before).differences(self._before)
        if "threads" in differences:  # what the traceback holds, as a pool with its threads, need not have ended
            self._kept = raised = None
            gc.collect()
            differences = threads.settled(self._before).differences(self._before)
        shot.faults |= differences
        if self._ignored and shot.when != "elsewhere":
            shot.faults.setdefault("exceptions", f"ignored: {self._ignored}")
        self._ignored.clear()
        return shot

    def _fire(self, delay: float) -> BaseException | None:
        """Call, and wait for the alarm where it comes later: what was raised."""
        end = time.perf_counter() + delay
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                self._target.call()
                while self._frame is None:
                    time.sleep(max(0.0, end - time.perf_counter()))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as error:
            return error
        return None


def _clears_errors(frame: FrameType) -> bool:
    """Whether this is Python code that compiled code calls which drops what it raises.

    That of numpy or pandas takes it for a no, and the interpreter ends what an object that is collected calls back, as of Python's own
    weak sets and dictionaries.
    """
    droppers = {"numpy", "pandas", "_weakrefset.py", "weakref.py"}
    return not droppers.isdisjoint(Path(frame.f_code.co_filename).parts)


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _place(frame: FrameType | None) -> str:
    """The innermost line, and the last one of numa_lab before it."""
    inner, own = frame, frame
    while own and not own.f_code.co_filename.startswith(os.path.dirname(numa_lab.__file__)):
        own = own.f_back
    told = [
        f"{os.path.basename(one.f_code.co_filename)}:{one.f_lineno} {one.f_code.co_name}" for one in (own, inner) if one
    ]
    return " > ".join(dict.fromkeys(told))


def play(case: Case, first: int, count: int, pipe: Connection) -> None:
    """In a process of its own: fire from one number on, and send how long a call takes, then where each alarm came, and its shot.

    After a fault nothing here is to be trusted, and the process ends.
    """
    faulthandler.register(STACKS, all_threads=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    number = first
    try:
        with case.made() as target:
            gun = Gun(target)
            pipe.send(gun.seconds)
            delays = gun.delays(count, case.name)
            for number in range(first, count):
                shot = gun.shoot(number, delays[number], pipe.send)
                pipe.send(shot)
                if shot.faults:
                    os._exit(1)
    except BaseException as error:  # before the first alarm, or when the context is left
        pipe.send(Shot(number, faults={"wrong": _told(error)}))
        os._exit(1)
