"""Install numa_lab and what it needs into the environment of the Python that runs this; `make setup` and `make test` do.

    .venv/bin/python tools/install.py [EXTRA]       (`lab`, the suite, where none is named; or `dev`)

The versions are those of constraints.txt. torch comes first, since its builds for CUDA are gigabytes that a suite for CPUs never
uses: where pip is left with its own index and PyTorch's CPU index answers, from there. The standard library has to do here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU_INDEX = (
    os.environ.get("TORCH_CPU_INDEX") or "https://download.pytorch.org/whl/cpu"
)  # a mirror of it, where one is named
PLACES = ("index-url", "extra-index-url", "find-links", "no-index")  # settings of pip that say where packages come from
ANSWER_SECONDS = 6.0
QUIET_SECONDS = 10.0  # between two lines where lines can't be written anew


def say(text: str) -> None:
    """One line to whoever waits."""
    print(f"make: {text}", flush=True)


def pip(*arguments: str) -> list[str]:
    """The command line of this environment's pip."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def configured_places() -> list[str]:
    """The settings of pip, from files and from the environment, that say where packages come from."""
    lines = subprocess.run(pip("config", "list"), stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    found = [re.fullmatch(r"(?:global|install|:env:)\.([\w-]+)=(?:'.+'|\".+\")", line) for line in lines]
    return sorted({match[1] for match in found if match and match[1].replace("_", "-") in PLACES})


def builds(requirement: str, *options: str) -> set[str]:
    """The builds of a pinned version, "2.13.0+cpu" say, that pip finds for this Python; none where no index answers in time."""
    name, _, pinned = requirement.partition("==")
    patience = [f"--timeout={ANSWER_SECONDS}", "--retries=0"]
    try:
        listed = subprocess.run(
            pip("index", "versions", name, *patience, *options),
            capture_output=True,
            text=True,
            timeout=2 * ANSWER_SECONDS,
        ).stdout
    except subprocess.TimeoutExpired:
        return set()
    return {found for found in re.findall(r"[^\s,()]+", listed) if found.partition("+")[0] == pinned}


def torch_options(requirement: str) -> list[str]:
    """Where torch is installed from, as options of pip; says what was chosen, and what a build for CUDA costs."""
    places = configured_places()
    if not places:
        say(f"asking PyTorch's CPU index for {requirement} ...")
        if builds(requirement, "--index-url", CPU_INDEX):
            say(f"{requirement} comes from {CPU_INDEX}")
            return ["--index-url", CPU_INDEX, "--no-deps"]  # nothing else comes from there
    configured = f"pip is configured ({', '.join(places)})"
    reason = configured if places else f"{CPU_INDEX} does not answer, or has no build for this Python"
    say(f"{requirement} comes from where pip looks by itself: {reason}")
    if not any(build.endswith("+cpu") for build in builds(requirement)):
        say(
            "that may be a build for CUDA, with 16 to 19 packages more: 2 to 3 GB to download for what no CPU uses; without it:"
        )
        print(f"    PIP_EXTRA_INDEX_URL={CPU_INDEX} make setup")
        print(
            "  or, where this machine doesn't reach that index, with a wheel that the same Python fetched on one that does:"
        )
        print(f"    pip download --no-deps --index-url {CPU_INDEX} {requirement}")
        print("    PIP_FIND_LINKS=/folder/of/the/wheel make setup", flush=True)
    return []


def pinned_torch(constraints: Path) -> str:
    """The requirement that constraints.txt has for torch."""
    return next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))


def is_installed(requirement: str) -> bool:
    """Whether some build of a pinned version is in this environment."""
    name, _, pinned = requirement.partition("==")
    try:
        return version(name).partition("+")[0] == pinned
    except PackageNotFoundError:
        return False


class Progress:
    """What pip is at: one line that changes on a terminal, and elsewhere a line every few seconds."""

    def __init__(self) -> None:
        self.started = self.printed = time.monotonic()
        self.on_terminal = sys.stdout.isatty()
        self.line = "starting"
        self.to_unpack = 0
        self.present = self._count()

    @staticmethod
    def _count() -> int:
        return sum(
            1 for folder in sys.path if folder.endswith("site-packages") for _ in Path(folder).glob("*.dist-info")
        )

    def read(self, line: str) -> None:
        """Take a line of pip's."""
        unpacked = re.match(r"Installing collected packages: (.*)", line)
        if unpacked:
            self.to_unpack, self.present = len(unpacked[1].split(",")), self._count()
        if line.strip() and not line.startswith("WARNING"):
            self.line = line.strip()

    def show(self) -> None:
        """Print where pip is, if it is time to."""
        now = time.monotonic()
        if not self.on_terminal and now - self.printed < QUIET_SECONDS:
            return
        self.printed = now
        what = (
            f"unpacking, {self._count() - self.present} of {self.to_unpack} packages" if self.to_unpack else self.line
        )
        text = f"make:   {now - self.started:3.0f} s: {what}"
        if self.on_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{text[:width]}", end="", flush=True)
        else:
            print(text, flush=True)

    def end(self) -> None:
        """Leave no line that is half written."""
        if self.on_terminal:
            print("\r\033[K", end="", flush=True)


def attempt(*arguments: str) -> tuple[int, list[str]]:
    """`pip install` with progress: its exit status, and the lines that it said."""
    progress, said = Progress(), list[str]()
    command = pip("install", "--progress-bar=off", *arguments)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:

        def listen() -> None:
            assert process.stdout
            for line in process.stdout:
                said.append(line)
                progress.read(line)

        listener = threading.Thread(target=listen)
        listener.start()
        while listener.is_alive():
            listener.join(timeout=1)
            progress.show()
    progress.end()
    return process.returncode, said


def install(*arguments: str) -> None:
    """`pip install` with progress; where it fails, all that it said is printed and this process ends with its status."""
    status, said = attempt(*arguments)
    if status:
        sys.stderr.writelines(said)
        say(f"pip ended with exit status {status}; what it said is above, and `make` tries again")
        sys.exit(status)


def size(folder: Path) -> float:
    """What a folder takes on disk, in bytes."""
    return sum(os.lstat(Path(root, name)).st_blocks * 512 for root, _, names in os.walk(folder) for name in names)


def main(extra: str = "lab") -> None:
    """Install numa_lab with an extra, and say how long it took and what it takes on disk."""
    began = time.monotonic()
    root = Path(__file__).resolve().parents[1]
    constraints = root / "constraints.txt"
    torch = pinned_torch(constraints)
    if not is_installed(torch):
        install(*torch_options(torch), "--constraint", str(constraints), torch)
    say(f"installing numa_lab, and what {'a report needs' if extra == 'lab' else 'tests and linters need'} ...")
    install("--constraint", str(constraints), "--editable", f"{root}[{extra}]")
    seconds = time.monotonic() - began
    took = f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"
    say(f"that took {took}; {Path(sys.prefix).name} takes {size(Path(sys.prefix)) / 1e9:.1f} GB on disk")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        print()
        say("stopped; `make` begins this step anew")
        sys.exit(130)
