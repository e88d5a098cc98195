"""Sets the CPU mask of a thread, and says why where the kernel does not.

Source: sched_setaffinity(2), sched_getaffinity(2).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from contextlib import suppress

from numa_lab.errors import NodeUnavailable, NotPermitted, NumaLabError
from numa_lab.machine.sysfs import format_cpulist

REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS)  # the call as such is refused, whichever CPUs it names
MAX_CPUS = 8192  # the largest kernels are built for so many; the kernel drops CPUs that do not exist
ALLOW = (
    "docker run --security-opt seccomp=unconfined IMAGE   # or a profile of your own that lists sched_setaffinity",
    "SystemCallFilter=@resources   # in a systemd unit",
    "snap connect SNAP:process-control",
)


def set_cpus(cpus: Collection[int]) -> None:
    """Let the calling thread run on these CPUs alone; the kernel drops those that the process may not use.

    Raises
    ------
    NotPermitted
        A sandbox refuses the call.
    NodeUnavailable
        None of the CPUs is online and in the process's cpuset.
    """
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise explained(error, cpus) from error


def give_back(cpus: Collection[int]) -> None:
    """Let the calling thread run where it ran before."""
    with suppress(
        OSError
    ):  # where the cpuset allows none of them any more, the kernel has put the thread where it may run
        os.sched_setaffinity(0, cpus)


def explained(error: OSError, cpus: Collection[int]) -> NumaLabError:
    """Return the error to raise in place of the one that ``sched_setaffinity`` raised for these CPUs."""
    asked = f"sched_setaffinity (CPU {format_cpulist(cpus)})"
    why = os.strerror(error.errno or 0)
    if error.errno in REFUSALS:
        return NotPermitted(
            error.errno,
            f"{asked} was refused: {why}. So no thread can be placed from inside; a sandbox does that (the seccomp filter of a "
            "container or unit, a snap). Place all of it from outside, by numactl --cpunodebind=NODE in front of what starts the sandbox, "
            "and call gqa_attention without a helper, or allow it by one of these:\n" + "\n".join(ALLOW),
        )
    allowed = format_cpulist(os.sched_getaffinity(0)) or "none"
    return NodeUnavailable(
        f"{asked}: {why}. It is offline, or outside of what this process may use now (CPUs {allowed} by its mask): take a "
        "CPU among those, or widen its cpuset"
    )
