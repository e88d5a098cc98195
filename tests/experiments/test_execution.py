import dataclasses
import os

import pytest

from numa_lab.errors import InvalidInput, NodeUnavailable, UntrustedResult
from numa_lab.experiments import execution
from numa_lab.machine.control_groups import MemoryLimit
from numa_lab.measurement import comparison, results
from numa_lab.measurement.workloads import CASE_KEY, case_key
from numa_lab.placement import openmp
from numa_lab.placement.binding import Binding
from numa_lab.placement.receipt import Receipt


@pytest.fixture(scope="module")
def measured():
    started = execution.start(profile="smoke", preset="llama-3-8b", kv_len=64)
    return started, started.measure()


def test_every_case_has_a_cold_sample_a_limit_and_a_receipt(measured):
    started, rows = measured
    cases = rows.groupby(list(comparison.CASE))
    wanted = started.workload.cases(len(started.cores))
    assert set(rows.groupby(list(CASE_KEY)).groups) == {case_key(case) for case in wanted}
    both = rows[(rows["attention"] == "gqa") & (rows["phase"] == "decode") & (rows["threads"] == len(started.cores))]
    assert set(both["backend"]) == {"numba", "torch"}
    assert (cases["cold"].sum() == 1).all()
    assert (rows["limit_bytes_per_s"] > 1e8).all()
    receipt = Receipt.from_columns(rows.iloc[-1])
    assert set(receipt.pages_after) == {"key", "value", "query", "output"}
    assert {len(Receipt.from_columns(row).threads) for _, row in rows.iterrows()} <= {1, len(started.cores)}


def test_under_first_touch_one_pinned_thread_fills_k_and_v(monkeypatch, four_nodes):
    started = execution.start(profile="smoke", preset="llama-3-8b", kv_len=64)
    node, before = started.topology.effective_nodes[0], (openmp.threads(), os.sched_getaffinity(0))
    filled_by = []

    class Watched(execution.KVPool):
        def __init__(self, nbytes):
            filled_by.append((openmp.threads(), os.sched_getaffinity(0)))
            super().__init__(nbytes)

    monkeypatch.setattr(execution, "KVPool", Watched)
    started = dataclasses.replace(started, requested=Binding.parse(f"c*f{node}"))
    assert started.pool().buffer.nbytes >= started.workload.largest_kv_bytes
    assert filled_by == [(1, set(started.topology.cpus_for([node], 1)))]
    assert (openmp.threads(), os.sched_getaffinity(0)) == before
    # Other nodes have room, and pages would silently go there.
    full = tuple(dataclasses.replace(one, free_bytes=0) if one.id == 1 else one for one in four_nodes.nodes)
    started = dataclasses.replace(
        started, topology=dataclasses.replace(four_nodes, nodes=full), requested=Binding.parse("c0-2f1")
    )
    with pytest.raises(NodeUnavailable, match=r"nodes 1 have 0 MiB free .* takes that of other nodes"):
        started.pool()
    limit = MemoryLimit("/sys/fs/cgroup/memory.high", 1 << 20, 1 << 10, True)
    limited = dataclasses.replace(started, topology=dataclasses.replace(four_nodes, memory_limits=(limit,)))
    with pytest.raises(
        NodeUnavailable, match=r"memory\.high limits this process to 1 MiB, of which 0 MiB are left .* K and V"
    ):
        limited.pool()


def test_finish_writes_what_the_sweep_asked_for(measured, tmp_path):
    started, rows = measured
    started = dataclasses.replace(started, identity={"result": str(tmp_path / "rows.parquet")})
    assert "no receipt contradicts" in started.finish(rows)
    assert len(results.read_rows(tmp_path / "rows.parquet")[0]) == len(rows)


def test_finish_refuses_a_contradiction_and_a_wrong_backend(measured, monkeypatch):
    started, rows = measured
    with pytest.raises(UntrustedResult, match="the kernel granted"):
        started.finish(rows.assign(effective="c0i0"))
    right = execution.gqa.gqa_attention
    monkeypatch.setattr(execution.gqa, "gqa_attention", lambda *args, **options: right(*args, **options) * 1.1)
    with pytest.raises(UntrustedResult, match="from float64"):
        started.finish(rows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backend": "fast"}, "torch-folded"),
        ({"preset": "llama-9"}, "llama-3-8b"),
        ({"profile": "slow"}, "smoke"),
        ({"execution": {"labl": "c0m0"}}, "labl"),
        ({"execution": {"binding": None}}, "expected a text for binding"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_named(changed, message):
    with pytest.raises(InvalidInput, match=message):
        execution.start(**{"profile": "smoke", "preset": "llama-3-8b"} | changed)
