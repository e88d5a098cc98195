import subprocess
import sys

import pytest

from numa_lab.attention.shapes import PRESETS, AttentionShape, fit, preset
from numa_lab.errors import InvalidInput

GIB = 1 << 30


def test_bytes_and_operations_of_the_guide():
    guide = preset("guide")
    assert guide.kv_bytes == 2 * 512 * 8 * 512 * 128 * 2
    assert guide.q_bytes == guide.output_bytes == 512 * 32 * 128 * 2
    assert guide.total_bytes == guide.kv_bytes + 2 * guide.q_bytes
    assert guide.flops == 4 * 512 * 32 * 512 * 128
    assert (guide.group, guide.kind, guide.phase) == (4, "gqa", "decode")
    assert guide.replace(dtype="float32", q_len=2).kv_bytes == 2 * guide.kv_bytes
    assert guide.replace(q_len=2).phase == "prefill"


def test_each_kind_is_among_the_presets():
    assert {shape.kind for shape in PRESETS.values()} == {"gqa", "mha", "mqa"}
    assert (PRESETS["falcon-7b"].kind, PRESETS["llama-2-7b"].kind) == ("mqa", "mha")
    assert {shape.phase for shape in PRESETS.values()} == {"decode"}


def test_a_preset_takes_other_values():
    assert preset("qwen2.5-7b", kv_len=7, dtype="float16") == AttentionShape(1, 28, 4, 1, 7, 128, "float16")


@pytest.mark.parametrize(
    ("name", "message"),
    [("llama3-8b", r"did you mean 'llama-3-8b'.*guide"), ("Gemma-2-9B", "'gemma-2-9b'"), ("x", "'x': expected one of")],
)
def test_an_unknown_preset_lists_the_known_ones(name, message):
    with pytest.raises(InvalidInput, match=message):
        preset(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch", 0), ("q_len", -1), ("kv_heads", 3), ("dtype", "int8"), ("kv_len", 1.5), ("q_heads", True)],
)
def test_a_shape_that_makes_no_sense_can_not_be_made(field, value):
    with pytest.raises(InvalidInput, match=f"{field}={value!r}"):
        AttentionShape(1, 32, 8, 1, 16, 128, "bfloat16").replace(**{field: value})


def test_fit_scales_the_batch_first_and_then_the_length():
    assert fit(preset("guide"), 2 * GIB) == (preset("guide"), "")
    smaller, message = fit(preset("guide"), GIB // 2)
    assert (smaller.batch, smaller.kv_len) == (128, 512)
    assert smaller.total_bytes <= GIB // 2 < smaller.replace(batch=256).total_bytes
    assert "batch from 512 to 128" in message
    assert "512.0 MiB" in message
    one, _ = fit(preset("guide"), GIB >> 12)
    assert one.batch == 1
    assert one.total_bytes <= GIB >> 12 < one.replace(kv_len=2 * one.kv_len).total_bytes
    with pytest.raises(InvalidInput, match="100"):
        fit(preset("guide"), 100)


def test_fit_never_leaves_more_new_tokens_than_tokens():
    prompt = preset("llama-3-8b", q_len=4096)
    smaller, message = fit(prompt, prompt.total_bytes // 3)
    assert smaller.q_len == smaller.kv_len == 1024
    assert "q_len from 4096 to 1024" in message


def test_shapes_do_not_need_torch():
    code = "import numa_lab.attention.shapes, numa_lab.measurement.workloads, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
