import os
import signal
import time
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from numa_lab import gqa_attention
from numa_lab.attention.reference import attention as reference
from numa_lab.errors import NodeUnavailable
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes.process_pool import NUMAProcessPool
from numa_lab.placement import page_location

NODE = read_topology().effective_nodes[0]


@pytest.fixture(scope="module")
def processes():
    with NUMAProcessPool([NODE]) as made:
        yield made


def test_it_is_an_executor_whose_processes_are_on_their_nodes(processes):
    assert isinstance(processes, Executor)
    assert list(processes.map(pow, [2, 3], [5, 2])) == [32, 9]
    with pytest.raises(ZeroDivisionError):
        processes.submit(divmod, 1, 0).result()
    receipt = processes.receipts()[NODE]
    cpus = read_topology().cpus_of([NODE])
    assert receipt.contradictions(cpus, [NODE]) == []
    assert len(receipt.threads) == len(read_topology().cpus_for([NODE]))
    assert processes.submit(os.getpid).result() != os.getpid()


def test_tensors_are_shared_not_copied(processes):
    shared = processes.empty((3, 5), torch.float32, NODE)
    processes.submit(torch.Tensor.add_, shared, 2).result()
    assert (shared == 2).all(), "the process wrote into a copy"
    result = processes.submit(torch.Tensor.mul_, shared, 3).result()
    result[0, 0] = 7
    assert shared[0, 0] == 7, "the result is a copy"


def test_attention_is_computed_where_its_tensors_lie(processes):
    query, key, value = torch.randn(1, 4, 1, 64), *torch.randn(2, 1, 2, 99, 64)
    key, value = processes.scatter([key, value])
    assert page_location.home(key) == page_location.home(value) == NODE
    output = processes.submit(gqa_attention, query, key, value, enable_gqa=True).result()
    torch.testing.assert_close(output.double(), reference(query, key, value, enable_gqa=True)[0], rtol=0, atol=1e-5)


def test_a_killed_process_is_told_and_started_anew_on_request(processes):
    victim = processes.submit(os.getpid).result()
    working = processes.submit(time.sleep, 3600)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        working.result(timeout=600)
    with pytest.raises(BrokenProcessPool):
        processes.submit(os.getpid)
    processes.restart(NODE)
    assert processes.submit(os.getpid).result() != victim


def test_what_makes_no_sense_is_refused(processes):
    with pytest.raises(NodeUnavailable, match="this pool has processes on nodes"):
        processes.submit(print, numa_node=77)
    with pytest.raises(NodeUnavailable, match="77"):
        NUMAProcessPool([77])
    closed = NUMAProcessPool([NODE])
    closed.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        closed.submit(print)
