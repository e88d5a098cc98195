"""A Debian of 64-bit Arm in a folder, and its programs run here by qemu-user: ``python -m arm64 run COMMAND ...``.

`prepare` in place of `run` leaves it at the folder, which is made once and again when what it is made of changes.

Debian's packages and the wheels are unpacked, not installed: no emulated dpkg, and nothing of this system changes. The
programs run in a namespace of their own, whose kernel hands Arm's programs to QEMU, those that they start included.

Limits: a Debian on another architecture, with apt-get; Linux 6.7 or newer, where a namespace may have such a table of
its own (or an entry for aarch64 with the flag F in the system's table, as qemu-user-static makes with binfmt-support).
qemu-user refuses the kernel's NUMA calls, and times mean nothing.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

BUILD = Path("build/arm64")
ROOT = BUILD / "root"
PACKAGES = ("bash", "dash", "libc-bin", "libnuma1", "libomp5", "libstdc++6", "numactl", "python3")
TORCH = "torch==2.10.0"  # the newest whose wheel for aarch64 in the package index is built without CUDA
# What the tests import, and what torch imports: pip reads the needs of a wheel for the machine that it runs on, CUDA here.
WHEELS = (
    "filelock", "fsspec", "jinja2", "networkx", "sympy", "typing_extensions",  # torch's
    "click", "hypothesis", "lazy_loader", "nbformat", "numba", "numpy", "pandas", "platformdirs", "psutil", "pyarrow", "pytest",
    "pyyaml", "threadpoolctl", "tqdm",
)  # fmt: skip
QEMU = "qemu-aarch64-static"
TOOLS = {
    QEMU: "qemu-user-static",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "unshare": "util-linux",
}  # program: Debian package
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "LANG": "C.UTF-8"}
# A processor that QEMU and LLVM know, of many servers: it has float16 arithmetic and no bfloat16.
CPU = "neoverse-n1"
CPUINFO = """processor\t: {}
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
# The head of an ELF file of 64-bit Arm, executable or shared, and the bits of it that count.
MAGIC = rb"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00".decode()
MASK = rb"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff".decode()
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "--")
TABLE = Path("/proc/sys/fs/binfmt_misc")


class ArmError(Exception):
    """There is no 64-bit Arm to be had here; the message says what is missing."""


def apt(*words: str, cwd: Path | None = None) -> str:
    """Run apt-get or apt-cache; what it printed.

    Raises
    ------
    ArmError
        It failed; the message is its own.
    """
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise ArmError(f"{' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout


def apt_for_arm(program: str, *words: str, cwd: Path | None = None) -> str:
    """The same for packages of arm64, with the sources of this system, and all else in a folder of its own."""
    state = (BUILD / "apt").absolute()
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()  # of installed packages: none
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "", "Acquire::Languages": "none", "Dir::State": state, "Dir::Cache": state,
        "Dir::State::status": state / "status",
    }  # fmt: skip
    return apt(program, *(f"--option={name}={value}" for name, value in settings.items()), *words, cwd=cwd)


def prepare() -> None:
    """Unpack Debian and the wheels into ``ROOT``; nothing where that is done.

    Raises
    ------
    ArmError
        This is no place for it, a program is missing, or something can't be fetched.
    """
    if platform.machine() in ("aarch64", "arm64"):
        raise ArmError("this is a 64-bit Arm: make test and make test-multinode run here as they are")
    if missing := [package for tool, package in TOOLS.items() if not shutil.which(tool)]:
        raise ArmError(f"programs are missing here; type: apt-get install {' '.join(missing)}")
    made_of = "\n".join([*PACKAGES, TORCH, *WHEELS, Path("constraints.txt").read_text()])
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = BUILD / "made-of"
        if stamp.exists() and stamp.read_text() == made_of:
            return
        stamp.unlink(missing_ok=True)
        print("arm64: fetching Debian's packages and the wheels (some minutes the first time) ...", file=sys.stderr)
        shutil.rmtree(ROOT, ignore_errors=True)
        unpack(PACKAGES, ROOT)
        _install_wheels()
        for folder in ("proc", "sys", "dev", "tmp"):
            (ROOT / folder).mkdir(exist_ok=True)
        run(["/sbin/ldconfig"], check=True)  # by whose list Python finds libraries
        _compile_modules()
        stamp.write_text(made_of)


def unpack(packages: Sequence[str], folder: Path) -> None:
    """Fetch packages, with all that they depend on, and unpack them into a folder."""
    shutil.rmtree(BUILD / "apt/archives", ignore_errors=True)
    apt_for_arm("apt-get", "update")
    apt_for_arm("apt-get", "install", "--yes", "--download-only", *packages)
    for package in sorted((BUILD / "apt/archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)


def _install_wheels() -> None:
    (library,) = (ROOT / "usr/lib").glob("python3.*")
    version = library.name.removeprefix("python")
    libc = next((BUILD / "apt/archives").glob("libc6_2.*")).name.split("_")[1]
    newest = int(libc.split("-")[0].split(".")[1])
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(newest, 16, -1)] + ["manylinux2014_aarch64"]
    options = ["--python-version", version, "--implementation", "cp", "--only-binary=:all:"]
    options += [word for tag in tags for word in ("--platform", tag)]
    options += [word for abi in (f"cp{version.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
    target = ROOT / "usr/local/lib" / library.name / "dist-packages"
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-compile", "--target", str(target), *options]
    for wheels in (["--no-deps", TORCH], ["--constraint", "constraints.txt", *WHEELS]):
        done = subprocess.run([*pip, *wheels], capture_output=True, text=True)
        if done.returncode != 0:
            raise ArmError(f"pip did not get the wheels of aarch64: {done.stderr.strip()}")
        shutil.rmtree(target / "bin", ignore_errors=True)  # scripts for the Python of this machine


def _compile_modules() -> None:
    """Write the bytecode of all modules, as installing would; a Python of the same version makes it without emulation."""
    (library,) = (ROOT / "usr/lib").glob("python3.*")
    folders = [f"usr/lib/{library.name}", f"usr/local/lib/{library.name}"]
    words = ["-m", "compileall", "-qq", "-s", str(ROOT.absolute())]
    if library.name == f"python3.{sys.version_info.minor}":
        subprocess.run([sys.executable, *words, *(str((ROOT / folder).absolute()) for folder in folders)])
    else:
        run(["python3", "-m", "compileall", "-qq", *(f"/{folder}" for folder in folders)])


def run(command: Sequence[str], check: bool = False) -> int:
    """Run a program of ``ROOT`` in the folder of the project; its exit status.

    Raises
    ------
    ArmError
        The kernel hands no programs of Arm to QEMU here.
    """
    _require_namespace()
    cpuinfo = BUILD / "cpuinfo"
    cpuinfo.write_text("".join(CPUINFO.format(cpu) for cpu in sorted(os.sched_getaffinity(0))))
    environment = {
        "QEMU_CPU": CPU,
        "PYTHONPATH": f"{os.getcwd()}:{os.getcwd()}/tests",
        "PYTHONDONTWRITEBYTECODE": "1",
        "NUMBA_OPT": "0",  # compiling takes longer than what is compiled; the kernels are optimised all the same, on their own
        "OMP_WAIT_POLICY": "passive",  # threads that wait would take the few CPUs from those that work
    }
    words = [*NAMESPACE, sys.executable, __file__, "enter", *command]
    return subprocess.run(words, env=os.environ | ENVIRONMENT | environment, check=check).returncode


def _require_namespace() -> None:
    """See beforehand whether a namespace may do what ``_enter`` does, so that its failures are told from the command's."""
    trial = ["true"] if _handed_over() else ["mount", "-t", "binfmt_misc", "binfmt_misc", str(TABLE)]
    done = subprocess.run([*NAMESPACE, *trial], capture_output=True, text=True)
    if done.returncode != 0:
        raise ArmError(
            f"no namespace in which programs of Arm are handed to QEMU ({done.stderr.strip()}). Linux 6.7 or newer lets any user "
            "have one; before that type as root, also on the host of a container: apt-get install qemu-user-static binfmt-support. "
            "Docker needs --security-opt seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN"
        )


def _enter(command: Sequence[str]) -> None:
    """In the namespace: hand Arm's programs to QEMU, lay out the file system, and become the command."""
    root, project = ROOT.absolute(), os.getcwd()
    if not _handed_over():
        _mount("-t", "binfmt_misc", "binfmt_misc", str(TABLE))
        # F: QEMU is opened now, so it need not exist in the other file system.
        (TABLE / "register").write_text(f":numa_lab-aarch64:M::{MAGIC}:{MASK}:{shutil.which(QEMU)}:F")
    for folder in ("proc", "sys", "dev"):
        _mount("--rbind", f"/{folder}", f"{root}/{folder}")
    _mount("-t", "tmpfs", "tmp", f"{root}/tmp")
    _mount("--bind", str((BUILD / "cpuinfo").absolute()), f"{root}/proc/cpuinfo")  # qemu-user shows this machine's
    Path(f"{root}/{project}").mkdir(parents=True, exist_ok=True)
    _mount("--bind", project, f"{root}/{project}")
    os.chroot(root)
    os.chdir(project)
    os.execvp(command[0], command)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _handed_over() -> bool:
    """Whether the system's own table has an entry for Arm that holds in any file system."""
    try:
        lines = (TABLE / "qemu-aarch64").read_text().splitlines()
    except OSError:
        return False
    return "enabled" in lines and any(line.startswith("flags:") and "F" in line for line in lines)


def main(words: Sequence[str]) -> int:
    """Prepare, and run a command where one is named."""
    try:
        prepare()
        return run(words[1:]) if words[0] == "run" else 0
    except ArmError as error:
        print(f"arm64: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    if sys.argv[1] == "enter":
        _enter(sys.argv[2:])
    sys.exit(main(sys.argv[1:]))
