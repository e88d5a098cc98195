import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest

import analyze_numa_cpu_attention
from numa_lab.errors import InvalidInput, NodeUnavailable
from numa_lab.experiments import guide_analyses
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.one_node import NUMAOptimizedGQA

NODE = read_topology().effective_nodes[0]
SCHEMA = json.loads((Path(__file__).parents[1] / "guide" / "numa_attention_results.schema.json").read_text())


def test_the_script_writes_what_the_guide_names(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "numa_attention_results.json"
    monkeypatch.setattr("sys.argv", ["analyze", "--seconds", "1", "--out", str(out)])
    analyze_numa_cpu_attention.main()
    assert str(out) in capsys.readouterr().out
    found = json.loads(out.read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["receipts"]["contradictions"] == []
    assert found["cross_numa"][f"mem_{NODE}_compute_{NODE}"]["is_local"]
    times = found["memory_allocation"][str(NODE)]
    assert times["min_time_gqa"] == min(times["times_gqa"])
    # Four times the bytes: whatever the machine, standard attention is not as fast as half of GQA's time.
    assert times["avg_time_std"] > 0.5 * times["avg_time_gqa"]


def test_every_node_is_crossed_with_every_node(four_nodes):
    shape, _ = guide_analyses.guide_shape(four_nodes)
    cells = guide_analyses.cells(four_nodes, shape)
    crossed = {(cell.compute_node, cell.memory_node) for cell in cells if cell.analysis == "cross_numa"}
    assert crossed == {(one, other) for one in range(3) for other in range(3)}
    assert {cell.case.threads for cell in cells if cell.analysis == "thread_affinity"} == {1, 2}
    with pytest.raises(NodeUnavailable, match="widen the cpuset"):
        guide_analyses.cells(dataclasses.replace(four_nodes, nodes=()), shape)


def test_the_guides_batch_is_scaled_to_the_smallest_node(four_nodes):
    shape, message = guide_analyses.guide_shape(four_nodes, full=True)
    assert shape.batch < 512
    assert "batch from 512" in message
    small, message = guide_analyses.guide_shape(four_nodes)
    assert (small.batch, message) == (guide_analyses.SMALL_BATCH, "")


def allocation_rows(seconds_of, threads_of):
    """Rows of the first analysis with planted seconds: per node and attention, one visit for each value."""
    shared = {"phase": "decode", "batch": 8, "q_len": 1, "kv_len": 512, "head_dim": 128, "dtype": "bfloat16"}
    return pd.DataFrame([
        {
            **shared, "backend": "numba", "q_heads": 32, "kv_heads": heads, "attention": kind, "cold": False,
            "execution_id": f"{kind}{node}{block}", "block": block, "order": block, "label": f"c{node}m{node}",
            "threads": threads_of[node], "seconds": seconds * factor,
        }
        for kind, heads, factor in (("gqa", 8, 1), ("mha", 32, 4))
        for node, values in seconds_of.items()
        for block, seconds in enumerate(values)
    ])  # fmt: skip


def test_spreads_compare_the_medians_of_nodes_also_with_unequal_cores():
    slower = {0: [1.0, 1.0, 1.0, 1.0, 9.0], 1: [1.2] * 5}
    for cores in ({0: 4, 1: 4}, {0: 4, 1: 2}):
        found = guide_analyses._spreads(allocation_rows(slower, cores))
        assert found["spread_gqa_percent"] == pytest.approx(20)
        assert found["spread_std_percent"] == pytest.approx(20)
    assert set(guide_analyses._spreads(allocation_rows({0: slower[0]}, {0: 4})).values()) == {None}


def test_equal_nodes_show_the_spread_that_chance_gives():
    generator = np.random.default_rng(0)
    nodes = {node: list(generator.lognormal(0, 0.05, 5)) for node in range(4)}
    found = guide_analyses._spreads(allocation_rows(nodes, dict.fromkeys(nodes, 4)))
    assert 1 < found["spread_gqa_by_chance_percent"] < 15, "noise of 5 % spreads four equal nodes by some percent"
    assert "equal nodes would show" in guide_analyses.spread_sentence(found, "gqa")
    alone = dict.fromkeys(found)
    assert guide_analyses.spread_sentence(alone, "std") == "Standard attention: one node, nothing to compare."


def test_before_and_after_tells_kernel_and_placement_apart():
    shape, _ = guide_analyses.guide_shape(read_topology())
    found = guide_analyses.before_and_after(NUMAOptimizedGQA(NODE), shape.replace(batch=1, kv_len=64), seconds=0.2)
    assert {len(of) for of in found.seconds.values()} >= {guide_analyses.BLOCKS}
    assert found.both.ratio == pytest.approx(found.kernel.ratio * found.placement.ratio)
    assert [sentence.split(":")[0] for sentence in found.sentences()] == [
        "The kernel",
        "The placement",
        "Both together",
    ]
    with pytest.raises(InvalidInput, match="seconds=0"):
        guide_analyses.measure(read_topology(), [], seconds=0)


def test_a_script_tells_a_bad_value_without_a_traceback():
    script = analyze_numa_cpu_attention.__file__
    done = subprocess.run([sys.executable, script, "--seconds", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "seconds=0.0: expected a positive time, for all visits together\n"
