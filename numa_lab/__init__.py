"""NUMA placement for LLM attention on CPUs: measure it, prove it, use it.

The modules, from the machine up to the reader; each imports only from those above it in this list:

- ``errors``: what goes wrong, in words
- ``sysfs``, ``hardware``, ``topology``, ``libnuma``: the machine, and the kernel's NUMA calls
- ``timing``, ``ratios``, ``stats``: the clock, and honest comparison
- ``overview``: the machine in words
- ``binding``, ``memory``, ``openmp``, ``results``: place threads and pages, see where they are, keep rows
- ``receipt``, ``notebook``, ``reading``: proof of placement; one notebook in a process of its own; timed reads
- ``probes``, ``doctor``, ``attention``: the limits of memory, what spoils them, what is computed
- ``workloads``, ``plan``: which cases an execution measures, and which executions a sweep runs
- ``run``, ``sweep``, ``report``: one execution, all executions of a plan, what is told of them
- ``cli``: the commands

Public names are loaded on first use, so that ``import numa_lab`` does not load torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
