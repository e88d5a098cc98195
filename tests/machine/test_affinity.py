import json
import os
import platform
import subprocess
import sys
import textwrap

import pytest

import seccomp
from numa_lab.errors import NodeUnavailable
from numa_lab.machine import affinity
from numa_lab.placement import team_replacement


def test_what_the_cpuset_allows_is_found_and_the_mask_comes_back():
    before = os.sched_getaffinity(0)
    affinity.set_cpus({min(before)})
    try:
        with pytest.raises(ZeroDivisionError), team_replacement.Widened() as reachable:
            assert reachable >= before
            assert os.sched_getaffinity(0) == reachable
            raise ZeroDivisionError
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        affinity.give_back(before)
    affinity.give_back({4095})  # as after the cpuset was rewritten: it may stay where it is
    assert os.sched_getaffinity(0) == before
    with pytest.raises(NodeUnavailable, match="CPU 4095"):
        affinity.set_cpus({4095})


REFUSED = """
    import json, sys, warnings
    import torch
    from seccomp import refuse
    refuse(json.loads(sys.argv[1]))
    from numa_lab import NUMAOptimizedGQA, NUMAThreadPool, NodeShardedKVCache
    from numa_lab.machine import doctor
    from numa_lab.placement import memory, pinned_team
    from numa_lab import bind_to_numa_node, get_optimal_numa_node, read_topology
    from numa_lab.nodes import optimal_node
    from numa_lab.attention.gqa import gqa_attention
    from numa_lab.placement.binding import Binding
    from numa_lab.nodes.process_pool import NUMAProcessPool

    node = get_optimal_numa_node()
    cpu = read_topology().cpus_for([node])[0]
    told = {}

    def tell(name, call):
        try:
            told[name] = "", str(call())
        except Exception as error:
            told[name] = type(error).__name__, str(error)

    def bound():
        with Binding((node,)).bind(read_topology()) as granted:
            return granted

    tell("helper", lambda: NUMAOptimizedGQA(node).__enter__())
    tell("compute", lambda: NUMAOptimizedGQA(node).compute(*torch.ones(3, 1, 1, 1, 64)))
    tell("receipt", lambda: NUMAOptimizedGQA(node).receipt())
    tell("pool", NUMAThreadPool)
    tell("cache", lambda: NodeShardedKVCache(1, 1, 64, capacity=64, dtype=torch.float32))
    tell("team", lambda: pinned_team.pinned_team([cpu]).__enter__())
    tell("binding", bound)
    tell("processes", lambda: NUMAProcessPool().shutdown())
    tell("for good", lambda: bind_to_numa_node(node))
    tell("attention", lambda: gqa_attention(*torch.ones(3, 1, 1, 1, 64)).sum().item())
    tell("empty", lambda: memory.empty((9,), torch.uint8, node).fill_(1).sum().item())
    print(json.dumps({"cpu": cpu, "told": told, "findings": doctor.to_json(doctor.examine())}))
"""


@pytest.fixture(scope="module", params=[["sched_setaffinity"], ["sched_setaffinity", "mbind"]], ids=len)
def refused(request):
    if platform.machine() not in seccomp.NUMBERS:
        pytest.skip("system call numbers are known for x86_64 and aarch64")
    command = [sys.executable, "-c", textwrap.dedent(REFUSED), json.dumps(request.param)]
    path = os.pathsep.join([os.path.dirname(seccomp.__file__), *sys.path])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, "the log of a thread, in place of an error"
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "what", ["helper", "compute", "receipt", "pool", "cache", "team", "binding", "processes", "for good"]
)
def test_what_has_to_pin_threads_names_the_call_the_cpu_and_the_fix(refused, what):
    kind, message = refused["told"][what]
    assert kind == "NotPermitted"
    assert "sched_setaffinity (CPU " in message
    assert str(refused["cpu"]) in message
    for fix in ("seccomp=unconfined", "SystemCallFilter=", "process-control", "numactl"):
        assert fix in message


@pytest.mark.parametrize(("what", "answer"), [("attention", "64.0"), ("empty", "9")])
def test_what_needs_no_pinning_works(refused, what, answer):
    assert refused["told"][what] == ["", answer]


def test_doctor_names_it(refused):
    (finding,) = (one for one in refused["findings"] if one["name"] == "affinity_refused")
    assert "refuses sched_setaffinity (Operation not permitted)" in finding["seen"]
    assert "seccomp=unconfined" in finding["fix"]
