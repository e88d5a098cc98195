import subprocess
import sys

import pytest

from numa_lab.attention.shapes import PRESETS, AttentionShape, fit, preset
from numa_lab.errors import InvalidInput

GIB = 1 << 30


def test_bytes_and_operations_of_the_guide():
    guide = preset("guide")
    assert guide.kv_bytes == 2 * 512 * 8 * 512 * 128 * 2
    assert guide.flops == 4 * 512 * 32 * 512 * 128
    assert (guide.group, guide.kind, guide.phase) == (4, "gqa", "decode")


def test_each_kind_is_among_the_presets():
    assert {shape.kind for shape in PRESETS.values()} == {"gqa", "mha", "mqa"}


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(InvalidInput, match=r"did you mean 'llama-3-8b'.*guide"):
        preset("llama3-8b")


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch", 0), ("q_len", -1), ("kv_heads", 3), ("dtype", "int8"), ("kv_len", 1.5), ("q_heads", 0)],
)
def test_a_shape_that_makes_no_sense_can_not_be_made(field, value):
    with pytest.raises(InvalidInput, match=str(value)):
        AttentionShape(1, 32, 8, 1, 16, 128, "bfloat16").replace(**{field: value})


def test_fit_scales_the_batch_first_and_then_the_length():
    assert fit(preset("guide"), 2 * GIB) == (preset("guide"), "")
    smaller, message = fit(preset("guide"), GIB // 2)
    assert (smaller.batch, smaller.kv_len) == (128, 512)
    assert smaller.total_bytes <= GIB // 2 < smaller.replace(batch=256).total_bytes
    assert "batch from 512 to 128" in message
    one, _ = fit(preset("guide"), GIB >> 12)
    assert one.batch == 1
    assert one.total_bytes <= GIB >> 12 < one.replace(kv_len=2 * one.kv_len).total_bytes
    with pytest.raises(InvalidInput, match="100"):
        fit(preset("guide"), 100)


def test_shapes_do_not_need_torch():
    code = "import numa_lab.attention.shapes, numa_lab.workloads, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
