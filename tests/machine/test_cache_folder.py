import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from numa_lab.attention import kernel_cache, openmp_regions
from numa_lab.machine import cache_folder

CODE = b"machine code"


@pytest.fixture
def built(monkeypatch):
    """What was compiled, in place of compiling it."""
    specs = []
    monkeypatch.setattr(kernel_cache, "machine_code", lambda spec: specs.append(spec) or CODE)
    monkeypatch.setattr(kernel_cache, "_load", len)
    return specs


def homeless(monkeypatch):
    def unknown(_uid):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def address():
    return kernel_cache.address.__wrapped__(openmp_regions.TeamRegion())


def kept(tmp_path):
    return [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_without_a_home_kernels_stay_in_memory(monkeypatch, built, tmp_path):
    homeless(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert cache_folder.path() is None
    assert "no HOME" in cache_folder.unusable()
    assert address() == len(CODE)
    assert built == [openmp_regions.TeamRegion()]
    assert not kept(tmp_path), "a folder with the name ~ was made"


@pytest.mark.parametrize("place", ["a file", "under a file", "/proc/nowhere", "dangling"])
def test_a_folder_that_cannot_be_made_is_no_error(monkeypatch, built, tmp_path, place):
    (tmp_path / "a file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    places = {"under a file": tmp_path / "a file/below", "/proc/nowhere": Path(place)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(places.get(place, tmp_path / place)))
    assert address() == len(CODE)
    assert built == [openmp_regions.TeamRegion()]
    if place != "/proc/nowhere":  # where root may write, as far as access(2) knows
        assert cache_folder.unusable()


def test_what_is_kept_is_read_back(monkeypatch, built, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder.unusable() == ""
    assert [address(), address()] == [len(CODE)] * 2
    assert built == [openmp_regions.TeamRegion()]
    (stored,) = kept(tmp_path)
    about = os.stat(stored)
    monkeypatch.setattr(os, "fstat", lambda _fd: os.stat_result((*about[:4], about.st_uid + 1, *about[5:])))
    address()
    assert built == [openmp_regions.TeamRegion()] * 2, "machine code of another user was run"


@pytest.mark.parametrize("what", ["empty", "cut", "pipe", "folder"])
def test_a_damaged_one_is_made_anew(monkeypatch, built, tmp_path, what):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    address()
    (stored,) = kept(tmp_path)
    whole = stored.read_bytes()
    stored.unlink()
    if what == "pipe":  # nobody writes into it: who opens it to read would wait for ever
        os.mkfifo(stored)
    elif what == "folder":
        stored.mkdir()
    else:
        stored.write_bytes({"empty": b"", "cut": whole[:-1]}[what])
    assert address() == len(CODE)
    assert built == [openmp_regions.TeamRegion()] * 2
    assert what == "folder" or stored.read_bytes() == whole


def test_a_full_disk_leaves_nothing_behind(monkeypatch, built, tmp_path):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    assert address() == len(CODE)
    assert list((tmp_path / "numa_lab/kernels").iterdir()) == []


WITHOUT_HOME = """
import pwd
def getpwuid(_uid):
    raise KeyError
pwd.getpwuid = getpwuid
import torch
from numa_lab import get_optimal_numa_node
from numa_lab.attention.gqa import gqa_attention
query, key = torch.ones(1, 8, 1, 64), torch.ones(1, 2, 9, 64)
torch.testing.assert_close(gqa_attention(query, key, key, enable_gqa=True, backend="numba"), query)
get_optimal_numa_node()
"""


def test_attention_works_for_a_user_without_home_and_account(tmp_path):
    found = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_HOME], env=found, cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())
