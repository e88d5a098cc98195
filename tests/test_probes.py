import dataclasses
import json
import os

import numpy as np
import pytest
import torch

from numa_lab import memory, openmp, probes
from numa_lab.topology import read_topology


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lines", [1, 2, 1000, 4097])
def test_every_line_is_read_exactly_once(threads, lines):
    words = torch.arange(lines * 8, dtype=torch.int64) * 7919
    assert probes.read_once(words, threads) == int(words.sum())


def test_a_chase_visits_every_line_before_it_returns():
    following = probes.cycle_through(memory.empty((4096 * 64,), torch.uint8))
    at, seen = 0, set()
    while at not in seen:
        seen.add(at)
        at = int(following[at])
    assert at == 0
    assert seen == set(range(0, 4096 * 8, 8))
    assert probes._chase(following, len(seen)) == 0


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(probes, "BUFFER_BYTES", 64 << 20)
    monkeypatch.setattr(probes, "CACHE_MULTIPLE", 0)
    return read_topology()


def test_probes_are_plausible_and_leave_no_trace(small):
    affinity, threads, seen = os.sched_getaffinity(0), torch.get_num_threads(), []
    found = probes.probe_nodes(small, seconds=0.2, progress=lambda *step: seen.append(step))
    node = small.effective_nodes[0]
    at = small.node_ids.index(node)
    assert 1e8 < found.read_bytes_per_s[at][at] < 1e13
    assert 1 < found.latency_ns[at][at] < 10_000
    assert found.all_nodes_bytes_per_s > 1e8
    assert set(found.pages[node]) == {node}
    assert [step[0] for step in seen] == sorted(step[0] for step in seen)
    assert seen[-1][0] == seen[-1][1]
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (affinity, threads)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["nodes"] == list(small.node_ids)
    assert "GB/s" in probes.render(found)


def test_a_node_without_cpus_has_an_empty_row(small):
    node = small.nodes[0]
    bare = dataclasses.replace(node, id=node.id + 1, cpus=(), memory_bytes=0, free_bytes=0, effective=False)
    topology = dataclasses.replace(small, nodes=(*small.nodes, bare), distances=None)
    found = probes.probe_nodes(topology, seconds=0.1)
    assert found.read_bytes_per_s[-1] == (None,) * len(topology.nodes)
    assert found.latency_ns[0][-1] is None


def test_without_torchs_openmp_its_own_sum_stands_in_and_says_so(monkeypatch):
    monkeypatch.setattr(openmp, "runtime", lambda: None)
    with pytest.warns(UserWarning, match=r"torch\.sum"):
        assert probes.read_bandwidth(torch.from_numpy(np.ones(1 << 20)), 1, seconds=0.01) > 0
