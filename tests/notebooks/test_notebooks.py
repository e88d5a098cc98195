import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from numa_lab.experiments import notebook_files, notebook_runner

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SAMPLE = Path(__file__).parents[2] / "data" / "sample"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_common_form(path):
    cells = notebook_runner.read(path).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert len(cells) <= 15
    assert cells[0].source.startswith(f"# {path.name[:2]} · ")
    assert "import" in code[0]
    assert [cell.metadata.get("tags") for cell in cells].index(["parameters"]) == 2
    assert not re.search(r"^\s*(def|class) ", "\n".join(code), re.MULTILINE)
    assert "bad " in " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert cells[-1].source.startswith("## Where to go next")
    for parameter in notebook_runner.parameters_of(path).values():
        assert parameter["help"], f"{parameter['name']} has no comment that says what it means"


def test_they_are_numbered_without_gaps():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(1, len(NOTEBOOKS) + 1)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in notebook_runner.read(path).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("01_machine", {"seconds": 1.0}),
        ("02_attention_under_binding", {"kv_len": 64}),
        ("03_optimal_node", {"seconds": 1.0}),
        ("04_thread_pool", {"kv_len": 64, "seconds": 0.5, "probe_seconds": 0.5}),
        ("05_decode_loop", {"kv_len": 64, "layers": 1, "tokens": 4, "seconds": 0.5}),
        ("06_cross_node_overhead", {}),
        ("07_optimization_guide", {}),
    ],
)
def test_a_notebook_runs_and_every_figure_has_alternative_text(name, parameters, tmp_path):
    output, log = tmp_path / "out.ipynb", tmp_path / "log"
    outcome = notebook_runner.execute(notebook_files.find(name), output, parameters, log=log)
    assert outcome.exit_status == 0, notebook_runner.failure(outcome, log)
    outputs = [output for cell in notebook_runner.read(output).cells for output in cell.get("outputs", ())]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert figures
    assert all(len(figure.metadata["image/png"]["alt"]) > 20 for figure in figures)
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]


@pytest.mark.notebook
def test_from_elsewhere_it_opens_the_sample_or_says_what_is_wrong_last(tmp_path):
    words = [sys.executable, "-m", "papermill", "--no-progress-bar", str(NOTEBOOKS[5]), "out.ipynb"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*words, "-p", "run_dir", "None"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("InvalidInput: parameter run_dir=None: expected str, got None (run directory")


def test_the_sample_says_which_machine_it_is():
    machine = json.loads((SAMPLE / "machine.json").read_text())
    assert machine["identity"]["model"]
    assert list((SAMPLE / "executions").glob("*.parquet"))
