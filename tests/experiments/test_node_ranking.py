import math

from numa_lab import rank_nodes
from numa_lab.nodes import optimal_node
from numa_lab.nodes.rankings import RankedNode, Ranking


def test_the_table_holds_the_ranking(monkeypatch):
    ranking = Ranking((RankedNode(2, 1e-3, 1.0, 1.0, 1.0, 1, "", 8), RankedNode(0, cause="memory nearly full")), 0.01)
    monkeypatch.setattr(optimal_node, "rank", lambda shape, seconds, refresh: ranking)
    table = rank_nodes("llama-3-8b")
    assert list(table.index) == [2, 0]
    assert table.index.name == "node"
    assert table.loc[2, "median_seconds"] == 1e-3
    assert math.isnan(table.loc[0, "ratio"])
    assert table.loc[0, ["tie_group", "cause", "visits"]].tolist() == [2, "memory nearly full", 0]
    assert table.attrs == {"noise_floor": 0.01}
