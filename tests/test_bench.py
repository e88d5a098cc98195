import sys
import time
from concurrent.futures import Future
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

MODULES = ("common", "peers", "progress")


@pytest.fixture
def bench(monkeypatch):
    """Lets the modules of bench/ be imported by their names, as its scripts do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_log_gets_lines_with_the_time_left(bench, monkeypatch, capsys):
    import progress

    shared, future, looks = progress.Progress(get_context("spawn")), Future(), iter([(0, 0), (3, 10), (6, 10), None])

    def wait(futures, pause):
        assert pause <= 15
        if look := next(looks):
            shared.tell(*look, "group 4, numba")
        else:
            future.set_result("rows")
        return SimpleNamespace(done=future.done())

    monkeypatch.setattr(progress, "wait", wait)
    assert shared.wait(future, "2 threads", seconds=60) == "rows"
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "2 threads: starting", "2 threads: 3 of 10 timings", "2 threads: 6 of 10 timings",
    ]  # fmt: skip
    assert all("left; group 4, numba" in line for line in lines)


def test_turns_end_with_the_time_and_one_is_always_taken(bench):
    import common

    work = {"one": lambda: 1.0, "two": lambda: 2.0}
    assert common.samples(work, 9, until=time.monotonic() - 1) == {"one": [1.0], "two": [2.0]}
    assert common.medians(work, 3) == {"one": 1.0, "two": 2.0}


def test_a_missing_peer_is_named_once_with_the_line_to_type(bench, monkeypatch, capsys):
    import common
    import peers

    monkeypatch.setattr(peers, "LIBRARIES", {"jax": ("no_such_library",), "ggml": ("json", "no_such_library")})
    options = common.parser("", turns=1, backends=["numba", "jax", "ggml"]).parse_args([])
    assert options.backends == ["numba"]
    said = capsys.readouterr()
    assert said.err.count("jax, ggml left out: not installed; .venv/bin/pip install") == 1
    assert len(said.err.splitlines()) == 1
    assert "cores of NUMA nodes" in said.out
