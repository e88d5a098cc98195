import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from numa_lab.attention import gqa
from numa_lab.attention.backend_names import BACKENDS
from numa_lab.attention.gqa import choose_backend, gqa_attention
from numa_lab.attention.partial import partial_attention
from numa_lab.attention.reference import attention as reference
from numa_lab.errors import InvalidInput


def error_bound(query, key, value, attn_mask=None, scale=None, **_):
    """How far from float64 rounding can take an output: its kernels compute in float32 and round to the dtype twice."""
    if not value.numel():
        return 0.0  # no key, so zeros exactly
    unit = 2**-24  # of float32
    scores = (query.abs().max() * key.abs().max() * query.size(-1)).item() * abs(scale or query.size(-1) ** -0.5)
    if attn_mask is not None and attn_mask.is_floating_point():
        scores += attn_mask.nan_to_num(neginf=0).abs().max().item()
    score_error = (query.size(-1) + 3) * unit * scores  # a sum of head_dim products, the scale, the mask, the maximum
    relative = 2 * score_error + (64 + 2 * key.size(-2)) * unit  # torch's exp is good to 20 units; two sums over kv_len
    if query.dtype != torch.float32:
        relative += torch.finfo(query.dtype).eps  # half of it for the weights, half for the output
    return relative * value.abs().max().item()


@st.composite
def calls(draw):
    """Arguments of one call: any group, strided or not, with and without each kind of mask."""
    batch, kv_heads, group = (draw(st.sampled_from(choice)) for choice in ([1, 2], [1, 2, 3], [1, 2, 4]))
    q_len, kv_len = draw(st.sampled_from([1, 3])), draw(st.sampled_from([0, 1, 5, 17]))
    head_dim, heads = 8, kv_heads * group  # each one would be compiled anew
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def tensor(heads, length):
        if draw(st.booleans()):  # a [B, S, H, D] cache seen as [B, H, S, D]
            return torch.randn(batch, length, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(dtype)

    query, key, value = tensor(heads, q_len), tensor(kv_heads, kv_len), tensor(kv_heads, kv_len)
    options = {"enable_gqa": draw(st.booleans()) if group == 1 else True, "scale": draw(st.sampled_from([None, 0.3]))}
    size = [batch, heads, q_len, kv_len][draw(st.integers(0, 2)) :]
    size = [draw(st.sampled_from([1, n])) for n in size]
    kind = draw(st.sampled_from(["none", "causal", "bool", "float", "minus infinity"]))
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        allowed = torch.rand(size, generator=generator) > 0.4  # some rows are masked throughout
        numbers = torch.randn(size, generator=generator).to(draw(st.sampled_from([dtype, torch.float32])))
        options["attn_mask"] = {
            "bool": allowed,
            "float": numbers,
            "minus infinity": numbers.masked_fill(~allowed, -math.inf),
        }[kind]
    return query, key, value, options


@given(calls())
@settings(max_examples=150, deadline=None)
def test_every_backend_agrees_with_float64_and_with_torch(call):
    query, key, value, options = call
    versions = [tensor._version for tensor in (query, key, value)]
    expected, _ = reference(query, key, value, **options)
    by_torch = scaled_dot_product_attention(query, key, value, **options)
    bound = error_bound(query, key, value, **options)
    for backend in ("auto", *BACKENDS):
        output = gqa_attention(query, key, value, **options, backend=backend)
        assert output.dtype == query.dtype
        assert torch.equal(gqa_attention(query, key, value, **options, backend=backend), output), (
            "the second time differs"
        )
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=bound)
        torch.testing.assert_close(output, by_torch, rtol=0, atol=2 * bound)
    assert [tensor._version for tensor in (query, key, value)] == versions, "an input was changed in place"


def test_lse_of_the_reference():
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    scores = query.double() @ key.double().transpose(-1, -2) / 8**0.5
    torch.testing.assert_close(reference(query, key, key)[1], scores.exp().sum(-1).log())
    assert reference(query, key[:, :, :0], key[:, :, :0])[1].eq(-math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_masked_by_the_least_number_is_an_average_as_in_torch(backend):
    query, key, value = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.zeros(2, 5)
    mask[1] = torch.finfo(torch.float32).min  # how Hugging Face models mask
    output = gqa_attention(query, key, value, mask, enable_gqa=True, backend=backend)
    torch.testing.assert_close(output[:, :, 1], value.mean(-2).repeat_interleave(2, 1))
    expected, lse = reference(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    assert lse[:, :, 1].eq(torch.finfo(torch.float32).min).all()


def test_scores_beside_which_the_number_of_keys_vanishes_are_averaged():
    query, key, value = torch.full((1, 1, 1, 8), 1e10), torch.full((1, 1, 5, 8), 1e10), torch.randn(1, 1, 5, 8)
    for output, _ in (reference(query, key, value), partial_attention(query, key, value)):
        torch.testing.assert_close(output.float(), value.mean(-2, keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_any_batch_that_torch_broadcasts_with_gradients(backend, batch):
    query, key = torch.randn(*batch, 4, 3, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    key = key.expand(*(1 for _ in batch), 2, 5, 8)
    results = [
        gqa_attention(query, key, key, is_causal=True, enable_gqa=True, backend=backend),
        reference(query, key, key, is_causal=True, enable_gqa=True)[0],
    ]
    for got, expected in zip(*(torch.autograd.grad(r.sum(), (query, key)) for r in results), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_mean(backend):
    torch.manual_seed(0)
    query, ones = torch.randn(1, 8, 16, 8), torch.ones(1, 2, 64, 8)
    output = gqa_attention(query, ones, ones, dropout_p=0.5, enable_gqa=True, backend=backend)
    assert output.std() > 0.05
    assert output.mean() == pytest.approx(1, abs=0.05)


def test_folding_makes_no_tensor_of_the_size_of_the_cache():
    class Largest(TorchDispatchMode):
        """The bytes of the largest tensor that an operation allocates."""

        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if tensor.untyped_storage().data_ptr() not in known:
                    self.found = max(self.found, tensor.untyped_storage().nbytes())
            return result

    query = torch.randn(2, 1, 8, 16).transpose(1, 2)
    key, value = (torch.randn(2, 512, 2, 16).transpose(1, 2) for _ in range(2))
    known = {tensor.untyped_storage().data_ptr() for tensor in (query, key, value)}
    with Largest() as largest:
        gqa_attention(query, key, value, enable_gqa=True, backend="torch-folded")
    assert 0 < largest.found <= query.nbytes


@pytest.fixture
def without_the_kernel(monkeypatch):
    monkeypatch.setattr(gqa.decode, "plan_for", lambda *_, **__: "none of its own")


@pytest.mark.usefixtures("without_the_kernel")
def test_auto_folds_the_group_where_tokens_see_all_of_the_cache(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    key = torch.randn(1, 2, 16, 8)
    assert choose_backend(torch.randn(1, 4, 1, 8), key, key, enable_gqa=True) == "torch-folded"
    assert choose_backend(torch.randn(1, 4, 99, 8), key, key, enable_gqa=True) == "torch-folded"
    assert choose_backend(torch.randn(1, 4, 999, 8), key, key, enable_gqa=True) == "torch"
    assert choose_backend(torch.randn(1, 4, 4, 8), key, key, enable_gqa=True, is_causal=True) == "torch"
    assert choose_backend(torch.randn(1, 2, 1, 8), key, key, enable_gqa=True) == "torch"
    assert choose_backend(torch.randn(1, 2, 1, 8), key, key) == "torch"


def test_a_prompt_is_left_to_torch():
    key = torch.randn(1, 2, 16, 8)
    assert choose_backend(torch.randn(1, 4, 16, 8), key, key, enable_gqa=True, is_causal=True) == "torch"


@pytest.mark.usefixtures("without_the_kernel")
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "torch"), (torch.bfloat16, "torch-folded")])
def test_auto_does_not_trade_threads_for_less_than_they_are_worth(monkeypatch, dtype, name):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 24)
    query, key = torch.randn(1, 32, 1, 8, dtype=dtype), torch.randn(1, 8, 16, 8, dtype=dtype)
    assert choose_backend(query, key, key, enable_gqa=True) == name
    assert (
        choose_backend(query.expand(3, -1, -1, -1), key.expand(3, -1, -1, -1), key, enable_gqa=True) == "torch-folded"
    )


@pytest.mark.parametrize(
    ("query", "key", "options", "message"),
    [
        ((1, 4, 1, 8), (1, 2, 5, 8), {}, "enable_gqa=True"),
        ((1, 3, 1, 8), (1, 2, 5, 8), {"enable_gqa": True}, "3 query heads with 2 KV heads"),
        ((4, 8), (5, 8), {"enable_gqa": True}, "dimension of heads"),
        ((1, 2, 1, 8), (1, 2, 5, 16), {}, r"\(1, 2, 5, 16\)"),
        ((3, 2, 1, 8), (2, 2, 5, 8), {}, "give all three the same batch"),
        ((1, 2, 1, 8), (1, 2, 5, 8), {"backend": "torch-fold"}, "did you mean 'torch-folded'"),
        ((1, 2, 1, 8), (1, 2, 5, 8), {"is_causal": True, "attn_mask": torch.ones(1, 5)}, "expected one of them"),
        ((1, 2, 1, 8), (1, 2, 5, 8), {"attn_mask": torch.ones(1, 4)}, r"attn_mask \(1, 4\).*\(1, 2, 1, 5\)"),
        ((1, 2, 1, 8), (1, 2, 5, 8), {"attn_mask": torch.ones(1, 5, dtype=torch.int32)}, r"int32.*torch\.bool"),
        ((1, 2, 1, 8), (1, 2, 5, 8), {"dropout_p": 1.5}, r"dropout_p=1\.5"),
    ],
)
def test_what_does_not_fit_together_is_named(query, key, options, message):
    with pytest.raises(InvalidInput, match=message):
        gqa_attention(torch.randn(query), torch.randn(key), torch.randn(key), **options)


def test_dtypes_and_devices_that_differ_are_named():
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(InvalidInput, match="bfloat16"):
        gqa_attention(query, key, key.bfloat16())
    with pytest.raises(InvalidInput, match="key on meta"):
        gqa_attention(query, key.to("meta"), key)
