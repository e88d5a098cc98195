"""Every code block of the source guide runs as it is written.

The guide was written on a machine with nodes 0 to 3. Where this one has fewer, the blocks name its own nodes instead:
that, and names that the guide leaves to the reader, is all that is filled in.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import numa_lab
from numa_lab.attention.reference import attention as reference
from numa_lab.machine import libnuma
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement import openmp

ROOT = Path(__file__).parents[2]
NODES = read_topology().effective_nodes
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (Path(__file__).parent / "guide.zh.md").read_text(), re.MULTILINE | re.DOTALL
)


def on_this_machine(code):
    if 3 not in NODES:
        code = re.sub(r"(numa_node|bind)=3", rf"\1={NODES[-1]}", code)
    return code if tuple(range(4)) == NODES else code.replace("range(4)", repr(list(NODES)))


def block(part, language="python"):
    (found,) = [code for kind, code in BLOCKS if part in code and kind == language]
    return on_this_machine(found)


@pytest.fixture
def names():
    """What a reader of the guide has at hand."""
    sizes = {"batch_size": 2, "num_heads": 8, "num_kv_heads": 2, "q_seq_len": 1, "seq_len": 64, "head_dim": 32}
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 1, 32, generator=generator)
    key, value = torch.randn(2, 2, 2, 64, 32, generator=generator).unbind()
    found = {"torch": torch, "dtype": torch.float32, **sizes, "query": query, "key": key, "value": value}
    for name in ("NUMAOptimizedGQA", "NUMAThreadPool", "get_optimal_numa_node", "scaled_dot_product_attention_gqa"):
        found[name] = getattr(numa_lab, name)
    for number in (1, 2, 3, 4):
        found |= {f"query{number}": number * query, f"key{number}": key, f"value{number}": value}
    return found


@pytest.fixture(autouse=True)
def threads_as_before():
    def look(_number):
        return os.sched_getaffinity(0), libnuma.get_mempolicy()

    count = torch.get_num_threads()
    before = openmp.run_on_each(look, count)
    yield
    torch.set_num_threads(count)  # one block sets it, as the guide says
    assert openmp.run_on_each(look, count) == before


def run(code, names):
    exec(compile(code, "guide", "exec"), names)
    return names


def test_the_guide_has_the_blocks_that_are_tested_here():
    assert [kind for kind, _ in BLOCKS] == ["python"] * 4 + ["bash"] + ["python"] * 6


@pytest.mark.parametrize(
    "part", ["from optimize_gqa_with_numa import NUMAOptimizedGQA\n\n# 自动", "numa_node=3, auto_detect"]
)
def test_one_node(part, names):
    (code,) = [code for _, code in BLOCKS if part in code]
    run(on_this_machine(code), names)
    expected, _ = reference(names["query"], names["key"], names["value"], enable_gqa=True)
    assert (names["output"] - expected).abs().max() < 1e-5


def test_tensors_and_computation_on_one_node(names):
    run(block("numa_gqa.compute(query, key, value)"), names)
    expected, _ = reference(names["query"], names["key"], names["value"], enable_gqa=True)
    assert (names["output"] - expected).abs().max() < 1e-5
    receipt = names["numa_gqa"].receipt()
    assert receipt.contradictions(read_topology().cpus_of([names["numa_gqa"].node]), [names["numa_gqa"].node]) == []


def test_a_batch_over_the_nodes(names):
    run(block("NUMAThreadPool(num_threads_per_node=1)"), names)
    names["thread_pool"].shutdown()
    for number, output in enumerate(names["results"], 1):
        expected, _ = reference(number * names["query"], names["key"], names["value"], enable_gqa=True)
        assert (output - expected).abs().max() < 1e-5


def test_one_global_helper_in_every_attention_call(names):
    whole = run(block("_global_numa_gqa = None") + block("def attn("), names)
    assert whole["attn"](None, whole["query"], whole["key"], whole["value"]) is None, "as written it ends in a comment"
    assert whole["get_numa_gqa"]() is whole["get_numa_gqa"]()
    compute = "return scaled_dot_product_attention_gqa(query_states, key_states, value_states)"
    run(block("_global_numa_gqa = None").replace("# ... 原有代码 ...", compute), names)
    output = names["attn"](None, names["query"], names["key"], names["value"])
    expected, _ = reference(names["query"], names["key"], names["value"], enable_gqa=True)
    assert (output - expected).abs().max() < 1e-5


def test_a_thread_count(names):
    code = block("torch.set_num_threads(cpus_per_node)").replace("= 24", "= 3")  # "as the machine has them"
    assert run(code, names)["torch"].get_num_threads() == 3


def test_memory_that_is_allocated_before(names):
    pool = run(block("memory_pool = {"), names)["memory_pool"]
    assert {name: tuple(tensor.shape) for name, tensor in pool.items()} == {
        "query": (2, 8, 1, 32), "key": (2, 2, 64, 32), "value": (2, 2, 64, 32),
    }  # fmt: skip


COMPUTE = """
    import os, torch
    from numa_lab.placement import openmp
    from numa_lab.machine.topology_reader import read_topology
    query, (key, value) = torch.ones(1, 8, 1, 64), torch.ones(2, 1, 2, 4096, 64)
    assert (numa_gqa.compute(query, key, value) == 1).all()
    with numa_gqa:
        cpus = set(read_topology("/").node_cpus[numa_node])
        assert all(thread.cpus <= cpus for thread in openmp.team())
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_per_node(method, tmp_path):
    code = block("import multiprocessing as mp").replace("# 执行计算...", COMPUTE.strip())
    worker, start = code.split("# 启动")
    script = tmp_path / "processes.py"
    script.write_text(
        f"import torch\nfrom optimize_gqa_with_numa import NUMAOptimizedGQA\n{worker}\n"
        "if __name__ == '__main__':\n"
        f"    mp.set_start_method({method!r})\n"
        "    torch.randn(500, 500) @ torch.randn(500, 500)  # the parent has a team, and a fork must not copy it\n"
        + "".join(f"    {line}\n" for line in f"# {start}".splitlines())
        + "    for p in processes:\n        p.join(600)\n        assert p.exitcode == 0, p.exitcode\n"
        f"    assert len(processes) == {len(NODES)}\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr


def commands():
    bash = [line for line in block("numactl", "bash").splitlines() if line.startswith("numactl")]
    preferred = f"numactl --preferred={format_cpulist(NODES[-1:])} python test_decode_thread.py"  # question 3
    return [*bash, preferred, block("python optimize_gqa_with_numa.py").strip()]


@pytest.mark.parametrize("command", commands())
def test_a_command(command, tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [str(ROOT / word) if word.endswith(".py") else word for word in command.split()]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PATH": path, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3
