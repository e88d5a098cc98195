import errno
import json
import os
import platform
import resource
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

import seccomp
from numa_lab import cli
from numa_lab.errors import NotPermitted
from numa_lab.machine import doctor, libnuma
from numa_lab.machine.doctor import load, optional, process
from numa_lab.machine.sysfs import Tree
from numa_lab.machine.topology_reader import read_topology

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
        f"{THP}hpage_pmd_size": "2097152\n",
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
    ("short_teams", {}, {"OMP_THREAD_LIMIT": "3"}, "OMP_THREAD_LIMIT=3", "unset OMP_THREAD_LIMIT"),
    (
        "short_teams",
        {},
        {"KMP_ALL_THREADS": "1", "OMP_DYNAMIC": "TRUE"},
        "OMP_DYNAMIC=TRUE",
        "KMP_ALL_THREADS OMP_DYNAMIC",
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
    (  # base pages of 64 KiB
        "transparent_huge_pages",
        {f"{THP}hpage_pmd_size": "536870912", f"{THP}hugepages-524288kB/enabled": "always inherit madvise [never]"},
        {},
        "hugepages-524288kB",
        f"echo madvise > /{THP}hugepages-524288kB/enabled",
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
        "gives back up to 40.0 GiB\nnumactl --membind=0 COMMAND   # 40.0 GiB free",
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
    (
        "online_cpus",
        {
            "sys/devices/system/cpu/online": "0-1",
            "proc/self/mountinfo": "9 8 0:5 / /sys/devices/system/cpu/online rw - fuse.lxcfs lxcfs rw\n",
        },
        {},
        "/sys/devices/system/cpu/online says 0-1, and the kernel lets this process use CPUs 0-3 of 0-3",
        "umount /sys/devices/system/cpu/online   # as root",
    ),
    (
        "online_cpus",
        {
            "sys/devices/system/cpu/online": "0",
            "proc/self/mountinfo": "9 8 0:5 /sys/devices/system/cpu /sys/devices/system/cpu rw - fuse.lxcfs lxcfs rw\n"
            "10 9 0:6 /x /sys/devices/system/cpu/online rw - ext4 /dev/vda rw\n",
        },
        {},
        "says 0, and",
        "umount /sys/devices/system/cpu/online /sys/devices/system/cpu   #",
    ),
    (
        "memory_limit",
        {"sys/fs/cgroup/session/memory.max": f"{4 << 30}", "sys/fs/cgroup/session/memory.current": f"{1 << 30}"},
        {},
        "/sys/fs/cgroup/session/memory.max limits this process to 4,096 MiB, of which 3,072 MiB are left (beyond it the "
        "kernel kills); the nodes that it may use hold 131,072 MiB",
        "docker update --memory=128g --memory-swap=128g CONTAINER",
    ),
    (
        "memory_limit",
        {"sys/fs/cgroup/session/job/memory.high": f"{8 << 30}", "sys/fs/cgroup/session/memory.max": f"{9 << 30}"},
        {},
        "beyond it the kernel slows this process down",
        "echo max > /sys/fs/cgroup/session/job/memory.high   # as root",
    ),
    (
        "memory_limit",
        {
            "proc/self/cgroup": "4:memory:/slurm/job 1\n",
            "sys/fs/cgroup/memory/slurm/job 1/memory.limit_in_bytes": f"{2 << 30}",
        },
        {},
        "limits this process to 2,048 MiB",
        "echo -1 > '/sys/fs/cgroup/memory/slurm/job 1/memory.limit_in_bytes'",
    ),
    ("load", {"proc/loadavg": "7.52 3.1 1.0 9/812 4711\n"}, {}, "load average 7.5", "top -b -n 1 -o %CPU"),
    (
        "load",
        {"proc/loadavg": "0.40 0 0 1/8 4", "proc/pressure/cpu": "some avg10=23.40 avg60=2.51 avg300=0.91 total=5\n"},
        {},
        "threads waited for a CPU in 23% of the last 10 s",
        "end it or wait",
    ),
    (
        "steal",
        {"proc/stat": "".join(f"cpu{n} 600 100 200 9000 50 0 10 {n * 50} 0 0\n" for n in ["", *CPUS])},
        {},
        "the host gave 8% of the CPU time",
        "virsh vcpupin",
    ),
]


@pytest.mark.parametrize(
    ("name", "files", "environ", "seen", "fix"), FAULTS, ids=[f"{name}-{seen}" for name, _, _, seen, _ in FAULTS]
)
def test_planted_fault_is_found_alone(healthy, name, files, environ, seen, fix):
    (finding,) = doctor.examine(plant(healthy, files), PATH | environ)
    assert finding.name == name
    assert seen in finding.seen
    assert fix in finding.fix
    assert " | " not in finding.fix, "a pipe is no word for or"
    for way in finding.fixes:
        assert subprocess.run(["bash", "-n", "-c", way]).returncode == 0, "it can't be pasted"


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
    "a limit of all cores": ({}, {"OMP_THREAD_LIMIT": "4", "OMP_DYNAMIC": "false"}),
    "no control groups": ({"proc/self/cgroup": ""}, {}),
    "a quota of all CPUs": ({"sys/fs/cgroup/session/cpu.max": "400000 100000"}, {}),
    "limits of more than there is": (
        {"sys/fs/cgroup/session/memory.max": f"{1 << 38}", "sys/fs/cgroup/session/job/memory.max": "max"},
        {},
    ),
    "isolated CPUs that this process may not use": (
        {
            "sys/devices/system/cpu/isolated": "3\n",
            "sys/devices/system/cpu/nohz_full": "(null)\n",
            "proc/thread-self/status": STATUS.format("0-2", "0-1"),
        },
        {},
    ),
    "time stolen from a machine that has done nothing": ({"proc/stat": "cpu  7 9 157 53181946 11 11 0 115 0\n"}, {}),
    "a machine that idles": (
        {
            "proc/loadavg": "0.31 0.20 0.10 2/98 8396\n",
            "proc/pressure/cpu": "some avg10=1.80 avg60=2.51 avg300=0.91 total=5\nfull avg10=0.00 avg60=0.00 total=0\n",
            "proc/stat": "cpu  7735 0 3003 59678 250 0 57 8 0 0\nprocs_running 1\n",
        },
        {},
    ),
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


@pytest.fixture(autouse=True)
def compiles(monkeypatch):
    """Trying Numba takes a second; the one test of it has the real function."""
    real = process.compiler_failure
    monkeypatch.setattr(process, "compiler_failure", str)
    return real


def test_numba_that_can_not_compile_is_found_with_the_versions_that_can(tmp_path, monkeypatch, compiles):
    assert compiles() == ""
    (tmp_path / "sitecustomize.py").write_text("import numba.core.cgutils\ndel numba.core.cgutils.for_range\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(process, "compiler_failure", compiles)
    finding = live_findings()["decode_kernel"]
    assert "cannot import name 'for_range'" in finding.seen
    assert finding.fix.startswith("pip install numba==")
    assert finding.severity == "problem"


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


@pytest.mark.usefixtures("numa_calls", "willing_kernel")
def test_what_is_optional_and_missing_is_found(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.EPERM, "refused")

    names = {"affinity_refused", "huge_pages_refused", "cache_folder", "shared_memory", "open_files"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((4096, 4096, *[1 << 20] * 8, 255)))
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (20000, 20000))
    assert not names & set(live_findings())
    (tmp_path / "numa_lab").write_text("")
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((4096, 4096, *[16384] * 8, 255)))
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (256, 20000))
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    monkeypatch.setattr(optional.mmap, "MADV_HUGEPAGE", -1)
    found = live_findings()
    assert names <= set(found)
    assert "numa_lab is no folder" in found["cache_folder"].seen
    assert "has 64 MiB" in found["shared_memory"].seen
    assert "--shm-size" in found["shared_memory"].fix
    assert "256 files" in found["open_files"].seen
    assert "ulimit -n" in found["open_files"].fix
    assert "CONFIG_TRANSPARENT_HUGEPAGE" in found["huge_pages_refused"].fix


FILTERED = """
    import json, sys
    from seccomp import refuse
    from numa_lab.machine import doctor

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


def test_isolated_cpus_are_advised_nowhere(healthy):
    plant(healthy, {"sys/devices/system/cpu/isolated": "2", "sys/devices/system/cpu/nohz_full": "3"})
    plant(healthy, {"sys/fs/cgroup/session/job/cpuset.cpus.effective": "0"})
    plant(healthy, {"proc/thread-self/status": STATUS.format("0", "0")})
    (finding,) = doctor.examine(healthy, PATH)
    assert "hides memory of nodes 1 and CPUs 1" in finding.seen
    assert "--cpuset-cpus=0-1 " in finding.fix
    plant(healthy, {"proc/self/cgroup": "", "proc/thread-self/status": STATUS.format("0,2", "0-1")})
    (finding,) = doctor.examine(healthy, PATH)
    assert (finding.name, "--pid 0-1 $$" in finding.fix, "; 1 could serve too" in finding.seen) == (
        "affinity",
        True,
        True,
    )
    plant(healthy, {"proc/thread-self/status": STATUS.format("2-3", "0-1")})
    assert doctor.examine(healthy, PATH) == [], "who takes these alone does so on purpose"


def test_only_the_files_of_a_captured_machine_are_looked_at(captured, monkeypatch):
    def leak(*_args, **_options):
        pytest.fail("the running machine was asked")

    monkeypatch.setenv("OMP_PROC_BIND", "close")
    monkeypatch.setenv("LD_PRELOAD", "/lib/libjemalloc.so.2")
    for module, names in (
        (os, ("sched_getaffinity", "sched_getcpu", "getloadavg", "cpu_count", "uname", "sysconf")),
        (libnuma, ("library", "available", "get_mempolicy", "set_mempolicy", "mbind", "page_status")),
        (load.psutil, ("process_iter", "Process", "cpu_count", "virtual_memory")),
        (load.time, ("sleep",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, leak, raising=False)
    read = os.open
    for name in ("16amd64-8n2c-cpusets", "16em64t-4s2c2t-offlines", "nvidia-dgx-gb10", "2arm-2c"):
        root, opened = captured(name), []
        monkeypatch.setattr(os, "open", lambda path, *rest, to=opened: to.append(path) or read(path, *rest))
        findings = {finding.name for finding in doctor.examine(root)}
        assert not findings & {"numactl", "libnuma", "affinity_variables", "preloaded_allocator", "load"}
        assert all(str(path).startswith(f"{root}/") for path in opened)
        monkeypatch.setattr(os, "open", read)
    assert "smt" in {finding.name for finding in doctor.examine(captured("16em64t-4s2c2t-offlines"))}


def test_the_command_examines_a_captured_machine(captured):
    root = captured("16em64t-4s2c2t-offlines")
    runner = CliRunner()
    told = runner.invoke(cli.main, ["doctor", "--root", str(root), "--json"])
    assert told.exit_code == 0
    assert json.loads(told.stdout) == doctor.to_json(doctor.examine(root))
    assert runner.invoke(cli.main, ["doctor", "--root", str(root)]).stdout == doctor.render(doctor.examine(root)) + "\n"
    assert runner.invoke(cli.main, ["doctor", "--root", f"{root}/nowhere"]).exit_code == 2


def test_a_busy_process_is_seen_and_named(monkeypatch):
    script = "import ctypes; ctypes.CDLL(None).prctl(15, b'a;rm\\n$(b)'); print(flush=True)\nwhile True: pass"
    every = load.psutil.process_iter
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as busy:
        try:
            busy.stdout.readline()
            monkeypatch.setattr(
                load.psutil, "process_iter", lambda names: (p for p in every(names) if p.pid in (busy.pid, os.getpid()))
            )
            tree, cpus = Tree(Path("/")), os.sched_getaffinity(0)
            looks = (load.look(tree, cpus) for _ in range(100))  # where many run, its turn may not come at once
            seen = next(one for one in looks if one.busiest)
        finally:
            busy.kill()
    assert [(one.pid, one.name) for one in seen.busiest] == [(busy.pid, "a?rm???b?")]
    assert seen.others >= seen.busiest[0].cpus > 0
    assert seen.queued >= 0


@pytest.mark.parametrize(("cpus", "named"), [(3.5, "ffmpeg (process 7) 350% of one"), (0.2, None)])
def test_load_is_told_with_what_causes_it(healthy, monkeypatch, cpus, named):
    busy = (load.Busy(7, "ffmpeg", cpus), load.Busy(8, "idle", 0.01))
    monkeypatch.setattr(load, "look", lambda *_: load.Load(cpus, busy, 4.25, 1.5, None, 0.0))
    findings = doctor.examine(healthy, PATH)
    assert bool(findings) is (named is not None)
    for finding in findings:
        assert named in finding.seen
        assert finding.seen.startswith("other processes took the time of 3.5 CPUs, and this one may use 4; ")
        assert finding.seen.endswith("; run queue 4.2; load average 1.5")
        assert finding.fixes[0] == "kill -STOP 7   # ffmpeg; kill -CONT 7 lets go on"


def test_load_on_emulated_cpus_is_their_own(healthy, monkeypatch):
    monkeypatch.setattr(load, "look", lambda *_: load.Load(others=3.0, stolen=0.5))
    plant(healthy, {"proc/cpuinfo": "model name : QEMU TCG CPU version 2.5+"})
    assert [finding.name for finding in doctor.examine(healthy, PATH)] == ["emulated"]


def test_ticks_are_those_of_the_cpus_that_count(tmp_path):
    stat = "cpu  90 0 0 0 0 0 0 9 0 0\ncpu0 10 1 2 100 50 3 4 5 6 7\ncpu1 80 0 0 0 0 0 0 4 0 0\n"
    tree = Tree(plant(tmp_path, {"proc/stat": stat}))
    assert load._ticks(tree, [0]) == (10 + 1 + 2 + 3 + 4, 5, 150)
    assert load._ticks(tree, [0, 1]) == (100, 9, 150)
    assert load._ticks(tree, [8, 9]) == (90, 9, 0), "a container that is shown CPUs of other numbers"
    assert load._ticks(Tree(tmp_path / "nowhere"), [0]) == (0, 0, 0)


def test_every_way_to_fix_it_is_a_line_of_its_own(healthy):
    findings = doctor.examine(healthy, {"PATH": ""})
    assert "\n  fix   " + "\n        ".join(findings[0].fixes) in doctor.render(findings)
    assert doctor.render(findings).endswith("\n\nWhere a fix has several lines, each of them alone is one.")
    assert doctor.to_json(findings)[0]["fixes"] == list(findings[0].fixes)
    assert len(doctor.to_json(findings)[0]["fix"].splitlines()) == 3


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
