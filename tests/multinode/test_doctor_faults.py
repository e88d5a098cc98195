"""Faults planted in a healthy guest: each is found, and nothing that is not there."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from numa_lab.machine import doctor
from numa_lab.machine.doctor import process
from numa_lab.machine.topology_reader import read_topology
from seccomp import refuse

MIB = 1 << 20
ALWAYS = {"emulated"}


def found(**environ):
    return {finding.name: finding for finding in doctor.examine(environ=os.environ | environ)}


@pytest.fixture(autouse=True)
def fresh_caches(monkeypatch):
    monkeypatch.setattr(process, "compiler_failure", str)  # loading Numba takes long in emulation, and fills the caches
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@pytest.mark.guest("memoryless")
def test_nothing_is_found_on_a_healthy_machine():
    assert found().keys() == ALWAYS


@contextmanager
def setting(path, value):
    file = Path(path)
    before = file.read_text()
    file.write_text(value)
    try:
        yield
    finally:  # some files show all values, and the chosen one in brackets
        file.write_text(before.partition("[")[2].partition("]")[0] or before)


@pytest.mark.guest("memoryless")
@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("numa_balancing", "/proc/sys/kernel/numa_balancing", "1"),
        ("transparent_huge_pages", "/sys/kernel/mm/transparent_hugepage/enabled", "never"),
    ],
)
def test_a_setting_of_the_kernel_is_found(name, path, value):
    with setting(path, value):
        assert found().keys() == {*ALWAYS, name}
    assert found().keys() == ALWAYS


@pytest.mark.guest("memoryless")
def test_openmps_own_pinning_is_found():
    assert found(OMP_PROC_BIND="close").keys() == {*ALWAYS, "affinity_variables"}


@pytest.mark.guest("memoryless")
def test_a_cpuset_and_a_quota_are_found():
    group = Path("/sys/fs/cgroup/doctor")
    (group.parent / "cgroup.subtree_control").write_text("+cpuset +cpu")
    group.mkdir()
    (group / "cpuset.cpus").write_text("0-3")
    (group / "cpuset.mems").write_text("0")
    (group / "cpu.max").write_text("150000 100000")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    findings = found()
    assert findings.keys() == {*ALWAYS, "cpuset", "cpu_quota"}
    assert "hides memory of nodes 2 and CPUs 4-5" in findings["cpuset"].seen
    assert "1.5 CPUs, and this process may use 4" in findings["cpu_quota"].seen


@pytest.mark.guest("memoryless")
@pytest.mark.parametrize("call", ["mbind", "set_mempolicy", "move_pages"])
def test_a_refused_call_is_found(call):
    refuse([call])
    findings = found()
    assert findings.keys() == {*ALWAYS, "numa_calls"}
    assert f"{call} (Operation not permitted)" in findings["numa_calls"].seen


@pytest.mark.guest("memoryless")
def test_a_nearly_full_node_is_found():
    free = read_topology().node(2).free_bytes
    script = f"import sys; block = bytearray(b'x') * {free - 60 * MIB}; print('full', flush=True); sys.stdin.read()"
    with ExitStack() as stack:
        hog = subprocess.Popen(
            ["numactl", "--membind=2", sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        stack.enter_context(hog)
        assert hog.stdout.readline() == b"full\n"
        findings = found()
        assert findings.keys() == {*ALWAYS, "nearly_full_nodes"}
        assert findings["nearly_full_nodes"].seen.startswith("node 2: ")
        hog.kill()


@pytest.mark.guest("memoryless")
def test_a_large_file_cached_on_one_node_is_found():
    import importlib.util

    library = Path(importlib.util.find_spec("torch").origin).parent / "lib/libtorch_cpu.so"
    assert library.stat().st_size > 330 * MIB
    subprocess.run(["numactl", "--cpunodebind=2", "--membind=2", "cat", library], stdout=subprocess.DEVNULL, check=True)
    time.sleep(0.1)
    findings = found()
    assert findings.keys() == {*ALWAYS, "file_cache"}
    assert findings["file_cache"].seen.startswith("node 2 holds")


@pytest.mark.guest("two-sockets")
def test_nodes_of_different_sizes_are_found():
    assert found().keys() == {*ALWAYS, "uneven_nodes"}


@pytest.mark.guest("gaps")
def test_threads_that_share_cores_are_found():
    findings = found()
    assert findings.keys() == {*ALWAYS, "uneven_nodes", "smt"}
    assert "taskset --cpu-list 0,2,4" in findings["smt"].fix
