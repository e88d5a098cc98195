import math

import pandas as pd

from numa_lab.report import figures


def ranked(ratios, noise_floor=0.015):
    nodes = list(ratios)
    values = [ratios[node] for node in nodes]
    found = pd.DataFrame({
        "median_seconds": values, "ratio": values, "low": [v - 0.02 for v in values], "high": [v + 0.02 for v in values],
        "tie_group": [2 if v > 1.1 or math.isnan(v) else 1 for v in values], "cause": "", "visits": 8, "receipt": "",
    }, index=pd.Index(nodes, name="node"))  # fmt: skip
    found.attrs["noise_floor"] = noise_floor
    return found


def test_a_ranking_tells_who_ties_and_who_is_worst():
    plot = figures.ranking(ranked({0: 1.0, 2: 1.01, 1: 1.3}))
    assert "Node 0 and node 2 not shown to be slower" in plot.alt
    assert "node 1 has the greatest ratio, 1.300" in plot.alt
    assert len(plot.table) == 3
    assert len(plot.png()) > 1000


def test_a_ranking_of_one_node_says_so():
    assert figures.ranking(ranked({0: math.nan})).note == "One node: nothing to compare."
    assert figures.ranking(ranked({0: 1.0, 1: math.nan})).note == "One usable node: nothing to compare."


def test_runs_and_batches_give_their_medians():
    runs = pd.DataFrame(
        {"helper": ["with", "without"] * 2, "block": [0, 0, 1, 1], "tokens_per_s": [20.0, 10.0, 22.0, 12.0]}
    )
    assert "21.0 tokens per second with the helper and 11.0 without" in figures.decode_runs(runs).alt


def test_points_and_predictions_by_number_of_nodes():
    rows = pd.DataFrame([
        {"work": work, "nodes": nodes, "load": load, "block": block, "seconds": 2.0 / max(nodes, 1), "bytes_per_s": 5e9 * max(nodes, 1),
         "predicted": math.nan if not nodes else 1.0 / nodes, "wrong": ""}
        for work in ("a batch", "one sequence") for block in range(2)
        for nodes, load in [(0, "others at rest"), (1, "others at rest"), (1, "others under load"), (2, "others at rest")]
    ])  # fmt: skip
    plot = figures.node_scaling(rows)
    assert "a batch on 2 nodes, others at rest, 10.0 (predicted 20.0)" in plot.alt
    assert "one sequence on no particular nodes, others at rest, 5.0" in plot.alt
    assert len(plot.png()) > 1000
    figures.node_scaling(rows[rows["nodes"] < 2].assign(predicted=math.nan)).png()
