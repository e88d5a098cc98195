"""`make`'s set-up: system tools, where torch comes from, the stamps in .venv, and the pins of the lowest Python."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pip
import pytest

ROOT = Path(__file__).parents[1]
NOBODY = "http://127.0.0.1:9"  # the port of the discard service, on which nothing listens


@pytest.fixture
def bare_system(tmp_path: Path) -> Path:
    """A folder of commands that has bash alone."""
    (tmp_path / "bash").symlink_to("/bin/bash")
    return tmp_path


def need(path: Path | str, *tools: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "need.sh"), *tools],
        env={"PATH": str(path), **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def test_missing_tools_without_package_manager_are_named_at_once(bare_system: Path) -> None:
    result = need(bare_system, "numactl", "chromium", "xz", "python")
    assert (result.returncode, result.stdout) == (1, "")
    for line in (
        "sudo apt-get install numactl chromium xz-utils python3-venv ",
        "sudo dnf install numactl chromium xz python3.12 ",
        "conda install -c conda-forge numactl chromium xz python ",
    ):
        assert line in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
@pytest.mark.parametrize("manager", ["apt-get", "dnf"])
def test_missing_tools_are_installed_together_and_said_so(bare_system: Path, manager: str) -> None:
    command(bare_system, manager, 'echo "$@" >> "${0%/*}/calls"')
    result = need(bare_system, "numactl", "chromium")
    assert result.returncode == 0
    assert f"installing numactl chromium with {manager}" in result.stderr
    assert (bare_system / "calls").read_text().splitlines()[-1].endswith(" numactl chromium")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
def test_python_is_installed_where_there_is_none(bare_system: Path) -> None:
    command(bare_system, "apt-get", f'[[ $1 != install ]] || /bin/ln -s {sys.executable} "${{0%/*}}/python3"')
    result = need(bare_system, "python")
    assert (result.returncode, result.stdout.strip()) == (0, str(bare_system / "python3"))


def test_present_tool_needs_nothing(bare_system: Path) -> None:
    command(bare_system, "chromium-browser", "exit 9")
    result = need(bare_system, "chromium")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_unknown_tool_is_refused(bare_system: Path) -> None:
    result = need(bare_system, "numactl", "chrome")
    assert result.returncode == 1
    assert "chrome: expected numactl, chromium" in result.stderr


def test_no_python_that_serves_names_those_found(bare_system: Path) -> None:
    command(bare_system, "python3", "echo 3.9")
    result = need(bare_system, "python")
    assert result.returncode == 1
    assert "3.11 or newer (found: python3 (3.9))" in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
def test_python_that_is_too_old_after_installing_is_refused(bare_system: Path) -> None:
    command(bare_system, "python3", "echo 3.9")
    command(bare_system, "apt-get", "")
    result = need(bare_system, "python")
    assert result.returncode == 1
    for line in ("found: python3 (3.9)", "make setup PYTHON=", "conda env create -f environment.yml"):
        assert line in result.stderr


def test_python_without_ensurepip_names_the_line_to_type(bare_system: Path) -> None:
    command(bare_system, "python3", "[[ $2 == *print* ]] && echo 3.12")
    result = need(bare_system, "python", "numactl")
    assert result.returncode == 1
    assert "apt-get install python3.12-venv numactl" in result.stderr


def test_python_that_was_named_is_taken() -> None:
    result = need(os.environ["PATH"], "python", PYTHON=sys.executable)
    assert (result.returncode, result.stdout.strip()) == (0, sys.executable)


# A stand-in for every Python of a set-up: it makes environments that hold itself, and notes what it is asked to install.
STAND_IN = """
case "$*" in
    *made-in*) cat .venv/made-in ;;
    *base_prefix*) echo "$(cat "${0%/*}/which" 2>/dev/null || echo "$0")" ;;
    *print*) echo 3.12 ;;
    *"-m venv"*)
        mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo "$0" > .venv/bin/which
        printf '#!/bin/bash\\n' > .venv/bin/jupyter && chmod +x .venv/bin/jupyter
        echo "venv" >> calls
        ;;
    *install.py*)
        [[ ! -e broken ]] || exit 1
        echo "install${2:+ $2}" >> calls
        ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with what make's set-up reads, and a stand-in for Python."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tools", folder / "tools")
    command(tmp_path, "stand-in", STAND_IN)
    return folder


def make(folder: Path, *words: str) -> list[str]:
    """What a call of make had done: environments made, and installs."""
    (folder / "calls").write_text("")
    of_make = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON"}  # of the make that may have started these tests
    environment = {name: value for name, value in os.environ.items() if name not in of_make}
    subprocess.run(["make", "-s", *words], cwd=folder, env=environment, capture_output=True, check=False)
    return (folder / "calls").read_text().splitlines()


def test_setup_is_made_once_and_completed_for_tests(project: Path) -> None:
    python = f"PYTHON={project.parent}/stand-in"
    assert make(project, "setup", python) == ["venv", "install"]
    assert make(project, "setup", python) == []
    assert make(project, "setup") == []
    assert make(project, ".venv/installed-dev", python) == ["install dev"]
    assert make(project, "setup", ".venv/installed-dev", python) == []


def test_setup_follows_what_it_was_made_from(project: Path) -> None:
    python = f"PYTHON={project.parent}/stand-in"
    make(project, ".venv/installed-dev", python)
    later = (project / ".venv" / "installed").stat().st_mtime + 5
    os.utime(project / "constraints.txt", (later, later))
    assert make(project, "setup", python) == ["install"]
    assert make(project, ".venv/installed-dev", python) == ["install dev"]
    moved = project.rename(project.parent / "moved")
    assert make(moved, "setup", python) == ["venv", "install"]
    shutil.copy(project.parent / "stand-in", project.parent / "newer")
    assert make(moved, "setup", f"PYTHON={project.parent}/newer") == ["venv", "install"]


def test_install_that_failed_is_made_again(project: Path) -> None:
    python = f"PYTHON={project.parent}/stand-in"
    make(project, ".venv/installed-dev", python)
    (project / ".venv" / "installed").unlink()
    (project / "broken").touch()
    assert make(project, "setup", python) == []
    (project / "broken").unlink()
    assert make(project, ".venv/installed-dev", python) == ["install dev"]
    assert make(project, "setup", python) == []


class Index(ThreadingHTTPServer):
    """A package index on loopback: a folder for each package, listed as it is; ``asked`` holds the paths that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                asked.append(self.path)

        asked = self.asked
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index(tmp_path / "index") as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        yield server
        server.shutdown()
        serving.join()


def wheel(tmp_path: Path, name: str, version: str, requires_python: str = ">=3") -> None:
    """A wheel with one empty module, on the index."""
    folder = tmp_path / "index" / name
    folder.mkdir(parents=True, exist_ok=True)
    file, about = f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / file, "w") as archive:
        headers = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            f"Requires-Python: {requires_python}",
        ]
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{about}/METADATA", "\n".join([*headers, ""]))
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    with (folder / "index.html").open("a") as page:
        page.write(f'<a href="{file}" data-requires-python="{html.escape(requires_python)}">{file}</a>\n')


BACKEND = """
import pathlib, zipfile
METADATA = pathlib.Path(__file__).with_name("METADATA").read_text()

def build_editable(folder, *_):
    with zipfile.ZipFile(f"{folder}/numa_lab-1-py3-none-any.whl", "w") as archive:
        archive.writestr("numa_lab-1.dist-info/METADATA", METADATA)
        archive.writestr("numa_lab-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("numa_lab-1.dist-info/RECORD", "")
    return "numa_lab-1-py3-none-any.whl"

def prepare_metadata_for_build_wheel(folder, *_):
    about = pathlib.Path(folder, "numa_lab-1.dist-info")
    about.mkdir()
    (about / "METADATA").write_text(METADATA)
    return about.name

prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel

def build_wheel(*_):
    raise NotImplementedError
"""


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """A project that tools/ install as they install this one, which needs nothing to be built."""
    folder = tmp_path / "small"
    shutil.copytree(ROOT / "tools", folder / "tools")
    (folder / "build").mkdir()
    (folder / "backend.py").write_text(BACKEND)
    (folder / "constraints.txt").write_text("# Pins.\ntorch==9.9.9\n")
    require(folder)
    return folder


def require(folder: Path, *requirements: str) -> None:
    python = f">={sys.version_info[0]}.{sys.version_info[1]}"
    metadata = [
        "Metadata-Version: 2.1",
        "Name: numa_lab",
        "Version: 1",
        f"Requires-Python: {python}",
        "Provides-Extra: lab",
        "Provides-Extra: dev",
        "Provides-Extra: bench",
    ]
    (folder / "METADATA").write_text("\n".join([*metadata, *(f"Requires-Dist: {line}" for line in requirements), ""]))
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        f'[project]\nname = "numa_lab"\nversion = "1"\nrequires-python = "{python}"\n'
    )


def run(python: Path | str, folder: Path, script: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run one of tools/ with a pip that no file configures and that reaches loopback alone."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PIP_") and name != "PYTHONPATH"
    }
    alone = {"PIP_CONFIG_FILE": os.devnull, "HTTPS_PROXY": NOBODY, "NO_PROXY": "127.0.0.1", "PIP_RETRIES": "0"}
    return subprocess.run(
        [str(python), f"tools/{script}"],
        cwd=folder,
        env=environment | alone | settings,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def empty_environment(tmp_path: Path) -> Path:
    """The Python of a new environment, which has pip alone."""
    venv.create(tmp_path / "venv", symlinks=True)
    packages = tmp_path / "venv/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    shutil.copytree(Path(pip.__file__).parent, packages / "pip")  # ensurepip takes much longer
    return tmp_path / "venv" / "bin" / "python"


def installed(python: Path) -> dict[str, str]:
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True).stdout
    return {package["name"]: package["version"] for package in json.loads(listed)}


def test_torch_comes_from_the_cpu_index_where_no_index_is_configured(
    tmp_path: Path, index: Index, small_project: Path, empty_environment: Path
) -> None:
    wheel(tmp_path, "torch", "9.9.9+cpu")
    result = run(empty_environment, small_project, "install.py", TORCH_CPU_INDEX=index.url)
    assert result.returncode == 0, result.stdout + result.stderr
    assert installed(empty_environment)["torch"] == "9.9.9+cpu"
    assert f"torch==9.9.9 comes from {index.url}" in result.stdout
    assert "CUDA" not in result.stdout
    assert "venv takes" in result.stdout.splitlines()[-1]
    index.asked.clear()
    again = run(empty_environment, small_project, "install.py", TORCH_CPU_INDEX=index.url)
    assert (again.returncode, index.asked) == (0, [])


@pytest.mark.parametrize("version", ["9.9.9", "9.9.9+cpu"])
def test_configured_index_is_respected_and_a_build_for_cuda_is_announced(
    tmp_path: Path, index: Index, small_project: Path, empty_environment: Path, version: str
) -> None:
    wheel(tmp_path, "torch", version)
    result = run(empty_environment, small_project, "install.py", TORCH_CPU_INDEX=NOBODY, PIP_INDEX_URL=index.url)
    assert result.returncode == 0, result.stdout + result.stderr
    assert installed(empty_environment)["torch"] == version
    assert "pip is configured (index-url)" in result.stdout
    assert (f"PIP_EXTRA_INDEX_URL={NOBODY} make setup" in result.stdout) == (version == "9.9.9")


def test_cpu_index_that_does_not_answer_or_lacks_the_version_is_left(
    tmp_path: Path, index: Index, small_project: Path
) -> None:
    wheel(tmp_path, "torch", "9.9.8+cpu")
    for url in (NOBODY, index.url):
        result = run(sys.executable, small_project, "install.py", TORCH_CPU_INDEX=url)
        assert result.returncode != 0  # pip's own index can't be reached here
        assert f"{url} does not answer, or has no build" in result.stdout
        assert "2 to 3 GB" in result.stdout


@pytest.mark.parametrize("section", ["global", "install"])
def test_every_way_to_configure_an_index_counts(tmp_path: Path, small_project: Path, section: str) -> None:
    places = {
        "index-url": NOBODY,
        "extra-index-url": f"\n {NOBODY}\n {NOBODY}",
        "find-links": tmp_path,
        "no-index": "true",
    }
    settings = [f"{name} = {value}" for name, value in {**places, "timeout": 9}.items()]
    (tmp_path / "pip.conf").write_text("\n".join([f"[{section}]", *settings]))
    (small_project / "tools" / "places.py").write_text("import install\nprint(install.configured_places())\n")
    result = run(sys.executable, small_project, "places.py", PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))
    assert result.stdout == f"{sorted(places)}\n"


def test_newest_versions_are_those_of_the_lowest_python(tmp_path: Path, index: Index, small_project: Path) -> None:
    wheel(tmp_path, "plain", "1.0+cpu")
    wheel(tmp_path, "choosy", "1.0")
    wheel(tmp_path, "choosy", "2.0", f">={sys.version_info[0]}.{sys.version_info[1]}.1")
    require(small_project, "choosy", "plain")
    result = run(sys.executable, small_project, "newest.py", PIP_INDEX_URL=index.url)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (small_project / "constraints.txt").read_text() == "# Pins.\nchoosy==1.0\nplain==1.0\n"


def test_pin_that_the_lowest_python_cannot_install_is_refused(
    tmp_path: Path, index: Index, small_project: Path
) -> None:
    asked = f">={sys.version_info[0]}.{sys.version_info[1]}.1"
    wheel(tmp_path, "choosy", "2.0", asked)
    require(small_project, "choosy")
    before = (small_project / "constraints.txt").read_text()
    result = run(sys.executable, small_project, "newest.py", PIP_INDEX_URL=index.url)
    assert result.returncode == 1
    assert "choosy" in result.stderr
    assert asked in result.stderr
    assert "constraints.txt is as it was" in result.stderr
    assert (small_project / "constraints.txt").read_text() == before
