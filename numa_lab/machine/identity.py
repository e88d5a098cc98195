"""Reads which machine this is: the names of its processors, and whether it is virtual or emulated."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from pathlib import Path

from numa_lab.machine.sysfs import Tree

# 64-bit Arm gives numbers in place of names: one for the maker of the processor, one for the part among the maker's. Sources: Linux's
# arch/arm64/include/asm/cputype.h, lscpu's and LLVM's tables (which agree), and QEMU's source for its own.
_MAKERS = {
    0x41: "Arm", 0x42: "Broadcom", 0x43: "Cavium", 0x46: "Fujitsu", 0x48: "HiSilicon", 0x4E: "NVIDIA", 0x50: "Applied Micro",
    0x51: "Qualcomm", 0x53: "Samsung", 0x56: "Marvell", 0x61: "Apple", 0x69: "Intel", 0x6D: "Microsoft", 0x70: "Phytium",
    0xC0: "Ampere",
}  # fmt: skip
_PARTS = {
    0x00: {0x051: "QEMU TCG CPU max"},
    0x41: {
        0xD03: "Arm Cortex-A53", 0xD05: "Arm Cortex-A55", 0xD07: "Arm Cortex-A57", 0xD08: "Arm Cortex-A72",
        0xD09: "Arm Cortex-A73", 0xD0A: "Arm Cortex-A75", 0xD0B: "Arm Cortex-A76", 0xD0C: "Arm Neoverse N1",
        0xD0D: "Arm Cortex-A77", 0xD40: "Arm Neoverse V1", 0xD41: "Arm Cortex-A78", 0xD42: "Arm Cortex-A78AE",
        0xD44: "Arm Cortex-X1", 0xD46: "Arm Cortex-A510", 0xD47: "Arm Cortex-A710", 0xD48: "Arm Cortex-X2",
        0xD49: "Arm Neoverse N2", 0xD4A: "Arm Neoverse E1", 0xD4D: "Arm Cortex-A715", 0xD4E: "Arm Cortex-X3",
        0xD4F: "Arm Neoverse V2", 0xD80: "Arm Cortex-A520", 0xD81: "Arm Cortex-A720", 0xD82: "Arm Cortex-X4",
        0xD83: "Arm Neoverse V3AE", 0xD84: "Arm Neoverse V3", 0xD85: "Arm Cortex-X925", 0xD87: "Arm Cortex-A725",
        0xD8E: "Arm Neoverse N3",
    },
    0x42: {0x516: "Broadcom Vulcan"},
    0x43: {0x0A1: "Cavium ThunderX", 0x0AF: "Cavium ThunderX2", 0x0B8: "Marvell ThunderX3"},
    0x46: {0x001: "Fujitsu A64FX", 0x003: "Fujitsu MONAKA"},
    0x48: {0xD01: "HiSilicon Kunpeng 920", 0xD02: "HiSilicon HIP09", 0xD06: "HiSilicon HIP12"},
    0x4E: {0x003: "NVIDIA Denver 2", 0x004: "NVIDIA Carmel", 0x010: "NVIDIA Olympus"},
    0x50: {0x000: "Applied Micro X-Gene"},
    0x51: {0x001: "Qualcomm Oryon", 0xC00: "Qualcomm Falkor", 0xC01: "Qualcomm Saphira"},
    0x61: {
        0x022: "Apple M1 Icestorm", 0x023: "Apple M1 Firestorm", 0x024: "Apple M1 Pro Icestorm",
        0x025: "Apple M1 Pro Firestorm", 0x028: "Apple M1 Max Icestorm", 0x029: "Apple M1 Max Firestorm",
        0x032: "Apple M2 Blizzard", 0x033: "Apple M2 Avalanche",
    },
    0x6D: {0xD49: "Microsoft Azure Cobalt 100"},
    0x70: {
        0x660: "Phytium FTC660", 0x661: "Phytium FTC661", 0x662: "Phytium FTC662", 0x663: "Phytium FTC663",
        0x664: "Phytium FTC664", 0x862: "Phytium FTC862",
    },
    0xC0: {0xAC3: "AmpereOne", 0xAC4: "Ampere-1A", 0xAC5: "Ampere-1B", 0xAC7: "Ampere-1C"},
}  # fmt: skip


def model_name(tree: Tree, info: str) -> str:
    """Return the processor's name in cpuinfo; on 64-bit Arm, which has none, the name of each kind of core by its maker and part."""
    named = _line(info, "[Mm]odel [Nn]ame")
    # Some kernels fill the line with the architecture, so that old programs find a name.
    if named and not re.match(r"(ARMv\d|AArch64) Processor", named):
        return named
    numbers = list(_arm_numbers(tree, info))
    kinds = dict.fromkeys(_arm_name(*pair) for pair in numbers)
    return " and ".join(kinds) or named or _line(info, "cpu|Processor|Hardware") or _product(tree)


def _line(info: str, names: str) -> str:
    line = re.search(rf"^(?:{names})\s*:[ \t]*(\S.*)$", info, re.MULTILINE)
    return " ".join(line[1].split()) if line else ""


def _arm_numbers(tree: Tree, info: str) -> Iterator[tuple[int, int]]:
    """Yield maker and part of each CPU: as cpuinfo has them, else from the identification registers."""
    maker = 0
    numbers = re.findall(r"^CPU (implementer|part)\s*:\s*(0x[0-9a-fA-F]+)", info, re.MULTILINE)
    for name, number in numbers:
        if name == "part":
            yield maker, int(number, 16)
        else:
            maker = int(number, 16)
    for cpu in () if numbers else tree.numbered(tree.cpu_dir, "cpu"):
        if register := tree.text(tree.cpu_dir / f"cpu{cpu}/regs/identification/midr_el1"):
            yield int(register, 16) >> 24 & 0xFF, int(register, 16) >> 4 & 0xFFF


def _arm_name(maker: int, part: int) -> str:
    if named := _PARTS.get(maker, {}).get(part):
        return named
    by = f"{_MAKERS[maker]} processor" if maker in _MAKERS else f"processor of implementer 0x{maker:02x}"
    return f"{by}, part 0x{part:03x}"


# The names that the firmware of virtual machines gives them, on any architecture. Clouds that have bare-metal machines too use the
# names of _CLOUD for both; on x86 a flag of the CPUs tells them apart.
_VIRTUAL = re.compile(
    "QEMU|KVM|VMware|VirtualBox|Virtual Machine|HVM domU|OpenStack|KubeVirt|Parallels|BHYVE|Apple Virtualization"
)
_CLOUD = re.compile(
    "Amazon EC2|Google Compute Engine|Alibaba Cloud|Tencent Cloud|Huawei ?Cloud|vServer|SCW-", re.IGNORECASE
)
_METAL = re.compile(r"\bmetal\b")  # c7g.metal, m7g.metal-48xl


def hypervisor(tree: Tree, info: str) -> str | None:
    """Return the name of the hypervisor that this machine runs in, "unknown" where nothing names it, and None where none is seen.

    x86 has a flag of the CPU for it. On other architectures the firmware's name of the machine tells it or, where the firmware gives
    none, the device tree, which names KVM, Xen and QEMU's board.
    """
    named, product = tree.text("sys/hypervisor/type"), _product(tree)
    flags = _line(info, "flags")
    if flags:
        seen = "hypervisor" in flags.split() or _VIRTUAL.search(product)
        clocks = tree.text("sys/devices/system/clocksource/clocksource0/available_clocksource")
        return named or (product or ("KVM" if "kvm-clock" in clocks else "unknown") if seen else None)
    if named or _VIRTUAL.search(product) or (_CLOUD.search(product) and not _METAL.search(product)):
        return named or product
    return _board(tree) or ((product or "unknown") if _firmware_is_virtual(tree) else None)


def _board(tree: Tree) -> str | None:
    """The name of a virtual board that the device tree or, in its place, ACPI gives; None where there is none."""
    base = next(
        (path for path in ("proc/device-tree", "sys/firmware/devicetree/base") if (tree.root / path).is_dir()), ""
    )
    if base and (under := tree.text(f"{base}/hypervisor/compatible")):
        return under.split("\0")[0]
    # QEMU hands files to its firmware by a device of its own. Containers hide /sys/firmware, but not the devices.
    for folder, device in (
        (base, "fw-cfg*"),
        ("sys/bus/platform/devices", "*fw-cfg*"),
        ("sys/bus/acpi/devices", "QEMU*"),
    ):
        if folder and any((tree.root / folder).glob(device)):
            return "QEMU"
    board = tree.text(f"{base}/compatible").split("\0")[0] if base else ""
    return board if re.search("dummy-virt|qemu", board) else None


def _firmware_is_virtual(tree: Tree) -> bool:
    """Whether SMBIOS says that the machine is virtual (type 0, extension byte 2, bit 4), where this user may read it."""
    try:
        entry = (tree.root / "sys/firmware/dmi/entries/0-0/raw").read_bytes()
    except OSError:
        return False
    return len(entry) > 19 and entry[1] > 19 and bool(entry[19] & 0x10)


def is_translated(tree: Tree, info: str) -> bool:
    """Return whether QEMU translates this very program, as in a container for another architecture, where cpuinfo is the host's."""
    others = {"aarch64": "flags", "x86_64": "CPU implementer"}.get(platform.machine(), "")
    return bool(others) and tree.root == Path("/") and bool(_line(info, others))


def is_emulated(tree: Tree, info: str) -> bool:
    """Return whether software is seen to run the instructions: QEMU without an accelerator (TCG).

    The processor of ``-cpu max`` has TCG in its name, or on Arm a part number of its own. A guest of QEMU on x86 whose processor has
    another name is emulated if it lacks x2APIC: under KVM it always has that, and TCG did not have it before QEMU 9.
    """
    if "TCG" in model_name(tree, info) or is_translated(tree, info):
        return True
    flags = _line(info, "flags").split()
    return "hypervisor" in flags and "x2apic" not in flags and _product(tree).startswith("QEMU")


def _product(tree: Tree) -> str:
    return " ".join(filter(None, (tree.text(f"sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name"))))
