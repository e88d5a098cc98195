import pytest

from numa_lab.errors import InvalidInput
from numa_lab.experiments import notebook_files


def test_a_notebook_is_found_by_name_and_an_own_copy_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = notebook_files.find("01_machine")
    assert theirs.parent == notebook_files.folder()
    assert notebook_files.find(theirs) == theirs
    notebook_files.copy(tmp_path / "notebooks")
    assert notebook_files.find("01_machine.ipynb") == tmp_path / "notebooks" / "01_machine.ipynb"


def test_a_notebook_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(InvalidInput, match=r"08_nowhere: no such file.* 01_machine, .*07_optimization_guide"):
        notebook_files.find("08_nowhere")


def test_copies_are_completed_and_changed_ones_never_overwritten(tmp_path):
    names = sorted(path.name for path in notebook_files.folder().glob("*.ipynb"))
    assert [path.name for path in notebook_files.copy(tmp_path / "own")] == names
    (tmp_path / "own" / names[0]).unlink()
    assert notebook_files.copy(tmp_path / "own") == [tmp_path / "own" / names[0]]
    (tmp_path / "own" / names[1]).write_text("changed")
    (tmp_path / "own" / names[0]).unlink()
    with pytest.raises(InvalidInput, match=f"other versions of {names[1]}, .*nothing was written"):
        notebook_files.copy(tmp_path / "own")
    assert not (tmp_path / "own" / names[0]).exists()
    assert (tmp_path / "own" / names[1]).read_text() == "changed"
