import errno
import os
import resource
import subprocess
import sys

import pytest
import torch

from numa_lab.errors import LimitReached
from numa_lab.machine import open_files
from numa_lab.machine.sysfs import Tree
from numa_lab.nodes import shared_memory
from numa_lab.nodes.process_pool import NUMAProcessPool

MIB = 1 << 20


@pytest.fixture
def small(monkeypatch):
    """A /dev/shm of which 64 MiB are free, as in a container."""
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((4096, 4096, *[16384] * 8, 255)))


@pytest.fixture
def few_files():
    """A limit that leaves no more than three open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = sorted(set(range(before[0])) - set(map(int, os.listdir("/proc/self/fd"))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[3], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("small")
def test_what_finds_no_room_is_refused_with_the_numbers_and_the_fix():
    shared_memory.require(64 * MIB, 1)
    whole = torch.empty(65 * MIB, dtype=torch.uint8)
    for value in (whole[:9], [1, (whole,)], {"key": [whole]}):  # all of a storage is shared
        with pytest.raises(LimitReached, match=r"65 MiB .* needed, and /dev/shm has 64 MiB free: .*--shm-size=1g"):
            shared_memory.require_for(value)
    shared_memory.require_for([whole[:9].clone()] * 2, "text", None, torch.empty(9, device="meta"))


def test_without_any_shared_memory_it_is_refused_too(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "none")
    with pytest.raises(LimitReached, match="can't be written: start the container"):
        shared_memory.require(1, 1)
    with pytest.raises(LimitReached, match="can't be written"):
        NUMAProcessPool()


@pytest.mark.usefixtures("few_files")
def test_too_many_open_files_are_told_with_the_limit():
    with pytest.raises(LimitReached, match=r"9 shared tensors needs 9 open files .*ulimit -n \d+"):
        shared_memory.require(9, 9)
    opened = []
    try:
        with (
            pytest.raises(LimitReached, match=r"a pipe: Too many open files\. .*ulimit -n \d+"),
            open_files.explained("a pipe"),
        ):
            while True:
                opened.append(os.eventfd(0))
        with pytest.raises(LimitReached, match="ulimit -n"):
            open_files.require(0, "a process")
        with pytest.raises(LimitReached, match="can't be read: Too many open files"):
            Tree(shared_memory.FOLDER).text("missing")
    finally:
        for number in opened:
            os.close(number)


def test_other_errors_stay_what_they_are():
    with pytest.raises(FileNotFoundError), open_files.explained("nothing"):
        os.stat("/nowhere")
    with pytest.raises(LimitReached, match=r"fs\.file-max"), open_files.explained("a file"):
        raise OSError(errno.ENFILE, "")
    with pytest.raises(RuntimeError, match="other"), shared_memory.clear_errors():
        raise RuntimeError("other")


IN_A_SMALL_CONTAINER = """
import resource
import torch
from numa_lab.errors import LimitReached
from numa_lab.nodes.process_pool import NUMAProcessPool

def large():
    return torch.ones(64 << 20, dtype=torch.uint8)

def main():
    for call in (
        lambda: pool.empty((64 << 20,), torch.uint8, node),
        lambda: pool.scatter([large()]),
        lambda: pool.submit(torch.sum, large()),
        lambda: pool.submit(torch.ones, 64 << 20, dtype=torch.uint8).result(),
    ):
        with NUMAProcessPool() as pool:
            node = pool.nodes[0]
            try:
                call()
            except LimitReached as error:
                print(error)
            assert pool.submit(torch.ones, 9).result().sum() == 9

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small /dev/shm needs root")
def test_a_container_with_a_small_shared_memory_kills_nobody(tmp_path):
    (tmp_path / "program.py").write_text(IN_A_SMALL_CONTAINER)
    script = 'mount -t tmpfs -o size=32m tmpfs /dev/shm && exec "$0" "$1"'
    command = ["unshare", "--mount", "sh", "-c", script, sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    if "unshare failed" in done.stderr:
        pytest.skip(f"this container makes no mount namespaces: {done.stderr}")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == 4, done.stderr
    for line in told:
        assert "/dev/shm has " in line
        assert "--shm-size" in line


@pytest.mark.usefixtures("few_files")
def test_a_pool_says_that_it_needs_more_open_files():
    with pytest.raises(LimitReached, match=r"a process on node \d+ needs 16 open files"):
        NUMAProcessPool()
