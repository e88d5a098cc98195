"""What is built from a source distribution works where no clone is: its notebooks, a sweep with them, and the report."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words, cwd, **settings):
    """What a command prints; it sees neither the clone nor the environment that is active here."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The programs of an environment that has the wheel, beside the packages that are installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "venv", symlinks=True)
    programs = folder / "venv" / "bin"
    packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    # Their folder alone: the link to the clone that an editable install put beside them is not followed from here.
    (packages / "packages_of_the_tests.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages"))
    )
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder, cwd=ROOT)
    (source,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", programs / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    run(programs / "python", "-m", "ipykernel", "install", "--sys-prefix", cwd=folder)  # as installing ipykernel does
    return programs


def test_the_wheel_holds_the_package_the_scripts_and_what_they_read(installed, tmp_path):
    script = (
        "import analyze_numa_cpu_attention, optimize_gqa_with_numa, test_decode_thread\n"
        "from importlib.resources import files\n"
        "from numa_lab.bandwidth import mlc\n"
        "print(*(files('numa_lab') / name for name in ('py.typed', '__init__.pyi', 'report/templates/report.html.j2')))\n"
        "print(len(mlc.published('broadwell').nodes), len(list((files('numa_lab') / 'notebooks').iterdir())))\n"
    )
    printed = run(installed / "python", "-c", script, cwd=tmp_path).split()
    for path in map(Path, printed[:3]):
        assert path.is_relative_to(installed.parent)
        assert path.is_file()
    assert int(printed[-1]) == len(list((ROOT / "notebooks").glob("*.ipynb")))


@pytest.mark.notebook
def test_notebooks_a_sweep_and_its_report_from_an_empty_folder(installed, tmp_path):
    copied = run(installed / "numa-lab", "notebooks", "own", cwd=tmp_path).splitlines()
    assert copied == [f"own/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    tiny = ("--profile", "smoke", "--bindings", "c*m*", "--executions", "1", "--no-probes")
    run_dir = run(installed / "numa-lab", "sweep", *tiny, cwd=tmp_path).split()[-1]
    assert re.fullmatch(r"data/runs/\w+-smoke", run_dir)
    page = Path(run(installed / "numa-lab", "report", run_dir, cwd=tmp_path).splitlines()[0])
    assert "<html" in (tmp_path / page).read_text()
    assert len(list((tmp_path / run_dir / "notebooks").glob("0[67]*.ipynb"))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"own", "data"}
