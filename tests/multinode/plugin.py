"""Runs the collected tests in guests with several NUMA nodes, and reports each as if it had run here.

The mark ``guest(LAYOUT)`` names a test's machine; the default is the first layout, and None is the host, after all guests.
Each machine boots once, imports once, and forks for each test: a test that binds, pins or is killed leaves nothing behind
for the next.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from multinode.guest import ARCHITECTURES, LAYOUTS, Guest, GuestError, prepare

AT_ONCE = 2  # guests: each is busy on about one core of the host
TEST_SECONDS = 240  # of a test that says nothing else
GUEST_SECONDS = 40 * 60
SHARED = "NUMA_LAB_GUEST"  # the folder that host and guest share
BUILD = Path("build/multinode")
HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the architecture of the guests."""
    parser.addoption("--architecture", choices=ARCHITECTURES, default="x86_64", help="of the guests (x86_64)")


def pytest_configure(config: pytest.Config) -> None:
    """Be one of two: the outer plugin, which boots guests, or the inner one, which forks for each test."""
    inside = SHARED in os.environ
    config.pluginmanager.register(Inner(Path(os.environ[SHARED])) if inside else Outer())


def _mark(item: pytest.Item) -> tuple[str | None, float]:
    layout: str | None = next(iter(LAYOUTS))
    seconds = float(TEST_SECONDS)
    for mark in reversed(list(item.iter_markers("guest"))):  # the nearest comes last and wins
        layout = mark.args[0] if mark.args else layout
        seconds = mark.kwargs.get("seconds", seconds)
    return layout, seconds


class Outer:
    """Boots a guest for each layout, and hands on what the tests in it report."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run all tests; pytest's own loop is for collecting only."""
        if session.config.option.collectonly or session.testsfailed:
            return None
        groups: dict[str, dict[str, pytest.Item]] = {}
        afterwards = []
        for item in session.items:
            layout, _ = _mark(item)
            if layout is None:
                afterwards.append(item)
            else:
                groups.setdefault(layout, {})[item.nodeid] = item
        try:
            prepare(_folder(session) / "cache", session.config.option.architecture)
        except GuestError as error:
            pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
        # The guest with the longest test first: it is the last to end.
        waiting = sorted(groups.items(), key=lambda group: -max(_mark(item)[1] for item in group[1].values()))
        running: list[Boot] = []
        try:
            while waiting or running:
                while waiting and len(running) < AT_ONCE:
                    running.append(Boot(*waiting.pop(0), session))
                running = [boot for boot in running if boot.go_on()]
                if session.shouldfail or session.shouldstop:
                    raise session.Interrupted(session.shouldfail or session.shouldstop)
                time.sleep(0.1)
        finally:
            for boot in running:
                boot.guest.kill()
        for item, following in zip_longest(afterwards, afterwards[1:]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return True


def _folder(session: pytest.Session) -> Path:
    return BUILD / session.config.option.architecture


class Boot:
    """A guest, and the tests that it has not reported yet."""

    def __init__(self, layout: str, items: dict[str, pytest.Item], session: pytest.Session) -> None:
        self._layout, self._left, self._session = layout, dict(items), session
        self._shared = (_folder(session) / layout).resolve()
        self._shared.mkdir(parents=True, exist_ok=True)
        self._reports = self._shared / "reports.jsonl"
        self._reports.write_text("")
        self._read = 0
        (self._shared / "tests").write_text("\n".join(items))
        architecture = session.config.option.architecture
        words = [
            ARCHITECTURES[architecture].python,
            "-m",
            "pytest",
            "-p",
            "multinode.plugin",
            "-p",
            "no:cacheprovider",
            "-q",
        ]
        words += ["-W", "ignore:numa_lab's decode kernel:RuntimeWarning"]  # guests have no AVX
        if all(HERE in item.path.parents for item in items.values()):
            words.append("--noconftest")  # what the fixtures of the other tests import takes a minute there
        environment = {
            SHARED: str(self._shared),
            "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE / "left_out")]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "NUMBA_OPT": "0",  # compiling takes longer there than what is compiled
            "OMP_WAIT_POLICY": "passive",  # threads that wait would take the host's few cores from those that work
        }
        words.append(f"@{self._shared / 'tests'}")
        self.guest = Guest(LAYOUTS[layout], architecture, words, self._shared, _folder(session) / "cache", environment)

    def go_on(self) -> bool:
        """Hand on new reports; whether the guest still runs."""
        running = self.guest.running()
        self._hand_on()
        if running and time.monotonic() > self.guest.began + GUEST_SECONDS:
            self.guest.kill()
            running = False
        if not running and self._left:
            self._lose()
        return running

    def _hand_on(self) -> None:
        """Whole lines only: the guest may be writing the last one."""
        with open(self._reports) as lines:
            lines.seek(self._read)
            new = lines.read()
        new = new[: new.rfind("\n") + 1]
        self._read += len(new)
        for line in new.splitlines():
            stored = json.loads(line)
            self._tell(stored["nodeid"], stored["reports"])

    def _tell(self, nodeid: str, reports: list[dict[str, object]]) -> None:
        item = self._left.pop(nodeid)
        item.ihook.pytest_runtest_logstart(nodeid=nodeid, location=item.location)
        for data in reports:
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=nodeid, location=item.location)

    def _lose(self) -> None:
        """Fail what was not reported: the first with all that the guest said."""
        try:
            why = f"The guest ended with exit status {self.guest.status()} and did not report this test.\n"
            why += (self._shared / "output").read_text(errors="replace")[-4000:]
        except GuestError as error:
            why = str(error)
        for nodeid, item in list(self._left.items()):
            self._tell(nodeid, [_failure(item, f"in guest {self._layout}: {why}")])
            why = "lost with the guest: see the first of its failures"


class Inner:
    """In the guest: forks for each test, and writes down what the child reports."""

    def __init__(self, shared: Path) -> None:
        self._reports = shared / "reports.jsonl"

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Get ready what every child would do anew; no OpenMP thread may start before the forks."""
        # The emulated kernel scans memory when it likes; what it does to a measurement has a test of its own.
        Path("/proc/sys/kernel/numa_balancing").write_text("0")
        if "torch" in sys.modules:
            from numa_lab.bandwidth import read_probe
            from numa_lab.placement import openmp, thread_state

            own = thread_state._exchange, thread_state._look, openmp._note_id, openmp._on_workers
            for compile_once in (*own, read_probe._team_body):
                compile_once()

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        """Run one test in a child."""
        reports = _in_child(item, lambda: [_data(item, r) for r in runtestprotocol(item, log=False)], _mark(item)[1])
        with open(self._reports, "a") as lines:
            lines.write(json.dumps({"nodeid": item.nodeid, "reports": reports}) + "\n")
        for data in reports:  # which reading them back alters
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            item.ihook.pytest_runtest_logreport(report=report)
        return True


def _data(item: pytest.Item, report: pytest.TestReport) -> dict[str, object]:
    data: dict[str, object] = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
    return data


def _failure(item: pytest.Item, why: str) -> dict[str, object]:
    return _data(item, pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call"))


def _in_child(
    item: pytest.Item, work: Callable[[], list[dict[str, object]]], seconds: float
) -> list[dict[str, object]]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()  # what the test leaves running is killed with it
            with open(writing, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    text = b"".join(_read(reading, time.monotonic() + seconds))
    os.close(reading)
    with suppress(ProcessLookupError):  # nothing was left
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    try:
        reports: list[dict[str, object]] = json.loads(text)
    except ValueError:
        return [
            _failure(
                item, f"the test's process was killed after its {seconds:.0f} s, or ended early (wait status {status})"
            )
        ]
    return reports


def _read(pipe: int, deadline: float) -> Iterator[bytes]:
    while select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
        if not (part := os.read(pipe, 1 << 16)):
            return
        yield part
