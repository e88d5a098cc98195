from pathlib import Path

import pytest

from numa_lab.errors import InvalidInput
from numa_lab.experiments import notebook_files, notebook_runner, parameters

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
CELL = "kv_len: int = 64  # tokens in the cache\nseconds: float = 2.0  # for all\nrefresh: bool = False  # anew\nname: str = 'x'"


def given(**changed):
    """What a notebook's cells see after its parameters cell, with what papermill injected."""
    return {"In": ["", "!ls", CELL], "kv_len": 64, "seconds": 2.0, "refresh": False, "name": "x", **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        ({"seconds": 2, "name": "", "refresh": True}, ""),
        ({"kv_len": None}, r"parameter kv_len=None: expected int, got None \(tokens in the cache\)\. Leave it out for its default, 64"),
        ({"kv_len": 64.0}, "kv_len=64.0: expected int, got float .* -p kv_len 1$"),
        ({"kv_len": True}, "expected int, got bool"),
        ({"seconds": "ten"}, "seconds='ten': expected float, got str"),
        ({"refresh": "false"}, "refresh='false': expected bool, got str .* -p refresh True, or False$"),
        ({"name": 12}, "name=12: expected str, got int .* -r name TEXT$"),
    ],
)  # fmt: skip
def test_a_parameter_of_another_type_is_named_with_its_meaning(changed, message):
    if message:
        with pytest.raises(InvalidInput, match=message):
            parameters.check(given(**changed))
    else:
        parameters.check(given(**changed))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_checks_each_of_its_parameters(path):
    code = [cell for cell in notebook_runner.read(path).cells if cell.cell_type == "code"]
    cell, following = code[1], code[2]
    assert cell.metadata.tags == ["parameters"]
    assert following.source.startswith("parameters.check(globals())\n")
    values: dict = {}
    exec(cell.source, values)
    declared = notebook_runner.parameters_of(path)
    parameters.check({"In": [cell.source], **{name: values[name] for name in declared}})
    for name in declared:
        with pytest.raises(InvalidInput, match=f"parameter {name}=None: expected "):
            parameters.check({"In": [cell.source], **values, name: None})


def test_a_run_directory_is_found_from_where_the_notebook_runs_or_from_the_project(tmp_path, monkeypatch):
    sample = NOTEBOOKS[0].parents[1] / "data" / "sample"
    monkeypatch.chdir(tmp_path)
    for text in ("", "../data/sample", "data/sample", str(sample)):
        assert parameters.find_run(text).resolve() == sample
    own = tmp_path / "data" / "sample"
    own.mkdir(parents=True)
    assert parameters.find_run("data/sample").resolve() == own
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parameters.find_run("~/data/sample") == own


@pytest.mark.parametrize("text", ["data/runs/none", "/nowhere/none"])
def test_a_run_directory_that_is_not_there_is_told_with_where_it_was_looked_for(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match=f"run_dir='{text}': no such folder.*absolute path.* --cwd ") as told:
        parameters.find_run(text)
    assert (str(tmp_path) in str(told.value)) == (not text.startswith("/"))


def test_without_a_checkout_the_sample_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook_files, "clone", lambda: None)
    with pytest.raises(InvalidInput, match="the sample is part of a checkout"):
        parameters.find_run("")
