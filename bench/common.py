"""What the benchmarks share: contenders, the limits of the machine, and turns in random order.

Every turn calls everything that is compared once, in random order, so that all see the same machine; medians count, of samples
during which the cores were ours (``own_cores``). Each
number of threads has a process of its own, which may use so many cores: some libraries take all that they see. The one that
waits for it says on stderr how far it is.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import numpy as np
import own_cores
import torch
from numba import cfunc, types
from numba.extending import intrinsic
from peers import PEERS, Unsupported, missing
from progress import Progress
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from numa_lab.attention import compiler, decode, simd, vectors
from numa_lab.attention.backend_names import BACKENDS
from numa_lab.attention.gqa import gqa_attention
from numa_lab.attention.reference import attention as reference
from numa_lab.attention.shapes import AttentionShape
from numa_lab.bandwidth import read_probe
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import spread
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement.blocks import randomized_blocks
from numa_lab.placement import openmp

SAMPLE_SECONDS = 0.02  # of one timing, at least one call
SLEEP_SECONDS = 0.05  # longer than the pools of all contenders spin
LIMIT_BYTES = 128 << 20  # read at once
READS = 4  # in one timing
LOOPS = 2_000_000  # of multiply-adds into every accumulator: some milliseconds

EVERYTHING = [*BACKENDS, *PEERS]

Key = TypeVar("Key", bound=Hashable)
Layers = Sequence[tuple[Tensor, Tensor]]

_progress: Progress | None = None  # of a measuring process


class _Parser(argparse.ArgumentParser):
    """Says on which processor this runs, and leaves out peers that are not installed."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Options, of which ``backends`` names what is here."""
        options = super().parse_args(*args, **kwargs)
        os.environ[vectors.VARIABLE] = options.vectors  # for the processes that measure, too
        vectors.host.cache_clear()
        introduce()
        if not hasattr(options, "backends"):
            return options
        absent = {name: how for name in options.backends if (how := missing(name))}
        options.backends = [name for name in options.backends if name not in absent]
        for how in dict.fromkeys(absent.values()):
            names = ", ".join(name for name in absent if absent[name] == how)
            print(f"{names} left out: {how}", file=sys.stderr)
        if not options.backends:
            self.error("nothing is left to measure")
        return options


def introduce() -> None:
    """Print what the numbers are of."""
    topology = read_topology()
    nodes = format_cpulist(topology.effective_nodes)
    print(
        f"{topology.model_name}, {len(cores_here())} cores of NUMA nodes {nodes}, kernels for {vectors.chosen()}",
        flush=True,
    )


def parser(description: str | None, turns: int, backends: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that benchmarks have in common; `backends` are compared where no others are named."""
    options = _Parser(description=description)
    cores = len(cores_here())
    options.add_argument("--threads", type=int, nargs="*", default=sorted({1, cores}), choices=range(1, cores + 1))
    if backends:
        options.add_argument("--backends", nargs="*", default=backends, choices=EVERYTHING, help="what is compared")
    options.add_argument("--cases", default="", help="regular expression that a case's name has to match")
    options.add_argument("--turns", type=int, default=turns)
    if why := decode.unavailable():
        options.error(f"the decode kernel can't run here: {why}")
    options.add_argument(
        "--vectors", default=vectors.chosen(), choices=vectors.available(), help="what kernels are made for"
    )
    return options


def cores_here() -> list[int]:
    """One CPU of each core that this process may use."""
    topology = read_topology()
    return list(topology.physical_cores(topology.allowed_cpus))


def in_own_process(threads: int, work: Callable[..., Any], *arguments: Any, seconds: float = math.inf) -> Any:
    """What ``work(*arguments)`` gives in a new process that has so many cores and computes with so many threads.

    Where it ends by itself within so many seconds, the time left is said accordingly.
    """
    context = multiprocessing.get_context("spawn")
    progress = Progress(context)
    with ProcessPoolExecutor(1, context, _confine, (threads, spread(cores_here(), threads), progress)) as pool:
        return progress.wait(pool.submit(work, *arguments), f"{threads} threads", seconds)


def _confine(threads: int, cpus: Sequence[int], progress: Progress) -> None:
    global _progress
    _progress = progress
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(threads)


def tell(done: int, total: int, doing: object) -> None:
    """So many of so many timings are done, for whoever waits for this process."""
    if _progress is not None:
        _progress.tell(done, total, ", ".join(doing) if isinstance(doing, tuple) else str(doing))


def medians(work: dict[Key, Callable[[], float]], turns: int, before: int = 0, after: int = 0) -> dict[Key, float]:
    """The median of what each gives, over turns in which each is called once, in random order.

    So many timings were told to be done `before`, and so many come `after`.
    """
    return {key: taken.median for key, taken in samples(work, turns, before, after).items()}


def samples(
    work: dict[Key, Callable[[], float]], turns: int, before: int = 0, after: int = 0, until: float = math.inf
) -> dict[Key, own_cores.Samples]:
    """What each gave in each turn; no turn but the first begins that would end after `until` of ``time.monotonic``."""
    taken = {key: own_cores.Samples() for key in work}
    begin, done, total = time.monotonic(), before, before + turns * len(work) + after
    for turn in range(turns):
        now = time.monotonic()
        if turn and now + (now - begin) / turn > until:
            break
        for _, key in randomized_blocks(work, 1):
            tell(done, total, key)
            before_it = own_cores.disturbed_regions()
            taken[key].append(work[key]())
            taken[key].disturbed.append(own_cores.disturbed_regions() > before_it)
            done += 1
    return taken


def print_refusals(refused: Mapping[tuple[str, str], Sequence[str]]) -> None:
    """Print by what is not measured, and why, in which cases that is so."""
    for (name, why), cases in refused.items():
        more = f" and {len(cases) - 3} more" if len(cases) > 3 else ""
        print(f"{name} not measured: {why} ({'; '.join(cases[:3])}{more})", flush=True)


def query_of(shape: AttentionShape) -> Tensor:
    """A random query."""
    return torch.randn(shape.batch, shape.q_heads, shape.q_len, shape.head_dim).to(getattr(torch, shape.dtype))


def contender(name: str, shape: AttentionShape, layers: Layers, query: Tensor, **options: Any) -> Callable[[int], Any]:
    """Attention of one backend or peer over a layer, by its number, as its users call it; raises ``Unsupported``."""
    if name in PEERS:
        return PEERS[name](shape, list(layers), query, torch.get_num_threads())
    options["enable_gqa"] = shape.group > 1
    if name == "torch":
        return lambda layer: scaled_dot_product_attention(query, *layers[layer], **options)
    return lambda layer: gqa_attention(query, *layers[layer], **options, backend=name)


def seconds_of(call: Callable[[int], Any], layers: int) -> Callable[[], float]:
    """What measures the seconds of a call, over enough calls for the clock, each with the next layer."""
    turn = iter(range(1 << 62))
    for _ in range(2):
        begin = time.perf_counter()
        call(next(turn) % layers)
    calls = max(1, int(SAMPLE_SECONDS / (time.perf_counter() - begin)))

    def measure() -> float:
        if calls > 1:
            settle(lambda: call(next(turn) % layers))
        with own_cores.watched():
            begin = time.perf_counter()
            for _ in range(calls):
                call(next(turn) % layers)
            return (time.perf_counter() - begin) / calls

    return measure


def settle(call: Callable[[], object]) -> None:
    """Let the threads of whatever ran before go to sleep, and call for a while.

    Threads that wake up beside others may share a core for some milliseconds: after OpenVINO the first 128 MiB were read at
    half the speed of the next.
    """
    time.sleep(SLEEP_SECONDS)
    begin = time.perf_counter()
    while time.perf_counter() < begin + SAMPLE_SECONDS:
        call()


def error(name: str, shape: AttentionShape) -> float:
    """Largest distance from float64, in units of the largest output; over one KV head and its query heads."""
    single = shape.replace(batch=1, kv_heads=1, q_heads=shape.group)
    torch.manual_seed(0)
    query = query_of(single)
    key, value = torch.randn(2, 1, 1, single.kv_len, single.head_dim).to(query.dtype)
    expected, _ = reference(query, key, value, enable_gqa=True)
    output = contender(name, single, [(key, value)], query)(0)
    return float((output - expected).abs().max() / expected.abs().max())


def read_limit(block: Tensor, threads: int) -> Callable[[], float]:
    """What measures bytes that `threads` threads read per second, each time others."""
    parts = block.split(LIMIT_BYTES)
    turn = iter(range(1 << 62))

    def read() -> None:
        read_probe.read_once(parts[next(turn) % len(parts)], threads)

    def measure() -> float:
        settle(read)
        with own_cores.watched():
            begin = time.perf_counter()
            for _ in range(READS):
                read()
            return READS * LIMIT_BYTES / (time.perf_counter() - begin)

    return measure


def vector_ceiling(threads: int) -> Callable[[], float]:
    """What measures bytes of float32 vectors that `threads` threads multiply and add per second, from registers."""
    cpu_vectors = vectors.host()
    assert cpu_vectors is not None, "the decode kernel can't run here, so there is no ceiling of its instructions"
    type_ = simd.floats(cpu_vectors.lanes)

    @intrinsic
    def multiply_adds(_context: Any, loops: Any) -> Any:
        def generate(_c: Any, b: Any, _s: Any, arguments: Any) -> Any:
            cells = [compiler.alloca_once_value(b, simd.constant(type_, i)) for i in range(cpu_vectors.accumulators)]
            for i, cell in enumerate(cells):
                b.store(simd.constant(type_, float(i)), cell)
            x = simd.splat(b, b.sitofp(simd.opaque(b, simd.I64(0)), simd.FLOAT), cpu_vectors.lanes)
            with compiler.for_range(b, arguments[0]):
                for cell in cells:
                    b.store(simd.fma(b, x, x, b.load(cell, typ=type_)), cell)
            total = b.load(cells[0], typ=type_)
            for cell in cells[1:]:
                total = b.fadd(total, b.load(cell, typ=type_))
            return simd.sum_lanes(b, total)

        return types.float32(types.int64), generate

    @cfunc(types.void(types.CPointer(types.float32)))
    def body(out: Any) -> None:
        out[0] = multiply_adds(LOOPS)

    sink = np.zeros(1, np.float32)

    def measure() -> float:
        with own_cores.watched():
            begin = time.perf_counter()
            openmp.run_on_team(body.address, sink.ctypes.data, threads)
            return threads * LOOPS * cpu_vectors.accumulators * cpu_vectors.bytes / (time.perf_counter() - begin)

    return measure


def multiply_adds_per_vector(shape: AttentionShape) -> int:
    """Multiply-adds of float32 vectors for each vector of K and V: two per query row where numbers have to be widened."""
    cpu_vectors = vectors.host()
    widened = shape.dtype == "float16" or (shape.dtype == "bfloat16" and not (cpu_vectors and cpu_vectors.pairs))
    return shape.group * shape.q_len * (2 if widened else 1)


__all__ = ["BACKENDS", "PEERS", "Unsupported"]
