"""What happens where Numba or llvmlite changed, or aren't there: torch computes, and who asked for the kernel is told why it can't run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import numa_lab
from numa_lab.attention import kernel_cache
from numa_lab.attention.gqa import gqa_attention
from numa_lab.errors import InvalidInput
from numa_lab.placement import jit

ROOT = Path(__file__).resolve().parents[2]

CHANGES = {
    "a name is gone": ("import numba.core.cgutils as c; del c.for_range_slice", "cannot import name 'for_range_slice'"),
    "a type is made otherwise": (
        "from llvmlite import ir; ir.HalfType.__new__ = lambda cls: (_ for _ in ()).throw(TypeError('sealed'))",
        "sealed",
    ),
    "a function takes other arguments": (
        "import numba.core.cgutils as c; c.for_range_slice = lambda builder: None",
        "takes 1 positional argument",
    ),
    "LLVM refuses the code": (
        "import llvmlite.binding as llvm\ndef refuse(text): raise RuntimeError('LLVM IR parsing error')\n"
        "llvm.parse_assembly = refuse",
        "LLVM IR parsing error",
    ),
    "Numba refuses this numpy": ("import sys; sys.modules['numba'] = None", "import of numba halted"),
}

PROGRAM = """
import sys, warnings
import torch
from torch.nn.functional import scaled_dot_product_attention
{change}
from numa_lab import gqa_attention
from numa_lab.attention.decode import decode_attention
from numa_lab.attention.gqa import choose_backend
from numa_lab.errors import CompilerUnusable

query, keys = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 100, 64)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        output = gqa_attention(query, keys, keys, enable_gqa=True)
torch.testing.assert_close(output, scaled_dot_product_attention(query, keys, keys, enable_gqa=True))
(warning,) = told
assert warning.category is RuntimeWarning and warning.filename == "<string>", warning
assert choose_backend(query, keys, keys, enable_gqa=True).startswith("torch")
for asked in (lambda: gqa_attention(query, keys, keys, enable_gqa=True, backend="numba"), lambda: decode_attention(query, keys, keys)):
    try:
        asked()
    except CompilerUnusable as error:
        assert error.__cause__ is not None and str(error) in str(warning.message)
    else:
        sys.exit("the kernel ran")
print(warning.message)
"""


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_torch_computes_where_numba_or_llvmlite_changed_and_one_warning_says_why(tmp_path, change, reason):
    words = [sys.executable, "-c", PROGRAM.format(change=change)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}  # where nothing was compiled before the change
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout
    assert f"pip install {' '.join(jit.TESTED)}" in done.stdout


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, TimeoutError, InvalidInput])
def test_what_is_no_fault_of_the_compiler_passes_and_the_kernel_serves_the_next_call(monkeypatch, error):
    def fail(_spec):
        raise error

    query = torch.randn(1, 3, 1, 248)  # of a version that no other test has loaded
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "machine_code", fail)
        patch.setattr(kernel_cache, "folder", lambda: None)
        with pytest.raises(error):
            gqa_attention(query, query[:, :1], query[:, :1], enable_gqa=True)
    kernel_cache.require_compiler()


def test_the_versions_to_install_are_those_that_are_tested():
    assert set(jit.TESTED) <= set((ROOT / "constraints.txt").read_text().splitlines())


def test_the_oldest_versions_that_run_the_tests_are_those_that_are_promised():
    promised = re.findall(r'"((?:llvmlite|numba)>=[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    tested = re.search(r"^OLDEST := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert len(promised) == 2
    assert {f"{bound.replace('>=', '==')}.0" for bound in promised} <= set(tested)


def test_one_module_alone_uses_what_numba_and_llvmlite_do_not_document():
    private = ("numba.core", "numba.np", "get_dummy_value", "get_value_type", "_create_instance", "intrinsic_name")
    sources = Path(numa_lab.__file__).parent.rglob("*.py")
    assert {path.name for path in sources if any(name in path.read_text() for name in private)} == {"compiler.py"}
