import dataclasses
import re
from pathlib import Path

import pytest

from numa_lab.bandwidth.node_bandwidths import NodeProbes
from numa_lab.errors import UntrustedResult
from numa_lab.measurement import comparison
from numa_lab.report import guide, guide_texts, receipts, verdicts

LABELS = ("c0m0", "c0m1", "c1m0", "c1m1")


def told(rows, machine):
    return verdicts.headline(rows, machine, comparison.compare(rows))


def test_one_node_has_nothing_to_compare(synthetic_rows, synthetic_machine):
    said = told(synthetic_rows(), synthetic_machine(1))
    assert said.startswith("One node: nothing to compare (c0m0).")
    assert "% of the memory read limit" in said
    assert "\n" not in said


def test_an_effect_is_told_with_its_size_and_an_absent_one_as_absent(synthetic_rows, synthetic_machine):
    machine = synthetic_machine(2)
    found = told(synthetic_rows(LABELS, effects={"c0m1": 1.42, "c1m0": 1.2}, executions=6), machine)
    assert "c0m1 takes 1.4" in found
    assert "times as long as" in found
    equal = told(synthetic_rows(("c0m0", "c1m1"), noise=0.001, executions=8), machine)
    assert equal.startswith("No difference between bindings above the noise floor")
    unclear = told(synthetic_rows(("c0m0", "c1m1"), noise=0.2, executions=3), machine)
    assert "could be shown" in unclear


def test_an_emulated_machine_says_that_its_times_mean_nothing(synthetic_rows, synthetic_machine):
    machine, rows = synthetic_machine(1, emulated=True), synthetic_rows()
    assert told(rows, machine).startswith("This machine is emulated: its times mean nothing")
    assert "emulated" in guide.markdown(rows, machine, comparison.compare(rows))
    assert "模拟" in guide.markdown(rows, machine, comparison.compare(rows), language="zh")


def test_the_best_node_is_named_only_where_one_was_shown(synthetic_rows, synthetic_machine):
    machine = synthetic_machine(2)
    rows = synthetic_rows(("c0m0", "c1m1"), effects={"c0m0": 1.2}, executions=6)
    compared = comparison.compare(rows)
    assert verdicts.best_node(compared) == 1
    assert verdicts.commands(rows, machine, compared)[0][1].startswith("numactl --cpunodebind=1 --membind=1")
    topology = dataclasses.replace(machine.topology, allowed_cpus=(0, 1, 2))
    machine = dataclasses.replace(machine, topology=topology)
    assert verdicts.commands(rows, machine, compared)[0][1].startswith("numactl --physcpubind=2 --membind=1")
    assert "numactl --cpunodebind=0 --membind=0" in verdicts.commands(rows, machine, compared)[-1][1]
    tie = comparison.compare(synthetic_rows(("c0m0", "c1m1"), executions=6))
    assert verdicts.best_node(tie) is None


def test_every_statement_of_the_guide_has_a_sentence_in_both_languages():
    decided = set(re.findall(r'Statement\(\s*"([^"]+)"', Path(guide.__file__).read_text()))
    english, chinese = (set(guide_texts.LANGUAGES[language]) for language in ("en", "zh"))
    assert english == chinese > decided > {"best node", "remote cost"}


def test_the_guide_says_the_same_in_both_languages(synthetic_rows, synthetic_machine):
    rows, machine = synthetic_rows(LABELS, effects={"c0m1": 1.4, "c1m0": 1.4}, executions=6), synthetic_machine(2)
    compared = comparison.compare(rows)
    english, chinese = (guide.markdown(rows, machine, compared, language=language) for language in ("en", "zh"))
    for number in ("17.07%", "4.37%", "1.4", "numactl --cpunodebind=0 --membind=0"):
        assert number in english
        assert number in chinese
    assert english.count("### ") == chinese.count("### ")


def test_each_sentence_survives_a_run_that_holds_little(synthetic_rows, synthetic_machine):
    rows = synthetic_rows(executions=1)
    for some in (rows, rows[rows["phase"] == "prefill"], rows[rows["threads"] == 1]):
        compared = comparison.compare(some)
        for sentence in (
            told(some, synthetic_machine(1)),
            verdicts.limit_sentence(some),
            verdicts.placement_sentence(some),
            verdicts.cold_sentence(some),
            verdicts.noise_sentence(some, compared),
            guide.markdown(some, synthetic_machine(1), compared),
        ):
            assert sentence.strip()
            assert "nan" not in sentence


def test_huge_pages_are_told_where_receipts_hold_them(synthetic_rows):
    rows = synthetic_rows(executions=1)
    assert "K and V lay on huge pages, 50% of them at least" in verdicts.placement_sentence(rows)
    assert receipts.receipts_table(rows)["least_huge_pages"].tolist() == [0.5, 0.5]
    rows["observed"] = rows["observed"].str.replace('"huge_pages"', '"of an older run"')
    assert "huge" not in verdicts.placement_sentence(rows)


def test_what_looks_unstable_names_the_next_command(synthetic_rows):
    few = synthetic_rows(executions=2)
    assert any("--profile standard" in sentence for sentence in verdicts.instability(few))
    assert verdicts.instability(synthetic_rows(executions=10, noise=0.001)) == []


def test_a_receipt_that_contradicts_its_label_fails(synthetic_rows, synthetic_machine):
    rows, machine = synthetic_rows(("c0m0", "c1m1")), synthetic_machine(2)
    assert "no receipt contradicts" in receipts.require_receipts(rows, machine)
    assert list(receipts.receipts_table(rows)["label"]) == ["c0m0", "c0m0~aa", "c1m1"]
    with pytest.raises(UntrustedResult, match="the kernel granted"):
        receipts.require_receipts(rows.assign(effective="c0m*"), machine)


def test_probe_sentences():
    bandwidths = ((100e9, 50e9, None), (40e9, 90e9, None), (None, None, None))
    latencies = ((90.0, 180.0, None), (180.0, 90.0, None), (None, None, None))
    probes = NodeProbes((0, 1, 3), bandwidths, latencies, None, (2, 2, 0), {}, ("a note",), 1.0)
    assert verdicts.bandwidth_sentence(probes) == (
        "Each of 2 node(s) reads its own memory at 90.0 to 100.0 GB/s; memory of another node gives 0.44 to 0.50 times that."
    )
    assert "2.00 to 2.00 times that" in verdicts.latency_sentence(probes)
    assert "4 pair(s)" in receipts.require_probes(probes)
    with pytest.raises(UntrustedResult, match="a note"):
        receipts.require_probes(dataclasses.replace(probes, read_bytes_per_s=((None,) * 3,) * 3))


def test_a_node_is_best_only_where_it_beats_every_other_and_loses_nowhere(synthetic_rows, synthetic_machine):
    rows, machine = synthetic_rows(("c0m0", "c1m1", "c2m2"), effects={"c0m0": 1.2}, executions=6), synthetic_machine(3)
    three = comparison.compare(rows)
    assert verdicts.best_node(three) is None  # nodes 1 and 2 are not told apart
    assert verdicts.slow_nodes(three) == [0]
    assert "--cpunodebind=1 " in verdicts.commands(rows, machine, three)[0][1]
    assert "Avoid node 0" in guide.markdown(rows, machine, three)
    rows = synthetic_rows(("c0m0", "c1m1"), executions=8)
    rows.loc[(rows["label"] == "c1m1") & (rows["phase"] == "prefill"), "seconds"] *= 1.3
    rows.loc[(rows["label"] == "c1m1") & (rows["phase"] == "decode"), "seconds"] /= 1.3
    compared = comparison.compare(rows)
    assert verdicts.best_node(compared) is None
    assert "none is the fastest throughout" in guide.markdown(rows, synthetic_machine(2), compared)


def test_what_was_not_told_apart_is_not_called_a_tie(synthetic_rows, synthetic_machine):
    rows = synthetic_rows(("c0m0", "c1m1"), noise=0.2, executions=3)
    assert "could not be told apart" in guide.markdown(rows, synthetic_machine(2), comparison.compare(rows))
    quiet = synthetic_rows(("c0m0", "c1m1"), noise=0.001, executions=8)
    assert "nodes tie" in guide.markdown(quiet, synthetic_machine(2), comparison.compare(quiet))


def test_memory_of_the_same_node_is_not_called_remote_because_no_policy_binds_it(synthetic_rows, synthetic_machine):
    rows = synthetic_rows(("c0m0", "c0f0"), effects={"c0f0": 1.3})
    assert "No other node's memory was measured." in guide.markdown(
        rows, synthetic_machine(2), comparison.compare(rows)
    )


def test_nothing_to_compare_says_why(synthetic_rows, synthetic_machine):
    assert told(synthetic_rows(), synthetic_machine(4)).startswith("One binding (c0m0) on 4 nodes")
    rows = synthetic_rows(("c0m0", "c*m*"))
    rows.loc[rows["label"] == "c*m*", "threads"] *= 4
    assert "no case in common" in told(rows, synthetic_machine(2))
    pair = synthetic_rows(("c0m0", "c1m1"))
    assert "no A/A pair" in told(pair[~pair["label"].str.endswith("~aa")], synthetic_machine(2))
