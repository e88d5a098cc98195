"""Attention over NUMA nodes: on the best one, or on all of them at once by threads, processes, or one sharded cache."""
