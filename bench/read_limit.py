"""Whether the read probe finds the true limit: beside loops that a C compiler made, over 1 GiB on huge pages, in one run."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch

from numa_lab.bandwidth import read_probe
from numa_lab.placement import memory

LOOPS = ("plain", "two_blocks")


def compiled(folder: str) -> str:
    """Compile the loops; the path of the library."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("read_limit: no C compiler found to compare with; on Debian: apt-get install gcc libc6-dev")
    path = f"{folder}/read_limit.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


def measure(library: str, turns: int) -> dict[str, float]:
    """Median bytes per second of the probe and of each C loop."""
    threads = torch.get_num_threads()
    block = memory.empty((1 << 30,), torch.uint8)
    block.view(torch.int64).fill_(1)
    loops = ctypes.CDLL(library)
    part = block.nbytes // threads // mmap.PAGESIZE * mmap.PAGESIZE

    def timed(read: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            begin = time.perf_counter()
            read()
            return block.nbytes / (time.perf_counter() - begin)

        return once

    def on_threads(loop: Callable[[ctypes.c_void_p, ctypes.c_size_t], int]) -> None:
        def read(i: int) -> None:
            end = block.nbytes if i == threads - 1 else (i + 1) * part
            loop(ctypes.c_void_p(block.data_ptr() + i * part), ctypes.c_size_t((end - i * part) // 8))

        others = [threading.Thread(target=read, args=(i,)) for i in range(1, threads)]
        for other in others:
            other.start()
        read(0)
        for other in others:
            other.join()

    work = {"the probe": timed(lambda: read_probe.read_once(block, threads))}
    for name in LOOPS:
        loop = getattr(loops, name)
        loop.restype = ctypes.c_int64
        work[f"C, {name}"] = timed(lambda loop=loop: on_threads(loop))
    return common.medians(work, turns)


def main() -> None:
    """Print a line per loop: GB/s, and in units of the fastest C loop."""
    options = common.parser(__doc__, turns=25).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(folder)
        for threads in options.threads:
            rates = common.in_own_process(threads, measure, library, options.turns)
            best = max(rate for name, rate in rates.items() if name != "the probe")
            print(f"\n{threads} threads")
            for name, rate in rates.items():
                print(f"{name:16} {rate / 1e9:6.1f} GB/s, {rate / best:.3f} of the fastest C loop", flush=True)


if __name__ == "__main__":
    main()
