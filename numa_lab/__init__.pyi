from .attention.gqa import gqa_attention as gqa_attention
from .attention.shapes import AttentionShape as AttentionShape
from .binding import Binding as Binding
from .binding import MemPolicy as MemPolicy
from .errors import NumaLabError as NumaLabError
from .receipt import Receipt as Receipt
from .results import load_run as load_run
from .results import load_runs as load_runs
from .topology import Topology as Topology
from .topology import read_topology as read_topology

__all__ = [
    "AttentionShape",
    "Binding",
    "MemPolicy",
    "NumaLabError",
    "Receipt",
    "Topology",
    "gqa_attention",
    "load_run",
    "load_runs",
    "read_topology",
]
