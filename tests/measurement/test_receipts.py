import json

from numa_lab.measurement.receipts import contradictions


def test_rows_are_held_against_the_threads_that_they_claim(synthetic_rows):
    rows, cpus = synthetic_rows(("c0m0",)), {0: (0, 1)}
    assert contradictions(rows, cpus) == []
    told = contradictions(rows.assign(threads=rows["threads"] + 1), cpus)
    assert [sentence[:45] for sentence in sorted(told)] == [
        "2 threads were requested and 1 computed: Open", "3 threads were requested and 2 computed: Open",
    ]  # fmt: skip
    short = json.loads(rows["observed"][0]) | {"team": {"asked": 64, "granted": 2, "quota": None}}
    (sentence,) = contradictions(rows.assign(observed=json.dumps(short)), cpus)
    assert sentence.startswith("64 threads were requested and 2 computed")
