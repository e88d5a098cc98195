import os
import subprocess
import sys
import threading

import pytest
from seat_work import Work

from numa_lab.errors import NodeUnavailable
from numa_lab.machine import libnuma
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes import seats
from numa_lab.nodes.seats import Place, Seats
from numa_lab.placement import openmp
from numa_lab.placement.pinned_team import pinned_team

NODE = read_topology().effective_nodes[0]
CPUS = read_topology().cpus_for([NODE])


@pytest.fixture
def two():
    """Two places on the node that is here, of one core each where there are two."""
    return Place(NODE, CPUS[:1]), Place(NODE, CPUS[-1:])


def state():
    return openmp.team(), openmp.run_on_each(lambda _: libnuma.get_mempolicy(), openmp.threads())


def test_what_lies_at_a_place_is_computed_there_and_threads_are_where_they_were_afterwards(two):
    before, work, own = state(), Work(two), Seats(two)
    for times in range(1, 4):
        own.run(*work.arguments)
        assert work.merges.value == times, "one thread merges"
        assert [rows[:, [0, 1, 3]].tolist() for rows in work.rows] == [[[1, place.cpus[0], times]] for place in two]
        assert state() == before
    with seats.ReservedSeats(two):
        own.run(*work.arguments)
        assert {rows[0, 2] for rows in work.rows} == {libnuma.MPOL_PREFERRED}
    (team, policies), (threads, others) = state(), before
    assert [thread.cpus for thread in team] == [
        thread.cpus for thread in threads
    ]  # some are new, where it was smaller inside
    assert policies == others


def test_who_is_on_no_free_seat_goes_to_one_and_comes_back(two):
    work, own = Work(two[1:]), Seats(two[1:])  # of the second core alone, on which the caller is not
    with pinned_team(CPUS[:1]):
        for _ in range(3):
            own.run(*work.arguments)
            assert os.sched_getaffinity(0) == {CPUS[0]}
    assert work.rows[0].tolist() == [
        [1, CPUS[-1], libnuma.MPOL_PREFERRED if len(CPUS) > 1 else libnuma.MPOL_DEFAULT, 3]
    ]


@pytest.mark.parametrize("threads", [1, 5])
def test_how_many_threads_torch_computes_with_changes_nothing(two, threads):
    work, own, before = Work(two), Seats(two), openmp.threads()
    openmp.set_threads(threads)
    try:
        team = openmp.team(max(threads, 2))
        own.run(*work.arguments)
        assert openmp.team(max(threads, 2)) == team, "threads were ended and started"
    finally:
        openmp.set_threads(before)
    assert [rows[0, 3] for rows in work.rows] == [1, 1]


SMALLER_TEAM = f"""
import torch
from numa_lab.attention.reference import attention
from numa_lab.nodes import kv_cache, kv_segments
from numa_lab.nodes.seats import Place
from numa_lab.placement import openmp

kv_segments.memory.empty = lambda shape, dtype, node, **_: torch.zeros(shape, dtype=dtype)
places = {{1: Place({NODE}, {CPUS[:1]}), 2: Place({NODE}, {CPUS[-1:]})}}
cache = kv_cache.NodeShardedKVCache(1, 2, 64, capacity=600, dtype=torch.float32, teams=places)
query, key, value = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 600, 64), torch.randn(1, 2, 600, 64)
cache.append(key, value)
expected, _ = attention(query, key, value, enable_gqa=True)
torch.testing.assert_close(cache.attend(query).double(), expected, rtol=0, atol=1e-5)
assert len(openmp.team(2)) == 1
"""


def test_a_team_that_openmp_makes_smaller_takes_all_seats_in_turn():
    limited = os.environ | {"OMP_THREAD_LIMIT": "1"}
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", SMALLER_TEAM], env=limited).returncode == 0


def test_a_forked_child_and_its_parent_go_on_alone(two):
    work, own = Work(two), Seats(two)
    own.run(*work.arguments)
    child = os.fork()
    if not child:
        own.run(*work.arguments)
        os._exit(work.merges.value != 2)
    assert os.waitpid(child, 0)[1] == 0
    own.run(*work.arguments)
    assert work.merges.value == 2


def test_threads_have_seats_of_their_own(two):
    found = [seats.seats_of(two)]
    thread = threading.Thread(target=lambda: found.append(seats.seats_of(two)))
    thread.start()
    thread.join()
    assert seats.seats_of(two) is found[0] is not found[1]


def test_inside_of_seats_the_machine_is_as_large_as_outside(two):
    with seats.ReservedSeats(two[:1]):
        assert seats.places() == {NODE: Place(NODE, CPUS)}
        started = subprocess.run(["grep", "Cpus_allowed_list", "/proc/self/status"], capture_output=True, text=True)
    assert started.stdout.split()[1] == format_cpulist(read_topology().cpus_of([NODE]))


def test_places_of_nodes_that_may_not_be_used_are_refused():
    assert seats.places([NODE]) == {NODE: Place(NODE, CPUS)}
    with pytest.raises(NodeUnavailable, match="4095"):
        seats.places([4095])
