import dataclasses
import functools
import itertools
import json
import os
import threading

import numpy as np
import pytest
import torch

from numa_lab.attention import vectors
from numa_lab.bandwidth import node_probes, read_probe
from numa_lab.errors import InvalidInput, NumaLabError
from numa_lab.machine.control_groups import MemoryLimit
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import memory, openmp, page_location


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("words", [1, 7, 8, 17, 8001, 4097 * 8])
def test_every_byte_is_read_exactly_once(threads, words):
    block = torch.full((words + 2,), 1 << 40)  # reading past either end shows in the sum
    tensor = block[1:-1]
    tensor.copy_(torch.arange(words) * 7919 + 3)
    assert read_probe.read_once(tensor, threads) == int(tensor.sum())


def test_the_read_loop_serves_a_cpu_whose_vectors_are_not_known(monkeypatch):
    monkeypatch.setattr(vectors, "host", lambda: None)
    monkeypatch.setattr(read_probe, "_team_body", functools.cache(read_probe._team_body.__wrapped__))
    test_every_byte_is_read_exactly_once(8001, 2)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(8).expand(1 << 10, 8),  # its nbytes exceed its storage
        torch.ones(64, 64).t(),
        torch.ones(0),
        torch.ones(7, dtype=torch.bfloat16),
        torch.ones(10, dtype=torch.bfloat16)[1:9],
    ],
)
def test_a_tensor_that_the_compiled_loop_would_misread_is_refused(tensor):
    with pytest.raises(InvalidInput, match="contiguous"):
        read_probe.read_bandwidth(tensor, 1)
    with pytest.raises(InvalidInput, match="threads=0"):
        read_probe.read_bandwidth(torch.ones(64), 0)


def test_a_chase_visits_every_line_before_it_returns():
    following = read_probe.cycle_through(memory.empty((4096 * 64,), torch.uint8))
    at, seen = 0, set()
    while at not in seen:
        seen.add(at)
        at = int(following[at])
    assert at == 0
    assert seen == set(range(0, 4096 * 8, 8))
    assert read_probe._chase(following, np.uint64(0), len(seen)) == 0


def test_chases_never_repeat_lines_that_a_cache_may_hold(monkeypatch):
    following = read_probe.cycle_through(memory.empty((4096 * 64,), torch.uint8))
    starts, chase = [], read_probe._chase
    monkeypatch.setattr(
        read_probe, "_chase", lambda f, at, steps: (starts.append((int(at), steps)), chase(f, at, steps))[1]
    )
    read_probe.read_latency(following, start_line=5, loads=100)
    (begin, _), *timed = starts
    assert begin == timed[0][0] == 40
    for (at, steps), (following_at, _) in itertools.pairwise(timed):
        assert following_at == chase(following, np.uint64(at), steps)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(node_probes, "BUFFER_BYTES", 32 << 20)
    monkeypatch.setattr(node_probes, "CHASE_BYTES", 8 << 20)
    monkeypatch.setattr(node_probes, "CACHE_MULTIPLE", 0)
    monkeypatch.setattr(node_probes, "CHASE_CACHE_MULTIPLE", 0)
    return read_topology()


@pytest.fixture
def three_nodes(small, monkeypatch):
    """This machine's first two cores as nodes 0 and 1, memory alone as node 2; where pages lie is pretended."""
    cores = small.physical_cores(small.allowed_cpus)[:2]
    if len(cores) < 2:
        pytest.skip("two teams at once need two cores")
    where = {}

    def empty(shape, dtype, node):
        tensor = torch.empty(shape, dtype=dtype)
        where[tensor.data_ptr()] = node
        return tensor

    monkeypatch.setattr(memory, "empty", empty)
    monkeypatch.setattr(page_location, "locate", lambda tensor: {where[tensor.data_ptr()]: 16384})
    nodes = tuple(
        dataclasses.replace(small.nodes[0], id=number, cpus=cpus, available_bytes=1 << 30)
        for number, cpus in enumerate([cores[:1], cores[1:], ()])
    )
    cpus = tuple(dataclasses.replace(cpu, node=cores.index(cpu.id)) for cpu in small.cpus if cpu.id in cores)
    return dataclasses.replace(
        small, nodes=nodes, cpus=cpus, allowed_cpus=cores, allowed_nodes=(0, 1, 2), distances=None
    )


def state():
    """Affinity and thread count of this thread, and the thread count that a later thread begins with."""
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return os.sched_getaffinity(0), torch.get_num_threads(), later


def test_this_machine_is_probed_plausibly_within_its_time(small, monkeypatch):
    before, seen, given = state(), [], []
    read_bandwidth = node_probes.read_bandwidth

    def noted(*arguments, seconds):
        given.append(seconds)
        return read_bandwidth(*arguments, seconds=seconds)

    monkeypatch.setattr(node_probes, "read_bandwidth", noted)
    found = node_probes.probe_nodes(small, seconds=1.0, progress=lambda *step: seen.append(step))
    cells = seen[-1][1] - 1  # besides all nodes at once
    assert 0 < sum(given[:cells]) <= 1 + cells * node_probes.MIN_CELL_SECONDS
    node = small.effective_nodes[0]
    at = small.node_ids.index(node)
    assert 5e8 < found.read_bytes_per_s[at][at] < 1e13
    assert 1 < found.latency_ns[at][at] < 10_000
    assert found.all_nodes_bytes_per_s > 5e8
    assert set(found.pages[node]) == {node}
    assert [step[0] for step in seen] == sorted(step[0] for step in seen)
    assert seen[-1][0] == seen[-1][1]
    assert state() == before


def test_a_node_without_cpus_has_an_empty_row_and_the_json_is_strict(three_nodes):
    before = state()
    found = node_probes.probe_nodes(three_nodes, seconds=0.1)
    for matrix in (found.read_bytes_per_s, found.latency_ns):
        assert all(value > 0 for row in matrix[:2] for value in row)
        assert matrix[2] == (None, None, None)
    assert found.threads == (1, 1, 0)
    assert found.all_nodes_bytes_per_s > 0
    assert state() == before  # the leaders overlapped
    plain = found.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["pages"] == {"0": {"0": 16384}, "1": {"1": 16384}, "2": {"2": 16384}}
    assert set(plain) == {
        "nodes", "read_bytes_per_s", "latency_ns", "all_nodes_bytes_per_s", "threads", "pages", "notes", "seconds",
    }  # fmt: skip
    with pytest.raises(ValueError, match="not JSON compliant"):
        dataclasses.replace(found, seconds=float("nan")).to_json()


def test_memory_that_lies_elsewhere_or_is_full_gives_nulls_and_says_why(three_nodes, monkeypatch):
    monkeypatch.setattr(page_location, "locate", lambda tensor: {0: 16384})
    full = dataclasses.replace(three_nodes.nodes[2], available_bytes=1 << 20)
    topology = dataclasses.replace(three_nodes, nodes=(*three_nodes.nodes[:2], full))
    found = node_probes.probe_nodes(topology, seconds=0.1)
    assert [[value is None for value in row] for row in found.read_bytes_per_s[:2]] == [[False, True, True]] * 2
    assert found.pages == {0: {0: 16384}, 1: {0: 16384}}
    assert "node 1 was not measured: the pages of its buffer lie on nodes {0: 16384}" in found.notes[0]
    assert "node 2 was not measured: 1048576 bytes" in found.notes[1]
    assert all(note in node_probes.render(found) for note in found.notes)


def test_a_smaller_buffer_is_noted(three_nodes):
    small = dataclasses.replace(three_nodes.nodes[0], available_bytes=32 << 20)
    topology = dataclasses.replace(three_nodes, nodes=(small,), allowed_nodes=(0,), allowed_cpus=small.cpus)
    assert "buffer of 16 MiB instead of 32 MiB" in node_probes.probe_nodes(topology, seconds=0.1).notes[0]


def test_what_a_control_group_leaves_is_shared_by_buffers_that_are_filled_at_once(three_nodes):
    limit = MemoryLimit("/sys/fs/cgroup/memory.max", 1 << 30, 64 << 20)
    found = node_probes.probe_nodes(dataclasses.replace(three_nodes, memory_limits=(limit,)), seconds=0.1)
    assert found.notes == tuple(
        f"Node {node}: buffer of 16 MiB instead of 32 MiB, half of its available memory; caches may hold part of it."
        for node in (0, 1)
    )


def test_state_comes_back_after_an_error(three_nodes, monkeypatch):
    def fail(*_args, **_options):
        raise ZeroDivisionError

    before = state()
    monkeypatch.setattr(node_probes, "read_latency", fail)
    with pytest.raises(ZeroDivisionError):
        node_probes.probe_nodes(three_nodes, seconds=0.1)
    assert state() == before


def test_one_nodes_error_ends_the_leaders_of_all(three_nodes, monkeypatch):
    before, fill = state(), node_probes._buffer

    def lacking(topology, node, *rest):
        if node == 1:
            raise ZeroDivisionError
        return fill(topology, node, *rest)

    monkeypatch.setattr(node_probes, "_buffer", lacking)
    with pytest.raises(ZeroDivisionError):
        node_probes._all_at_once(three_nodes, [0, 1], {0: three_nodes.nodes[0].cpus, 1: three_nodes.nodes[1].cpus}, 0.1)
    assert state() == before


def test_a_process_without_memory_is_told_so(small):
    with pytest.raises(NumaLabError, match="nothing to probe"):
        node_probes.probe_nodes(dataclasses.replace(small, allowed_nodes=()))


@pytest.mark.filterwarnings("ignore:torch's OpenMP library was not found")
def test_without_torchs_openmp_its_own_sum_stands_in_and_says_so(small, monkeypatch):
    monkeypatch.setattr(openmp, "runtime", lambda: None)
    with pytest.warns(UserWarning, match=r"torch\.sum"):
        assert read_probe.read_bandwidth(torch.ones(1 << 20), 1, seconds=0.01) > 0
    found = node_probes.probe_nodes(small, seconds=0.1)
    assert "torch.sum was timed" in found.notes[0]
    assert found.all_nodes_bytes_per_s > 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_time_that_makes_no_sense_is_refused(seconds):
    with pytest.raises(InvalidInput, match=f"seconds={seconds}: expected a positive time"):
        node_probes.probe_nodes(read_topology(), seconds=seconds)
