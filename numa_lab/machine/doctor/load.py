"""Looks at what else runs on a machine now: its run queue, its busiest processes, and the time that its hypervisor gives to others.

Limits: a running machine is watched for a moment, and a process that sleeps during it is not seen. Of a captured machine there are
only the averages that the kernel keeps. A container sees its own processes alone, but the CPU time of all processes of the machine.
Source: proc_stat(5), proc_loadavg(5), the kernel's Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import psutil

from numa_lab.machine.sysfs import Tree

SAMPLE_SECONDS = 0.4
LOOKS = 4  # so often is the run queue looked at within the sample
ENOUGH_TICKS = (
    50  # wanted within the sample, for a stolen share of the sample; else that of all time since boot is taken
)
ENOUGH_SHARE = 0.01  # of the time since boot was wanted; a machine that has done less shows no stolen share


@dataclass(frozen=True)
class Busy:
    """A process that ran, and how many CPUs' worth of time it took."""

    pid: int
    name: str
    cpus: float


@dataclass(frozen=True)
class Load:
    """What runs beside this process; a value is None where nothing tells it."""

    others: float | None = None  # CPUs' worth of time that others took on the CPUs of this process
    busiest: tuple[Busy, ...] = ()
    queued: float | None = None  # threads that ran or waited for a CPU, without this one
    average: float | None = None  # the same, and threads that waited for a disk, over the last minute
    waited: float | None = None  # share of the last ten seconds in which a thread waited for a CPU
    stolen: float | None = None  # share of the wanted CPU time that other guests of the host got


def look(tree: Tree, cpus: Collection[int]) -> Load:
    """Look at the load of the machine below the tree's root, for ``SAMPLE_SECONDS`` where it is the running one.

    `cpus` are those that matter to this process.
    """
    average = re.match(r"[\d.]+", tree.text("proc/loadavg"))
    waited = re.search(r"^some avg10=([\d.]+)", tree.text("proc/pressure/cpu"))
    kept = Load(average=float(average[0]) if average else None, waited=float(waited[1]) / 100 if waited else None)
    before = _ticks(tree, cpus)
    if not tree.live:
        return replace(kept, stolen=_stolen_since_boot(*before))
    this, began, ran, queued = psutil.Process(), time.monotonic(), _seconds_by_pid(), []
    own = sum(this.cpu_times()[:2])
    for _ in range(LOOKS):
        time.sleep(SAMPLE_SECONDS / LOOKS)
        running = re.search(r"^procs_running (\d+)$", tree.text("proc/stat"), re.MULTILINE)
        queued += [int(running[1]) - 1] if running else []
    seconds, after = time.monotonic() - began, _ticks(tree, cpus)
    own = sum(this.cpu_times()[:2]) - own
    took = {pid: (name, now - ran[pid][1]) for pid, (name, now) in _seconds_by_pid().items() if pid in ran}
    busiest = sorted(
        (Busy(pid, name, used / seconds) for pid, (name, used) in took.items()), key=lambda busy: -busy.cpus
    )
    used, stolen, _ = (now - then for now, then in zip(after, before, strict=True))
    per_tick = os.sysconf("SC_CLK_TCK")
    seen = sum(busy.cpus for busy in busiest)
    return replace(
        kept,
        others=max(seen, (used / per_tick - own) / seconds),
        busiest=tuple(busy for busy in busiest[:3] if busy.cpus > 0),
        queued=sum(queued) / len(queued) if queued else None,
        stolen=stolen / (used + stolen) if used + stolen >= ENOUGH_TICKS else _stolen_since_boot(*after),
    )


def _ticks(tree: Tree, cpus: Collection[int]) -> tuple[int, int, int]:
    """The ticks since boot in which these CPUs worked, in which the host ran something else, and in which they had nothing to do.

    Where a container is shown CPUs with other numbers, all CPUs count.
    """
    lines = {
        name: list(map(int, ticks.split()))
        for name, ticks in re.findall(r"^(cpu\d*) +([\d ]+)$", tree.text("proc/stat"), re.MULTILINE)
    }
    names = [f"cpu{cpu}" for cpu in cpus]
    chosen = [lines[name] for name in names] if lines.keys() >= set(names) else [lines["cpu"]] if "cpu" in lines else []
    # user, nice, system, idle, iowait, irq, softirq, steal; those after it are part of the first two
    worked, stolen, idle = (
        sum(sum(ticks[first:end]) for ticks in chosen for first, end in spans)
        for spans in (((0, 3), (5, 7)), ((7, 8),), ((3, 5),))
    )
    return worked, stolen, idle


def _stolen_since_boot(worked: int, stolen: int, idle: int) -> float | None:
    wanted = worked + stolen
    return stolen / wanted if wanted > ENOUGH_SHARE * (wanted + idle) else None


def _seconds_by_pid() -> dict[int, tuple[str, float]]:
    """The name and CPU seconds of every other process that can be seen.

    A process chooses its name, and users copy it to a shell, so only harmless signs of it are kept.
    """
    return {
        process.pid: (
            re.sub(r"[^\w.:/+@ -]", "?", process.info["name"] or "?", flags=re.ASCII),
            sum(process.info["cpu_times"][:2]),
        )
        for process in psutil.process_iter(["name", "cpu_times"])
        if process.pid != os.getpid() and process.info["cpu_times"]
    }
