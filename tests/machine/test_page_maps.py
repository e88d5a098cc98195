import pytest

from numa_lab.machine import page_maps
from numa_lab.machine.sysfs import Tree

NUMA_MAPS = """\
7f0000000000 bind:0 anon=512 dirty=512 N0=512 kernelpagesize_kB=4
7f0000400000 default
7f0000800000 default file=/anon_hugepage huge dirty=2 N1=2 kernelpagesize_kB=2048
"""

SMAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                4096 kB
AnonHugePages:      2048 kB
7f0000400000-7f0000600000 rw-p 00000000 00:00 0
Rss:                   0 kB
AnonHugePages:         0 kB
7f0000800000-7f0000c00000 rw-p 00000000 00:10 42          /anon_hugepage (deleted)
Rss:                   0 kB
Private_Hugetlb:    4096 kB
"""


def test_pages_are_counted_by_mapping_in_base_pages():
    assert page_maps.pages_per_node(0x7F0000000000, 0x7F0000200000, NUMA_MAPS) == {0: 512}
    assert page_maps.pages_per_node(0x7F0000000000, 0x7F0000900000, NUMA_MAPS) == {0: 512, 1: 1024}


def test_huge_pages_are_those_of_smaps():
    assert page_maps.huge_page_share(0x7F0000000000, 0x7F0000001000, SMAPS) == 0.5
    assert page_maps.huge_page_share(0x7F0000400000, 0x7F0000401000, SMAPS) == 0
    assert page_maps.huge_page_share(0x7F0000800000, 0x7F0000900000, SMAPS) == 1
    assert page_maps.huge_page_share(0x7F0000000000, 0x7F0000900000, SMAPS) == 0.75


def test_the_kernels_own_moves_are_counted():
    assert page_maps.kernel_moves() >= 0


@pytest.mark.parametrize(
    ("told", "words", "nodes"),
    [
        ("default", "default", ()),
        ("local", "local", ()),
        ("bind:0,2-3", "bind", (0, 2, 3)),
        ("bind=static|balancing:1", "bind", (1,)),
        ("prefer (many):0-1", "prefer (many)", (0, 1)),
        ("weighted interleave:0", "weighted interleave", (0,)),
    ],
)
def test_the_policy_of_a_thread_is_that_of_its_stack(told, words, nodes):
    assert page_maps.thread_policy(f"{NUMA_MAPS}7ffe00000000 {told} stack anon=3 N0=3\n") == (words, nodes)
    assert page_maps.thread_policy("") == ("default", ())


@pytest.mark.parametrize(
    ("told", "page_bytes", "expected"),
    [
        ({"hpage_pmd_size": "2097152\n"}, 4096, 2 << 20),
        ({"hpage_pmd_size": "536870912\n"}, 65536, 512 << 20),
        ({"enabled": "always [madvise] never\n"}, 16384, 32 << 20),  # before Linux 4.11
        ({}, 4096, 0),
        (None, 4096, 2 << 20),  # no sysfs: who asks is told by madvise
    ],
)
def test_the_size_of_huge_pages_is_the_kernels(tmp_path, told, page_bytes, expected):
    if told is not None:
        folder = tmp_path / page_maps.HUGE_PAGES
        (folder if told else folder.parent).mkdir(parents=True)
        for name, text in told.items():
            (folder / name).write_text(text)
    assert page_maps.huge_page_bytes(Tree(tmp_path), page_bytes) == expected
