"""NUMA placement for LLM attention on CPUs: measure it, prove it, use it.

The modules, from the machine up to the reader; each imports only from those above it in this list:

- ``errors``: what goes wrong, in words
- ``commands``, ``progress``, ``entered``, ``futures``, ``new_threads``: what is printed to be pasted into a shell, bars whose clock goes
  on, and blocks, futures and threads that no interrupt spoils
- ``sysfs``, ``hardware``, ``identity``, ``control_groups``, ``machine_files``, ``simd``, ``topology``, ``libnuma``, ``mappings``,
  ``free_memory``: the machine, its name, and what of it this process may use, the kernel's NUMA calls, what it tells of
  mappings, and what a node can still hold
- ``affinity``, ``cache_folder``, ``descriptors``, ``new_threads``, ``shared_memory``: the mask of a thread, where what can be made
  again is kept, limits of open files, functions on new threads, and limits of memory that processes share
- ``timing``, ``ratios``, ``stats``: the clock, and honest comparison
- ``measured``, ``mlc``, ``limits``: bandwidths and latencies between nodes, Intel MLC's output, and what they allow at once
- ``overview``: the machine in words
- ``openmp``, ``thread_state``: torch's own threads, their masks and policies
- ``binding``, ``memory``, ``gpus``, ``results``: place threads and pages, see where they are, keep rows
- ``caller_alone``: the place of one thread
- ``receipt``, ``team``, ``recycled``, ``parameters``, ``supervisor``, ``notebook``, ``reading``: proof of placement; a team on its
  place; memory that malloc hands out again; what a notebook was given, one in a process of its own, and the end of all that it
  started; timed reads
- ``replacement``: what becomes of a team whose CPUs are taken away
- ``probes``, ``doctor``, ``attention``, ``proof``: the limits of memory, what spoils them, what is computed, where a team is
- ``seats``, ``node_team``: one team over several nodes for a step, and threads that stay on a node with teams of their own
- ``workloads``, ``sampling``: which cases are measured, and one case with its receipt
- ``rankings``, ``optimal_node``: which node is best, and how sure that is
- ``roofline``, ``placement``: what memory allows for each placement, and which to choose
- ``kv_layout``, ``sharded``, ``batch``: which token of a sharded cache lies on which node, attention by all of them, and which node
  computes which input of a batch
- ``plan``, ``optimized``, ``pool``, ``process_pool``, ``kv_cache``: which executions a sweep runs; attention on one node, work
  over all of them by threads or by processes, and one sequence over all of them
- ``run``, ``sweep_lock``, ``sweep``, ``report``: one execution, one sweep at a time, all executions of a plan, what is told of them
- ``node_scaling``, ``decode_loop``, ``guide_analyses``: the source guide's experiments, measured as this project measures
- ``cli``: the commands

Public names are loaded on first use, so that ``import numa_lab`` does not load torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
