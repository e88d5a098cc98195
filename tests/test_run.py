import dataclasses

import pytest

from numa_lab import results, run
from numa_lab.errors import InvalidInput, UntrustedResult
from numa_lab.receipt import Receipt
from numa_lab.workloads import CASE_KEY, case_key


@pytest.fixture(scope="module")
def measured():
    started = run.start(profile="smoke", preset="llama-3-8b", kv_len=64)
    return started, started.measure()


def test_every_case_has_a_cold_sample_a_limit_and_a_receipt(measured):
    started, rows = measured
    cases = rows.groupby(list(results.CASE))
    wanted = started.workload.cases(len(started.cores))
    assert set(rows.groupby(list(CASE_KEY)).groups) == {case_key(case) for case in wanted}
    both = rows[(rows["attention"] == "gqa") & (rows["phase"] == "decode") & (rows["threads"] == len(started.cores))]
    assert set(both["backend"]) == {"numba", "torch"}
    assert (cases["cold"].sum() == 1).all()
    assert (rows["limit_bytes_per_s"] > 1e8).all()
    receipt = Receipt.from_columns(rows.iloc[-1])
    assert set(receipt.pages_after) == {"key", "value", "query", "output"}
    assert {len(Receipt.from_columns(row).threads) for _, row in rows.iterrows()} <= {1, len(started.cores)}


def test_finish_writes_what_the_sweep_asked_for(measured, tmp_path):
    started, rows = measured
    started = dataclasses.replace(started, identity={"result": str(tmp_path / "rows.parquet")})
    assert "no receipt contradicts" in started.finish(rows)
    assert len(results.read_rows(tmp_path / "rows.parquet")[0]) == len(rows)


def test_finish_refuses_a_contradiction_and_a_wrong_backend(measured, monkeypatch):
    started, rows = measured
    with pytest.raises(UntrustedResult, match="the kernel granted"):
        started.finish(rows.assign(effective="c0i0"))
    right = run.gqa.gqa_attention
    monkeypatch.setattr(run.gqa, "gqa_attention", lambda *args, **options: right(*args, **options) * 1.1)
    with pytest.raises(UntrustedResult, match="from float64"):
        started.finish(rows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backend": "fast"}, "torch-folded"),
        ({"preset": "llama-9"}, "llama-3-8b"),
        ({"profile": "slow"}, "smoke"),
        ({"execution": {"labl": "c0m0"}}, "labl"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_named(changed, message):
    with pytest.raises(InvalidInput, match=message):
        run.start(**{"profile": "smoke", "preset": "llama-3-8b"} | changed)
