"""Aim alarms at public calls: `python -m interrupts --count 3000 --only attend`; exit status 1 where one leaves anything behind.

An alarm's handler raises somewhere in the call, as Ctrl-C does. After that there may be no hang, no wrong number in the next
call, no thread lost or left over, no mask, memory policy or thread count changed; and what the handler raised has to arrive.
"""

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from multiprocessing import get_context

from interrupts import aim, caches, cases, experiments, placements, pools, sweeps  # noqa: F401 - cases are listed where they are defined
from interrupts.aim import Case, Shot

HANG_SECONDS = 60.0
STACK_SECONDS = 2.0  # for printing them
MOST_FAULTS = 10  # of a case: each costs a new process
CONTEXT = get_context("fork")  # a case starts with what was imported and compiled here
PLACES = ("inside", "after", "elsewhere")
FAULTS = ("hang", "wrong", "threads", "states", "exceptions")
MOST_SHOWN, MOST_PLACES = 2000, 8  # characters of a fault, and places that lead to it


class Tally:
    """What came of all alarms at a case."""

    def __init__(self, name: str) -> None:
        self.name, self.seconds, self.fired = name, 0.0, 0
        self.counted: Counter[str] = Counter()
        self.faults: list[Shot] = []
        self.place = ""  # where an alarm came of which nothing else is known yet

    def add(self, shot: Shot) -> None:
        """Count one alarm, and what it left behind."""
        self.fired, self.place = shot.number + 1, ""
        self.counted.update([shot.when, *shot.faults])
        if shot.faults:
            self.faults.append(shot)

    def row(self) -> str:
        """A line of the table."""
        numbers = (self.fired, *(self.counted[name] for name in (*PLACES, *FAULTS)))
        return f"{self.name:<26}{1e3 * self.seconds:>9.2f}" + "".join(f"{number:>11}" for number in numbers)

    def told(self) -> str:
        """What was seen: of faults that end with the same words the first, and where the alarms came that left them."""
        alike: defaultdict[tuple[str, str], list[Shot]] = defaultdict(list)
        for shot in self.faults:
            for kind, text in shot.faults.items():
                alike[kind, text.strip().splitlines()[-1]].append(shot)
        lines = []
        for (kind, _), shots in alike.items():
            lines.append(f"\n{self.name}, {kind}, {len(shots)} times: {shots[0].faults[kind].strip()[-MOST_SHOWN:]}")
            places = Counter(f"{shot.when} ({shot.place})" for shot in shots)
            lines += [f"  {times} x {place}" for place, times in places.most_common(MOST_PLACES)]
        return "\n".join([*lines, ""]) if lines else ""


def header() -> str:
    """The line above the table."""
    return f"{'case':<26}{'ms':>9}" + "".join(f"{name:>11}" for name in ("alarms", *PLACES, *FAULTS))


def watch(case: Case, count: int) -> Tally:
    """Aim so many alarms at a case, in a new process after each fault; the first hang is the last."""
    tally = Tally(case.name)
    while tally.fired < count and len(tally.faults) < MOST_FAULTS and not tally.counted["hang"]:
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=aim.play, args=(case, tally.fired, count, theirs))
        process.start()
        theirs.close()
        faults = len(tally.faults)
        try:
            while ours.poll(HANG_SECONDS):
                told = ours.recv()
                if isinstance(told, Shot):
                    tally.add(told)
                elif isinstance(told, float):
                    tally.seconds = told
                else:
                    tally.place = told
        except EOFError:
            process.join(HANG_SECONDS)
        if process.is_alive():
            os.kill(process.pid, aim.STACKS)
            process.join(STACK_SECONDS)
            tally.add(Shot(tally.fired, place=tally.place, faults={"hang": "the stacks of its threads stand above"}))
        elif process.exitcode and len(tally.faults) == faults:
            tally.add(
                Shot(
                    tally.fired,
                    place=tally.place,
                    faults={"wrong": f"the process ended with status {process.exitcode}"},
                )
            )
        process.kill()
        process.join()
    return tally


def main(words: Sequence[str] | None = None) -> int:
    """Aim at all cases, or at those that are named, and print a table."""
    parser = argparse.ArgumentParser("interrupts", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--count", type=int, default=3000, help="alarms for each case; calls that take long get a share of them"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*cases.CASES, sweeps.NAME], metavar="NAME", help="these cases alone"
    )
    options = parser.parse_args(words)
    tallies = []
    cases.warm_up()
    print(header(), flush=True)
    for case in cases.CASES.values():
        count = int(options.count * case.share)
        if count and (not options.only or case.name in options.only):
            tallies.append(watch(case, count))
            print(tallies[-1].row(), flush=True)
    count = int(options.count * sweeps.SHARE)
    if count and (not options.only or sweeps.NAME in options.only):
        tallies.append(Tally(sweeps.NAME))
        for shot in sweeps.shots(count):
            tallies[-1].add(shot)
        print(tallies[-1].row(), flush=True)
    for tally in tallies:
        print(tally.told(), end="")
    return int(any(tally.faults for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
