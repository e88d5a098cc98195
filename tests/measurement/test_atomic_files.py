from pathlib import Path

import pytest

from numa_lab.errors import RunDirectoryError
from numa_lab.measurement import atomic_files


def test_a_folder_that_can_not_be_written_and_a_full_disk_are_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="can't be written"):
        atomic_files.write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(RunDirectoryError, match="No space left"), atomic_files.atomic_file(tmp_path / "y.json"):
        Path("/dev/full").write_text("x" * 10000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
