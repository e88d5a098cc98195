"""NUMA placement for LLM attention on CPUs: measure it, prove it, use it.

Its rooms, from the reader down to the machine; each imports only from those below it:

- ``cli``: the commands
- ``report``: what is told of a run: figures, sentences, and the page that holds them
- ``experiments``: what a notebook measures, and the sweep that runs notebooks under every binding
- ``nodes``: attention over nodes: the best one, all of them by threads or processes, and one sequence over all of them
- ``bandwidth``: what memory allows, and what it predicts
- ``measurement``: cases, the clock, rows of results, and honest comparison
- ``attention``: what is computed; it knows nothing of nodes
- ``placement``: where threads run and pages lie, and proof of it
- ``machine``: what Linux tells
- ``errors``: what goes wrong, in words

Public names are loaded on first use, so that ``import numa_lab`` does not load torch.
"""

from collections.abc import Callable

import lazy_loader

from numa_lab.errors import suite_needed

__version__ = "0.1.0"

_load: Callable[[str], object]
_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    with suite_needed():
        return _load(name)
