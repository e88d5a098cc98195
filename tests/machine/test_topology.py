import dataclasses
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numa_lab.errors import InvalidInput, NodeUnavailable
from numa_lab.machine import identity
from numa_lab.machine.overview import overview
from numa_lab.machine.sysfs import Tree, format_cpulist, parse_cpulist
from numa_lab.machine.topology import Topology
from numa_lab.machine.topology_reader import read_topology
from numa_lab.placement.binding import Binding

CAPTURED = Path(__file__).parents[1] / "topologies"
EXPECTED = json.loads((CAPTURED / "expected.json").read_text())

# Sockets, cores and MiB of last-level caches, as hwloc 2.9 counts them but where noted. No socket: the kernel tells
# none (hwloc calls each core one). No cache: the kernel does not describe them.
COUNTS = {
    "128ia64-17n4s2c": (64, 128, 0),
    "16amd64-4n4c-cgroup-distance-merge": (4, 16, 8),  # hwloc also applies the cgroup that was captured with it
    "16amd64-8n2c-cpusets": (8, 15, 15),  # the same; there is no third level
    "16em64t-4s2c2t-offlines": (4, 7, 16),
    "20em64t-hybrid-1p6c2t+2ca4co1t": (1, 14, 24),
    "256ppc-8n8s4t": (0, 64, 256),
    "2arm-2c": (1, 2, 0),
    "32em64t-2n8c+dax+nvme+mic+dimms": (2, 16, 40),
    "32intel64-2p8co2t+8ve": (2, 16, 22),
    "40intel64-2g2n4c+pcilocality": (4, 40, 120),
    "40intel64-4n10c+pci-conflicts": (4, 40, 120),  # hwloc drops one socket
    "64amd64-4s2n4ca2co": (4, 32, 48),  # hwloc counts both halves of a module, which share their vector unit
    "8ia64-2n2s2c": (4, 8, 72),
    "96em64t-4no4pa3ca2co": (16, 96, 256),
    "fakecpuid1f-64intel64-2p4d2n2c2t": (4, 32, 128),
    "fakeheteromemtiers": (1, 6, 16),
    "nvidia-dgx-gb10": (1, 20, 24),
}


@pytest.fixture
def machine(tmp_path):
    """Writes a machine of two nodes with two CPUs each, and changes to it (None: no such file); returns its root."""

    def write(changes=()):
        files = {"sys/devices/system/cpu/online": "0-3\n", "proc/cpuinfo": "model name\t: Some  CPU\n"}
        for node in (0, 1):
            folder = f"sys/devices/system/node/node{node}"
            files[f"{folder}/cpulist"] = ("0-1\n", "2-3\n")[node]
            files[f"{folder}/distance"] = ("10 21\n", "21 10\n")[node]
            files[f"{folder}/meminfo"] = f"Node {node} MemTotal:  4096 kB\nNode {node} MemFree:  1024 kB\n"
        for path, text in (files | dict(changes)).items():
            if text is not None:
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_text(text)
        return tmp_path

    return write


def status(cpus, mems):
    return f"Name:\tx\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t{mems}\nvoluntary_ctxt_switches:\t1\n"


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_captured_machine_is_read_right(captured, name):
    root, expected = captured(name), EXPECTED[name]
    topology = read_topology(root)
    found = topology.to_json()
    assert [{key: node[key] for key in ("id", "cpus", "memory_bytes")} for node in found["nodes"]] == expected["nodes"]
    assert found["distances"] == expected["distances"]
    online = {cpu["id"] for cpu in found["cpus"]}
    assert online == {cpu for node in expected["nodes"] for cpu in node["cpus"]}
    assert online.isdisjoint(expected["offline_listed"])
    assert found["allowed_cpus"] == sorted(online)
    assert topology.allowed_nodes == tuple(node.id for node in topology.nodes if node.memory_bytes)
    cores = {cpu.core for cpu in topology.cpus}
    assert (len(topology.sockets), len(cores), topology.last_cache_bytes / 2**20) == COUNTS[name]
    assert topology.physical_cores(online) == tuple(sorted(cores))
    assert all(topology.node_of_cpu(cpu) == node.id for node in topology.nodes for cpu in node.cpus)
    assert json.loads(json.dumps(found)) == found
    assert Topology.from_json(found) == topology
    assert overview(topology)


@pytest.mark.parametrize(
    ("name", "performance"),
    [
        ("nvidia-dgx-gb10", "5-9,15-19"),
        ("20em64t-hybrid-1p6c2t+2ca4co1t", "0-11"),  # and among them two favoured cores of a higher clock
        ("16amd64-4n4c-cgroup-distance-merge", ""),
    ],
)
def test_big_and_little_cores(captured, name, performance):
    cpus = read_topology(captured(name)).cpus
    assert format_cpulist(cpu.id for cpu in cpus if cpu.kind == "performance") == performance
    assert {cpu.kind for cpu in cpus} == ({"performance", "efficiency"} if performance else {""})


@pytest.mark.parametrize(
    ("told", "kinds"),
    [
        (("acpi_cppc/highest_perf", "166 186 211 236"), ["", "", "", ""]),  # AMD ranks equal cores
        (("cpufreq/cpuinfo_max_freq", "5880 5880 5300 5000"), ["", "", "", ""]),  # favoured cores
        (("cpufreq/cpuinfo_max_freq", "4700 4700 3500 3500"), ["performance"] * 2 + ["efficiency"] * 2),
        (("cpu_capacity", "1024 997 731 718"), ["performance"] * 2 + ["efficiency"] * 2),
    ],
)
def test_cores_are_of_two_kinds_only_where_they_differ_enough(machine, told, kinds):
    path, values = told
    root = machine({f"sys/devices/system/cpu/cpu{n}/{path}": v for n, v in enumerate(values.split())})
    assert [cpu.kind for cpu in read_topology(root).cpus] == kinds


def test_hybrid_kinds_come_from_the_counters_of_intel(machine):
    pmus = {"core": "0-1", "atom": "2", "lowpower": "3"}
    root = machine({f"sys/devices/cpu_{name}/cpus": f"{cpus}\n" for name, cpus in pmus.items()})
    assert [cpu.kind for cpu in read_topology(root).cpus] == ["performance"] * 2 + ["efficiency"] * 2


def test_memory_without_cpus_belongs_to_its_initiator_then_to_the_nearest_node(captured):
    tiers = read_topology(captured("fakeheteromemtiers"))
    assert [tiers.nearest_cpu_node(node) for node in tiers.node_ids] == [0, 1, 2, 1, 1, 0, 2]
    assert tiers.effective_nodes == (0, 1, 2)
    assert tiers.allowed_nodes == tiers.node_ids
    assert read_topology(captured("128ia64-17n4s2c")).nearest_cpu_node(16) == 0


def test_gpus_and_their_node(captured, machine):
    def gpus(root):
        return [(gpu.pci, gpu.node) for gpu in read_topology(root).gpus]

    assert gpus(captured("32em64t-2n8c+dax+nvme+mic+dimms")) == [("0000:05:00.0", 0)]
    assert gpus(captured("40intel64-2g2n4c+pcilocality")) == [("0000:09:03.0", None)]
    devices = {"0000:01:00.0": ("0x030200", "1"), "0000:02:00.0": ("0x120000", "-1"), "0000:03:00.0": ("0x020000", "0")}
    devices["0000:04:00.0"] = ("0x038000", "9")  # a node that is not online
    for where in ("sys/bus/pci/devices", "sys/devices/pci0000:00/0000:00:01.0"):
        root = machine({f"{where}/{pci}/class": kind for pci, (kind, _) in devices.items()})
        machine({f"{where}/{pci}/numa_node": node for pci, (_, node) in devices.items()})
        assert gpus(root) == [("0000:01:00.0", 1), ("0000:02:00.0", None), ("0000:04:00.0", None)]
        shutil.rmtree(root / where)


def test_a_machine_without_nodes_is_one_node(machine):
    root = machine({"proc/meminfo": "MemTotal: 8 kB\nMemFree: 4 kB\n", "sys/bus/pci/devices/0/class": "0x030000"})
    shutil.rmtree(root / "sys/devices/system/node")
    topology = read_topology(root)
    (node,) = topology.nodes
    assert (node.id, node.cpus, node.memory_bytes, node.free_bytes, node.effective) == (
        0,
        (0, 1, 2, 3),
        8192,
        4096,
        True,
    )
    assert topology.distances is None
    assert topology.gpus[0].node == 0


def test_trailing_nul_bytes_and_bitmaps(machine):
    node = "sys/devices/system/node/node1"
    topology = read_topology(machine({f"{node}/cpulist": None, f"{node}/cpumap": "00000000,0000000c\n\0\0\0"}))
    assert topology.node(1).cpus == (2, 3)
    topology = read_topology(machine({"sys/devices/system/cpu/online": "0-2\n\0", f"{node}/cpulist": "2-3\n\0\0"}))
    assert topology.node(1).cpus == (2,)


@pytest.mark.parametrize("row", ["10\n", "10 21 21\n", "", None])
def test_a_distance_matrix_that_does_not_fit_is_none(machine, row):
    topology = read_topology(machine({"sys/devices/system/node/node0/distance": row}))
    assert topology.distances is None
    assert topology.to_json()["distances"] is None
    assert "distances: not told" in overview(topology)


def test_a_node_with_neither_its_memory_told_nor_the_machine_to_itself_has_none(machine):
    changes = {"sys/devices/system/node/node1/meminfo": None, "proc/meminfo": "MemTotal: 8192 kB\nMemFree: 8 kB\n"}
    topology = read_topology(machine(changes))
    assert (topology.node(1).memory_bytes, topology.node(1).effective, topology.allowed_nodes) == (0, False, (0,))


@pytest.mark.parametrize(
    ("cpus", "mems", "effective", "allowed_nodes"),
    [("0-3", "0-1", (0, 1), (0, 1)), ("2-3", "0-1", (1,), (0, 1)), ("0-3", "1", (1,), (1,)), ("0-1", "", (), ())],
)
def test_a_cpuset_hides_cpus_and_memory(machine, cpus, mems, effective, allowed_nodes):
    topology = read_topology(machine({"proc/self/status": status(cpus, mems)}))
    assert topology.node_ids == (0, 1)
    assert topology.effective_nodes == effective
    assert topology.allowed_nodes == allowed_nodes
    assert topology.allowed_cpus == topology.cpus_of([0, 1]) == topology.physical_cores(range(4)) == parse_cpulist(cpus)
    assert topology.nearest_cpu_node(0) == (0 if topology.cpus_of([0]) else 1)


CPU = "sys/devices/system/cpu/"
STATUS = "proc/self/status"


@pytest.mark.parametrize(
    ("files", "online", "allowed"),
    [
        ({f"{CPU}online": "0-1", STATUS: status("2-3", "0-1")}, "0-3", "2-3"),  # lxcfs, which counts from 0
        ({f"{CPU}online": "0-1", STATUS: status("1-2", "0-1")}, "0-2", "1-2"),
        ({f"{CPU}online": "0", STATUS: status("3", "0-1"), f"{CPU}offline": ""}, "0-3", "3"),
        ({f"{CPU}online": "0-1", STATUS: status("2-3", "0-1"), f"{CPU}offline": "1"}, "0,2-3", "2-3"),
        ({f"{CPU}online": "3", STATUS: status("3", "0-1"), f"{CPU}cpu1/online": "1"}, "1,3", "3"),  # and its own CPUs
        ({f"{CPU}online": "0-2", STATUS: status("0-127", "0-1"), f"{CPU}offline": "3-127"}, "0-2", "0-2"),
        ({f"{CPU}online": "0-2", STATUS: status("0-127", "0-1"), f"{CPU}cpu3/online": "0"}, "0-2", "0-2"),
        ({f"{CPU}online": None, STATUS: status("0-127", "0-1"), f"{CPU}cpu3/online": "1"}, "0-3", "0-3"),
    ],
)
def test_a_cpu_that_may_be_used_runs_whatever_a_container_is_shown_as_online(machine, files, online, allowed):
    topology = read_topology(machine(files))
    assert format_cpulist(cpu.id for cpu in topology.cpus) == online
    assert topology.allowed_cpus == topology.cpus_of([0, 1]) == parse_cpulist(allowed)
    assert topology.node_cpus == {node: tuple(c for c in parse_cpulist(online) if c // 2 == node) for node in (0, 1)}
    assert topology.cpus_for(topology.effective_nodes) == parse_cpulist(allowed)


def test_isolated_cpus_are_left_alone_unless_they_are_all_there_is(machine):
    def read(allowed, isolated="1", clockless="2-3", **files):
        files = {f"{CPU}{name}": text for name, text in files.items()}
        files |= {f"{CPU}isolated": isolated, f"{CPU}nohz_full": clockless, STATUS: status(allowed, "0-1")}
        return read_topology(machine(files))

    topology = read("0-3")
    assert (topology.isolated_cpus, topology.allowed_cpus, topology.usable_cpus) == ((1, 2, 3), (0, 1, 2, 3), (0,))
    assert topology.cpus_of([0, 1]) == topology.cpus_for([0]) == topology.physical_cores(range(4)) == (0,)
    assert (topology.effective_nodes, topology.cpu_nodes, topology.nearest_cpu_node(1)) == ((0,), (0,), 0)
    assert "\nisolated CPUs 1-3 are left alone\n" in overview(topology)
    assert topology.to_json()["isolated_cpus"] == [1, 2, 3]
    with pytest.raises(NodeUnavailable, match=r"may use \(its CPUs 2-3 are isolated by .*nodes with both: 0"):
        topology.require_effective(1)
    with pytest.raises(
        NodeUnavailable, match=r"c1m1: node 1 has no CPUs .* \(its CPUs 2-3 are isolated by .* usable CPUs: 0"
    ):
        Binding.parse("c1m1").require(topology)
    chosen = read("2-3")
    assert chosen.cpus_of([1]) == chosen.usable_cpus == (2, 3), "who may use these alone was put there on purpose"
    assert "left alone" not in overview(chosen)
    assert read("0-3", "", "(null)\n").isolated_cpus == ()
    assert read("0-3", "3", "\n", **{"cpu1/topology/thread_siblings_list": "0-1"}).cpus_for([0, 1]) == (0, 2)


@pytest.mark.parametrize(
    ("cmdline", "isolated"),
    [
        ("ro isolcpus=1,3 quiet", (1, 3)),
        ("isolcpus=managed_irq,domain,2-3 nohz_full=1", (1, 2, 3)),
        ("isolcpus=managed_irq,2", ()),  # kept free of interrupts alone
        ("nohz_full=all rcu_nocbs=1", ()),
        ("xisolcpus=1 isolcpus=3-1", ()),
    ],
)
def test_without_the_list_the_command_line_of_the_kernel_tells_isolated_cpus(machine, cmdline, isolated):
    assert read_topology(machine({"proc/cmdline": cmdline})).isolated_cpus == isolated


def test_a_container_that_sees_no_nodes_uses_what_it_may(machine):
    root = machine({f"{CPU}online": "0-1", STATUS: status("6-7", "1"), "proc/meminfo": "MemTotal: 8 kB\n"})
    shutil.rmtree(root / "sys/devices/system/node")
    topology = read_topology(root)
    assert (topology.effective_nodes, topology.allowed_nodes, topology.cpus_of([1])) == ((1,), (1,), (6, 7))


def test_a_cpu_that_no_node_lists_is_on_the_node_that_its_own_folder_names(machine):
    root = machine({f"{CPU}online": "0-4", f"{CPU}cpu4/topology/core_id": "0"})
    (root / f"{CPU}cpu4/node1").symlink_to("../../node/node1")
    topology = read_topology(root)
    assert (topology.node_of_cpu(4), topology.node_cpus[1]) == (1, (2, 3, 4))


def test_the_affinity_counts_where_the_running_machine_shows_something_else(monkeypatch):
    cpus, true = sorted(os.sched_getaffinity(0)), Tree.text
    monkeypatch.setattr(
        Tree, "text", lambda tree, path: "4095" if str(path).endswith("cpu/online") else true(tree, path)
    )
    assert read_topology().allowed_cpus == tuple(cpus)
    assert set(read_topology().cpus_of(read_topology().effective_nodes)) == set(cpus)


def test_a_root_may_be_named_from_where_one_is(machine, monkeypatch):
    expected = read_topology(machine())
    monkeypatch.chdir(machine().parent)
    assert read_topology(machine().name) == expected


def test_what_the_asking_thread_may_use_counts(machine):
    def pinned(cpu):
        os.sched_setaffinity(0, {cpu})
        return read_topology().allowed_cpus

    topology = read_topology(
        machine({"proc/self/status": status("0-3", "0"), "proc/thread-self/status": status("1", "0")})
    )
    assert topology.allowed_cpus == (1,)
    before = os.sched_getaffinity(0)
    with ThreadPoolExecutor(max_workers=1) as thread:
        assert thread.submit(pinned, max(before)).result() == (max(before),)
    assert read_topology().allowed_cpus == tuple(sorted(before))


def test_no_cpu_to_reach_memory_is_said(machine):
    topology = read_topology(machine({"proc/self/status": status("9", "0-1")}))
    with pytest.raises(NodeUnavailable, match="allowed: none"):
        topology.nearest_cpu_node(0)


@pytest.mark.parametrize(
    ("files", "hypervisor", "emulated"),
    [
        ({}, None, False),
        ({"proc/cpuinfo": "model name: QEMU TCG CPU version 2.5+\nflags: fpu hypervisor lahf\n"}, "unknown", True),
        ({"proc/cpuinfo": "model name: QEMU Virtual CPU version 2.5+\nflags: hypervisor\n"}, "unknown", False),
        (
            {"proc/cpuinfo": "model name: AMD EPYC\nflags: fpu hypervisor\n", "sys/class/dmi/id/sys_vendor": "QEMU\n"},
            "QEMU",
            True,  # without x2APIC, which KVM always shows
        ),
        (
            {
                "proc/cpuinfo": "model name: AMD EPYC\nflags: x2apic hypervisor\n",
                "sys/class/dmi/id/sys_vendor": "QEMU\n",
            },
            "QEMU",
            False,
        ),
        ({"proc/cpuinfo": "CPU part: 0xd0c\n", "sys/class/dmi/id/product_name": "KVM Virtual Machine\n"}, "KVM", False),
        (
            {"proc/cpuinfo": "model name: x\nvmx flags: hypervisor\n", "sys/class/dmi/id/sys_vendor": "HP\n"},
            None,
            False,
        ),
        ({"sys/hypervisor/type": "xen\n"}, "xen", False),
    ],
)
def test_virtual_and_emulated_machines_are_told_apart(machine, files, hypervisor, emulated):
    topology = read_topology(machine(files))
    assert topology.hypervisor == hypervisor or topology.hypervisor.startswith(hypervisor)
    assert topology.emulated is emulated
    assert ("times mean nothing" in overview(topology)) is emulated
    assert ("virtual machine" in overview(topology)) is bool(hypervisor)


def arm(*pairs):
    """cpuinfo of 64-bit Arm: maker and part of each CPU."""
    return "".join(
        f"processor\t: {cpu}\nFeatures\t: fp asimd\nCPU implementer\t: 0x{maker:02x}\nCPU architecture: 8\n"
        f"CPU variant\t: 0x1\nCPU part\t: 0x{part:03x}\nCPU revision\t: 0\n\n"
        for cpu, (maker, part) in enumerate(pairs)
    )


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (arm((0x48, 0xD01), (0x48, 0xD01)), "HiSilicon Kunpeng 920"),
        (arm((0x41, 0xD0C)), "Arm Neoverse N1"),
        (arm((0x41, 0xD40)), "Arm Neoverse V1"),
        (arm((0x41, 0xD49)), "Arm Neoverse N2"),
        (arm((0x41, 0xD4F)), "Arm Neoverse V2"),
        (arm((0xC0, 0xAC3)), "AmpereOne"),
        (arm((0x46, 0x001)), "Fujitsu A64FX"),
        (arm((0x41, 0xD03), (0x41, 0xD08), (0x41, 0xD03)), "Arm Cortex-A53 and Arm Cortex-A72"),
        (arm((0x41, 0xFFE)), "Arm processor, part 0xffe"),
        (arm((0x99, 0x123), (0x48, 0xD01)), "processor of implementer 0x99, part 0x123 and HiSilicon Kunpeng 920"),
        ("model name\t: ARMv8 Processor rev 1 (v8l)\n" + arm((0x41, 0xD4F)), "Arm Neoverse V2"),  # a filled-in line
        ("Processor\t: AArch64 Processor rev 4 (aarch64)\n" + arm((0x41, 0xD08)), "Arm Cortex-A72"),  # an old kernel
        ("model name\t: Phytium,S2500/64 C00\n" + arm((0x70, 0x663)), "Phytium,S2500/64 C00"),
        ("Processor\t: ARMv7 Processor rev 1 (v7l)\nHardware\t: Board\n", "ARMv7 Processor rev 1 (v7l)"),
    ],
)
def test_a_processor_of_arm_is_named_after_its_numbers(machine, cpuinfo, name):
    topology = read_topology(machine({"proc/cpuinfo": cpuinfo}))
    assert topology.model_name == name
    assert overview(topology).startswith(f"{name}: sockets")


def test_the_numbers_come_from_the_registers_where_cpuinfo_has_none(machine, captured):
    registers = "sys/devices/system/cpu/cpu{}/regs/identification/midr_el1"
    changes = {registers.format(0): "0x00000000481fd010\n", registers.format(1): "0x00000000413fd0c1\n"}
    topology = read_topology(machine({"proc/cpuinfo": None, **changes}))
    assert topology.model_name == "HiSilicon Kunpeng 920 and Arm Neoverse N1"
    assert read_topology(captured("nvidia-dgx-gb10")).model_name == "Arm Cortex-A725 and Arm Cortex-X925"


DMI, BOARD = "sys/class/dmi/id/", "proc/device-tree/"


@pytest.mark.parametrize(
    ("files", "hypervisor"),
    [
        ({DMI + "sys_vendor": "Amazon EC2\n", DMI + "product_name": "m7g.4xlarge\n"}, "Amazon EC2 m7g.4xlarge"),
        ({DMI + "sys_vendor": "Amazon EC2\n", DMI + "product_name": "c7g.metal\n"}, None),
        ({DMI + "sys_vendor": "Amazon EC2\n", DMI + "product_name": "m7g.metal-48xl\n"}, None),
        ({DMI + "sys_vendor": "Google\n", DMI + "product_name": "Google Compute Engine\n"}, "Google"),
        ({DMI + "sys_vendor": "Alibaba Cloud\n", DMI + "product_name": "Alibaba Cloud ECS\n"}, "Alibaba Cloud"),
        ({DMI + "sys_vendor": "OpenStack Foundation\n", DMI + "product_name": "OpenStack Nova\n"}, "OpenStack"),
        ({DMI + "sys_vendor": "Microsoft Corporation\n", DMI + "product_name": "Virtual Machine\n"}, "Microsoft"),
        ({DMI + "sys_vendor": "QEMU\n", DMI + "product_name": "QEMU Virtual Machine\n"}, "QEMU"),
        ({DMI + "sys_vendor": "Huawei\n", DMI + "product_name": "TaiShan 200 (Model 2280)\n"}, None),
        (
            {BOARD + "fw-cfg@9020000/compatible": "qemu,fw-cfg-mmio\0", BOARD + "compatible": "linux,dummy-virt\0"},
            "QEMU",
        ),
        ({"sys/firmware/devicetree/base/fw-cfg@9020000/reg": ""}, "QEMU"),
        ({"sys/bus/platform/devices/9020000.fw-cfg/modalias": ""}, "QEMU"),  # a container hides the device tree
        ({"sys/bus/acpi/devices/QEMU0002:00/hid": "QEMU0002\n"}, "QEMU"),
        ({BOARD + "compatible": "linux,dummy-virt\0"}, "linux,dummy-virt"),  # Firecracker, crosvm
        ({BOARD + "hypervisor/compatible": "xen,xen-4.17\0xen,xen\0"}, "xen,xen-4.17"),
        ({BOARD + "compatible": "raspberrypi,4-model-b\0brcm,bcm2711\0"}, None),
        ({"sys/firmware/dmi/entries/0-0/raw": "\0\x1a" + "\0" * 17 + "\x1c"}, "unknown"),
        ({"sys/firmware/dmi/entries/0-0/raw": "\0\x1a" + "\0" * 17 + "\x0c"}, None),
    ],
)
def test_virtual_machines_of_arm_are_recognised_without_a_flag(machine, files, hypervisor):
    topology = read_topology(machine({"proc/cpuinfo": arm((0x41, 0xD0C)), **files}))
    assert topology.hypervisor == hypervisor or topology.hypervisor.startswith(hypervisor)
    assert not topology.emulated


def test_on_x86_the_flag_tells_a_cloud_from_its_metal(machine):
    ec2 = {DMI + "sys_vendor": "Amazon EC2\n", DMI + "product_name": "m5.large\n"}
    cpuinfo = "model name: Intel(R) Xeon(R)\nflags: fpu x2apic{}\n"
    assert read_topology(machine({"proc/cpuinfo": cpuinfo.format(""), **ec2})).hypervisor is None
    assert (
        read_topology(machine({"proc/cpuinfo": cpuinfo.format(" hypervisor"), **ec2})).hypervisor
        == "Amazon EC2 m5.large"
    )


def test_the_emulated_processor_of_arm_and_programs_run_for_another_are_seen(machine, monkeypatch):
    topology = read_topology(machine({"proc/cpuinfo": arm((0x00, 0x051))}))
    assert (topology.model_name, topology.emulated) == ("QEMU TCG CPU max", True)
    here, x86 = Tree(Path("/")), "model name: AMD EPYC\nflags: fpu\n"
    for architecture, other, own in (("aarch64", x86, arm((0x41, 0xD0C))), ("x86_64", arm((0x41, 0xD0C)), x86)):
        monkeypatch.setattr("platform.machine", lambda architecture=architecture: architecture)
        assert identity.is_emulated(here, other)
        assert not identity.is_emulated(here, own)
        assert not identity.is_emulated(Tree(machine({"proc/cpuinfo": other})), other), "captured elsewhere"


def test_the_fingerprint_is_the_hardware_alone(machine):
    topology = read_topology(machine({"proc/self/status": status("0-3", "0-1")}))
    fuller = "Node 0 MemTotal:  4096 kB\nNode 0 MemFree:  1 kB\n"
    same = machine({"proc/self/status": status("1", "0"), "sys/devices/system/node/node0/meminfo": fuller})
    assert read_topology(same).fingerprint() == topology.fingerprint()
    (node, other), cache = topology.nodes, ((10, 31), (31, 10))
    grown = dataclasses.replace(node, memory_bytes=2**31)  # a virtual machine was given more
    assert dataclasses.replace(topology, nodes=(grown, other)).fingerprint() == topology.fingerprint()
    for changes in (
        {"model_name": "Another CPU"},
        {"distances": cache},
        {"nodes": (dataclasses.replace(node, memory_bytes=0), other)},
        {"nodes": (dataclasses.replace(node, cpus=(0,)), other)},
    ):
        assert dataclasses.replace(topology, **changes).fingerprint() != topology.fingerprint()


def test_what_does_not_exist_is_named(machine, tmp_path):
    topology = read_topology(machine())
    with pytest.raises(NodeUnavailable, match=r"node 7 does not exist.*0-1"):
        topology.node(7)
    with pytest.raises(InvalidInput, match=r"CPU 9 is not online.*0-3"):
        topology.node_of_cpu(9)
    with pytest.raises(InvalidInput, match=r"nowhere' is not a folder: expected /"):
        read_topology(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match=r"holds no sys/devices/system/cpu: expected /"):
        read_topology(tmp_path / "proc")


@given(st.sets(st.integers(0, 5000)))
def test_a_written_list_reads_back(numbers):
    assert parse_cpulist(format_cpulist(numbers)) == tuple(sorted(numbers))


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "0,,1",
        "0,",
        "0-99999999999",
        "9" * 5000,
        "x",
        "3-1",
        "-1",
        "1-",
        "0-3;8",
        "0x3",
        "1 2",
        "٣",
        "1--2",
        "0-3, 8",
    ],
)
def test_what_is_no_list_is_refused(text):
    with pytest.raises(InvalidInput, match=re.escape(repr(text))):
        parse_cpulist(text)


def test_topologies_of_older_runs_are_read(four_nodes):
    stored = four_nodes.to_json()
    for node in stored["nodes"]:
        del node["available_bytes"]
    del stored["isolated_cpus"], stored["memory_limits"]
    older = Topology.from_json(stored)
    assert (older.isolated_cpus, older.memory_limits, older.cpus) == ((), (), four_nodes.cpus)
    assert older.available_bytes([0]) == older.free_bytes([0])
    del stored["allowed_cpus"]
    for wrong in (stored, [], None):
        with pytest.raises(InvalidInput, match="numa-lab topology --json"):
            Topology.from_json(wrong)


def test_without_any_effective_node_the_message_says_what_may_be_used(four_nodes):
    assert four_nodes.require_effective_nodes() == four_nodes.effective_nodes
    assert four_nodes.require_effective_nodes([1]) == (1,)
    with pytest.raises(NodeUnavailable, match="node 3 has no CPUs, or no memory"):
        four_nodes.require_effective_nodes([0, 3])
    with pytest.raises(NodeUnavailable, match=r"nodes=\(\): expected at least one node"):
        four_nodes.require_effective_nodes([])
    nowhere = dataclasses.replace(four_nodes, nodes=four_nodes.nodes[3:], allowed_cpus=(), allowed_nodes=(3,))
    with pytest.raises(NodeUnavailable, match=r"no node has both .*: allowed are CPUs none and memory of nodes 3"):
        nowhere.require_effective_nodes()
