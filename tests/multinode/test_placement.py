"""Under each binding every computing thread and every page is where the receipt says; two sockets of two nodes."""

import os
import threading

import pytest
import torch
from seat_work import Work

from multinode import witness
from numa_lab.attention.reference import attention as reference
from numa_lab.attention.shapes import preset
from numa_lab.bandwidth.node_bandwidths import NodeBandwidths
from numa_lab.errors import InvalidInput, NodeUnavailable
from numa_lab.experiments import execution, node_scaling
from numa_lab.machine import libnuma
from numa_lab.machine.topology_reader import read_topology
from numa_lab.measurement import case_timing
from numa_lab.measurement.case_timing import KVPool, sample_case
from numa_lab.measurement.workloads import Case
from numa_lab.nodes import seats
from numa_lab.nodes.kv_cache import NodeShardedKVCache
from numa_lab.nodes.one_node import NUMAOptimizedGQA
from numa_lab.nodes.process_pool import NUMAProcessPool
from numa_lab.nodes.thread_pool import NUMAThreadPool, node_of
from numa_lab.placement import memory, openmp, page_location, pinned_team
from numa_lab.placement.binding import Binding
from numa_lab.placement.receipt import Receipt

MIB = 1 << 20
SHAPE = preset("llama-3-8b", kv_len=64)


@pytest.fixture(scope="module")
def topology():
    return read_topology()


@pytest.fixture
def weights():
    """Three pages in turn for node 0 and one for each other."""
    before = {node: (libnuma.WEIGHTS / f"node{node}").read_text() for node in range(4)}
    for node in before:
        (libnuma.WEIGHTS / f"node{node}").write_text("3" if node == 0 else "1")
    yield
    for node, weight in before.items():
        (libnuma.WEIGHTS / f"node{node}").write_text(weight)


def small(count=256):
    """Fresh base pages, touched by this thread."""
    return memory.empty((count * memory.PAGE_BYTES,), torch.uint8, huge_pages=False).fill_(1)


@pytest.mark.guest("two-sockets")
@pytest.mark.parametrize("born", ["before", "after"])
@pytest.mark.parametrize("label", ["c0m0", "c1m3", "c0-2i0-2", "c1w0,2", "c2p1"])
def test_threads_and_pages_are_where_the_receipt_says(monkeypatch, topology, label, born):
    binding = Binding.parse(label)
    cpus = topology.cpus_of(binding.cpu_nodes)
    if born == "before":
        openmp.set_threads(6)
        torch.randn(256, 256) @ torch.randn(256, 256)

    checked = []

    def locate(tensor, locate=page_location.locate):
        found = locate(tensor)
        assert found == witness.pages(tensor)
        assert all(witness.pages_of_mapping(tensor)[node] >= count for node, count in found.items() if node >= 0)
        checked.append(tensor)
        return found

    monkeypatch.setattr(case_timing.page_location, "locate", locate)
    with binding.bind(topology) as granted, pinned_team.pinned_team(cpus, libnuma.get_mempolicy()) as pinned:
        assert granted == binding
        assert len(pinned) == len(cpus)
        pool = KVPool(8 * MIB)
        with witness.Threads() as threads:
            rows = sample_case(
                Case(SHAPE, len(cpus)), pool, requested=binding, granted=granted, topology=topology, backend="auto",
                seconds=0.5, identity={"label": label},
            )  # fmt: skip
    receipt = Receipt.from_columns(rows[0])
    # The few pages of the output come from malloc, which may have them from elsewhere: the receipt tells it, as it should.
    assert [told for told in receipt.contradictions(cpus, binding.cpu_nodes) if "pages of output lie" not in told] == []
    assert len(checked) == 7, "key, value and query before and after, and the output"
    computing = {thread.tid: thread for thread in receipt.threads}
    assert {thread.tid for thread in pinned} >= computing.keys() >= {pinned[0].tid}
    for tid, seen in threads.ran.items():
        assert seen <= set(cpus), f"thread {tid} was seen on {seen}, with mask {threads.masks[tid]}"
        assert len(threads.masks[tid]) == 1 or tid not in computing
    assert threads.ran.keys() >= computing.keys()


@pytest.mark.guest("two-sockets")
@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("c0m3", {3: 256}),
        ("c2p1", {1: 256}),
        ("c0i1,2", {1: 128, 2: 128}),
        ("c1w0,2", {0: 192, 2: 64}),
        ("c1m*", {1: 256}),
    ],
)
@pytest.mark.usefixtures("weights")
def test_each_policy_sends_new_pages_where_it_says(topology, label, expected):
    with Binding.parse(label).bind(topology):
        tensor = small()
    assert page_location.locate(tensor) == expected == witness.pages(tensor)


@pytest.mark.guest("two-sockets")
@pytest.mark.parametrize("node", [1, 2])
def test_k_and_v_lie_where_one_thread_touched_them_first(topology, node):
    label = f"c0-2f{node}"
    cpus = topology.cpus_of([0, 1, 2])
    identity = {"label": label, "binding": label}
    with Binding.parse(label).bind(topology) as granted:
        assert str(granted) == "c0-2m*"
        pool = execution.start(profile="smoke", preset="llama-3-8b", kv_len=512, execution=identity).pool()
        assert witness.pages(pool.buffer) == {node: pool.buffer.nbytes // witness.PAGE}
        with pinned_team.pinned_team(cpus):
            rows = sample_case(
                Case(SHAPE, len(cpus)), pool, requested=Binding.parse(label), granted=granted, topology=topology,
                backend="auto", seconds=0.3, identity=identity,
            )  # fmt: skip
    assert Receipt.from_columns(rows[0]).contradictions(cpus, (0, 1, 2)) == []
    assert witness.pages(pool.buffer).keys() == {node}


@pytest.mark.guest("two-sockets")
@pytest.mark.parametrize("placed_by", ["mbind", "first touch"])
@pytest.mark.usefixtures("weights")
def test_tensors_are_interleaved_by_turn_and_by_weight(monkeypatch, placed_by):
    monkeypatch.setattr(memory, "placer", lambda: placed_by)

    def laid(**options):
        tensor = memory.interleaved((8 * MIB,), torch.uint8, **options).fill_(1)
        assert page_location.locate(tensor) == witness.pages(tensor)
        return page_location.locate(tensor)

    assert laid(nodes=[0, 3], huge_pages=False) == {0: 1024, 3: 1024}
    assert laid(nodes=[0, 3]) == {0: 1024, 3: 1024}, "2 MiB in turn"
    assert laid(huge_pages=False) == dict.fromkeys(range(4), 512)
    assert laid(nodes=[0, 1], weighted=True, huge_pages=False) == {0: 1536, 1: 512}


@pytest.mark.guest("two-sockets")
def test_tensors_lie_on_each_node_also_on_one_without_cpus():
    for node in range(4):
        tensor = memory.empty((6 * MIB,), torch.uint8, node).fill_(1)
        assert page_location.locate(tensor) == witness.pages(tensor) == witness.pages_of_mapping(tensor) == {node: 1536}
        assert page_location.home(tensor) == node
        assert 0 < page_location.huge_page_share(tensor) <= 1


@pytest.mark.guest("two-sockets")
def test_memory_recycled_from_another_node_is_found_and_moved(topology):
    openmp.set_threads(1)  # other threads of the team are not bound, and would touch pages on their own nodes
    torch.empty(4 * MIB, dtype=torch.uint8).fill_(1)  # once freed, malloc keeps blocks of this size for itself
    with Binding.parse("c0m0").bind(topology):
        old, guard = torch.empty(3 * MIB, dtype=torch.uint8).fill_(1), torch.empty(2 * MIB, dtype=torch.uint8).fill_(1)
    del old
    with Binding.parse("c2m2").bind(topology):
        recycled = torch.empty(2 * MIB, dtype=torch.uint8).fill_(7)
    assert page_location.locate(recycled).get(0, 0) > 400, "bound to node 2, and yet on node 0"
    moved = page_location.migrate(recycled, 2)
    assert moved == witness.pages(recycled) == {2: sum(moved.values())}
    assert page_location.locate(guard).keys() - {2} == {0}, "the neighbour stays, but for the page that it shares"
    assert bool((recycled == 7).all())


@pytest.mark.guest("two-sockets")
def test_a_tensor_in_use_is_moved_there_and_back():
    tensor = memory.empty((64 * MIB,), torch.uint8, 0).fill_(1)
    end = threading.Event()

    def use():
        while not end.is_set():
            tensor.add_(1)

    user = threading.Thread(target=use)
    user.start()
    try:
        for node in (2, 3, 0):
            assert page_location.migrate(tensor, node) == witness.pages(tensor) == {node: 16384}
    finally:
        end.set()
        user.join()


@pytest.mark.guest("two-sockets")
def test_what_a_node_can_not_hold_is_refused_with_the_numbers(topology):
    refused = r"node 3 has [\d,]+ MiB available and 700 MiB were asked for"
    with pytest.raises(NodeUnavailable, match=refused):
        memory.empty((700 * MIB,), torch.uint8, 3)
    with pytest.raises(NodeUnavailable, match=r"node 2 has [\d,]+ MiB available and 4,096 MiB"):
        NUMAOptimizedGQA(2).memory_pool({"key": (4096 * MIB,)}, torch.uint8)
    with Binding.parse("c0m3").bind(topology), pytest.raises(NodeUnavailable, match="bound to nodes 3, which have"):
        KVPool(700 * MIB)
    with pytest.raises(NodeUnavailable, match="node 3 has"):
        page_location.migrate(memory.empty((700 * MIB,), torch.uint8, 0).fill_(1), 3)


@pytest.mark.guest("two-sockets")
def test_two_teams_at_once_do_not_disturb_each_other(topology):
    together, wrong = threading.Barrier(2), []

    def work(node, other):
        cpus = topology.cpus_of([node])
        for turn in range(20):
            together.wait()
            with pinned_team.pinned_team(cpus, (libnuma.MPOL_BIND, [other])):
                masks = [thread.cpus for thread in openmp.team()]
                tensor = small(64)
                policies = set(openmp.run_on_each(lambda _number: libnuma.get_mempolicy(), len(cpus)))
            found = masks, witness.pages(tensor), policies
            if found != ([{cpu} for cpu in cpus], {other: 64}, {(libnuma.MPOL_BIND, frozenset({other}))}):
                wrong.append((node, turn, found))

    threads = [threading.Thread(target=work, args=pair) for pair in ((0, 1), (2, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.guest("two-sockets")
def test_helpers_nest_over_nodes_and_give_everything_back():
    def state():
        return openmp.threads(), openmp.run_on_each(lambda _number: (openmp.team(1), libnuma.get_mempolicy()), 2)

    before = state()
    outer, inner = NUMAOptimizedGQA(0), NUMAOptimizedGQA(2)
    with outer:
        within = state()
        with pytest.raises(ZeroDivisionError), inner:
            assert witness.pages(small(16)) == {2: 16}
            raise ZeroDivisionError
        assert state() == within
        assert witness.pages(small(16)) == {0: 16}
    assert state() == before


@pytest.mark.guest("two-sockets")
def test_a_node_without_cpus_is_no_place_to_compute(topology):
    assert topology.effective_nodes == (0, 1, 2)
    with pytest.raises(NodeUnavailable, match="0-2"):
        NUMAOptimizedGQA(3)
    with pytest.raises(NodeUnavailable, match="node 3 has no CPUs"):
        Binding.parse("c3m3").require(topology)
    with NUMAThreadPool() as pool:
        assert pool.nodes == (0, 1, 2)
        for node, receipt in pool.receipts().items():
            assert receipt.contradictions(topology.cpus_of([node]), [node]) == []
            assert receipt.notes == ()
        keys = pool.scatter([torch.ones(1 << 16) for _ in range(6)])
        assert [page_location.home(key) for key in keys] == [0, 1, 2, 0, 1, 2]
        far = memory.empty((MIB,), torch.uint8, 3).fill_(1)
        assert node_of((far,), pool.nodes, topology) == 2, "the nearest with CPUs"
    with pytest.raises(InvalidInput, match="1 to 2"):
        NUMAThreadPool(3)


@pytest.mark.guest("two-sockets")
def test_one_sequence_lies_on_all_nodes_and_each_reads_its_own(topology):
    cache = NodeShardedKVCache(1, 2, 64, capacity=4096, dtype=torch.float32, block=64, weights={0: 2, 1: 1, 2: 1})
    assert cache.nodes == (0, 1, 2)  # node 3 has no CPUs
    key, value = torch.randn(2, 1, 2, 3000, 64)
    cache.append(key[:, :, :2000], value[:, :, :2000])

    def lie():
        return {node: witness.pages(cache._memory.segments[0].keys[node]) for node in cache.nodes}

    first = lie()
    assert all(pages.keys() <= {node, -1} for node, pages in first.items())
    assert first[0][0] > 1.5 * max(first[node][node] for node in (1, 2))
    query = torch.randn(1, 8, 1, 64)
    with cache, witness.Threads() as threads:
        for _ in range(20):
            output = cache.attend(query)
    expected, _ = reference(query, key[:, :, :2000], value[:, :, :2000], enable_gqa=True)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    for node, receipt in cache.receipts().items():
        cpus = topology.cpus_of([node])
        assert receipt.contradictions(cpus, [node]) == []
        assert len(receipt.threads) == len(cpus)
        for thread in receipt.threads:
            assert threads.ran.get(thread.tid, set()) <= set(cpus)
        assert any(thread.tid in threads.ran for thread in receipt.threads), f"nothing ran on node {node}"
    cache.append(key[:, :, 2000:], value[:, :, 2000:])
    for node, pages in lie().items():
        assert pages.keys() <= {node, -1}
        assert pages[node] >= first[node][node], "growth moved pages"


@pytest.mark.guest("two-sockets")
def test_what_a_step_has_to_do_at_a_node_is_done_on_its_cpus(topology):
    places = tuple(seats.places().values())
    assert [place.cpus for place in places] == [(0, 1), (2, 3), (4, 5)]
    work, own, before = Work(places), seats.Seats(places), openmp.team()
    for times in range(1, 6):
        own.run(*work.arguments)
        for place, rows in zip(places, work.rows, strict=True):
            assert rows[:, [0, 3]].tolist() == [[2, times]] * 2, "each seat computed once"
            assert set(rows[:, 1]) <= set(topology.cpus_of([place.node]))
        assert work.merges.value == times
        assert openmp.team() == before


@pytest.mark.guest("two-sockets")
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_any_number_of_kv_heads_is_split_also_over_memory_without_cpus(topology, kv_heads):
    cache = NodeShardedKVCache(2, kv_heads, 32, capacity=500, dtype=torch.bfloat16, nodes=[0, 1, 2, 3], block=32)
    key, value = torch.randn(2, 2, kv_heads, 440, 32).bfloat16()
    cache.append(key, value)
    for node in cache.nodes:
        for segment in cache._memory.segments:
            assert witness.pages(segment.keys[node]).keys() <= {node, -1}
    query = torch.randn(2, 2 * kv_heads, 1, 32).bfloat16()
    output = cache.attend(query)
    expected, _ = reference(query, key, value, enable_gqa=True)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-2)
    readers = {0: 0, 1: 1, 2: 2, 3: 2}  # node 3 has memory alone, and node 2 is next to it
    for node, receipt in cache.receipts().items():
        assert receipt.contradictions(topology.cpus_of([readers[node]]), [readers[node]]) == []
        assert receipt.pages_after["key"].keys() == {node}


@pytest.mark.guest("two-sockets")
def test_two_caches_at_once_use_the_same_teams():
    wrong = []

    def decode(seed):
        generator = torch.Generator().manual_seed(seed)
        cache = NodeShardedKVCache(1, 2, 32, capacity=300, dtype=torch.float32, block=16)
        key, value = torch.randn(2, 1, 2, 300, 32, generator=generator)
        cache.append(key[:, :, :200], value[:, :, :200])
        for length in range(201, 260):
            cache.append(key[:, :, length - 1 : length], value[:, :, length - 1 : length])
            query = torch.randn(1, 4, 1, 32, generator=generator)
            expected, _ = reference(query, key[:, :, :length], value[:, :, :length], enable_gqa=True)
            if (cache.attend(query) - expected).abs().max() > 1e-5:
                wrong.append((seed, length))

    threads = [threading.Thread(target=decode, args=[seed]) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.guest("two-sockets", seconds=300)
def test_work_grows_over_nodes_each_where_it_lies(monkeypatch):
    monkeypatch.setattr(node_scaling, "MIN_BLOCKS", 1)
    monkeypatch.setattr(node_scaling, "VISIT_SECONDS", 0.0)
    rates = tuple(tuple(1e9 if cpu == mem else 5e8 for mem in range(4)) if cpu < 3 else (None,) * 4 for cpu in range(4))
    measured = NodeBandwidths((0, 1, 2, 3), rates, None, 3e9)
    rows = node_scaling.measure(SHAPE, inputs_per_node=1, seconds=0.01, measured=measured)
    assert len(rows) == len(node_scaling.arms_of(3)) == 12
    assert "10 visits: every thread ran" in node_scaling.require_placed(rows)
    assert (rows["predicted"].isna() == (rows["nodes"] == 0)).all()


@pytest.mark.guest("two-sockets")
def test_the_pool_moves_inputs_to_the_nodes_that_compute_them():
    size = (1, 2, 256, 64)
    keys, values = (
        [memory.empty(size, torch.float32, 3, huge_pages=False).normal_() for _ in range(4)] for _ in range(2)
    )
    queries = [torch.randn(1, 4, 1, 64) for _ in keys]
    with NUMAThreadPool(on_remote="migrate") as threads:
        outputs = threads.parallel_gqa_compute(queries, keys, values)
        notes = [note for receipt in threads.receipts().values() for note in receipt.notes]
    assert sum(int(note.removeprefix("inputs migrated: ")) for note in notes) == 4
    for query, key, value, output in zip(queries, keys, values, outputs, strict=True):
        (home,) = witness.pages(key)
        assert witness.pages(value).keys() == {home} < {0, 1, 2, 3}
        assert home != 3, "it lies where no CPUs are"
        torch.testing.assert_close(output.double(), reference(query, key, value, enable_gqa=True)[0], rtol=0, atol=1e-5)


@pytest.mark.guest("two-sockets", seconds=240)
def test_processes_are_on_their_nodes_and_tensors_in_memory_of_them(topology):
    with NUMAProcessPool([0, 2]) as processes:
        for node, receipt in processes.receipts().items():
            assert receipt.contradictions(topology.cpus_of([node]), [node]) == []
            shared = processes.empty((1 << 16,), torch.float32, node)
            assert witness.pages(shared).keys() == {node}
            assert processes.submit(os.sched_getaffinity, 0, numa_node=node).result() == set(topology.cpus_of([node]))
            assert processes.submit(torch.Tensor.sum, shared.fill_(1)).result() == 1 << 16
