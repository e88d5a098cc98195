"""What a decode step costs when it is handed to several nodes: ratios to the same attention called with all threads.

The two "nodes" are halves of one, so that nothing is gained by sharding and its cost is all that shows. A ratio is the median of
those within each turn, with its quartiles. Bars say what sharding may cost.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from two_nodes import CALLED, ENTERED, SHARDED, Model, in_threads, make_model, steps, tokens

from numa_lab.attention.gqa import gqa_attention
from numa_lab.attention.shapes import preset
from numa_lab.machine.doctor import load
from numa_lab.machine.sysfs import Tree
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.thread_pool import NUMAThreadPool
from numa_lab.placement import memory, openmp

KV_LENS = (2048, 8192, 32768, 131072)
SHORT, MIDDLE = KV_LENS[:2]
GAPS = (0.0002, 0.001, 0.005, 0.02)  # seconds between two steps
HIDDEN = 4096  # features of a linear layer
BARS = {
    "step, 2048 tokens": 1.10,
    "step, 8192 tokens": 1.05,
    "step, 32768 tokens": 1.02,
    "loop, bfloat16": 1.05,
    "loop, float32": 1.05,
}
BUSY_CPUS = (
    0.1  # CPUs' worth of time of other processes that is told: what spins loses whole slices of time beside them
)
AGAIN, READING = "called again", "reading alone"

BATCH = 8
BATCH_KV_LEN = 4096
LIMIT_BYTES = 1 << 30  # more than caches hold

# It ends with who started it.
BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""

Measures = dict[tuple[str, str], Callable[[], float]]  # of seconds, by what is computed and by the way it is
Taken = Mapping[tuple[str, str], Sequence[float]]  # what they gave in each turn


def model_of(kv_len: int, dtype: str = "bfloat16") -> Model:
    """Layers as llama-3-8b has them."""
    return make_model(preset("llama-3-8b", kv_len=kv_len, dtype=dtype))


def step_measures(kv_lens: Sequence[int]) -> Measures:
    """Steps one after the other, for caches of several lengths."""
    models = {f"step, {kv_len} tokens": model_of(kv_len) for kv_len in kv_lens}
    return {(row, name): steps(model, name) for row, model in models.items() for name in model.ways}


def loop_measures() -> Measures:
    """Decode loops, in both dtypes."""
    found: Measures = {}
    for dtype in ("bfloat16", "float32"):
        model = model_of(MIDDLE, dtype)
        size = model.layers, HIDDEN, HIDDEN
        weights = torch.randn(size).mul_(HIDDEN**-0.5).to(getattr(torch, dtype)).unbind()
        found |= {(f"loop, {dtype}", name): tokens(model, name, weights) for name in model.ways}
    return found


def steps_and_reading(turns: int) -> str:
    """Steps, and how long it takes to read the same K and V at the memory's limit."""
    work, threads = step_measures(KV_LENS), torch.get_num_threads()
    limit = common.read_limit(_block(), threads)
    for kv_len in KV_LENS:
        kv_bytes = preset("llama-3-8b", kv_len=kv_len).kv_bytes
        work[f"step, {kv_len} tokens", READING] = lambda kv_bytes=kv_bytes: kv_bytes / limit()
    return table(common.samples(work, turns))


def loops(turns: int) -> str:
    """Decode loops."""
    return table(common.samples(loop_measures(), turns))


def gaps(turns: int) -> str:
    """Steps with gaps between them, in which the caller computes in Python or sleeps."""
    model = model_of(MIDDLE)
    waits = {"busy": _compute, "asleep": time.sleep}
    work = {
        (f"{1e3 * gap:g} ms apart, {kind}", name): steps(model, name, partial(wait, gap))
        for kind, wait in waits.items()
        for gap in GAPS
        for name in model.ways
    }
    return table(common.samples(work, turns))


def two_callers(turns: int) -> str:
    """Steps of two Python threads at once, each with layers of its own."""
    work: Measures = {}
    for kv_len in (SHORT, MIDDLE):
        models = [model_of(kv_len) for _ in range(2)]
        for name in models[0].ways:
            work[f"{kv_len} tokens each", name] = partial(in_threads, [steps(model, name) for model in models])
    return table(common.samples(work, turns))


def beside_a_team(turns: int) -> str:
    """Steps and loops while another Python thread of the process has a team of OpenMP threads, which sleeps."""
    with other_team():
        return table(common.samples(step_measures([MIDDLE]) | loop_measures(), turns))


def beside_a_load(turns: int) -> str:
    """Steps while other processes compute on one core and on all of them; calling twice shows how far times differ by chance."""
    models = {kv_len: model_of(kv_len) for kv_len in (SHORT, MIDDLE)}
    cores, taken = common.cores_here(), {}
    loads = [cores[-1:], cores]  # a sample is longer there, as who spins loses whole slices of time
    for number, cpus in enumerate(loads):
        work = {
            (f"{kv_len} tokens, {len(cpus)} of {len(cores)} cores busy", name): steps(
                model, CALLED if name == AGAIN else name, times=2
            )
            for kv_len, model in models.items()
            for name in (*model.ways, AGAIN)
        }
        all_of_load = turns * len(work)
        with busy(cpus):
            taken |= common.samples(work, turns, number * all_of_load, (len(loads) - 1 - number) * all_of_load)
    return table(taken)


def handing_over(turns: int) -> str:
    """Steps with next to nothing to compute."""
    model = model_of(kv_len=2)
    return table(common.samples({("1 token per node", name): steps(model, name) for name in model.ways}, turns))


def _on_core(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    openmp.set_threads(1)


def _block() -> torch.Tensor:
    return memory.empty((LIMIT_BYTES,), torch.uint8, read_topology().effective_nodes[0]).fill_(1)


def _compute(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@contextmanager
def other_team() -> Iterator[None]:
    """Another Python thread has computed with torch, and sleeps."""
    computed, end = threading.Event(), threading.Event()

    def work() -> None:
        torch.ones(1 << 22).exp_()
        computed.set()
        end.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    computed.wait()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextmanager
def busy(cpus: Sequence[int]) -> Iterator[None]:
    """On each CPU a process computes, of normal priority."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for cpu in cpus:
            processes.append(subprocess.Popen([sys.executable, "-c", BUSY]))
            os.sched_setaffinity(processes[-1].pid, {cpu})
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def table(taken: Taken) -> str:
    """A line for each way beside calling: microseconds, and the median ratio to calling within a turn, with quartiles and bar.

    Where calling was measured twice, its ratio to itself is the bar: so far do times differ by chance.
    """
    lines = [f"{'':50}{'us':>10}{'called':>10}{'ratio':>8}  {'quartiles'}"]
    for row in dict.fromkeys(row for row, _ in taken):
        called, ways = taken[row, CALLED], {name: seconds for (of, name), seconds in taken.items() if of == row}
        bar = max(1.0, _quartiles(ways[AGAIN], called)[2]) if AGAIN in ways else BARS.get(row)
        for name in [name for name in ways if name != CALLED]:
            low, ratio, high = _quartiles(ways[name], called)
            us = f"{1e6 * np.median(ways[name]):10.0f}{1e6 * np.median(called):10.0f}"
            line = f"{row:36}{name:14}{us}{ratio:8.3f}  {low:.3f} to {high:.3f}"
            if bar and name in (SHARDED, ENTERED):
                line += f"   at most {bar:.2f}: {'met' if ratio <= bar else 'not met'}"
            lines.append(line)
    return "\n".join(lines)


def _quartiles(seconds: Sequence[float], called: Sequence[float]) -> tuple[float, ...]:
    return tuple(np.quantile(np.divide(seconds, called), (0.25, 0.5, 0.75)))


def batch(turns: int) -> str:
    """How much faster a pool with a thread on each core computes sequences than one core, and all cores read than one."""
    shape, cpus = preset("llama-3-8b", kv_len=BATCH_KV_LEN), common.cores_here()
    dtype, size = getattr(torch, shape.dtype), (shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim)
    queries = [common.query_of(shape) for _ in range(BATCH)]
    keys, values = ([torch.randn(size).to(dtype) for _ in range(BATCH)] for _ in range(2))
    block = _block()
    with ThreadPoolExecutor(1, initializer=_on_core, initargs=cpus[:1]) as single, NUMAThreadPool(len(cpus)) as pool:

        def one_by_one() -> None:
            for query, key, value in zip(queries, keys, values, strict=True):
                gqa_attention(query, key, value, enable_gqa=True)

        calls = {
            "one": lambda _layer: single.submit(one_by_one).result(),
            "pool": lambda _layer: pool.parallel_gqa_compute(queries, keys, values),
        }
        work = {name: common.seconds_of(call, 1) for name, call in calls.items()}
        limits = {f"read by {count}": common.read_limit(block, count) for count in (1, len(cpus))}
        seconds = common.medians(work | limits, turns)
    return (
        f"{len(cpus)} cores compute {seconds['one'] / seconds['pool']:.2f} times as fast as one; "
        f"{len(cpus)} cores read {seconds[f'read by {len(cpus)}'] / seconds['read by 1']:.2f} times as fast as one"
    )


PARTS: dict[str, tuple[str, Callable[[int], str]]] = {
    "step": ("a decode step, one after the other", steps_and_reading),
    "loop": (
        f"a token of a decode loop, {MIDDLE} tokens, a {HIDDEN} x {HIDDEN} linear layer before each attention",
        loops,
    ),
    "gaps": (f"a decode step after a gap, {MIDDLE} tokens", gaps),
    "threads": ("a decode step of two Python threads at once", two_callers),
    "team": ("beside a second OpenMP team in the process", beside_a_team),
    "load": ("a decode step beside other processes", beside_a_load),
    "empty": ("handing over alone", handing_over),
    "batch": (f"a batch of {BATCH}, {BATCH_KV_LEN} tokens", batch),
}


def main() -> None:
    """Print a table for each part."""
    topology = read_topology()
    cpus = topology.cpus_of(topology.effective_nodes[:1])
    os.sched_setaffinity(0, cpus)
    parser = common.parser(__doc__, turns=15)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of the parts {', '.join(PARTS)}, with commas between")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--only {options.only}: there is no {', '.join(unknown)}; expected some of {','.join(PARTS)}")
    cores = len(common.cores_here())
    if cores < 2:
        parser.error("1 core: expected at least 2, one for each of the two nodes")
    for name in wanted:
        title, measure = PARTS[name]
        others = load.look(Tree(Path("/")), cpus).others or 0
        beside = f", while others took the time of {others:.1f} CPUs" if others >= BUSY_CPUS else ""
        print(f"\n{name}: {title}{beside}", flush=True)
        print(common.in_own_process(cores, measure, options.turns), flush=True)


if __name__ == "__main__":
    main()
