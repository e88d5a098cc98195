import pytest

from numa_lab.measurement.labels import by_number, is_local


@pytest.mark.parametrize(
    ("label", "local"), [("c3m3", True), ("c3m3~aa", True), ("c3m2", False), ("c0-1m0-1", False), ("c*m*", False)]
)
def test_a_node_with_its_own_memory_is_local(label, local):
    assert is_local(label) == local


def test_labels_are_sorted_by_node_number():
    assert sorted(["c10m10", "c2m2", "c2m10"], key=by_number) == ["c2m2", "c2m10", "c10m10"]
