import pandas as pd
import pytest

from numa_lab import batch_scaling
from numa_lab.attention.shapes import preset
from numa_lab.errors import InvalidInput, UntrustedResult
from numa_lab.topology import read_topology


def planted(speeds, misplaced=0):
    return pd.DataFrame([
        {"arm": str(nodes), "nodes": nodes, "block": block, "sequences_per_s": speed * (1 + 0.01 * block), "misplaced": misplaced}
        for block in range(5)
        for nodes, speed in speeds.items()
    ])  # fmt: skip


def test_every_arm_is_visited_in_every_block_and_inputs_lie_where_they_are_computed():
    rows = batch_scaling.measure(preset("llama-3-8b", kv_len=64), inputs_per_node=2, seconds=0.01)
    arms = len(read_topology().effective_nodes) + 1
    assert rows.groupby("nodes").size().to_dict() == dict.fromkeys(range(arms), batch_scaling.MIN_BLOCKS)
    assert "every input" in batch_scaling.require_placed(rows)
    with pytest.raises(UntrustedResult, match="5 inputs"):
        batch_scaling.require_placed(planted({1: 1.0}, misplaced=1))
    with pytest.raises(InvalidInput, match="inputs_per_node=0"):
        batch_scaling.measure(preset("llama-3-8b"), inputs_per_node=0)


def test_the_sentence_says_what_the_intervals_allow():
    told = batch_scaling.sentence(planted({0: 300, 1: 300, 2: 590}))
    assert "The pool over 2 nodes against one process: 1.9" in told
    assert "linear would be 2" in told
    told = batch_scaling.sentence(planted({0: 300, 1: 301}))
    assert "The pool over 1 node against one process: a tie" in told
    assert "One node: there is no scaling over nodes to show." in told
