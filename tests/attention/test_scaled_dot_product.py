import pytest
import torch

from numa_lab.attention.reference import attention as reference
from numa_lab.attention.scaled_dot_product import scaled_dot_product_attention_gqa
from numa_lab.errors import InvalidInput


def inputs(q_len=5):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, q_len, 64, generator=generator)
    key, value = torch.randn(2, 2, 2, 40, 64, generator=generator).unbind()
    return query, key, value


def test_the_guides_function_agrees_with_float64_and_writes_where_it_is_told():
    query, key, value = inputs()
    expected, _ = reference(query, key, value, enable_gqa=True, is_causal=True)
    room = torch.empty(2, 5, 8, 64).transpose(1, 2)  # strided, as [batch, q_len, heads, head_dim] seen by heads
    for output_tensor in (None, torch.empty_like(query), room):
        output = scaled_dot_product_attention_gqa(query, key, value, is_causal=True, output_tensor=output_tensor)
        assert output_tensor is None or output is output_tensor
        assert (output - expected).abs().max() < 1e-5
    mask = torch.rand(5, 40) > 0.5
    masked, _ = reference(query, key, value, mask, enable_gqa=True, scale=0.3)
    assert (scaled_dot_product_attention_gqa(query, key, value, mask, scale=0.3) - masked).abs().max() < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        torch.empty(2, 8, 5, 32),
        torch.empty(2, 8, 5, 64, dtype=torch.float64),
        torch.empty(1, 8, 5, 64).expand(2, 8, 5, 64),
    ],
)
def test_an_output_tensor_that_does_not_fit_is_refused(wrong):
    with pytest.raises(InvalidInput, match=r"expected \(2, 8, 5, 64\) of torch.float32"):
        scaled_dot_product_attention_gqa(*inputs(), output_tensor=wrong)


def test_an_output_of_another_type_is_refused():
    query, key, value = inputs()
    with pytest.raises(TypeError, match=r"output_tensor is numpy\.ndarray: expected a torch\.Tensor"):
        scaled_dot_product_attention_gqa(query, key, value, output_tensor=query.numpy())
