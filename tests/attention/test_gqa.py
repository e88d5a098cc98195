import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from numa_lab.attention.gqa import BACKENDS, choose_backend, gqa_attention
from numa_lab.attention.reference import attention as reference
from numa_lab.errors import InvalidInput

# Outputs are averages of normal values, so of size one at most; torch rounds the weights and the result to the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@st.composite
def calls(draw):
    """Arguments of one call: any group, strided or not, with and without each kind of mask."""
    batch, kv_heads, group, q_len, head_dim = (draw(st.sampled_from(c)) for c in
                                               ([1, 2], [1, 2, 3], [1, 2, 4], [1, 3], [8, 16]))  # fmt: skip
    kv_len = draw(st.sampled_from([0, 1, 5, 17]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    heads = kv_heads * group

    def tensor(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    query = tensor(batch, heads, q_len, head_dim)
    if draw(st.booleans()):  # a [B, S, H, D] cache seen as [B, H, S, D]
        key, value = (tensor(batch, kv_len, kv_heads, head_dim).transpose(1, 2) for _ in range(2))
    else:
        key, value = (tensor(batch, kv_heads, kv_len, head_dim) for _ in range(2))
    options = {"enable_gqa": group > 1, "scale": draw(st.sampled_from([None, 0.3]))}
    size = draw(
        st.sampled_from([(q_len, kv_len), (1, 1, q_len, kv_len), (batch, heads, q_len, kv_len), (batch, 1, 1, kv_len)])
    )
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    if kind == "causal":
        options["is_causal"] = True
    elif kind == "bool":
        options["attn_mask"] = torch.rand(size, generator=generator) > 0.4  # some rows are masked whole
    elif kind == "float":
        options["attn_mask"] = tensor(*size)
    return query, key, value, options


@given(calls(), st.sampled_from(["auto", *BACKENDS]))
@settings(max_examples=300, deadline=None)
def test_every_backend_agrees_with_float64_and_with_torch(call, backend):
    query, key, value, options = call
    output = gqa_attention(query, key, value, **options, backend=backend)
    expected, _ = reference(query, key, value, **options)
    assert output.dtype == query.dtype
    assert output.shape == expected.shape
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=TOLERANCE[query.dtype])
    by_torch = scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(output, by_torch, rtol=0, atol=TOLERANCE[query.dtype])


def test_log_sum_exp_of_the_reference():
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    scores = query.double() @ key.double().transpose(-1, -2) / 8**0.5
    torch.testing.assert_close(reference(query, key, key)[1], scores.exp().sum(-1).log())


def test_without_a_batch_and_with_gradients():
    query, key = torch.randn(4, 3, 8, requires_grad=True), torch.randn(2, 5, 8)
    for backend in BACKENDS:
        output = gqa_attention(query, key, key, enable_gqa=True, backend=backend)
        (gradient,) = torch.autograd.grad(output.sum(), query)
        assert gradient.shape == query.shape


def test_auto_folds_the_group_where_few_tokens_are_decoded():
    key = torch.randn(1, 2, 16, 8)
    assert choose_backend(torch.randn(1, 4, 1, 8), key, key, enable_gqa=True) == "torch-folded"
    assert choose_backend(torch.randn(1, 4, 99, 8), key, key, enable_gqa=True) == "torch"
    assert choose_backend(torch.randn(1, 4, 9, 8), key, key, enable_gqa=True, is_causal=True) == "torch"
    assert choose_backend(torch.randn(1, 2, 1, 8), key, key) == "torch"


@pytest.mark.parametrize(
    ("query", "key", "options", "message"),
    [
        ((1, 4, 1, 8), (1, 2, 5, 8), {}, "enable_gqa=True"),
        ((1, 3, 1, 8), (1, 2, 5, 8), {"enable_gqa": True}, "a multiple of them"),
        ((1, 2, 1, 8), (1, 2, 5, 16), {}, r"\(1, 2, 5, 16\)"),
        ((3, 2, 1, 8), (2, 2, 5, 8), {}, "don.t match"),
        ((1, 2, 1, 8), (1, 2, 5, 8), {"backend": "fast"}, "torch-folded"),
        ((1, 2, 1, 8), (1, 2, 5, 8), {"is_causal": True, "attn_mask": torch.ones(1, 5)}, "expected one of them"),
    ],
)
def test_what_does_not_fit_together_is_named(query, key, options, message):
    with pytest.raises(InvalidInput, match=message):
        gqa_attention(torch.randn(query), torch.randn(key), torch.randn(key), **options)


def test_dtypes_that_differ_are_named():
    with pytest.raises(InvalidInput, match="bfloat16"):
        gqa_attention(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8).bfloat16())
