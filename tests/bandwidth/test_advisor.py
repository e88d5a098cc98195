import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numa_lab.attention.shapes import preset
from numa_lab.bandwidth import advisor, mlc
from numa_lab.bandwidth.node_bandwidths import NodeBandwidths
from numa_lab.bandwidth.roofline import Roofline
from numa_lab.errors import InvalidInput, RunDirectoryError
from numa_lab.machine.control_groups import MemoryLimit
from numa_lab.measurement.atomic_files import write_json
from numa_lab.placement.binding import Binding

LONG = preset("llama-3-8b", kv_len=131072)
GB = 1e9


def by_label(strategies):
    return {strategy.label: strategy for strategy in strategies}


def machine(bandwidth, together=None, latency=None):
    """Nodes with these bandwidths in GB/s; latencies of two sockets where none are given."""
    count = len(bandwidth)
    far = [[90.0 if c == m else 200.0 for m in range(count)] for c in range(count)]
    rows = tuple(tuple(None if cell is None else cell * GB for cell in row) for row in bandwidth)
    return NodeBandwidths(tuple(range(count)), rows, tuple(map(tuple, latency or far)), together and together * GB)


@pytest.mark.parametrize("name", mlc.PUBLISHED)
def test_every_pair_of_a_published_machine_has_a_strategy_and_best_comes_first(name):
    measured = mlc.published(name)
    advice = advisor.plan_placement(LONG, None, measured)
    pairs = {f"c{c}m{m}" for c in measured.nodes for m in measured.nodes}
    labels = [strategy.label for strategy in advice.strategies]
    assert pairs < set(labels)
    assert len(labels) == len(set(labels))
    seconds = [strategy.seconds for strategy in advice.strategies]
    assert seconds == sorted(seconds)
    everywhere = f"sharded 0-{measured.nodes[-1]}"
    assert advice.best.label == advice.choice.label == everywhere
    assert (advice.best.kind, advice.best.nodes, sum(advice.best.parts)) == ("sharded", measured.nodes, LONG.kv_len)
    told = advice.to_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert {strategy["kind"] for strategy in told["strategies"]} == {"single", "remote", "sharded", "instances"}


def test_cluster_on_die_is_local_before_sibling_before_other_socket():
    found = by_label(Roofline(mlc.published("broadwell")).strategies(LONG))
    local, sibling, other = (found[label].seconds for label in ("c0m0", "c0m1", "c0m2"))
    assert local == LONG.kv_bytes / 36481.7e6
    assert sibling / local == pytest.approx(36481.7 / 18909.5)
    assert local < sibling < other
    assert "another socket's" in found["c0m2"].limit
    assert "another socket's" not in found["c0m1"].limit
    assert found["sharded 0-1"].nodes == (0, 1)  # one socket: half of the machine, and twice one of its nodes
    assert found["sharded 0-1"].seconds == pytest.approx(local / 2, rel=0.01)


def test_a_remote_socket_of_cascadelake_reads_at_030_of_local():
    found = by_label(Roofline(mlc.published("cascadelake")).strategies(LONG))
    assert found["c0m0"].seconds / found["c0m1"].seconds == pytest.approx(0.304, abs=0.001)


def test_eight_nodes_read_eight_times_as_fast_as_one_but_not_more_than_all_reads():
    measured = mlc.published("sapphirerapids")
    found = by_label(Roofline(measured).strategies(LONG))
    together = found["sharded 0-7"]
    assert together.seconds - together.merge_seconds >= LONG.kv_bytes / 491946.4e6 * (1 - 1e-12)
    assert found["c0m0"].seconds / together.seconds == pytest.approx(8, rel=0.01)
    # Half of what is capped stays capped; a socket alone is not.
    capped = dataclasses.replace(measured, all_nodes_bytes_per_s=300e9)
    slower = by_label(Roofline(capped).strategies(LONG))
    assert slower["sharded 0-7"].seconds == pytest.approx(LONG.kv_bytes / 300e9 + together.merge_seconds)
    assert "all nodes reading at once, 300.0 GB/s" in slower["sharded 0-7"].limit
    assert slower["sharded 0-3"] == found["sharded 0-3"]


def test_pairs_that_were_left_out_count_as_those_alike_and_say_so():
    measured = mlc.published("sapphirerapids")
    found = by_label(Roofline(measured).strategies(LONG))
    assert "not measured" in found["c7m7"].limit
    assert found["c7m7"].seconds == pytest.approx(found["c6m6"].seconds, rel=0.01)
    assert 59e9 < LONG.kv_bytes / found["c7m6"].seconds < 62e9
    assert "Not measured: c7m6, c7m7" in " ".join(advisor.plan_placement(LONG, None, measured).notes)


def test_interleaving_is_held_up_by_the_link_between_sockets():
    measured = machine([[100, 25], [25, 100]], 200)
    found = Roofline(measured).interleaved(LONG)
    assert found.seconds - found.merge_seconds == pytest.approx(
        LONG.kv_bytes / 4 / 25e9
    )  # a quarter of all bytes crosses in each direction
    wide = Roofline(machine([[100, 80], [80, 100]], 200)).interleaved(LONG)
    assert wide.seconds - wide.merge_seconds == pytest.approx(LONG.kv_bytes / 200e9)
    # Four nodes: each pair could read its share in time, and the link that they share can't carry them together.
    shared = Roofline(mlc.published("sapphirerapids")).interleaved(LONG)
    assert shared.limit.startswith("socket link from nodes")
    assert shared.seconds > 2 * LONG.kv_bytes / 491946.4e6


def test_a_batch_goes_to_instances_in_whole_sequences():
    measured = machine([[10, 3], [3, 10]])
    one, three, four = (
        by_label(Roofline(measured).strategies(LONG.replace(batch=n)))["instances 0-1"] for n in (1, 3, 4)
    )
    assert one.seconds == by_label(Roofline(measured).strategies(LONG))["c0m0"].seconds
    assert (one.parts, "1 of 2 nodes idle" in one.limit) == ((1, 0), True)
    assert three.seconds == four.seconds == 2 * one.seconds
    assert sorted(three.parts) == [1, 2]
    unequal = by_label(Roofline(machine([[30, 3], [3, 10]])).strategies(LONG.replace(batch=4)))["instances 0-1"]
    assert unequal.parts == (3, 1)


def test_shards_follow_bandwidth_and_the_merge_follows_the_formula():
    measured = machine([[30, 4], [5, 10]])
    found = by_label(Roofline(measured).strategies(LONG))["sharded 0-1"]
    assert found.parts == (98304, 32768)
    merge = 200e-9 + 32 * 129 * 4 / 5e9  # collected by node 1, whose link is the faster
    assert found.merge_seconds == pytest.approx(merge)
    assert found.seconds == pytest.approx(LONG.kv_bytes / 40e9 + merge)
    tiny = by_label(Roofline(measured).strategies(preset("llama-3-8b", kv_len=1)))["sharded 0-1"]
    assert (tiny.parts, tiny.merge_seconds) == ((1, 0), 0)


def test_merging_makes_short_contexts_faster_on_one_node():
    measured = mlc.published("cascadelake")
    short = advisor.plan_placement(preset("llama-3-8b", kv_len=16), None, measured)
    assert short.choice.kind == "single"
    merging = by_label(short.strategies)["sharded 0-1"]
    assert short.interleaved.seconds > short.choice.seconds
    assert merging.limit.startswith("collecting partial results")


def test_a_tie_is_said_and_the_simplest_is_taken():
    measured = machine([[100, 98], [97, 101]])
    advice = advisor.plan_placement(preset("llama-3-8b", kv_len=16), None, measured)
    assert advice.best.label == "c1m1"
    assert advice.choice.label == "c0m0"  # of nodes that tie, none is the winner
    assert {strategy.label for strategy in advice.tied} >= {"c0m0", "c1m1", "c0m1"}
    assert advice.sentence().startswith("A tie within 5%: c0m0, c1m1")
    assert "for steps as short as this, measure" in " ".join(advice.notes)
    clear = advisor.plan_placement(preset("llama-3-8b", kv_len=16), None, machine([[100, 50], [50, 106]]))
    assert [strategy.label for strategy in clear.tied if strategy.kind == "single"] == ["c1m1"]
    batch = advisor.plan_placement(LONG.replace(batch=8), None, mlc.published("broadwell"))
    assert batch.choice.kind == "instances"
    assert "sharded 0-3" in batch.sentence()


def test_first_touch_is_predicted_as_all_cpus_reading_one_node(four_nodes):
    measured = machine([[50, 40, 30, 20]] * 3 + [[None] * 4], 150)
    bindings = [Binding.parse(label) for label in ("c0-2f1", "c0-2m1", "c0-2m*")]
    touched, bound, unknown = advisor.predict_bindings([(b, LONG) for b in bindings], four_nodes, measured)
    assert touched == bound
    assert "memory of node 1" in touched.limit
    assert unknown is None


def test_pages_by_weight_are_predicted_where_the_weights_are_known(four_nodes):
    measured = machine([[100, 50, 50, 50]] * 3 + [[None] * 4])
    binding = Binding.parse("c0w0,1")
    (unknown,) = advisor.predict_bindings([(binding, LONG)], four_nodes, measured)
    (known,) = advisor.predict_bindings([(binding, LONG)], four_nodes, measured, {0: 3, 1: 1})
    assert unknown is None
    assert known.seconds == pytest.approx(
        max(LONG.kv_bytes * 0.75 / 100e9, LONG.kv_bytes * 0.25 / 50e9, LONG.kv_bytes / 100e9)
    )


def test_one_node_has_nothing_to_choose():
    advice = advisor.plan_placement(LONG, None, machine([[20]], 21))
    assert [strategy.label for strategy in advice.strategies] == ["c0m0"]
    assert advice.sentence().startswith("One node: nothing to choose. c0m0")
    assert (advice.interleaved, advice.notes) == (None, ())


def test_nodes_without_cpus_or_memory_leave_others_to_choose():
    # Node 1 has CPUs alone, node 2 memory alone.
    measured = machine([[50, None, 10], [20, None, 8], [None, None, None]])
    advice = advisor.plan_placement(LONG, None, measured)
    assert {strategy.label for strategy in advice.strategies} == {"c0m0", "c0m2", "c1m0", "c1m2"}
    assert advice.choice.label == "c0m0"
    assert advice.interleaved.label == "c0-1i0,2"
    assert "No CPUs read from node 2" in " ".join(advice.notes)
    with pytest.raises(InvalidInput, match="no bandwidth was measured"):
        Roofline(machine([[None]])).strategies(LONG)


def test_a_topology_gives_sockets_and_room_and_what_may_be_used(four_nodes):
    measured = machine([[50, 40, 30, 20]] * 3 + [[None] * 4], 150)
    advice = advisor.plan_placement(LONG, four_nodes, measured)
    assert advice.sockets == ((0, 1, 2, 3),)  # all its CPUs are of one
    assert "sharded 0-2" in by_label(advice.strategies)
    narrow = dataclasses.replace(four_nodes, allowed_cpus=(0, 1), allowed_nodes=(0, 3))
    advice = advisor.plan_placement(LONG, narrow, measured)
    assert {strategy.label for strategy in advice.strategies} == {"c0m0", "c0m3"}
    wide = LONG.replace(batch=4)  # 2 GiB, and each node holds 1
    advice = advisor.plan_placement(wide, four_nodes, measured)
    found = by_label(advice.strategies)
    assert not found["c0m0"].fits
    assert found["c0m0"].limit == "does not fit: 2.1 GB into the 1.1 GB of node 0"
    assert advice.choice.label == "sharded 0-2"
    limits = (MemoryLimit("/sys/fs/cgroup/memory.max", 2 << 30, 0), MemoryLimit("/memory.high", 3 << 29, 0, True))
    limited = dataclasses.replace(four_nodes, memory_limits=limits)
    assert by_label(advisor.plan_placement(LONG, limited, measured).strategies)["c0m0"].fits
    with pytest.raises(
        InvalidInput, match=r"hold 1.1, 1.1, 1.1, 1.1 GB, and a control group lets this process hold 1.6:"
    ):
        advisor.plan_placement(wide, limited, measured)
    (bound,) = advisor.predict_bindings([(Binding.parse("c0-2i0-2"), wide)], limited, measured)
    assert (bound.fits, bound.limit) == (False, "does not fit: 2.1 GB into the 1.6 GB that a control group allows")
    assert advisor.predict_bindings([(Binding.parse("c0u9m0"), wide)], four_nodes, measured) == [None]
    isolated = dataclasses.replace(four_nodes, isolated_cpus=(2, 3))
    assert "sharded 0,2" in by_label(advisor.plan_placement(LONG, isolated, measured).strategies)
    with pytest.raises(InvalidInput, match="fit nowhere"):
        advisor.plan_placement(LONG.replace(batch=64), four_nodes, measured)
    with pytest.raises(InvalidInput, match="measured were nodes 0-1, and the machine has 0-3"):
        advisor.plan_placement(LONG, four_nodes, machine([[2, 1], [1, 2]]))


def test_a_prompt_is_not_predicted():
    with pytest.raises(InvalidInput, match="q_len=16: expected 1"):
        Roofline(machine([[20]])).strategies(preset("llama-3-8b", q_len=16))


def test_a_run_without_probes_says_how_to_add_them(tmp_path, synthetic_machine):
    write_json(tmp_path / "machine.json", synthetic_machine(2).to_json())
    with pytest.raises(RunDirectoryError, match=r"no probes\.json.*sweep --resume"):
        advisor.read_run(tmp_path)
    write_json(tmp_path / "probes.json", {"nodes": [0]})
    with pytest.raises(RunDirectoryError, match=r"probes\.json is damaged, probes without all_nodes"):
        advisor.read_run(tmp_path)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.floats(1, 500), min_size=n, max_size=n), min_size=n, max_size=n)
    ),
    st.integers(1, 40),
    st.integers(1, 5000),
)
@settings(max_examples=60, deadline=None)
def test_no_strategy_beats_the_memory_of_its_nodes_and_nothing_is_lost(bandwidth, batch, kv_len):
    shape = preset("llama-3-8b", batch=batch, kv_len=kv_len)
    for strategy in Roofline(machine(bandwidth)).strategies(shape):
        assert strategy.seconds * sum(map(max, bandwidth)) * GB >= shape.kv_bytes * (1 - 1e-9)
        if strategy.kind == "sharded":
            assert sum(strategy.parts) == kv_len
        if strategy.kind == "instances":
            assert sum(strategy.parts) == batch
            # No other split of whole sequences is done earlier.
            rates = [bandwidth[node][node] for node in strategy.nodes]
            last = max(count / rate for count, rate in zip(strategy.parts, rates, strict=True))
            assert all(
                (count + 1) / rate >= last * (1 - 1e-9) for count, rate in zip(strategy.parts, rates, strict=True)
            )
