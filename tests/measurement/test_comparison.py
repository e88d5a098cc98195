import json
import math

import pytest

from numa_lab.measurement import comparison

LABELS = ("c0m0", "c0m1", "c1m0", "c1m1")


def verdicts(compared, a, b):
    return [c.verdict for c in compared.comparisons if (c.a, c.b) == (a, b)]


def test_a_planted_effect_is_found_with_its_sign_and_size(synthetic_rows):
    compared = comparison.compare(synthetic_rows(LABELS, effects={"c0m1": 1.3, "c1m0": 1.3}, noise=0.01, executions=6))
    assert set(verdicts(compared, "c0m0", "c0m1")) == {"faster"}
    assert set(verdicts(compared, "c1m0", "c1m1")) == {"slower"}
    remote = next(c for c in compared.comparisons if (c.a, c.b) == ("c0m0", "c0m1"))
    assert remote.low < 1 / 1.3 < remote.high
    assert "c0m0 is faster than c0m1" in remote.sentence()


def test_without_an_effect_hardly_ever_a_claim(synthetic_rows):
    claims = 0
    for seed in range(20):
        compared = comparison.compare(synthetic_rows(("c0m0", "c1m1"), noise=0.03, executions=5, seed=seed))
        claims += any(c.verdict in ("slower", "faster") for c in compared.comparisons)
    assert claims <= 1


def test_equal_bindings_tie_where_the_noise_is_small(synthetic_rows):
    compared = comparison.compare(synthetic_rows(("c0m0", "c1m1"), noise=0.001, executions=8))
    assert set(verdicts(compared, "c0m0", "c1m1")) == {"same"}


def test_too_few_executions_are_unclear_and_say_how_many_are_needed(synthetic_rows):
    compared = comparison.compare(synthetic_rows(("c0m0", "c1m1"), effects={"c1m1": 2.0}, executions=2))
    assert set(verdicts(compared, "c0m0", "c1m1")) == {"unclear"}
    assert "at least 3 are needed" in compared.comparisons[0].sentence()
    assert json.loads(json.dumps(compared.to_json(), allow_nan=False))["comparisons"][0]["low"] is None


def test_the_noise_floor_is_what_the_pair_shows(synthetic_rows):
    rows = synthetic_rows(("c0m0",), noise=0.0, executions=5)
    rows.loc[rows["label"] == "c0m0~aa", "seconds"] *= 1.07
    assert comparison.noise_floor(comparison.execution_medians(rows)) == pytest.approx(0.07, abs=1e-6)
    alone = rows[rows["label"] == "c0m0"]
    assert math.isnan(comparison.compare(alone).noise_floor)
    assert comparison.compare(alone).comparisons == ()


def test_samples_of_one_process_are_not_pooled(synthetic_rows):
    rows = synthetic_rows(("c0m0",), executions=3, samples=50)
    medians = comparison.execution_medians(rows)
    assert len(medians) == len(rows[~rows["cold"]]) / 50


def test_spread_of_local_nodes_stands_beside_what_chance_gives(synthetic_rows):
    rows = synthetic_rows(("c0m0", "c1m1", "c2m2", "c3m3"), effects={"c2m2": 1.17}, noise=0.01, executions=6)
    found = comparison.spread(rows)
    assert set(found["worst"]) == {"c2m2"}
    assert found["spread"].between(0.12, 0.24).all()
    assert (found["low"] < 0.17).all()
    assert (found["by_chance"] < found["spread"]).all()
    assert comparison.spread(synthetic_rows(("c0m0",)))["spread"].isna().all()


def test_drift_over_the_run_order_is_seen(synthetic_rows):
    rows = synthetic_rows(("c0m0", "c1m1"), executions=10, noise=0.001)
    assert abs(comparison.lag1_autocorrelation(comparison.run_order(rows)["relative"].tolist())) < 0.6
    rows["seconds"] *= 1 + rows["order"] / 40
    assert comparison.lag1_autocorrelation(comparison.run_order(rows)["relative"].tolist()) > 0.6
    assert math.isnan(comparison.lag1_autocorrelation([1.0, 1.0, 1.0, 1.0]))


def test_a_large_matrix_is_compared_in_seconds(synthetic_rows):
    labels = [f"c{cpu}m{mem}" for cpu in range(4) for mem in range(4)]
    compared = comparison.compare(synthetic_rows(labels, samples=2))
    assert len(compared.comparisons) == 8 * (12 * 4 + 6)


def test_the_spread_of_equal_nodes_may_be_none(synthetic_rows):
    found = comparison.spread(synthetic_rows(("c0m0", "c1m1", "c2m2", "c3m3"), noise=0.02, executions=6, seed=1))
    assert (found["low"] == 0).all()


def test_labels_are_ordered_by_node_number(synthetic_rows):
    compared = comparison.compare(synthetic_rows(("c2m2", "c10m10"), executions=3))
    assert {(c.a, c.b) for c in compared.comparisons} == {("c2m2", "c10m10")}
