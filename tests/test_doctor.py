import errno
import json
import os
import platform
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import seccomp
from numa_lab import doctor, libnuma
from numa_lab.errors import NotPermitted
from numa_lab.topology import read_topology

CPUS = range(4)  # two on each of two nodes, each a core of its own
NODE = "sys/devices/system/node/node{}/{}"
CPU = "sys/devices/system/cpu/cpu{}/{}"
THP = "sys/kernel/mm/transparent_hugepage/"
STATUS = "Name:\tpython\nCpus_allowed_list:\t{}\nMems_allowed_list:\t{}\n"
PATH = {"PATH": "/usr/bin"}


def meminfo(node, total_gib=64.0, free_gib=60.0, file_gib=2.0, shared_gib=0.0):
    amounts = {"MemTotal": total_gib, "MemFree": free_gib, "FilePages": file_gib, "Shmem": shared_gib}
    return "".join(f"Node {node} {name}: {int(gib * 2**20)} kB\n" for name, gib in amounts.items())


def plant(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.fixture
def healthy(tmp_path):
    files = {
        "sys/devices/system/cpu/online": "0-3",
        "proc/cpuinfo": "model name\t: A Server CPU\nflags\t\t: fpu avx2\n",
        "proc/thread-self/status": STATUS.format("0-3", "0-1"),
        "proc/self/cgroup": "0::/session/job\n",
        "sys/fs/cgroup/session/cpuset.cpus.effective": "0-3",
        "proc/sys/kernel/numa_balancing": "0\n",
        f"{THP}enabled": "always [madvise] never\n",
        f"{THP}hugepages-2048kB/enabled": "always [inherit] madvise never\n",
        "usr/bin/numactl": "",
    }
    for cpu in CPUS:
        files[CPU.format(cpu, "topology/thread_siblings_list")] = f"{cpu}"
        files[CPU.format(cpu, "cpufreq/scaling_governor")] = "performance\n"
    for node, cpus in enumerate(("0-1", "2-3")):
        files[NODE.format(node, "cpulist")] = cpus
        files[NODE.format(node, "meminfo")] = meminfo(node)
        files[NODE.format(node, "distance")] = "10 21" if node == 0 else "21 10"
    plant(tmp_path, files)
    (tmp_path / "usr/bin/numactl").chmod(0o755)
    return tmp_path


SIBLINGS = {CPU.format(cpu, "topology/thread_siblings_list"): f"{cpu % 2},{cpu % 2 + 2}" for cpu in CPUS}

FAULTS = [  # name, files, environment, what the finding must have seen, what its fix must say for this machine
    (
        "emulated",
        {"proc/cpuinfo": "model name : QEMU TCG CPU version 2.5+"},
        {},
        "QEMU TCG CPU",
        "qemu-system-x86_64 -accel kvm",
    ),
    (
        "emulated",
        {"proc/cpuinfo": "CPU implementer : 0x00\nCPU part : 0x051\n"},
        {},
        "TCG CPU max",
        "qemu-system-aarch64 -machine virt -accel kvm",
    ),
    ("numactl", {}, {"PATH": "/opt/bin"}, "numactl", "apt-get install numactl"),
    ("cpuset", {"proc/thread-self/status": STATUS.format("0-3", "0")}, {}, "memory of nodes 1", "--cpuset-mems=0-1"),
    (
        "cpuset",
        {
            "proc/thread-self/status": STATUS.format("0-1", "0-1"),
            "sys/fs/cgroup/session/job/cpuset.cpus.effective": "0-1",
        },
        {},
        "hides CPUs 2-3",
        "AllowedCPUs=0-3",
    ),
    (
        "cpuset",
        {
            "proc/thread-self/status": STATUS.format("3", "0-1"),
            "proc/self/cgroup": "4:memory:/docker/x\n3:cpuset:/docker/x\n0::/\n",
            "sys/fs/cgroup/cpuset/cpuset.effective_cpus": "3",
        },
        {},
        "hides CPUs 0-2",
        "--cpuset-cpus=0-3",
    ),
    ("affinity", {"proc/thread-self/status": STATUS.format("0,2-3", "0-1")}, {}, "CPUs 0,2-3; 1", "--pid 0-3 $$"),
    ("affinity_variables", {}, {"KMP_AFFINITY": "granularity=fine,compact"}, "compact", "unset KMP_AFFINITY"),
    ("affinity_variables", {}, {"GOMP_CPU_AFFINITY": "0-1"}, "=0-1", "unset GOMP_CPU_AFFINITY"),
    (
        "affinity_variables",
        {},
        {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"},
        "OMP_PROC_BIND=close, OMP_PLACES=cores",
        "unset OMP_PROC_BIND OMP_PLACES",
    ),
    ("thread_variables", {}, {"OMP_NUM_THREADS": "1"}, "OMP_NUM_THREADS=1", "export OMP_NUM_THREADS=4"),
    ("thread_variables", {}, {"MKL_NUM_THREADS": "64"}, "MKL_NUM_THREADS=64", "export MKL_NUM_THREADS=4"),
    (
        "preloaded_allocator",
        {},
        {"LD_PRELOAD": "/lib/libtcmalloc.so.4:/lib/libother.so"},
        "/lib/libtcmalloc.so.4",
        "export LD_PRELOAD=/lib/libother.so",
    ),
    ("preloaded_allocator", {}, {"LD_PRELOAD": "/lib/libjemalloc.so.2"}, "jemalloc", "unset LD_PRELOAD"),
    ("numa_balancing", {"proc/sys/kernel/numa_balancing": "2"}, {}, "= 2", "sysctl -w kernel.numa_balancing=0"),
    (
        "transparent_huge_pages",
        {f"{THP}enabled": "always madvise [never]"},
        {},
        "never",
        f"echo madvise > /{THP}enabled",
    ),
    (
        "transparent_huge_pages",
        {f"{THP}hugepages-2048kB/enabled": "always inherit madvise [never]"},
        {},
        "never",
        f"echo madvise > /{THP}hugepages-2048kB/enabled",
    ),
    ("smt", SIBLINGS, {}, "4 CPUs on 2 physical cores", "taskset --cpu-list 0-1 COMMAND"),
    (
        "cpu_governor",
        {CPU.format(cpu, "cpufreq/scaling_governor"): "powersave" for cpu in (1, 2)},
        {},
        "powersave on CPUs 1-2",
        "echo performance",
    ),
    (
        "nearly_full_nodes",
        {
            NODE.format(0, "meminfo"): meminfo(0, free_gib=40, file_gib=20),
            NODE.format(1, "meminfo"): meminfo(1, free_gib=0.5, file_gib=50, shared_gib=10),
        },
        {},
        "node 1: 512 MiB of 64.0 GiB free, 40.0 GiB hold file cache",
        "gives back up to 40.0 GiB) | numactl --membind=0 COMMAND",
    ),
    (
        "nearly_full_nodes",
        {NODE.format(node, "meminfo"): meminfo(node, free_gib=0.5, file_gib=1) for node in (0, 1)},
        {},
        "node 0: 512 MiB of 64.0 GiB free",
        "numastat -p",
    ),
    (
        "file_cache",
        {NODE.format(1, "meminfo"): meminfo(1, free_gib=40, file_gib=20)},
        {},
        "node 1 holds 20.0 GiB of the 22.0 GiB",
        "drop_caches",
    ),
    (
        "cpu_quota",
        {"sys/fs/cgroup/session/cpu.max": "250000 100000", "sys/fs/cgroup/session/job/cpu.max": "max 100000"},
        {},
        "the time of 2.5 CPUs, and this process may use 4",
        "--cpuset-cpus",
    ),
    (
        "cpu_quota",
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000",
        },
        {},
        "the time of 1 CPU,",
        "--cpus=1",
    ),
    ("uneven_nodes", {NODE.format(1, "meminfo"): meminfo(1, 56, 50)}, {}, "node 1: 56.0 GiB", "56.0 GiB a node"),
]


@pytest.mark.parametrize(
    ("name", "files", "environ", "seen", "fix"), FAULTS, ids=[f"{name}-{seen}" for name, _, _, seen, _ in FAULTS]
)
def test_planted_fault_is_found_alone(healthy, name, files, environ, seen, fix):
    (finding,) = doctor.examine(plant(healthy, files), PATH | environ)
    assert finding.name == name
    assert seen in finding.seen
    assert fix in finding.fix


HARMLESS = {
    "nothing": ({}, {}),
    "huge pages always": ({f"{THP}enabled": "[always] madvise never"}, {}),
    "a size of huge pages of its own": (
        {f"{THP}enabled": "always madvise [never]", f"{THP}hugepages-2048kB/enabled": "always inherit [madvise] never"},
        {},
    ),
    "OpenMP told not to bind": ({}, {"OMP_PROC_BIND": "FALSE", "OMP_PLACES": "cores", "GOMP_CPU_AFFINITY": "0"}),
    "no KMP affinity": ({}, {"KMP_AFFINITY": "verbose,none"}),
    "all cores": ({}, {"OMP_NUM_THREADS": "4,1", "MKL_NUM_THREADS": "4"}),
    "the cores of one node": ({}, {"OMP_NUM_THREADS": "2"}),
    "another preloaded library": ({}, {"LD_PRELOAD": "/lib/libother.so"}),
    "the kernel's own share": ({NODE.format(0, "meminfo"): meminfo(0, 62)}, {}),
    "a large memory node without CPUs": (
        {
            NODE.format(2, "cpulist"): "",
            NODE.format(2, "meminfo"): meminfo(2, 512, 500),
            "proc/thread-self/status": STATUS.format("0-3", "0-2"),
        },
        {},
    ),
    "no control groups": ({"proc/self/cgroup": ""}, {}),
    "a quota of all CPUs": ({"sys/fs/cgroup/session/cpu.max": "400000 100000"}, {}),
    "a little file cache on one node": ({NODE.format(1, "meminfo"): meminfo(1, free_gib=50, file_gib=12)}, {}),
}


@pytest.mark.parametrize(("files", "environ"), HARMLESS.values(), ids=HARMLESS)
def test_what_does_no_harm_is_not_found(healthy, files, environ):
    assert doctor.examine(plant(healthy, files), PATH | environ) == []


def test_numa_balancing_does_not_matter_on_one_node(healthy):
    plant(healthy, {"proc/sys/kernel/numa_balancing": "1", NODE.format(1, "meminfo"): meminfo(1, 0, 0, 0)})
    assert doctor.examine(healthy, PATH) == []


def test_topology_that_was_read_already_is_not_read_again(healthy):
    topology = read_topology(healthy)
    plant(healthy, {"proc/thread-self/status": STATUS.format("0", "0")})
    assert doctor.examine(healthy, PATH, topology) == []


@pytest.fixture
def willing_kernel(monkeypatch):
    for call in ("set_mempolicy", "get_mempolicy", "mbind", "page_status"):
        monkeypatch.setattr(libnuma, call, lambda *_, **__: None)


CALLS = {
    "set_mempolicy": "set_mempolicy",
    "get_mempolicy": "get_mempolicy",
    "mbind": "mbind",
    "page_status": "move_pages",
}


def live_findings():
    return {finding.name: finding for finding in doctor.examine()}


@pytest.mark.usefixtures("willing_kernel")
@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(("code", "fix"), [(errno.EPERM, "docker run --"), (errno.ENOSYS, "CONFIG_NUMA=y")])
def test_refused_call_is_named(monkeypatch, function, code, fix):
    def refuse(*_, **__):
        raise NotPermitted(code, "refused")

    assert "numa_calls" not in live_findings()
    monkeypatch.setattr(libnuma, function, refuse)
    finding = live_findings()["numa_calls"]
    assert finding.seen == f"the kernel refuses {CALLS[function]} ({os.strerror(code)})"
    assert fix in finding.fix


def test_missing_libnuma_is_found_and_no_call_tried(monkeypatch):
    monkeypatch.setattr(libnuma, "available", lambda: False)
    monkeypatch.setattr(libnuma, "get_mempolicy", lambda: pytest.fail("called"))
    assert "apt-get install numactl" in live_findings()["libnuma"].fix


@pytest.mark.usefixtures("numa_calls")
def test_trying_the_calls_leaves_the_policy_of_the_thread():
    node = read_topology().allowed_nodes[0]

    def policy_after():
        libnuma.set_mempolicy(libnuma.MPOL_BIND, [node])
        doctor.examine()
        return libnuma.get_mempolicy()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(policy_after).result() == (libnuma.MPOL_BIND, {node})


FILTERED = """
    import json, sys
    from seccomp import refuse
    from numa_lab import doctor

    refuse(json.loads(sys.argv[1]))
    findings = doctor.to_json(doctor.examine())
    print(json.dumps({"findings": findings, "heavy": sorted({"torch", "numba"} & set(sys.modules))}))
"""


@pytest.mark.usefixtures("numa_calls")
@pytest.mark.skipif(
    platform.machine() not in seccomp.NUMBERS, reason="system call numbers are known for x86_64 and aarch64"
)
@pytest.mark.parametrize(
    ("refused", "fix"),
    [
        ({"set_mempolicy", "get_mempolicy", "mbind"}, "--cap-add SYS_NICE"),
        ({"set_mempolicy", "get_mempolicy", "mbind", "move_pages"}, "seccomp=unconfined"),
    ],
)
def test_calls_refused_by_a_real_seccomp_filter(refused, fix):
    command = [sys.executable, "-c", textwrap.dedent(FILTERED), json.dumps(sorted(refused))]
    found = os.environ | {"PYTHONPATH": os.path.dirname(seccomp.__file__)}
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=found).stdout)
    assert answer["heavy"] == []
    (finding,) = (finding for finding in answer["findings"] if finding["name"] == "numa_calls")
    assert {call for call in CALLS.values() if f"{call} (" in finding["seen"]} == refused
    assert fix in finding["fix"]


def test_worst_first_and_all_five_parts_are_told(healthy):
    plant(healthy, SIBLINGS | {"proc/sys/kernel/numa_balancing": "1"})
    findings = doctor.examine(healthy, {"PATH": ""})
    assert [finding.severity for finding in findings] == ["problem", "warning", "info"]
    words = " ".join(doctor.render(findings).split())
    for finding, as_json in zip(findings, doctor.to_json(findings), strict=True):
        for part in ("name", "seen", "why", "fix", "severity"):
            assert as_json[part] == getattr(finding, part)
            assert " ".join(as_json[part].split()) in words


def test_a_healthy_machine_is_told_so():
    assert doctor.render([]) == "Nothing found that spoils NUMA performance here."
