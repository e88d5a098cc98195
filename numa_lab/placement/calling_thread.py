"""The place of the calling thread alone: what is left where torch's OpenMP library is not found, and what one thread needs.

Limits: torch's workers keep what they have.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress

from numa_lab.errors import NumaLabError
from numa_lab.machine import affinity, libnuma
from numa_lab.placement import openmp
from numa_lab.placement.thread_state import MASK_FAILED, POLICY_FAILED


class CallerAlone:
    """As ``Exchange``, of the calling thread's mask, policy and thread count.

    Parameters
    ----------
    cpus, policy
        What it takes: its mask, and the mode and nodes of its policy, or None to leave that alone.
    threads
        How many torch then computes with.
    """

    granted = 1

    def __init__(self, cpus: Collection[int], policy: tuple[int, Collection[int]] | None, threads: int) -> None:
        self._new = cpus, policy, threads
        self._taken = False

    def there(self) -> int:
        """Take what is new; which calls failed."""
        cpus, policy, threads = self._new
        self._cpus, self._policy, self._threads = os.sched_getaffinity(0), None, openmp.threads()
        self._taken = True
        openmp.set_threads(threads)
        failed = 0
        try:
            os.sched_setaffinity(0, cpus)
        except OSError:
            failed |= MASK_FAILED
        if policy:
            try:
                self._policy = libnuma.get_mempolicy(flags=True)
                libnuma.set_mempolicy(*policy)
            except (OSError, NumaLabError):
                self._policy = None
                failed |= POLICY_FAILED
        return failed

    def back(self) -> None:
        """Take what was old, if the new was taken and not given back: again, it does nothing."""
        if self._taken:
            affinity.give_back(self._cpus)
            if self._policy:
                with suppress(OSError, NumaLabError):  # if this is refused, so was the new one
                    libnuma.set_mempolicy(*self._policy)
            openmp.set_threads(self._threads)
            self._taken = False

    def cpus_before(self) -> frozenset[int]:
        """What the calling thread might use before."""
        return frozenset(self._cpus)

    def look(self) -> int:
        """0: what has become of the mask is not looked at."""
        return 0

    def thread_ids(self) -> list[int]:
        """None: so no thread is looked at."""
        return []
