import pytest
from hypothesis import given
from hypothesis import strategies as st

from numa_lab.limits import Limits
from numa_lab.measured import Measured, socket_groups
from numa_lab.stealing import Reads, seconds_saved

GB = 10**9


def limits(bandwidth, together=None):
    """Nodes with these bandwidths in GB/s, each a socket of its own."""
    measured = Measured(
        tuple(range(len(bandwidth))),
        tuple(tuple(None if cell is None else cell * 1e9 for cell in row) for row in bandwidth),
        None,
        together and together * 1e9,
    )
    return Limits(measured, socket_groups(measured))


SLOW_CPUS = limits([[25, 25], [50, 100]])  # of node 0, whose memory node 1 reads at 50 over the link


def test_slow_cpus_are_helped_up_to_what_their_memory_can_do():
    assert seconds_saved(SLOW_CPUS, {0: 4 * GB}, {0}, 1, Reads(0, GB)) == pytest.approx(4 / 25 - 4 / 50)
    assert seconds_saved(SLOW_CPUS, {1: 4 * GB}, {1}, 0, Reads(1, GB)) == 0, "node 1 is at its memory's limit"
    assert seconds_saved(limits([[100, 60], [90, 100]]), {0: 9 * GB}, {0}, 1, Reads(0, GB)) == 0


def test_a_gain_within_a_tie_is_none():
    for best, pays in ((26, False), (27, True)):
        machine = limits([[25, 10], [best, 100]])
        assert bool(seconds_saved(machine, {0: 9 * GB}, {0}, 1, Reads(0, GB))) == pays


def test_a_long_queue_is_helped_although_one_input_of_it_is_nothing():
    assert seconds_saved(SLOW_CPUS, {0: 1000 * GB}, {0}, 1, Reads(0, GB)) == pytest.approx(1000 / 50)


def test_a_slow_helper_takes_no_input_that_it_would_finish_last():
    machine = limits([[50, 10, 10], [10, 100, 10], [100, 10, 100]])
    assert seconds_saved(machine, {0: 2 * GB}, {0}, 1, Reads(0, GB)) == 0, "a tenth of a second instead of 2 / 50"
    assert seconds_saved(machine, {0: 100 * GB}, {0}, 1, Reads(0, GB)) == pytest.approx(100 / 50 - 100 / 60)


def test_who_helps_already_counts():
    machine = limits([[25, 25, 25], [25, 100, 25], [50, 25, 100]])
    load, last = {0: 8 * GB}, Reads(0, GB)
    assert seconds_saved(machine, load, {0}, 1, last)
    assert seconds_saved(machine, load, {0, 1}, 2, last) == 0, "two nodes reach the 50 GB/s of its memory"
    assert seconds_saved(machine, load, {0, 1}, 1, last) == 0, "all its CPUs count already"


def test_a_node_that_has_work_of_its_own_does_not_help():
    assert seconds_saved(SLOW_CPUS, {0: GB}, {0}, 1, Reads(0, GB), own={1: GB})
    assert seconds_saved(SLOW_CPUS, {0: GB}, {0}, 1, Reads(0, GB), own={1: 4 * GB}) == 0


def test_memory_without_cpus_is_taken_off_a_node_that_reads_its_own():
    # Node 0 can read 100 GB/s in all, of which the memory of node 2 could give it 60, as it could give node 1.
    machine = limits([[100, 20, 60], [20, 100, 60], [None, None, None]])
    load = {0: 6 * GB, 2: 6 * GB}
    assert seconds_saved(machine, {2: 6 * GB}, {0}, 1, Reads(2, GB)) == 0
    assert seconds_saved(machine, load, {0}, 1, Reads(2, GB)) > 0


@given(
    st.integers(2, 5).flatmap(
        lambda n: st.lists(st.lists(st.floats(1, 500), min_size=n, max_size=n), min_size=n, max_size=n)
    ),
    st.integers(1, 50),
)
def test_no_help_makes_memory_faster_than_it_was_ever_seen(bandwidth, inputs):
    machine, load = limits(bandwidth), {0: inputs * GB}
    without, least = machine.seconds({(0, 0): inputs * GB}), inputs / max(row[0] for row in bandwidth)
    for thief in range(1, len(bandwidth)):
        saved = seconds_saved(machine, load, {0}, thief, Reads(0, GB))
        assert saved == 0 or saved > without * 0.04
        assert without - saved >= least * (1 - 1e-9)
