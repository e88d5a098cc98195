import random

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from numa_lab.attention import decode, kernel_cache, partial
from numa_lab.attention.reference import attention as reference
from numa_lab.errors import InvalidInput
from numa_lab.machine.topology_reader import read_topology
from numa_lab.nodes import kv_segments
from numa_lab.nodes.kv_cache import NodeShardedKVCache
from numa_lab.nodes.seats import Place
from numa_lab.placement import page_location

BY_TORCH_ITSELF = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule",
    "ignore:.*torch.jit:DeprecationWarning",
)


@pytest.fixture
def several(monkeypatch):
    """Three nodes that are all the one that is here, each with memory of its own."""
    real = read_topology()
    node = real.effective_nodes[0]
    cpus = real.cpus_for([node])
    monkeypatch.setattr(
        kv_segments.memory, "empty", lambda shape, dtype, node, **_: torch.zeros(shape, dtype=dtype, device="cpu")
    )
    return {10: Place(node, cpus), 11: Place(node, cpus[:1]), 12: Place(node, cpus[-1:])}


class Plain:
    """What the cache stands for: lists of keys and values, and the formula."""

    def __init__(self, batch):
        self.keys, self.values = [[] for _ in range(batch)], [[] for _ in range(batch)]

    def append(self, key, value, counts):
        for b, count in enumerate(counts):
            self.keys[b] += key[b, :, :count].unbind(1)
            self.values[b] += value[b, :, :count].unbind(1)

    def attend(self, query):
        outputs = []
        for b, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            key, value = (torch.stack(rows, 1).unsqueeze(0) for rows in (keys, values))
            q_len, kv_len = query.size(2), len(keys)
            mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
            outputs.append(reference(query[b : b + 1], key, value, mask, enable_gqa=True)[0])
        return torch.cat(outputs)

    def truncate(self, tokens):
        self.keys, self.values = [k[:tokens] for k in self.keys], [v[:tokens] for v in self.values]

    def fork(self):
        twin = Plain(len(self.keys))
        twin.keys, twin.values = [list(k) for k in self.keys], [list(v) for v in self.values]
        return twin


def play(chance, cache, plain, steps, dtype, family):
    """Do the same at random to a cache and to what it stands for."""
    for _ in range(steps):
        act = chance.choice(["append", "append", "prompt", "ragged", "truncate", "fork", "attend"])
        if act in ("append", "prompt", "ragged"):
            new = 1 if act == "append" else chance.randrange(1, 30)
            counts = [chance.randrange(new + 1) if act == "ragged" else new for _ in range(cache.batch)]
            key, value = torch.randn(2, cache.batch, cache.kv_heads, new, cache.head_dim).to(dtype)
            if max(length + count for length, count in zip(cache.lengths, counts, strict=True)) > cache.capacity:
                with pytest.raises(InvalidInput, match=f"the capacity is {cache.capacity}"):
                    cache.append(key, value, counts)
            else:
                cache.append(key, value, counts)
                plain.append(key, value, counts)
        elif act == "truncate" and chance.random() < 0.4:
            tokens = chance.randrange(len(cache) + 2)
            cache.truncate(tokens)
            plain.truncate(tokens)
        elif act == "fork" and len(family) < 4:
            family.append((cache.fork(), plain.fork()))
        assert list(cache.lengths) == [len(keys) for keys in plain.keys]
        q_len = chance.choice([1, 1, 2, 20])
        if min(cache.lengths) >= q_len:
            query = torch.randn(cache.batch, cache.kv_heads * 2, q_len, cache.head_dim).to(dtype)
            torch.testing.assert_close(
                cache.attend(query).double(),
                plain.attend(query),
                rtol=0,
                atol=3e-2 if dtype is torch.bfloat16 else 1e-5,
            )


@pytest.mark.parametrize("number", range(12))
def test_whatever_is_done_to_it_it_attends_as_the_formula_says(several, number):
    chance = random.Random(number)
    torch.manual_seed(number)
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.float64])
    nodes = list(several)[: chance.choice([1, 2, 3])]
    weights = chance.choice([None, {node: chance.choice([1.0, 2.5]) for node in nodes}])
    batch = chance.choice([1, 3])
    cache = NodeShardedKVCache(
        batch,
        chance.choice([1, 2]),
        16,
        capacity=chance.choice([7, 150]),
        dtype=dtype,
        nodes=nodes,
        teams=several,
        block=chance.choice([1, 4, 64]),
        weights=weights,
    )
    family = [(cache, Plain(batch))]
    for _ in range(10):
        play(chance, *chance.choice(family), 4, dtype, family)


def test_torch_computes_the_parts_that_the_kernel_does_not_serve(monkeypatch, several):
    monkeypatch.setattr(partial, "CHUNK", 7)
    query, key, value = torch.randn(2, 6, 3, 12), torch.randn(2, 2, 20, 12), torch.randn(2, 2, 20, 12)  # 12 is odd
    mask = torch.rand(3, 20) > 0.5
    mask[1] = False
    expected, expected_lse = reference(query, key, value, mask, enable_gqa=True)
    output, lse = partial.partial_attention(query, key, value, mask)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)
    cache = NodeShardedKVCache(2, 2, 12, capacity=20, dtype=torch.float32, teams=several, block=2)
    cache.append(key, value)
    expected, _ = reference(query, key, value, torch.ones(3, 20, dtype=torch.bool).tril(17), enable_gqa=True)
    torch.testing.assert_close(cache.attend(query).double(), expected, rtol=0, atol=1e-5)


def test_torch_computes_where_kernels_can_not_be_compiled_and_one_warning_says_so(monkeypatch, several):
    cache, plain = NodeShardedKVCache(1, 2, 56, capacity=20, dtype=torch.float32, teams=several, block=2), Plain(1)
    monkeypatch.setattr(kernel_cache, "_failures", [])
    monkeypatch.setattr(kernel_cache, "folder", lambda: None)
    monkeypatch.setattr(kernel_cache, "machine_code", lambda _spec: 1 / 0)
    decode.warn_once.cache_clear()
    key = torch.randn(1, 2, 20, 56)  # which no other test has had compiled
    cache.append(key, key)
    plain.append(key, key, [20])
    query = torch.randn(1, 4, 1, 56)
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError.*pip install numba==") as told:
        for _ in range(2):
            torch.testing.assert_close(cache.attend(query).double(), plain.attend(query), rtol=0, atol=1e-5)
    assert len(told) == 1


def test_the_usual_heads_of_128_in_bfloat16_are_merged_from_all_nodes(several):
    cache = NodeShardedKVCache(2, 2, 128, capacity=60, dtype=torch.bfloat16, teams=several, block=7)
    key, value = torch.randn(2, 2, 2, 45, 128).to(torch.bfloat16)
    query = torch.randn(2, 22, 1, 128).to(torch.bfloat16)
    for begin, end in ((0, 5), (5, 12), (12, 45)):  # on one node, on two, on all
        cache.append(key[:, :, begin:end], value[:, :, begin:end])
        expected, _ = reference(query, key[:, :, :end], value[:, :, :end], enable_gqa=True)
        torch.testing.assert_close(cache.attend(query).double(), expected, rtol=0, atol=2e-2)
    assert min(cache.tokens_per_node.values()) > 0


@BY_TORCH_ITSELF
def test_what_torch_has_to_see_is_computed_by_its_operators(several):
    cache = NodeShardedKVCache(2, 1, 16, capacity=40, dtype=torch.float32, teams=several, block=3)
    key, value = torch.randn(2, 2, 1, 30, 16)
    cache.append(torch._neg_view(key), value, [30, 20])
    mask = torch.arange(30) < torch.tensor([30, 20]).view(2, 1, 1, 1) - 1 + torch.arange(2).view(2, 1)
    query = torch.randn(2, 3, 2, 16)
    expected, _ = reference(query, -key, value, mask, enable_gqa=True)
    cache.attend(query)  # what is known by now must not be what decides

    def close(output):
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)

    close(cache.attend(torch._neg_view(-query)))
    close(torch.vmap(cache.attend)(query[None])[0])
    close(make_fx(lambda q: cache.attend(q))(torch.zeros_like(query))(query))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(cache.attend(forward_ad.make_dual(query, query))).tangent
    _, by_formula = torch.func.jvp(lambda q: reference(q, -key, value, mask, enable_gqa=True)[0], (query,), (query,))
    torch.testing.assert_close(tangent.double(), by_formula, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = cache.attend(query)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=0, atol=5e-2)
    for wrong in (query.numpy(), None):
        with pytest.raises(TypeError, match=r"query is .*: expected a torch\.Tensor"):
            cache.attend(wrong)
        with pytest.raises(TypeError, match=r"value is .*: expected a torch\.Tensor"):
            cache.append(key, wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["kernel", "torch"])
def test_what_a_program_set_for_its_own_tensors_changes_nothing(several, dtype):
    key, value, query = (torch.randn(1, heads, 40, 16).to(dtype) for heads in (2, 2, 4))
    expected, _ = reference(query[:, :, -1:], key, value, enable_gqa=True)
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode():
            cache = NodeShardedKVCache(1, 2, 16, capacity=40, dtype=dtype, teams=several, block=3)
            cache.append(key[:, :, :20].clone().to("cpu"), value[:, :, :20])
        cache.append(key[:, :, 20:].requires_grad_(), value[:, :, 20:])
        outputs = [cache.attend(query[:, :, -1:].requires_grad_())]
        with torch.inference_mode():
            outputs.append(cache.attend(query[:, :, -1:]))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for output in outputs:
        assert (output.dtype, output.is_cpu, output.requires_grad) == (dtype, True, False)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-2)


def test_beams_that_fork_at_each_token_stay_few_segments(several):
    cache = NodeShardedKVCache(1, 1, 16, capacity=400, dtype=torch.float32, teams=several, block=32)
    key, value = torch.randn(2, 1, 1, 150, 16)
    cache.append(key[:, :, :50], value[:, :, :50])
    for token in range(50, 150):
        cache = cache.fork()
        cache.append(key[:, :, token : token + 1], value[:, :, token : token + 1])
    assert len(cache._memory.segments) <= 1 + -(-100 // 32)
    query = torch.randn(1, 2, 1, 16)
    expected, _ = reference(query, key, value, enable_gqa=True)
    torch.testing.assert_close(cache.attend(query).double(), expected, rtol=0, atol=1e-5)


def test_pages_lie_on_their_nodes_and_the_receipt_says_so():
    cache = NodeShardedKVCache(1, 2, 64, capacity=5000, dtype=torch.float32)
    cache.append(*torch.randn(2, 1, 2, 3000, 64))
    for node, receipt in cache.receipts().items():
        assert receipt.pages_after["key"].keys() == {node}
        assert receipt.pages_after["value"].keys() == {node}
        assert not receipt.contradictions(read_topology().cpus_of([node]), [node])
    assert page_location.locate(cache._memory.segments[0].keys[cache.nodes[0]])[page_location.UNTOUCHED], (
        "nothing was left to grow into"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0: expected at least 1"),
        ({"dtype": torch.int8}, "int8"),
        ({"nodes": []}, "expected each node once"),
        ({"weights": {0: -1.0}}, "none negative"),
        ({"weights": {}}, "expected one for each"),
        ({"weights": {0: 0.0}}, "not all 0"),
        ({"weights": {0: float("nan")}}, "finite"),
        ({"weights": {0: 1.0, 4095: 1.0}}, "expected one for each"),
    ],
)
def test_senseless_caches_are_refused(options, message):
    given = {"batch": 1, "kv_heads": 1, "head_dim": 8, "capacity": 8, "dtype": torch.float32} | options
    with pytest.raises(InvalidInput, match=message):
        NodeShardedKVCache(**given, teams={} if "nodes" in options else None)


def test_what_does_not_fit_is_refused_and_nothing_is_added():
    cache = NodeShardedKVCache(2, 2, 8, capacity=16, dtype=torch.float32)
    key = torch.randn(2, 2, 3, 8)
    cache.append(key, key, [3, 1])
    with pytest.raises(InvalidInput, match=r"expected \(2, 2, 3, 8\) of torch.float32"):
        cache.append(key.double(), key)
    with pytest.raises(InvalidInput, match=r"lengths=.*expected 2 numbers, 0 to 3"):
        cache.append(key, key, [4, 0])
    with pytest.raises(InvalidInput, match="a multiple of 2"):
        cache.attend(torch.randn(2, 3, 1, 8))
    with pytest.raises(InvalidInput, match="append the keys and values of the queries first"):
        cache.attend(torch.randn(2, 2, 2, 8))
    assert cache.lengths == (3, 1)
    assert len(cache) == 3
