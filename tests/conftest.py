"""What each test has to leave as it was; captured machines, and runs with a planted truth."""

import dataclasses
import errno
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, settings

from numa_lab.attention.shapes import preset
from numa_lab.errors import NotPermitted, NumaLabError
from numa_lab.experiments import sweep_lock
from numa_lab.machine import libnuma
from numa_lab.machine.hardware import Cpu, Node
from numa_lab.machine.sysfs import format_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.measurement import atomic_files, machine_facts, results
from numa_lab.placement.binding import Binding, MemPolicy
from still_running import StillRunning

settings.register_profile("busy", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # how long an example takes says nothing on a machine with other work

GIB = 1 << 30
CAPTURED = Path(__file__).parent / "topologies"

# Python takes a filter from 3.11.4 on, and asks for one from 3.12 on.
SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}

# Of the 70,000 files and links in the archives, those of the kinds that a reader of topologies may look at.
LOOKED_AT = re.compile(
    r"/(cpu/(online|offline|isolated|nohz_full)|cpu\d+/(online|cpu_capacity|cpufreq|acpi_cppc/highest_perf)"
    r"|cpufreq/(policy\d+/)?cpuinfo_max_freq"
    r"|topology/((thread_siblings|core_cpus)\w*|physical_package_id|core_id|die_id)"
    r"|cache/index\d+/(level|type|size|shared_cpu_\w+)|node\d+/(cpulist|cpumap|distance|meminfo)|initiators/node\d+"
    r"|bus/pci/devices/.*|pci\w+:\w+/.*/(class|numa_node)|dmi/id/\w+|regs/identification/midr_el1"
    r"|proc/(cpuinfo|meminfo|cmdline|self/.*))$"
)

CASES = [
    preset("llama-3-8b", kv_len=kv_len, kv_heads=kv_heads, q_len=q_len, batch=batch, dtype=dtype)
    for kv_heads, dtype, q_len, kv_len, batch in [
        (8, "bfloat16", 1, 4096, 1),
        (8, "bfloat16", 1, 1024, 1),
        (8, "bfloat16", 1, 4096, 4),
        (8, "bfloat16", 256, 256, 1),
        (32, "bfloat16", 1, 4096, 1),
        (32, "bfloat16", 256, 256, 1),
        (1, "float32", 1, 4096, 1),
    ]
]


def pytest_configure(config):
    config.pluginmanager.register(StillRunning())


def _shared_state():
    """What all tests of this process share and some of them change, by name."""
    state = {"CPUs of the main thread": os.sched_getaffinity(0), "working directory": os.getcwd()}
    try:
        state["memory policy of the main thread"] = libnuma.get_mempolicy()
    except (NumaLabError, OSError) as error:
        state["memory policy of the main thread"] = str(error)
    if torch := sys.modules.get("torch"):
        with ThreadPoolExecutor(1) as new:
            state["threads of new threads"] = new.submit(torch.get_num_threads).result()
        state["threads of the main thread"] = torch.get_num_threads()
    return state


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """Let each test leave what all share as it was, so that they pass in any order; in a guest each has its own process."""
    before = _shared_state()
    yield
    if "multinode" not in request.path.parts:
        after = _shared_state()
        assert {name: (value, after[name]) for name, value in before.items() if value != after[name]} == {}


@pytest.fixture(scope="session")
def captured():
    """From the name of a captured machine to its root, unpacked once."""
    memory_disk = Path("/dev/shm")  # 20,000 small files take 20 s on some disks
    roomy = memory_disk.is_dir() and shutil.disk_usage(memory_disk).free > 2**28
    roots = {}
    with tempfile.TemporaryDirectory(dir=memory_disk if roomy else None) as folder:

        def root(name):
            if name not in roots:
                with tarfile.open(CAPTURED / f"{name}.tar.bz2") as archive:
                    members = [member for member in archive if LOOKED_AT.search(member.name)]
                    archive.extractall(folder, members, **SAFELY)
                roots[name] = Path(folder, members[0].name.split("/")[0])
            return roots[name]

        yield root


@pytest.fixture(autouse=True, scope="session")
def no_other_sweep():
    """A lock of this test process alone: sweeps and other tests that run on this machine are let be, and keep no test waiting."""
    own = f"numa_lab.test.{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_lock, "NAME", f"\0{own}")
        patch.setattr(sweep_lock, "FILE", sweep_lock.FILE.with_name(own))
        yield
        sweep_lock.FILE.unlink(missing_ok=True)


@pytest.fixture
def numa_calls():
    """Skips where QEMU runs this program in the kernel's place (make test-arm).

    It has no NUMA calls, passes on no advice and no limit of memory, and makes up smaps. A kernel without NUMA is like it.
    """
    try:
        libnuma.get_mempolicy()
    except NotPermitted as error:
        if error.errno == errno.ENOSYS:
            pytest.skip("no kernel with NUMA calls answers, QEMU does in its place: on Arm a guest's kernel is asked")


@pytest.fixture
def four_nodes():
    """Three nodes of two CPUs, and one with memory alone."""
    cpus = tuple(Cpu(cpu, cpu, 0, cpu // 2) for cpu in range(6))
    nodes = tuple(Node(n, tuple(c.id for c in cpus if c.node == n), GIB, GIB, GIB, n < 3) for n in range(4))
    return Topology(nodes, cpus, None, tuple(range(6)), tuple(range(4)), (), (), "test", None, False)


@pytest.fixture
def synthetic_rows():
    """Tidy rows of a sweep with a planted truth."""
    return _rows


def _rows(labels=("c0m0",), executions=5, effects=None, noise=0.01, seed=0, samples=6, nodes=4):
    """Rows of `executions` per label and of its A/A twin; `effects` gives the factor on the time of a label.

    `noise` is the spread between executions; samples within one differ by a tenth of it.
    """
    rng = np.random.default_rng(seed)
    rows, order = [], 0
    twin = labels[0] + "~aa"
    for block in range(executions):
        for label in rng.permutation([*labels, twin]):
            binding = Binding.parse(str(label).removesuffix("~aa"))
            speed = (effects or {}).get(str(binding), 1.0) * np.exp(rng.normal(0, noise))
            for shape in CASES:
                for threads in (1, 2) if shape == CASES[0] else (2,):
                    rows += _case(rng, shape, threads, str(label), binding, speed, block, order, noise, samples)
            order += 1
    return pd.DataFrame(rows)[[column.name for column in results.COLUMNS]]


def _case(rng, shape, threads, label, binding, speed, block, order, noise, samples):
    limit = 20e9 * threads
    seconds = (shape.kv_bytes / (0.4 * limit) + shape.flops / (40e9 * threads)) * speed
    cpu_nodes = binding.cpu_nodes or (0,)
    mem_nodes = binding.mem_nodes or cpu_nodes
    cpus = [cpu for node in cpu_nodes for cpu in (2 * node, 2 * node + 1)][:threads]
    pages = {str(node): 1024 // len(mem_nodes) for node in mem_nodes}
    placed = dict.fromkeys(("key", "value", "query"), pages)
    receipt = {
        "requested": str(binding), "effective": str(binding.asked_of_kernel),
        "observed": json.dumps({
            "threads": [{"tid": 100 + cpu, "allowed": str(cpu), "seen": str(cpu)} for cpu in cpus],
            "pages_before": placed, "pages_after": placed, "notes": [], "huge_pages": {"key": 1.0, "value": 0.5},
        }),
    }  # fmt: skip
    local = len(set(cpu_nodes) & set(mem_nodes)) / len(mem_nodes)
    shared = {
        "run_id": "synthetic", "execution_id": f"{order:04}", "block": block, "order": order, "label": label,
        "cpu_nodes": format_cpulist(binding.cpu_nodes), "mem_nodes": format_cpulist(binding.mem_nodes),
        "policy": binding.policy.value, "observed_cpus": format_cpulist(cpus), "local_page_share": local,
        "attention": shape.kind, "phase": shape.phase, "batch": shape.batch, "q_heads": shape.q_heads,
        "kv_heads": shape.kv_heads, "q_len": shape.q_len, "kv_len": shape.kv_len, "head_dim": shape.head_dim,
        "dtype": shape.dtype, "backend": "torch-folded" if shape.group > 1 and shape.q_len == 1 else "torch",
        "threads": threads, "kv_bytes": shape.kv_bytes, "flops": shape.flops, "limit_bytes_per_s": limit, **receipt,
    }  # fmt: skip
    jitter = np.exp(rng.normal(0, noise / 10, samples + 1))
    return [
        {**shared, "sample": i, "cold": i == 0, "seconds": seconds * jitter[i] * (3 if i == 0 else 1)}
        for i in range(samples + 1)
    ]


@pytest.fixture
def synthetic_machine():
    """A machine with so many nodes of two CPUs."""
    return _machine


def _machine(nodes=1, emulated=False):
    cpus = tuple(Cpu(cpu, cpu, cpu // 2, cpu // 2) for cpu in range(2 * nodes))
    listed = tuple(Node(n, (2 * n, 2 * n + 1), 8 * GIB, 7 * GIB, 7 * GIB, True) for n in range(nodes))
    distances = tuple(tuple(10 if i == j else 21 for j in range(nodes)) for i in range(nodes))
    topology = Topology(
        listed, cpus, distances, tuple(range(2 * nodes)), tuple(range(nodes)), (), (), "Synthetic 9000", None, emulated
    )
    return dataclasses.replace(machine_facts.describe_machine(topology), findings=[])


@pytest.fixture
def synthetic_run(tmp_path, synthetic_machine):
    """Write a run directory from rows, with a failed execution in it where asked for."""

    def write(rows, nodes=1, failed=0, emulated=False) -> Path:
        machine = synthetic_machine(nodes, emulated)
        run_dir = tmp_path / f"run-{zlib.crc32(str(len(rows)).encode()):x}-{nodes}"
        atomic_files.write_json(run_dir / "machine.json", machine.to_json())
        executions = []
        for key, group in rows.groupby("execution_id"):
            first = group.iloc[0]
            described = {
                "execution_id": key,
                "label": first["label"],
                "block": int(first["block"]),
                "order": int(first["order"]),
            }
            executions.append({**described, "command": f"numactl --cpunodebind=0 papermill {first['label']}.ipynb"})
            results.write_rows(run_dir / "executions" / f"{key}.parquet", group, machine.fingerprint)
            outcome = {**described, "status": "ok", "reasons": [], "exit_status": 0, "seconds": 9.5}
            atomic_files.write_json(run_dir / "executions" / f"{key}.json", outcome)
        for number in range(failed):
            outcome = {
                "execution_id": f"bad{number}", "label": "c0m0", "block": 0, "order": 900 + number, "status": "failed",
                "reasons": ["papermill ended with exit status 138: <the kernel died>"], "exit_status": 138, "seconds": 2.0,
            }  # fmt: skip
            atomic_files.write_json(run_dir / "executions" / f"bad{number}.json", outcome)
        atomic_files.write_json(
            run_dir / "plan.json",
            {
                "schema_version": machine_facts.SCHEMA_VERSION, "run_id": "synthetic", "created": "2026-01-01T00:00:00+00:00",
                "profile": "quick", "bindings": sorted(set(rows["label"])), "notebook": "02_attention_under_binding.ipynb",
                "notebook_sha256": "0" * 64, "parameters": {"profile": "quick"},
                "command": "numa-lab sweep --profile quick", "executions": executions,
                "estimated_seconds": 60,
            },
        )  # fmt: skip
        return run_dir

    return write


@pytest.fixture
def local_bindings():
    """Labels of the local bindings of so many nodes."""
    return lambda nodes: [str(Binding((n,), (n,), MemPolicy.BIND)) for n in range(nodes)]
