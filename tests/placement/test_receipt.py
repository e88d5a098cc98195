import json
from pathlib import Path

import pytest

from numa_lab.measurement.results import load_run
from numa_lab.placement.binding import Binding
from numa_lab.placement.receipt import Receipt, Team
from numa_lab.placement.thread_watch import ThreadSeen

GOOD = {"key": {1: 100}, "value": {1: 100}}


THREAD = ThreadSeen(7, (2,), (2,))


def receipt(label="c1m1", effective=None, threads=(THREAD,), before=GOOD, after=GOOD, team=None):
    requested, granted = Binding.parse(label), Binding.parse(effective or label)
    return Receipt(requested, granted, tuple(threads), before, after, team=team)


def test_a_receipt_that_matches_has_nothing_to_say():
    assert receipt().contradictions(cpus={2, 3}, cpu_nodes={1}) == []
    assert receipt(team=Team(1, 1, 1.0)).contradictions(cpus={2, 3}, cpu_nodes={1}) == []
    assert receipt("c*m*").contradictions(cpus={0, 1, 2, 3}, cpu_nodes={0, 1}) == []
    assert receipt("c*m*", "c0-1l*").contradictions(cpus={0, 1, 2, 3}, cpu_nodes={0, 1}) == [], "the same by name"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"effective": "c0m1"}, "CPUs of nodes 1 were requested, and the kernel granted nodes 0."),
        ({"effective": "c1m0"}, "Memory policy bind:1 was requested, and the kernel granted bind:0."),
        ({"effective": "c1m*"}, "Memory policy bind:1 was requested, and the kernel granted default."),
        (
            {"effective": "c1u9m*"},
            "Memory policy bind:1 was requested, and the kernel granted unknown policy 9.",
        ),
        ({"label": "c1m*", "effective": "c1P0-1"}, "default was requested, and the kernel granted preferred-many:0-1."),
        ({"threads": ()}, "No thread was seen computing."),
        ({"team": Team(3, 1)}, "3 threads were requested and 1 computed"),
        ({"team": Team(3, 3, 2.5)}, "3 threads were requested, and a control group grants the time of 2.5 CPUs."),
        ({"threads": [ThreadSeen(7, (0, 2), (0, 2))]}, "Thread 7 computed on CPUs 0, outside the requested CPUs 2-3."),
        (
            {"threads": [ThreadSeen(7, (), (0, 2)), ThreadSeen(8, (), (5,)), THREAD]},
            "2 of 3 threads computed on CPUs 0,5, outside the requested CPUs 2-3.",
        ),
        ({"before": GOOD | {"key": {1: 99, 0: 1}}}, "Pages of key moved during the measurement"),
        ({"after": GOOD | {"output": {0: 3, 1: 1}}}, "3 of 4 pages of output lie on nodes 0 instead of 1."),
        ({"after": GOOD | {"output": {-1: 3, 1: 1}}}, "3 of 4 pages of output were never touched."),
    ],
)
def test_each_contradiction_is_a_sentence(changed, sentence):
    found = receipt(**changed).contradictions(cpus={2, 3}, cpu_nodes={1})
    assert len(found) == 1
    assert sentence in found[0]


def test_under_first_touch_only_k_and_v_lie_where_they_were_touched():
    def told(effective="c0-1m*", **after):
        found = receipt("c0-1f1", effective, before={}, after=GOOD | after)
        return found.contradictions(cpus={0, 1, 2, 3}, cpu_nodes={0, 1})

    assert told(query={0: 2}, output={0: 2, 1: 1}) == []
    assert told(value={0: 3, 1: 97}) == ["3 of 100 pages of value lie on nodes 0 instead of 1."]
    bound = "Memory policy default was requested, and the kernel granted bind:1."
    assert told("c0-1m1") == [bound], "a policy would have put them there, whoever touched"


def test_it_survives_its_columns():
    original = receipt("c0-1i0-1", threads=[ThreadSeen(7, (0, 1, 2), (1,)), ThreadSeen(9, (), (2,))])
    assert Receipt.from_columns(original.to_columns()) == original
    for team in (Team(2, 1), Team(2, 2, 1.5)):
        assert Receipt.from_columns(receipt(team=team).to_columns()).team == team
    assert "seen 1 of 2 threads" in str(receipt(team=Team(2, 1)))
    touched = receipt("c0-1f1", "c0-1m*")
    assert Receipt.from_columns(touched.to_columns()) == touched


def test_the_example_of_the_documentation_is_the_samples():
    root = Path(__file__).parents[2]
    rows = load_run(root / "data/sample/guest")
    chosen = rows.query("label == 'c0m1' and phase == 'decode' and attention == 'gqa' and threads == 2")
    example, page = Receipt.from_columns(chosen.iloc[0]), (root / "docs/proof.md").read_text()
    assert f"\n{example}\n" in page
    shown = json.loads(page.split("```json\n")[1].split("```")[0])
    assert shown == json.loads(example.to_columns()["observed"])
    assert example.contradictions((0, 1), (0,)) == []
