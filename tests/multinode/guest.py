"""A Linux guest with several NUMA nodes, under QEMU's software emulation: no KVM, no root rights, nothing installed.

The guest sees the host's files, read-only under a layer in its own memory, and one folder that both write. Placement is
real in it. Times mean nothing: all memory is equally far, and a few cores of the host run all CPUs of the guest. CPUs of x86 have no
AVX there, which QEMU 7.2 emulates by calls out of its translated code: imports take a quarter less time without it, and with it
pandas' sorting ended in a segmentation fault in notebook 06. So torch computes there, not the decode kernel.

A guest of 64-bit Arm sees Debian's packages for it in a folder (``arm64``), and this process's folder, in place of all files.

Limits: the host is x86-64; the kernels are Debian's, fetched by apt-get without being installed.
"""

from __future__ import annotations

import base64
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import arm64
from arm64 import apt

KERNEL = "linux-image-6.12"  # weighted interleaving came with 6.9
MODULES = (  # each after those that it needs
    "virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
    "fscache", "netfs", "9pnet", "9pnet_virtio", "9p", "overlay",
)  # fmt: skip
PASSED_ON = ("PATH", "HOME", "LANG", "VIRTUAL_ENV")
TOOLS = {
    "setpriv": "util-linux",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "xz": "xz-utils",
    "numactl": "numactl",
}  # program: Debian package
BOOT = Path(__file__).parent / "boot"


class GuestError(Exception):
    """A guest can't be made here, or ended without an exit status; the message says what its console says."""


@dataclass(frozen=True)
class Architecture:
    """What the guests of an architecture differ in."""

    debian: str  # Debian's name of it
    emulator: str
    package: str  # of the emulator
    machine: tuple[str, ...]  # QEMU's words for it
    console: str
    root: Path = Path("/")  # the files that the guest sees
    python: str = sys.executable
    runner: tuple[str, ...] = ()  # what runs its programs here
    apt: Callable[..., str] = apt


ARCHITECTURES = {
    "x86_64": Architecture(
        "amd64", "qemu-system-x86_64", "qemu-system-x86", ("-machine", "q35", "-cpu", "max,-avx,-avx2"), "ttyS0"
    ),
    # Without what costs most to emulate: authentication of pointers by a real cipher, and vectors of any length.
    "aarch64": Architecture(
        "arm64", "qemu-system-aarch64", "qemu-system-arm",
        ("-machine", "virt", "-cpu", "max,pauth-impdef=on,sve=off,sme=off"), "ttyAMA0", arm64.ROOT, "/usr/bin/python3",
        ("qemu-aarch64-static",), arm64.apt_for_arm,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """What a node holds: MiB of memory, and CPUs, either of which may be 0."""

    mib: int
    cpus: int = 0


@dataclass(frozen=True)
class Layout:
    """A machine. Nodes stand in the order of their ids, None for an id that does not exist. CPUs are numbered node by node.

    `distances` are 10 and 20 where none are given.
    """

    nodes: tuple[Node | None, ...]
    distances: tuple[tuple[int, ...], ...] = ()
    nodes_per_socket: int = 1
    cpus_per_core: int = 1

    def arguments(self, architecture: str) -> tuple[list[str], str]:
        """QEMU's arguments, and the kernel's."""
        words = ["-m", f"{sum(node.mib for node in self.nodes if node)}M"]
        for number, node in enumerate(self.nodes):
            memory = f",memdev=memory{number}" if node and node.mib else ""
            if node and memory:
                words += ["-object", f"memory-backend-ram,id=memory{number},size={node.mib}M"]
            words += ["-numa", f"node,nodeid={number}{memory}"]
        for source, row in enumerate(self.distances):
            for destination, distance in enumerate(row):
                words += ["-numa", f"dist,src={source},dst={destination},val={distance}"]
        cpus, kernel = self._cpus_of_arm() if architecture == "aarch64" else self._cpus_of_x86()
        return words + cpus, kernel

    def _cpus_of_x86(self) -> tuple[list[str], str]:
        """Linux numbers nodes in the order in which firmware names places for CPUs, so each node gets such places; only
        the wanted CPUs are plugged in, and possible_cpus keeps Linux from counting the empty ones.
        """
        sockets, cores = self._sockets_and_cores()
        words: list[str] = []
        plugged = 0
        for number in range(sockets * self.nodes_per_socket):
            node = (self.nodes[number] if number < len(self.nodes) else None) or Node(0)
            place = f"socket-id={number // self.nodes_per_socket}"
            if self.nodes_per_socket > 1:
                place += f",die-id={number % self.nodes_per_socket}"
            words += ["-numa", f"cpu,node-id={min(number, len(self.nodes) - 1)},{place}"]
            for cpu in range(node.cpus):
                if plugged:  # the first CPU of the machine is there already
                    core, thread = divmod(cpu, self.cpus_per_core)
                    words += ["-device", f"max-x86_64-cpu,{place},core-id={core},thread-id={thread}"]
                plugged += 1
        most = sockets * self.nodes_per_socket * cores * self.cpus_per_core
        words += [
            "-smp",
            f"1,maxcpus={most},sockets={sockets},dies={self.nodes_per_socket},cores={cores},threads={self.cpus_per_core}",
        ]
        return words, f"possible_cpus={plugged}"

    def _cpus_of_arm(self) -> tuple[list[str], str]:
        """The first places are taken, the others stay empty: nodes with fewer CPUs than others have to come last."""
        sockets, cores = self._sockets_and_cores()
        words = []
        for number in range(sockets * self.nodes_per_socket):
            socket, cluster = divmod(number, self.nodes_per_socket)
            place = f"socket-id={socket},cluster-id={cluster}"
            words += ["-numa", f"cpu,node-id={min(number, len(self.nodes) - 1)},{place}"]
        most = sockets * self.nodes_per_socket * cores * self.cpus_per_core
        places = f"sockets={sockets},clusters={self.nodes_per_socket},cores={cores},threads={self.cpus_per_core}"
        return [*words, "-smp", f"{sum(node.cpus for node in self.nodes if node)},maxcpus={most},{places}"], ""

    def _sockets_and_cores(self) -> tuple[int, int]:
        cores = max(-(-node.cpus // self.cpus_per_core) for node in self.nodes if node) or 1
        return -(-len(self.nodes) // self.nodes_per_socket), cores


LAYOUTS = {
    "two-sockets": Layout(
        (Node(2048, 2), Node(1024, 2), Node(768, 2), Node(512)),
        ((10, 12, 32, 32), (12, 10, 32, 32), (32, 32, 10, 12), (32, 32, 12, 10)),
        nodes_per_socket=2,
    ),
    "two-nodes": Layout((Node(1536, 2), Node(1536, 2)), ((10, 21), (21, 10))),
    "memoryless": Layout((Node(1280, 2), Node(0, 2), Node(1280, 2))),
    "gaps": Layout((Node(1536, 4), None, Node(1024, 2), None, Node(512)), cpus_per_core=2),
}


def prepare(cache: Path, architecture: str) -> None:
    """Fetch the kernel and busybox into a folder, and build the initial file system; nothing where that is done.

    Raises
    ------
    GuestError
        A Debian package is missing, or can't be fetched.
    """
    guest = ARCHITECTURES[architecture]
    missing = [package for tool, package in {guest.emulator: guest.package, **TOOLS}.items() if not shutil.which(tool)]
    if missing:
        raise GuestError(f"the guest needs programs that are missing here; type: apt-get install {' '.join(missing)}")
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if guest.root == arm64.ROOT:
                arm64.prepare()
            if not (cache / "kernel").is_dir():
                _fetch(cache, f"{KERNEL}-{guest.debian}", guest.apt)
        except arm64.ArmError as error:
            raise GuestError(str(error)) from error
        _build_initial_files(cache, guest.runner)


def _fetch(cache: Path, kernel: str, apt: Callable[..., str]) -> None:
    work = cache / "fetching"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    described = apt("apt-cache", "depends", kernel).split()
    version = next((word for word in described if word.startswith("linux-image-6") and word != kernel), None)
    if version is None:
        raise GuestError(f"apt does not know {kernel} (Debian 12 and later have it); type: apt-get update")
    apt("apt-get", "download", version, "busybox-static", cwd=work)
    for package in work.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, work / "files"], check=True)
    parts = work / "kernel"
    (parts / "modules").mkdir(parents=True)
    (next((work / "files/boot").glob("vmlinuz-*"))).rename(parts / "vmlinuz")
    (work / "files/bin/busybox").rename(parts / "busybox")
    for module in MODULES:
        for found in (work / "files").rglob(f"{module}.ko*"):  # some are built into the kernel
            shutil.copy(found, parts / "modules")
    if packed := list((parts / "modules").glob("*.xz")):
        subprocess.run(["xz", "-d", *packed], check=True)
    parts.rename(cache / "kernel")
    shutil.rmtree(work)


def _build_initial_files(cache: Path, runner: Sequence[str]) -> None:
    built = cache / "initramfs"
    if built.exists() and built.stat().st_mtime > max(path.stat().st_mtime for path in BOOT.iterdir()):
        return
    tree = cache / "initial"
    shutil.rmtree(tree, ignore_errors=True)
    for folder in ("bin", "dev", "proc", "sys", "lower", "upper", "new"):
        (tree / folder).mkdir(parents=True)
    shutil.copytree(cache / "kernel/modules", tree / "modules")
    (tree / "modules/order").write_text("".join(f"{module}\n" for module in MODULES))
    shutil.copy(cache / "kernel/busybox", tree / "bin")
    for script in ("init", "stage2"):
        shutil.copy(BOOT / script, tree)
    (tree / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with open(built, "wb") as archive:
        subprocess.run(
            [*runner, cache.absolute() / "kernel/busybox", "cpio", "-o", "-H", "newc", "-R", "0:0"],
            cwd=tree, input=names.encode(), stdout=archive, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
    shutil.rmtree(tree)


class Guest:
    """One boot of a layout, which runs one command; its output is in ``shared/output`` while it runs.

    Parameters
    ----------
    layout
        The machine.
    architecture
        One of ``ARCHITECTURES``.
    command
        The words to run in it, in this process's folder.
    shared
        A folder that host and guest both write, under the same path.
    cache
        Where ``prepare`` left the kernel.
    environment
        Variables for the command, besides PATH and the like.
    """

    def __init__(
        self,
        layout: Layout,
        architecture: str,
        command: Sequence[str],
        shared: Path,
        cache: Path,
        environment: Mapping[str, str] = {},
    ) -> None:
        shared.mkdir(parents=True, exist_ok=True)
        self.shared = shared.resolve()
        self.began = time.monotonic()
        guest = ARCHITECTURES[architecture]
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"PYTHONUNBUFFERED": "1"}
        if guest.root != Path("/"):
            variables |= arm64.ENVIRONMENT
        lines = [f"export {name}={shlex.quote(value)}" for name, value in (variables | dict(environment)).items()]
        script = self.shared / "command"
        script.write_text(
            "\n".join(["#!/bin/bash", *lines, f"cd {shlex.quote(os.getcwd())}", f"exec {shlex.join(command)}\n"])
        )
        script.chmod(0o755)
        for stale in ("status", "output", "console.log"):
            (self.shared / stale).unlink(missing_ok=True)
        machine, kernel = layout.arguments(architecture)
        shares = {"root": (guest.root, ",readonly=on"), "shared": (self.shared, "")}
        if guest.root != Path("/"):
            shares["project"] = (Path.cwd(), ",readonly=on")
        words = []
        for name, (path, access) in shares.items():
            kernel += f" guest_{name}={base64.b64encode(bytes(path)).decode()}"
            words += ["-fsdev", f"local,id={name},path={path},security_model=none,multidevs=remap{access}"]
            words += ["-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}"]
        with open(self.shared / "qemu.log", "wb") as complaints:
            self._process = subprocess.Popen(
            [
                # Whoever kills this process, even with -9, ends the guest too.
                "setpriv", "--pdeathsig", "KILL", "--",
                guest.emulator, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                *guest.machine, "-accel", "tcg,thread=multi", *machine, *words,
                "-kernel", cache / "kernel/vmlinuz", "-initrd", cache / "initramfs",
                "-append", f"console={guest.console} loglevel=6 panic=-1 mitigations=off nowatchdog {kernel}",
                "-chardev", f"file,id=console,path={self.shared / 'console.log'}", "-serial", "chardev:console",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=complaints,
        )  # fmt: skip

    def running(self) -> bool:
        """Whether the guest has not ended yet."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def status(self) -> int:
        """Exit status of the command, once the guest has ended.

        Raises
        ------
        GuestError
            It was killed, it hung or its kernel panicked: the message shows the end of its console.
        """
        self._process.wait()
        try:
            return int((self.shared / "status").read_text())
        except (FileNotFoundError, ValueError):
            seconds = time.monotonic() - self.began
            raise GuestError(
                f"the guest ended after {seconds:.0f} s and left no status (QEMU: {self._process.returncode} "
                f"{tail(self.shared / 'qemu.log')}).\nIts console ends:\n{tail(self.shared / 'console.log')}\n"
                f"Its output ends:\n{tail(self.shared / 'output')}"
            ) from None


def tail(path: Path, lines: int = 30) -> str:
    """The last lines of a file, nothing where it is missing."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
