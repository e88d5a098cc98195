from .attention.gqa import gqa_attention as gqa_attention
from .attention.shapes import AttentionShape as AttentionShape
from .binding import Binding as Binding
from .binding import MemPolicy as MemPolicy
from .errors import NumaLabError as NumaLabError
from .kv_cache import NodeShardedKVCache as NodeShardedKVCache
from .optimal_node import bind_to_numa_node as bind_to_numa_node
from .optimal_node import get_optimal_numa_node as get_optimal_numa_node
from .optimal_node import rank_nodes as rank_nodes
from .optimized import NUMAOptimizedGQA as NUMAOptimizedGQA
from .optimized import scaled_dot_product_attention_gqa as scaled_dot_product_attention_gqa
from .placement import plan_placement as plan_placement
from .pool import NUMAThreadPool as NUMAThreadPool
from .process_pool import NUMAProcessPool as NUMAProcessPool
from .receipt import Receipt as Receipt
from .results import load_run as load_run
from .results import load_runs as load_runs
from .topology import Topology as Topology
from .topology import read_topology as read_topology

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
