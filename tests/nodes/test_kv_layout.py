import itertools

from numa_lab.nodes.kv_layout import Layout


def test_blocks_go_round_by_weight_and_fill_each_node_from_its_start():
    layout = Layout.of({0: 3.0, 1: 1.0}, block=4, capacity=32)
    assert sorted(layout.owners) == [0] * 6 + [1] * 2
    assert len(set(layout.owners[:4])) == 2, "the smaller share came last"
    for tokens in range(33):
        assert layout.count(0, tokens) + layout.count(1, tokens) == tokens
    places = {node: [] for node in (0, 1)}
    for node, local, start, stop in itertools.chain(layout.ranges(0, 13), layout.ranges(13, 32)):
        assert list(layout.positions(node, local, local + stop - start)) == list(range(start, stop))
        places[node] += range(local, local + stop - start)
    assert all(found == list(range(len(found))) for found in places.values())
