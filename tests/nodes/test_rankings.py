import pytest

from numa_lab.nodes import rankings
from numa_lab.nodes.rankings import RankedNode, Ranking

RANKING = Ranking((RankedNode(2, 1e-3, 1.0, 1.0, 1.0, 1, "", 8), RankedNode(0, cause="memory nearly full")), 0.01)


def test_a_ranking_survives_its_file(tmp_path):
    rankings.keep(tmp_path / "ranking.json", RANKING)
    again = rankings.read(tmp_path / "ranking.json", (0, 2))
    assert repr(again) == repr(RANKING), "by their text, since NaN is not equal to NaN"
    assert rankings.read(tmp_path / "ranking.json", (0, 1)) is None, "of other nodes"


@pytest.mark.parametrize(
    "damaged", ["{", "[]", '{"noise_floor": 0, "rows": [{"node": 0}]}', '{"noise_floor": 0, "rows": [1]}']
)
def test_a_damaged_file_is_no_ranking(tmp_path, damaged):
    (tmp_path / "ranking.json").write_text(damaged)
    assert rankings.read(tmp_path / "ranking.json", (0,)) is None


def test_a_ranking_is_told_as_a_table_and_in_a_sentence():
    assert RANKING.render().splitlines()[1:] == [
        "     2        1000.0        1.000   1.000-1.000          1",
        "     0             -            -             -          2  memory nearly full",
    ]
    assert RANKING.sentence() == "Node 2 is the best. Node 0 is not usable (memory nearly full)."
    assert RANKING.require_receipts() == "8 visits: no receipt contradicts its node."
