"""The placement of the calling thread alone: for a torch whose OpenMP library is not found, and for what needs no other thread.

Limits: the threads that torch has started keep their CPUs and policies.
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
    """An exchange as ``thread_state.Exchange``, but of the calling thread's mask, policy and thread count alone.

    Parameters
    ----------
    cpus, policy
        The mask that the thread takes, and the mode and nodes of its memory policy; None leaves the policy alone.
    threads
        How many threads torch then computes with.
    """

    granted = 1

    def __init__(self, cpus: Collection[int], policy: tuple[int, Collection[int]] | None, threads: int) -> None:
        self._new = cpus, policy, threads
        self._taken = False

    def there(self) -> int:
        """Take the new mask, policy and count; return which calls failed, as ``MASK_FAILED`` and ``POLICY_FAILED``."""
        cpus, policy, threads = self._new
        self._old_cpus, self._old_policy, self._old_threads = os.sched_getaffinity(0), None, openmp.threads()
        self._taken = True
        openmp.set_threads(threads)
        failed = 0
        try:
            os.sched_setaffinity(0, cpus)
        except OSError:
            failed |= MASK_FAILED
        if policy:
            try:
                self._old_policy = libnuma.get_mempolicy(flags=True)
                libnuma.set_mempolicy(*policy)
            except (OSError, NumaLabError):
                self._old_policy = None
                failed |= POLICY_FAILED
        return failed

    def back(self) -> None:
        """Take the old mask, policy and count again, if the new ones were taken; a second call does nothing."""
        if self._taken:
            affinity.give_back(self._old_cpus)
            if self._old_policy:
                with suppress(OSError, NumaLabError):  # if this is refused, so was the new one
                    libnuma.set_mempolicy(*self._old_policy)
            openmp.set_threads(self._old_threads)
            self._taken = False

    def cpus_before(self) -> frozenset[int]:
        """Return what the calling thread could use before."""
        return frozenset(self._old_cpus)

    def look(self) -> int:
        """Return 0, for no change: what has become of the mask is not looked at."""
        return 0

    def thread_ids(self) -> list[int]:
        """Return no ids, so that nobody looks at the masks of threads."""
        return []
