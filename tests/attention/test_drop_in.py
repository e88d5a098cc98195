"""``gqa_attention`` under whatever may be active in torch, beside torch's own attention there."""

import sys

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from numa_lab.attention import addresses
from numa_lab.attention.gqa import choose_backend, gqa_attention
from numa_lab.errors import InvalidInput

BY_TORCH_ITSELF = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule",
    "ignore:.*torch.jit:DeprecationWarning",
)


def tensors(q_len=1, kv_len=48, dtype=torch.float32):
    generator = torch.Generator().manual_seed(q_len + kv_len)
    shapes = [(2, 8, q_len, 64), (2, 2, kv_len, 64), (2, 2, kv_len, 64)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


Q, K, V = tensors()
MASK = torch.randn(1, 1, 1, 48, generator=torch.Generator().manual_seed(0))


def tangent(attention):
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        return forward_ad.unpack_dual(attention(forward_ad.make_dual(Q, Q), K, V)).tangent


def tangent_of_the_mask(attention):
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        return forward_ad.unpack_dual(attention(Q, K, V, forward_ad.make_dual(MASK, MASK))).tangent


def jvp(attention):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda key: attention(Q, key, V), (K,), (K,))[1]


def twice_backward(attention):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.grad(lambda q: torch.func.grad(lambda k: attention(q, k, V).sum())(K).square().sum())(Q)


def recorded(mode):
    def replay(attention):
        graph = make_fx(lambda *given: attention(*given), tracing_mode=mode)(Q, K, V)
        return graph(-Q, K, V), [str(node.target) for node in graph.graph.nodes]

    return replay


def traced(attention):
    return torch.jit.trace(lambda *given: attention(*given), (Q, K, V))(-Q, K, V)


def symbolic(attention):
    graph = torch.fx.symbolic_trace(lambda query, key, value: attention(query, key, value))
    return graph(Q, K, V), [str(node.target) for node in graph.graph.nodes]


def faked(attention):
    with torch._subclasses.FakeTensorMode() as mode:
        output = attention(*map(mode.from_tensor, (Q, K, V)))
    return type(output), output.shape, output.stride()


def counted(attention):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no other kernel of the CPU
        attention(Q, K, V)
    assert counter.get_total_flops() == 4 * Q.numel() * K.size(-2)
    return counter.get_total_flops()


def autocast(*dtypes, to=torch.bfloat16):
    def cast(attention):
        with torch.autocast("cpu", dtype=to):
            return attention(*(one.to(dtype) for one, dtype in zip((Q, K, V, MASK), dtypes, strict=False)))

    return cast


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def seen_by_a_mode(attention):
    with Seen() as seen:
        attention(Q, K, V)
    return seen.names


class Negated(TorchDispatchMode):
    """A mode that changes what attention gives."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return tree_map(lambda one: -one if isinstance(one, torch.Tensor) else one, func(*args, **(kwargs or {})))


def changed_by_a_mode(attention):
    with Negated():
        return attention(Q, K, V)


class Named(torch.Tensor):
    """A subclass that says what was called with it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return f"{func.__name__} gave {type(result).__name__}" if func is scaled_dot_product_attention else result


def under_inference(attention):
    with torch.inference_mode():
        output = attention(Q, K.clone(), V)
    return output.is_inference(), output.clone()


def on_other_default_device(attention):
    with torch.device("meta"):
        return attention(Q, K, V)


WORLDS = {
    "a negated query": lambda attention: attention(torch._neg_view(Q), K, V),
    "a negated key": lambda attention: attention(Q, torch._neg_view(K), V),
    "a negated value": lambda attention: attention(Q, K, torch._neg_view(V)),
    "a negated mask": lambda attention: attention(Q, K, V, torch.complex(MASK, MASK).conj().imag),
    "a parameter": lambda attention: attention(torch.nn.Parameter(Q, requires_grad=False), torch.nn.Parameter(K), V),
    "meta": lambda attention: attention(*(one.to("meta") for one in (Q, K, V))).shape,
    "nested": lambda attention: attention(*[torch.nested.nested_tensor([*K], layout=torch.jagged)] * 3).values(),
    "a subclass": lambda attention: attention(Q.as_subclass(Named), K, V),
    "a subclass as mask": lambda attention: attention(Q, K, V, MASK.as_subclass(Named)),
    "vmap": lambda attention: torch.vmap(attention)(Q[None], K[None], V[None]),
    "vmap over a mask": lambda attention: torch.vmap(attention, (None, None, None, 0))(Q, K, V, MASK[None]),
    "vmap over nothing that is used": lambda attention: torch.vmap(lambda x: attention(Q, K, V) + x)(torch.ones(2)),
    "functionalize": lambda attention: torch.func.functionalize(lambda *given: attention(*given))(Q, K, V),
    "grad": lambda attention: torch.func.grad(lambda value: attention(Q, K, value).sum())(V),
    "jacrev": lambda attention: torch.func.jacrev(lambda mask: attention(Q, K, V, mask)[:1, :1, :, :2])(MASK),
    "grad of grad": twice_backward,
    "jvp": jvp,
    "forward AD": tangent,
    "forward AD of a mask": tangent_of_the_mask,
    "make_fx": recorded("real"),
    "make_fx, fake": recorded("fake"),
    "make_fx, symbolic": recorded("symbolic"),
    "torch.jit.trace": traced,
    "torch.fx": symbolic,
    "fake tensors": faked,
    "a FLOP counter": counted,
    "a function mode": seen_by_a_mode,
    "a dispatch mode": changed_by_a_mode,
    "inference mode": under_inference,
    "a default device": on_other_default_device,
    "autocast of float32": autocast(torch.float32, torch.float32, torch.float32, torch.float32),
    "autocast of two dtypes": autocast(torch.float32, torch.bfloat16, torch.float16),
    "autocast to float16": autocast(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32, to=torch.float16),
    "autocast of float64": autocast(torch.float64, torch.float64, torch.float64),
}


@pytest.fixture(autouse=True)
def known():
    """Calls of this kind have been served before, by the kernel."""
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            gqa_attention(Q, K, V, enable_gqa=True)
            assert choose_backend(Q, K, V, enable_gqa=True) == "numba"


def assert_alike(got, expected):
    if isinstance(expected, torch.Tensor):
        assert (type(got), got.requires_grad, got.layout) == (type(expected), expected.requires_grad, expected.layout)
        torch.testing.assert_close(
            got,
            expected,
            rtol=2e-2 if got.dtype.itemsize == 2 else 1e-5,
            atol=1e-2 if got.dtype.itemsize == 2 else 1e-5,
        )
    elif isinstance(expected, tuple | list) and any(isinstance(one, torch.Tensor) for one in expected):
        for one, other in zip(got, expected, strict=True):
            assert_alike(one, other)
    else:
        assert got == expected


def ours(backend):
    return lambda *given: gqa_attention(*given, enable_gqa=True, backend=backend)


def theirs(*given):
    return scaled_dot_product_attention(*given, enable_gqa=True)


@BY_TORCH_ITSELF
@pytest.mark.parametrize("world", WORLDS)
def test_it_means_what_torch_means_whatever_is_active(world):
    expected = WORLDS[world](theirs)
    for backend in ("auto", "numba"):
        assert_alike(WORLDS[world](ours(backend)), expected)


@BY_TORCH_ITSELF
@pytest.mark.parametrize("backend", ["torch-folded", "guide"])
@pytest.mark.parametrize(
    "world", ["a negated key", "nested", "a subclass", "vmap", "grad", "torch.fx", "inference mode"]
)
def test_backends_made_of_torchs_operators_mean_the_same(world, backend):
    assert_alike(WORLDS[world](ours(backend)), WORLDS[world](theirs))


def test_a_mode_is_shown_the_operators_of_the_backend_that_was_named():
    assert changed_by_a_mode(ours("torch-folded")).shape == Q.shape
    graph = make_fx(ours("torch-folded"))(Q, K, V)
    torch.testing.assert_close(graph(-Q, K, V), theirs(-Q, K, V))


def test_zeros_without_memory_are_zeros():
    zeros = torch._efficientzerotensor(K.shape)
    for _ in range(2):
        assert gqa_attention(Q, K, zeros, enable_gqa=True).eq(0).all()
        torch.testing.assert_close(gqa_attention(Q, zeros, V, enable_gqa=True), theirs(Q, 0 * K, V))


@pytest.mark.parametrize("odd", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn])
def test_what_torch_refuses_is_refused(odd):
    for given in ((Q, odd(K), V), (odd(Q), K, V), (Q, K, V, odd(MASK))):
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            theirs(*given)
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            ours("auto")(*given)


@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["heads", "rows"])
def test_the_output_has_the_layout_of_torchs_own(q_len, order):
    query, key, value = tensors(q_len, kv_len=50)
    query = query.permute(order).contiguous().permute(order)
    expected = theirs(query, key, value)
    for _ in range(2):  # the second time the shape is known
        for attention in (ours("auto"), lambda *given: torch.ops.numa_lab.gqa_attention(*given, enable_gqa=True)):
            output = attention(query, key, value)
            torch.testing.assert_close(output, expected)
            assert output.stride() == expected.stride()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": np.ones(Q.shape)}, r"query is numpy.ndarray: .*torch\.from_numpy\(query\)"),
        ({"key": [[1.0]]}, r"key is list: .*torch\.as_tensor\(key\)"),
        ({"value": None}, "value is NoneType: expected a torch.Tensor"),
        ({"attn_mask": np.ones((1, 48), bool)}, r"torch\.from_numpy\(attn_mask\)"),
        ({"scale": "0.3"}, "scale is str '0.3': expected a number"),
        ({"scale": torch.ones(2)}, "scale is torch.Tensor"),
        ({"dropout_p": None}, "dropout_p is None"),
        ({"is_causal": 1}, "is_causal is int 1: expected True or False"),
        ({"enable_gqa": "yes"}, "enable_gqa is str 'yes'"),
    ],
)
def test_a_wrong_type_is_named_with_the_way_out(options, message):
    given = {"query": Q, "key": K, "value": V, "enable_gqa": True} | options
    for _ in range(2):
        with pytest.raises(TypeError, match=message) as raised:
            gqa_attention(**given)
        assert isinstance(raised.value, InvalidInput)
    with pytest.raises(TypeError):
        scaled_dot_product_attention(**given)


@pytest.mark.parametrize(
    "options", [{"scale": 1}, {"scale": True}, {"scale": torch.tensor(0.3)}, {"dropout_p": 0}], ids=str
)
def test_numbers_are_taken_as_torch_takes_them(options):
    got = gqa_attention(Q, K, V, **options, enable_gqa=True)
    torch.testing.assert_close(got, scaled_dot_product_attention(Q, K, V, **options, enable_gqa=True))


@pytest.mark.parametrize("torch_has_guards", [True, False])
def test_a_guard_lets_nothing_pass_but_calls_alike(monkeypatch, torch_has_guards):
    if not torch_has_guards:
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    room = torch.randn(2, 2, 2, 99, 64)
    key, value = room[..., :48, :].unbind()
    same = addresses.guard(Q, key, value, any_rows=(1, 2))
    assert ("Guards" in repr(same)) == torch_has_guards
    assert same(Q.clone(), *room[..., 1:80, :].unbind()), "the number of keys may differ"
    for other in (
        (torch._neg_view(Q), key, value),
        (Q, torch._neg_view(key), value),
        (Q, key, value.clone()),
        (Q, key, value.requires_grad_()),
        (Q.clone().requires_grad_(), key, value),
        (Q.bfloat16(), key, value),
        (Q[:, :4], key, value),
        (Q.as_subclass(Named), key, value),
        (Q.numpy(), key, value),
    ):
        assert not same(*other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not same(Q, *room[..., :48, :].unbind())
    with torch.inference_mode():
        assert not same(Q.clone(), *room[..., :48, :].unbind())


def test_a_known_call_under_one_autocast_is_none_under_another():
    query, key, value = tensors(dtype=torch.bfloat16)
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float16, None):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                assert gqa_attention(query, key, value, enable_gqa=True).dtype == (dtype or torch.bfloat16)


def test_graphs_hold_it_as_one_operator_without_a_word(capfd):
    """``fullgraph=True`` raises where a graph would be cut."""
    seen = []

    def look(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def model(query, key, value, mask=None):
        return gqa_attention(2 * query, key, value, mask, enable_gqa=True) + 1

    compiled = torch.compile(model, backend=look, fullgraph=True, dynamic=True)
    for q_len, kv_len in ((1, 48), (1, 99), (5, 48), (40, 77)):
        given = tensors(q_len, kv_len)
        torch.testing.assert_close(compiled(*given), model(*given))
        torch.testing.assert_close(compiled(*given), theirs(2 * given[0], *given[1:]) + 1)
    torch.testing.assert_close(compiled(Q, K, V, MASK), model(Q, K, V, MASK))
    assert all("numa_lab.gqa_attention" in targets for targets in seen)
    learning = Q.clone().requires_grad_()
    got, expected = (torch.autograd.grad(f(learning, K, V).sum(), learning) for f in (compiled, model))
    torch.testing.assert_close(got, expected)
    assert "numa_lab.gqa_attention" not in seen[-1], "it has no gradient"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(Q, K, V).dtype == model(Q, K, V).dtype
    jvp_of = torch.compile(lambda q: torch.func.jvp(lambda q: ours("auto")(q, K, V), (q,), (q,))[1], backend=look)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(jvp_of(Q), torch.func.jvp(lambda q: theirs(q, K, V), (Q,), (Q,))[1])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("options", [(None, False, None, True), (MASK, False, 0.3, True)], ids=["plain", "options"])
def test_the_operator_keeps_torchs_rules(q_len, options):
    query, key, value = tensors(q_len)
    assert set(torch.library.opcheck(torch.ops.numa_lab.gqa_attention, (query, key, value, *options)).values()) == {
        "SUCCESS"
    }
    got = torch.ops.numa_lab.gqa_attention(query[0], key[0], value[0], None, True, None, True)
    torch.testing.assert_close(
        got, scaled_dot_product_attention(query[0], key[0], value[0], is_causal=True, enable_gqa=True)
    )
