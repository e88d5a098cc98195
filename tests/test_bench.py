import re
import sys
import time
from concurrent.futures import Future
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

from numa_lab.placement import openmp

MODULES = ("common", "model", "own_cores", "peers", "progress", "sharded", "two_nodes")


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


def test_samples_during_which_others_had_a_core_count_only_where_there_is_no_other(bench, monkeypatch):
    import common
    import own_cores

    waited = iter([0, 1_000_000_000])  # before and after the first sample; then nothing more is waited
    monkeypatch.setattr(own_cores, "schedstat", lambda _tid: (0, last.append(next(waited, last[-1])) or last[-1]))
    monkeypatch.setattr(own_cores, "_stolen_ticks", lambda: ticks[0])
    monkeypatch.setattr(own_cores.os, "listdir", lambda _path: ["1"])
    last, ticks, values = [0], [0], iter([9.0, 8.0, 1.0, 3.0])

    def sample(steal=0):
        with own_cores.watched():
            ticks[0] += steal
            return next(values)

    steals = iter([0, 1, 0, 0])
    taken = common.samples({"one": lambda: sample(next(steals))}, 4)["one"]
    assert (taken, taken.disturbed) == ([9.0, 8.0, 1.0, 3.0], [True, True, False, False])
    assert taken.median == 2.0
    taken.disturbed = [True] * 4
    assert taken.median == 5.5


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


def test_ratios_are_taken_within_turns_and_stand_beside_their_bars(bench):
    import sharded

    drifting, calm = [1.0, 2.0, 4.0], [1.0, 1.0, 1.0]
    text = sharded.table(
        {
            ("step, 2048 tokens", "called"): drifting,
            ("step, 2048 tokens", "sharded"): [1.1 * seconds for seconds in drifting],
            ("step, 2048 tokens", "entered"): [1.11 * seconds for seconds in drifting],
            ("step, 2048 tokens", "reading alone"): [0.9 * seconds for seconds in drifting],
            ("noisy", "called"): calm,
            ("noisy", "called again"): [1.0, 1.02, 1.06],
            ("noisy", "sharded"): [1.03, 1.03, 1.05],
            ("without bar", "called"): calm,
            ("without bar", "sharded"): [2.0, 3.0, 4.0],
        }
    )
    rows = {tuple(re.split(" {2,}", line)[:2]): line for line in text.splitlines()[1:]}
    assert list(rows) == [
        ("step, 2048 tokens", "sharded"), ("step, 2048 tokens", "entered"), ("step, 2048 tokens", "reading alone"),
        ("noisy", "called again"), ("noisy", "sharded"), ("without bar", "sharded"),
    ]  # fmt: skip
    endings = [line.rpartition("   ")[2] for line in rows.values()]
    assert endings[:2] == ["at most 1.10: met", "at most 1.10: not met"]
    assert endings[4] == "at most 1.04: met"  # as far do times differ where the same is called twice
    assert "3.000  2.500 to 3.500" in rows["without bar", "sharded"]
    assert text.count("at most") == 3


@pytest.fixture
def quick(bench, monkeypatch):
    """Lets bench/sharded.py measure little, and once."""
    import common
    import sharded
    import two_nodes

    if len(common.cores_here()) < 2:
        pytest.skip("two nodes need two cores")
    for module, name, value in (
        (common, "SLEEP_SECONDS", 0), (common, "SAMPLE_SECONDS", 0), (two_nodes, "SAMPLE_SECONDS", 0),
        (common, "LIMIT_BYTES", 1 << 20), (sharded, "LIMIT_BYTES", 1 << 20), (two_nodes, "LAYERS_BYTES", 0),
        (sharded, "KV_LENS", (64, 96)), (sharded, "SHORT", 64), (sharded, "MIDDLE", 96), (sharded, "GAPS", (0.0002,)),
        (sharded, "BATCH_KV_LEN", 64),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("step", ["step, 64 tokens", "step, 96 tokens"]),
        ("loop", ["loop, bfloat16", "loop, float32"]),
        ("gaps", ["0.2 ms apart, busy", "0.2 ms apart, asleep"]),
        ("threads", ["64 tokens each", "96 tokens each"]),
        ("team", ["step, 96 tokens", "loop, bfloat16", "loop, float32"]),
        ("load", ["64 tokens, 1 of", "96 tokens, 1 of"]),
        ("empty", ["1 token per node"]),
        ("batch", ["times as fast as one"]),
    ],
)
def test_each_part_of_sharding_measures_what_it_names(quick, part, rows):
    import sharded

    text = sharded.PARTS[part][1](1)
    assert [row for row in rows if row not in text] == []


def test_entering_a_cache_surrounds_the_steps_of_a_sample(quick):
    import sharded
    import two_nodes

    masks = {}
    for way in ("sharded", "entered"):
        outside, seen = openmp.team(), set()
        measure = two_nodes.steps(sharded.model_of(64), way, lambda seen=seen: seen.add(openmp.team()[-1].cpus))
        assert measure() > 0
        assert openmp.team() == outside
        masks[way] = seen
    assert masks["sharded"] == {outside[-1].cpus}
    assert [len(mask) for mask in masks["entered"]] == [1], "a worker was not pinned"


@pytest.mark.parametrize(
    ("assembly", "wanted"),
    [
        (
            """
.LBB0_1:
	xorl	%ecx, %ecx
.LBB0_2:                                # =>  This is the inner loop
	#APP
	prefetcht1	64(%rax,%rdx)
	#NO_APP
	vfmadd231ps	32(%rsp), %ymm1, %ymm2 # 32-byte Folded Reload
	jae	.LBB0_4
	vdpbf16ps	%zmm3, %zmm4, %zmm5
.LBB0_4:
	cmpq	%rcx, %rbx
	jne	.LBB0_2
	decq	%rdi
	jne	.LBB0_1
""",
            [["prefetcht1", "vfmadd231ps", "jae", "vdpbf16ps", "cmpq", "jne"]],
        ),
        (
            """
.LBB0_1:                                // %entry
	fmla	v1.4s, v2.4s, v3.4s
	ldr	q3, [sp, #16]
	cbnz	x9, .LBB0_1
	fmov	s1, s2
.LBB0_2:
	tbnz	w9, #0, .LBB0_2
""",
            [["fmla", "ldr", "cbnz"]],
        ),
    ],
    ids=["x86-64", "64-bit Arm"],
)
def test_the_inner_loops_of_generated_code_are_found(bench, assembly, wanted):
    import model

    found = model.loops(assembly)
    assert [[line.split()[0] for line in loop] for loop in found] == wanted
    assert model.multiply_adds(found[0]) == sum(name.startswith(("vfm", "vdp", "fmla")) for name in wanted[0])
