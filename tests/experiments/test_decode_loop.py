import dataclasses
import math
import time

import pandas as pd
import pytest
import torch

import test_decode_thread
from numa_lab.attention.reference import attention as reference
from numa_lab.attention.shapes import preset
from numa_lab.errors import InvalidInput, UntrustedResult
from numa_lab.experiments import decode_loop
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement.significance import Ratio
from numa_lab.nodes.one_node import NUMAOptimizedGQA
from numa_lab.placement import memory

NODE = read_topology().effective_nodes[0]
SHAPE = preset("llama-3-8b", kv_len=16, dtype="float32")


@pytest.mark.parametrize("helper", [None, NUMAOptimizedGQA(NODE)])
def test_a_token_attends_to_all_before_it_and_to_itself(helper):
    (layer,) = decode_loop.make_layers(SHAPE, 1, 2, helper)
    key, value = torch.randn(2, 1, 8, 128).unbind()
    keys, values = layer.append(key, value)
    assert keys.size(-2) == 17
    assert torch.equal(keys[:, :, -1], key)
    query = torch.randn(1, 32, 1, 128)
    expected, _ = reference(query, keys, values, enable_gqa=True)
    for attend in (decode_loop.torch_attention, test_decode_thread.attn):
        assert (attend(layer, query, keys, values) - expected).abs().max() < 1e-5
    layer.append(key, value)
    with pytest.raises(InvalidInput, match="holds 18 tokens and is full"):
        layer.append(key, value)


def test_runs_alternate_and_the_receipt_is_that_of_the_helpers_cache():
    helper = NUMAOptimizedGQA(NODE)
    found = decode_loop.compare(helper, SHAPE, attend_with=test_decode_thread.attn, layers=1, tokens=2, seconds=1e-3)
    assert found.runs.groupby("helper").size().to_dict() == {"with": 5, "without": 5}
    assert set(found.receipt.pages_after["keys"]) == {NODE}
    assert sum(found.pages_without.values()) > 0
    assert list(found.receipts_table()["helper"]) == ["with", "without"]
    assert decode_loop.require_placed(found, helper).startswith(f"{helper.threads} threads and all pages")
    assert found.speedup.low <= found.speedup.ratio <= found.speedup.high
    with pytest.raises(InvalidInput, match="layers=0"):
        decode_loop.compare(helper, SHAPE, attend_with=test_decode_thread.attn, layers=0)


def test_what_is_optional_is_no_doubt_and_what_was_not_seen_is_one(monkeypatch):
    helper = NUMAOptimizedGQA(NODE)
    monkeypatch.setattr(memory, "no_huge_pages", lambda: "Invalid argument")  # as kernels say that have none
    found = decode_loop.compare(helper, SHAPE, attend_with=test_decode_thread.attn, layers=1, tokens=2, seconds=1e-3)
    assert any("madvise was refused" in note for note in found.receipt.notes)
    assert decode_loop.require_placed(found, helper).startswith(f"{helper.threads} threads and all pages")
    for change, told in (
        ({"pages_after": {"keys": {}}}, "No page of keys could be looked at"),
        ({"notes": ("something else",)}, "something else"),
    ):
        doubtful = dataclasses.replace(found, receipt=dataclasses.replace(found.receipt, **change))
        with pytest.raises(UntrustedResult, match=told):
            decode_loop.require_placed(doubtful, helper)


def test_slow_calls_make_runs_shorter_not_longer_than_the_time():
    def slow(*given):
        time.sleep(0.02)
        return decode_loop.plain_attention(*given)

    found = decode_loop.compare(
        NUMAOptimizedGQA(NODE), SHAPE, attend_with=slow, attend_without=slow, layers=1, tokens=50, seconds=0.6
    )
    assert found.runs.groupby("helper").size().min() >= 5
    assert set(found.runs["tokens"]) <= {1, 2}  # 0.06 s for each of ten runs, and at least 0.02 s a token: never 50


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.98, 1.03, "a tie (0.98 to 1.03 times as many)"),
        (0.6, 3.2, "unclear (0.60 to 3.20 times as many)"),
        (1.9, 2.1, "10.0 without: 1.90 to 2.10 times as many"),
    ],
)
def test_the_sentence_says_what_the_interval_allows(low, high, told):
    runs = pd.DataFrame({"helper": ["with", "without"], "tokens_per_s": [20.0, 10.0]})
    assert told in decode_loop.Comparison(runs, Ratio(1, low, high, 0.5), None, {}).sentence()


def test_too_few_blocks_give_no_claim():
    runs = pd.DataFrame({"helper": ["with", "without"], "tokens_per_s": [20.0, 10.0]})
    too_few = Ratio(2, math.nan, math.nan, 1.0)
    assert "too few" in decode_loop.Comparison(runs, too_few, None, {}).sentence()
