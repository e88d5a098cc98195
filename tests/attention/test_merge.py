"""The merge of partial results, by torch and by compiled code, against attention over all keys at once."""

import math

import pytest
import torch

from numa_lab.attention import partial
from numa_lab.attention.kernel_plan import Merge
from numa_lab.attention.reference import attention as reference
from numa_lab.placement.openmp import run_on_team

ERROR = {
    torch.float32: 1e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}  # the parts are rounded, and the whole is again
LEAST = torch.finfo(torch.float32).min


def by_torch(outputs, lse):
    return partial.merge(outputs, lse).to(outputs.dtype)


def compiled(outputs, lse):
    out = torch.full(outputs.shape[1:], math.nan, dtype=outputs.dtype)
    rows = lse.numel() // len(outputs)
    merge = Merge(outputs.dtype, outputs.size(-1), outputs.data_ptr(), lse.data_ptr(), len(outputs), rows)
    merge.into(out.data_ptr())
    run_on_team(merge.kernel, merge.address, 1)
    return out


@pytest.mark.parametrize("merge", [by_torch, compiled])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("ends", [(9,), (9, 9), (0, 9), (4, 9), (4, 4, 9), (2, 3, 9)], ids=str)
def test_parts_make_the_whole(merge, dtype, head_dim, ends):
    generator = torch.Generator().manual_seed(head_dim)
    query, key, value = (torch.randn(2, 3, rows, head_dim, generator=generator).to(dtype) for rows in (2, 9, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 2:] = False  # the second query sees nothing of most last parts
    expected, _ = reference(query, key, value, mask)
    parts = [
        reference(query, key[:, :, begin:end], value[:, :, begin:end], mask[:, begin:end])
        for begin, end in zip((0, *ends), ends, strict=False)
    ]
    outputs, lse = (torch.stack(each) for each in zip(*parts, strict=True))
    merged = merge(outputs.to(dtype), lse.float())
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=ERROR[dtype])


@pytest.mark.parametrize("merge", [by_torch, compiled])
@pytest.mark.parametrize(
    ("lse", "expected"),
    [
        ((-math.inf, -math.inf), 0),  # no part has a key
        ((LEAST, -math.inf), 1),  # the first has keys, masked by the least number throughout
        ((-math.inf, LEAST), 3),
        ((LEAST, LEAST), 2),
        ((LEAST, 0), 3),
        ((-1e31, -1e31), 2),
    ],
)
def test_a_part_without_keys_weighs_nothing_beside_the_smallest_that_has_some(merge, lse, expected):
    has_keys = torch.tensor(lse).view(2, 1, 1, 1).expand(2, 1, 1, 64) > -math.inf
    outputs = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1) * has_keys
    merged = merge(outputs, torch.tensor(lse, dtype=torch.float32).view(2, 1, 1))
    assert merged.eq(expected).all()
