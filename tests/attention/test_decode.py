"""The decode kernel against float64: what it reads and writes, and what it leaves alone."""

import ctypes
import math
import mmap
import os
import platform
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from numa_lab.attention import decode, decode_spec, kernel_plan, vectors
from numa_lab.attention.call import AttentionCall
from numa_lab.attention.gqa import choose_backend, gqa_attention
from numa_lab.attention.reference import attention as reference
from numa_lab.errors import InvalidInput

PAGE = mmap.PAGESIZE
TIMES_TORCHS_ERROR = 1.5
OTHER_ORDERS = 4


def at_the_end_of_a_page(size, dtype, random_numbers):
    """A tensor whose last byte is followed by a page that may not be touched."""
    nbytes = math.prod(size) * dtype.itemsize
    pages = -(-max(nbytes, 1) // PAGE)
    block = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + pages * PAGE), PAGE, mmap.PROT_READ * 0) == 0
    tensor = (
        torch.frombuffer(block, dtype=dtype, count=math.prod(size), offset=pages * PAGE - nbytes) if nbytes else None
    )
    tensor = torch.empty(size, dtype=dtype) if tensor is None else tensor.view(size)
    return tensor.copy_(torch.randn(size, generator=random_numbers).to(dtype)) if nbytes else tensor


VERSIONS = [  # dtype, head_dim, query rows that one compiled version serves: as (group, q_len)
    (torch.float32, 128, [(4, 1), (2, 2), (1, 4)]),
    (torch.bfloat16, 128, [(11, 1), (5, 3), (19, 1)]),
    (torch.bfloat16, 72, [(1, 1)]),
    (torch.float16, 80, [(7, 1), (1, 7)]),
    (torch.float16, 64, [(2, 1)]),
]


def torchs_error(query, key, value, mask, expected, numbers):
    """Largest distance of torch's outputs from float64, over some orders of the elements of Q and K where they are float32.

    By the formula the result is the same in every order, and rounding is not: in float32 an output errs as the few scores do that weigh
    most, so that torch itself is further from float64 in one order than in another by more than 1.5 times for a tenth of the sequences.
    """
    orders = [torch.arange(query.size(-1))]
    if query.dtype == torch.float32:
        orders += [torch.randperm(query.size(-1), generator=numbers) for _ in range(OTHER_ORDERS)]
    return max(
        largest(
            scaled_dot_product_attention(query[..., order], key[..., order], value, mask, enable_gqa=True) - expected
        )
        for order in orders
    )


def largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0


def half_a_unit(expected, dtype):
    """Half a unit in the last place of the largest output: even an exact output is so far from float64 once it is rounded to its dtype."""
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(largest(expected))[1] - 2)


def one_shape(number):
    chance, numbers = random.Random(number), torch.Generator().manual_seed(number)
    dtype, head_dim, rows = VERSIONS[number % len(VERSIONS)]
    group, q_len = chance.choice(rows)
    batch, kv_heads = chance.choice([1, 1, 2, 3]), chance.choice([1, 2, 3])
    kv_len = chance.choice([0, 1, 2, 15, 16, 17, 63, 64, 65, chance.randrange(600)])
    torch.set_num_threads(chance.choice([1, 2, 3]))  # of this thread
    query = at_the_end_of_a_page((batch, kv_heads * group, q_len, head_dim), dtype, numbers)
    if chance.random() < 0.5:
        key, value = (at_the_end_of_a_page((batch, kv_heads, kv_len, head_dim), dtype, numbers) for _ in range(2))
    else:  # a [B, S, H, D] cache seen as [B, H, S, D]
        key, value = (
            at_the_end_of_a_page((batch, kv_len, kv_heads, head_dim), dtype, numbers).transpose(1, 2) for _ in range(2)
        )
    mask = None
    if chance.random() < 0.5:
        size = [chance.choice([1, n]) for n in (batch, kv_heads * group, q_len, kv_len)]
        mask = torch.rand(size, generator=numbers) > 0.3
        if chance.random() < 0.5:
            mask = (
                torch.randn(size, generator=numbers)
                .masked_fill(~mask, -math.inf)
                .to(chance.choice([dtype, torch.float32]))
            )
    room = torch.full((query.numel() + 128,), math.nan, dtype=dtype)
    out = room[64:-64].view(query.shape)
    result, lse = decode.decode_attention(query, key, value, mask, out=out, return_lse=True)
    expected, expected_lse = reference(query, key, value, mask, enable_gqa=True)
    what = (
        f"shape {number}: {dtype} {tuple(query.shape)} {tuple(key.shape)} mask {None if mask is None else mask.dtype}"
    )
    by_torch = torchs_error(query, key, value, mask, expected, numbers)
    assert largest(result - expected) <= TIMES_TORCHS_ERROR * by_torch + half_a_unit(expected, dtype), (what, by_torch)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-4, msg=lambda m: f"{what}: {m}")
    assert room[:64].isnan().all(), what
    assert room[-64:].isnan().all(), what


def test_1000_shapes_from_several_threads_are_right_and_read_and_write_nothing_else():
    before = torch.get_num_threads()
    for version in range(len(VERSIONS)):
        one_shape(version)  # compiles
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(one_shape, range(1000)))
    torch.set_num_threads(before)


def test_an_output_of_another_layout_is_written_where_it_lies_when_the_shape_is_known_already():
    query, key, value = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 40, 64), torch.randn(1, 2, 40, 64)
    expected = decode.decode_attention(query, key, value)
    room = torch.full((4, 1, 1, 128), math.nan)
    for out in (torch.empty_like(query), room[..., :64].transpose(0, 1), torch.empty_like(query)):
        assert decode.decode_attention(query, key, value, out=out) is out
        assert torch.equal(out, expected)
    assert room[..., 64:].isnan().all()
    with pytest.raises(InvalidInput, match=r"expected torch\.float32"):
        decode.decode_attention(query, key, value, out=torch.empty(1, 4, 1, 32))


def test_rows_of_a_query_may_overlap():
    key, value = torch.randn(2, 1, 1, 30, 16)
    for strides in ((0, 0, 8, 1), (7, 7, 7, 1), (1, 1, 1, 1)):
        query = torch.randn(100).as_strided((1, 4, 2, 16), strides)
        expected, _ = reference(query, key, value, enable_gqa=True)
        for _ in range(2):  # the second time the shape is known
            output = gqa_attention(query, key, value, enable_gqa=True)
            torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "kv_len"), [(1.0, 2000), (30.0, 500), (1.0, 131072)])
def test_no_further_from_float64_than_torch(dtype, size, kv_len):
    """The error of one output is luck (which sums happen to round well), so the mean over many sequences is compared."""
    torch.manual_seed(0)
    batch = max(1, 2**15 // kv_len)
    query = (size * torch.randn(batch, 4, 1, 64)).to(dtype)
    key, value = (torch.randn(batch, 1, kv_len, 64).to(dtype) for _ in range(2))
    expected, _ = reference(query, key, value, enable_gqa=True)

    def error(output):
        return (output - expected).square().mean().sqrt().item()

    by_torch = error(scaled_dot_product_attention(query, key, value, enable_gqa=True))
    assert error(decode.decode_attention(query, key, value)) <= 1.25 * by_torch  # ours rounds weights of BF16 as well


def test_what_is_no_number_is_not_hidden():
    query, key, value = torch.randn(1, 2, 1, 64), torch.randn(1, 1, 99, 64), torch.randn(1, 1, 99, 64)
    key[0, 0, 50, 3] = math.nan
    assert gqa_attention(query, key, value, enable_gqa=True, backend="numba").isnan().all()


def test_what_the_kernel_does_not_serve_goes_to_torch_and_is_named():
    query, key = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 9, 64)
    assert choose_backend(query, key, key, enable_gqa=True) == "numba"
    for odd in (
        {"query": query.double(), "key": key.double()},
        {"query": query[..., :60], "key": key[..., :60]},
        {"query": query.expand(1, 4, 17, 64)},
        {"query": query.clone().requires_grad_()},
        {"key": key.transpose(-1, -2).contiguous().transpose(-1, -2)},
        {"scale": 0.0},
        {"dropout_p": 0.1},
    ):
        given = {"query": query, "key": key, **odd}
        given["value"] = given["key"]
        assert choose_backend(**given, enable_gqa=True, backend="numba").startswith("torch"), odd
    with pytest.raises(InvalidInput, match="one kv_len for key and value"):
        decode.decode_attention(query, key, key[:, :, :5])  # compiled code would read behind the values
    with pytest.raises(InvalidInput, match="multiple of them in query"):
        decode.decode_attention(query[:, :3], key, key)
    with pytest.raises(InvalidInput, match=r"float64.*use gqa_attention"):
        decode.decode_attention(query.double(), key.double(), key.double())


def test_without_what_it_needs_torch_computes_and_one_warning_says_why(monkeypatch):
    query, key = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 9, 64)
    monkeypatch.setattr(vectors, "host", lambda: None)
    decode._lacking.cache_clear()
    decode.warn_once.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="AVX2") as warned:
            for _ in range(2):
                assert choose_backend(query, key, key, enable_gqa=True).startswith("torch")
        assert len(warned) == 1
    finally:
        decode._lacking.cache_clear()


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_threads_share_no_page_of_their_workspace_whatever_its_size(monkeypatch, page):
    monkeypatch.setattr(mmap, "PAGESIZE", page)
    spec = decode_spec.DecodeSpec.of(vectors.Rows(vectors.AVX2, vectors.Kind.FLOAT32, 128), 4)
    workspace = kernel_plan.Workspace()
    begin = workspace.at_least(3 * spec.workspace_bytes(4))
    assert begin % page == spec.workspace_bytes(4) % page == 0
    assert begin + 3 * spec.workspace_bytes(4) <= workspace._buffer.data_ptr() + workspace._buffer.nbytes


def test_a_plan_serves_a_longer_cache_and_compiles_nothing_before_it_runs(monkeypatch):
    query, key, value = torch.randn(1, 4, 1, 64), *torch.randn(2, 1, 2, 40, 64)
    call = AttentionCall(query, key[:, :, :9], value[:, :, :9], enable_gqa=True)
    kernel_plan._compiled_kernel.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(kernel_plan.kernel_cache, "address", lambda _: pytest.fail("a kernel was loaded"))
        plan = decode.plan_for(call)
    longer = call._replace(key=key, value=value)
    assert torch.equal(plan.attend(longer), decode.decode_attention(query, key, value))
    assert decode.plan_for(call._replace(dropout_p=0.1)) == "dropout_p=0.1"


BY_ANOTHER_PROCESS = """
import torch
from numa_lab.attention import kernel_cache, decode
built = []
kernel_cache.machine_code = lambda spec, make=kernel_cache.machine_code: built.append(spec) or make(spec)
query = torch.ones(1, 1, 1, 64)
torch.testing.assert_close(decode.decode_attention(query, query, query), query)
print(len(built), len(list(kernel_cache.folder().glob("*.o"))))
"""


def test_what_was_compiled_is_loaded_from_disk_and_made_anew_where_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def others(count):
        words = [sys.executable, "-c", BY_ANOTHER_PROCESS]
        started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        return [tuple(map(int, process.communicate()[0].split())) for process in started]

    assert {files for _, files in others(2)} == {2}  # at once; a kernel, and what lets a team run it
    assert others(1) == [(0, 2)]
    stored, _ = kept = list((tmp_path / "numa_lab/kernels").glob("*.o"))
    stored.write_bytes(stored.read_bytes()[:-100])
    assert others(1) == [(1, 2)]
    for file in kept:
        file.unlink()
    stored.parent.rmdir()
    stored.parent.write_text("not a folder")
    assert others(1) == [(2, 0)]


NUMBA_ON_X86 = pytest.mark.skipif(
    platform.machine() != "x86_64",
    reason="Numba compiles for the architecture that it runs on, and this code is of x86-64",
)
FOR_ANOTHER_CPU = """
import dataclasses, sys
import llvmlite.binding as llvm
from numa_lab.attention import decode_spec, kernel_cache, vectors
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
name, kind, cpu, triple = sys.argv[1:]
cpu_vectors = getattr(vectors, name)
if name == "NEON":  # Numba compiles for this CPU too, which does not know that instruction
    cpu_vectors = dataclasses.replace(cpu_vectors, prefetch="")
rows = vectors.Rows(cpu_vectors, vectors.Kind[kind], 72)
target = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
print(kernel_cache.assembly(decode_spec.DecodeSpec.of(rows, 4), target))
"""


@pytest.mark.parametrize(
    ("name", "kind", "cpu", "triple", "wanted"),
    [
        pytest.param(
            *("AVX512_BF16", "BFLOAT16_PAIRS", "znver4", "x86_64-linux-gnu", ["vdpbf16ps", "zmm", "prefetcht1"]),
            marks=NUMBA_ON_X86,
        ),
        pytest.param(
            *("AVX512", "FLOAT16", "skylake-avx512", "x86_64-linux-gnu", ["vfmadd", "zmm", "vcvtph2ps"]),
            marks=NUMBA_ON_X86,
        ),
        ("NEON", "BFLOAT16", "neoverse-n1", "aarch64-linux-gnu", ["fmla\tv"]),
    ],
)
def test_one_source_gives_the_instructions_of_other_cpus(name, kind, cpu, triple, wanted):
    """They can't run here, so what is made for them is looked at."""
    words = [sys.executable, "-c", FOR_ANOTHER_CPU, name, kind, cpu, triple]
    environment = os.environ | ({"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""} if name != "NEON" else {})
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in wanted)
