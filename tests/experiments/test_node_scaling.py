import math
from unittest import mock

import pandas as pd
import pytest

from numa_lab.attention.shapes import preset
from numa_lab.bandwidth.node_bandwidths import NodeBandwidths
from numa_lab.errors import InvalidInput, UntrustedResult
from numa_lab.experiments import node_scaling
from numa_lab.experiments.node_scaling import BATCH, ISOLATED, LOADED, ONE_PROCESS, SEQUENCE
from numa_lab.machine.topology_reader import read_topology

SHAPE = preset("llama-3-8b", batch=1, q_len=1, kv_len=64)


def planted(speeds, wrong="", predicted=math.nan):
    return pd.DataFrame([
        {"work": work, "nodes": nodes, "load": load, "block": block, "seconds": (1 + 0.01 * block) / speed,
         "bytes_per_s": speed, "predicted": predicted, "wrong": wrong}
        for work in (BATCH, SEQUENCE) for block in range(5) for (nodes, load), speed in speeds.items()
    ])  # fmt: skip


def test_every_arm_is_visited_in_every_block_and_lies_where_it_is_computed():
    nodes = read_topology().node_ids
    rates = tuple(tuple(1e9 if cpu == mem else 5e8 for mem in nodes) for cpu in nodes)
    rows = node_scaling.measure(
        SHAPE, inputs_per_node=2, seconds=0.01, measured=NodeBandwidths(nodes, rates, None, 3e9)
    )
    arms = node_scaling.arms_of(len(read_topology().effective_nodes))
    assert rows.groupby(["work", "nodes", "load"]).size().to_dict() == {
        (arm.work, arm.nodes, arm.load): node_scaling.MIN_BLOCKS for arm in arms
    }
    assert "every page" in node_scaling.require_placed(rows)
    one = rows[(rows["nodes"] == 1) & (rows["load"] == ISOLATED)]
    total = 2 * len(read_topology().effective_nodes) * SHAPE.kv_bytes
    assert one["predicted"].tolist() == pytest.approx([total / 1e9] * len(one))
    assert rows.loc[rows["nodes"] == ONE_PROCESS, "predicted"].isna().all()


def test_pages_elsewhere_are_told(monkeypatch):
    monkeypatch.setattr(
        node_scaling, "page_location", mock.Mock(wraps=node_scaling.page_location, home=lambda _tensor: 77)
    )
    rows = node_scaling.measure(SHAPE, inputs_per_node=1, seconds=0.01)
    with pytest.raises(UntrustedResult, match=r"an input for node \d+ lies on node 77"):
        node_scaling.require_placed(rows)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InvalidInput, match="inputs_per_node=0"):
        node_scaling.measure(SHAPE, inputs_per_node=0)
    with pytest.raises(InvalidInput, match="batch=3, q_len=1"):
        node_scaling.measure(SHAPE.replace(batch=3))


def test_arms_are_all_numbers_of_few_nodes_and_powers_of_two_of_many():
    counts = {arm.nodes for arm in node_scaling.arms_of(12)}
    assert counts == {0, 1, 2, 3, 4, 8, 12}
    loaded = {arm.nodes for arm in node_scaling.arms_of(4) if arm.load == LOADED}
    assert loaded == {1, 2, 3}


def test_the_sentences_say_what_the_intervals_allow():
    told = node_scaling.sentence(
        planted({(0, ISOLATED): 300, (1, ISOLATED): 300, (1, LOADED): 200, (2, ISOLATED): 590}, predicted=1 / 300)
    )
    assert "A batch on 2 nodes against one process: 1.9" in told
    assert "linear would be 2" in told
    assert "One node while the others are under load: 0.6" in told
    told = node_scaling.sentence(planted({(0, ISOLATED): 300, (1, ISOLATED): 301}))
    assert "One sequence on 1 node against one process: a tie" in told
    assert "One node: there is no scaling over nodes to show." in told
    rows = planted({(1, ISOLATED): 300, (2, ISOLATED): 600}, predicted=1 / 300)
    assert "2 arms" not in node_scaling.prediction_sentence(rows)
    assert "measured times are 0.51 to 1.02" in node_scaling.prediction_sentence(rows)


def test_a_node_under_load_expects_its_part_of_what_all_read_together(four_nodes):
    rates = tuple(tuple(1e9 for _ in range(4)) for _ in range(4))
    work = node_scaling._Work(SHAPE, 4, None, four_nodes)
    arm = node_scaling.Arm(BATCH, 1, LOADED)
    measured = NodeBandwidths((0, 1, 2, 3), rates, None, 2e9)
    assert work.predict(arm, {0: 4}, measured, 4) == pytest.approx(4 * SHAPE.kv_bytes / 5e8)
    assert work.predict(node_scaling.Arm(BATCH, 1), {0: 4}, measured, 4) == pytest.approx(4 * SHAPE.kv_bytes / 1e9)
