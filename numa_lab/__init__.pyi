from .attention.gqa import gqa_attention as gqa_attention
from .attention.scaled_dot_product import scaled_dot_product_attention_gqa as scaled_dot_product_attention_gqa
from .attention.shapes import AttentionShape as AttentionShape
from .bandwidth.advisor import plan_placement as plan_placement
from .errors import NumaLabError as NumaLabError
from .experiments.node_ranking import rank_nodes as rank_nodes
from .machine.topology import Topology as Topology
from .machine.topology_reader import read_topology as read_topology
from .measurement.results import load_run as load_run
from .measurement.results import load_runs as load_runs
from .nodes.kv_cache import NodeShardedKVCache as NodeShardedKVCache
from .nodes.one_node import NUMAOptimizedGQA as NUMAOptimizedGQA
from .nodes.optimal_node import bind_to_numa_node as bind_to_numa_node
from .nodes.optimal_node import get_optimal_numa_node as get_optimal_numa_node
from .nodes.process_pool import NUMAProcessPool as NUMAProcessPool
from .nodes.thread_pool import NUMAThreadPool as NUMAThreadPool
from .placement.binding import Binding as Binding
from .placement.binding import MemPolicy as MemPolicy
from .placement.receipt import Receipt as Receipt

__version__: str

__all__ = [
    "AttentionShape",
    "Binding",
    "MemPolicy",
    "NUMAOptimizedGQA",
    "NUMAProcessPool",
    "NUMAThreadPool",
    "NodeShardedKVCache",
    "NumaLabError",
    "Receipt",
    "Topology",
    "bind_to_numa_node",
    "get_optimal_numa_node",
    "gqa_attention",
    "load_run",
    "load_runs",
    "plan_placement",
    "rank_nodes",
    "read_topology",
    "scaled_dot_product_attention_gqa",
]
