"""Every way of the kernel that this CPU can run is right, not only the one that it would choose."""

import os
import subprocess
import sys

import pytest

from numa_lab.attention import vectors
from numa_lab.errors import InvalidInput

# One of each way to read K: widened into registers, as it lies in memory, and widened into working memory, with two panels.
CASES = """
import sys
from numa_lab.attention import processors
if sys.argv[1:]:
    plan = processors.processor(sys.argv[1])
    processors.processor = lambda name: plan
import torch
from numa_lab.attention import decode
from numa_lab.attention.reference import attention
torch.manual_seed(0)
for dtype, group, head_dim, tolerance in (
    (torch.float16, 2, 72, 1e-3), (torch.float32, 7, 128, 1e-5), (torch.bfloat16, 17, 80, 1e-2),
):
    for kv_len in (1, 130, 700):
        query = torch.randn(1, 2 * group, 1, head_dim).to(dtype)
        key, value = torch.randn(2, 1, kv_len, 2, head_dim).to(dtype).transpose(2, 3)
        expected, _ = attention(query, key, value, enable_gqa=True)
        output = decode.decode_attention(query, key, value)
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
"""


@pytest.mark.parametrize("name", vectors.available())
def test_each_kind_of_vectors_is_right(name):
    done = subprocess.run(
        [sys.executable, "-c", CASES], env={**os.environ, vectors.VARIABLE: name}, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["znver4", "unknown"])
def test_the_plan_of_another_processor_is_right(name):
    done = subprocess.run([sys.executable, "-c", CASES, name], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def test_vectors_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setenv(vectors.VARIABLE, "mmx")
    with pytest.raises(InvalidInput, match=r"NUMA_LAB_VECTORS=mmx: expected one that this CPU has \("):
        vectors.chosen()
