import pytest

from numa_lab.errors import NodeUnavailable
from numa_lab.machine import free_memory
from numa_lab.machine.control_groups import ControlGroups, MemoryLimit
from numa_lab.machine.sysfs import Tree
from numa_lab.machine.topology_reader import read_topology

MIB = 1 << 20
NONE = str(0x7FFFFFFFFFFFF000)
NONE_OF_64K_PAGES = str(0x7FFFFFFFFFFF0000)
GROUP, MOUNTS = "proc/self/cgroup", "proc/self/mountinfo"
MOUNT_2 = "30 23 0:26 {root} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_1 = "35 31 0:32 {root} {point} rw,relatime - cgroup cgroup rw,memory\n"


@pytest.fixture
def limits(tmp_path):
    def read(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}\n")
        found = ControlGroups(Tree(tmp_path)).memory_limits()
        return [(one.file, one.limit_bytes // MIB, one.available_bytes // MIB, one.throttles) for one in found]

    return read


def group(folder, version=2, used=0, cached=0, **limits):
    names = {
        2: ("memory.current", "inactive_file"),
        1: ("memory.usage_in_bytes", "inactive_file 0\ntotal_inactive_file"),
    }
    files = {names[version][0]: used * MIB, "memory.stat": f"anon 7\n{names[version][1]} {cached * MIB}"}
    told = {name: amount if isinstance(amount, str) else amount * MIB for name, amount in limits.items()}
    return {f"{folder}/{name}": text for name, text in (files | {f"memory.{n}": t for n, t in told.items()}).items()}


def test_every_level_of_version_2_counts_and_file_cache_is_left(limits):
    files = {GROUP: "0::/pod/box", MOUNTS: MOUNT_2.format(root="/", point="/sys/fs/cgroup")}
    files |= group("sys/fs/cgroup/pod/box", used=700, cached=200, max=1000, high="max")
    files |= group("sys/fs/cgroup/pod", used=1900, cached=300, max="max", high=1800)
    found = limits(files | group("sys/fs/cgroup", used=5000))
    assert found == [
        ("/sys/fs/cgroup/pod/box/memory.max", 1000, 500, False),
        ("/sys/fs/cgroup/pod/memory.high", 1800, 200, True),
    ]


def test_a_namespaced_container_sees_its_own_group_as_the_root(limits):
    files = {GROUP: "0::/"} | group("sys/fs/cgroup", used=100, max=4096)
    assert limits(files) == [("/sys/fs/cgroup/memory.max", 4096, 3996, False)]
    mounted = MOUNT_2.format(root="/../..", point="/sys/fs/cgroup")  # as a process sees it that was moved out
    assert limits(files | {MOUNTS: mounted, GROUP: "0::/../.."}) == [("/sys/fs/cgroup/memory.max", 4096, 3996, False)]


def test_version_1_is_read_where_it_is_mounted(limits):
    files = {GROUP: "4:memory:/docker/x/inner\n1:name=systemd:/\n0::/"}
    files[MOUNTS] = MOUNT_1.format(root="/docker/y", point="/elsewhere") + MOUNT_1.format(
        root="/docker/x", point="/my\\040groups/memory"
    )
    files |= group("my groups/memory/inner", 1, used=800, cached=100, limit_in_bytes=NONE)
    files |= group("my groups/memory", 1, used=900, cached=100, limit_in_bytes=1000)
    files |= group("elsewhere", 1, limit_in_bytes=1)
    assert limits(files) == [("/my groups/memory/memory.limit_in_bytes", 1000, 200, False)]
    files["my groups/memory/memory.use_hierarchy"] = "0"
    assert limits(files) == [], "then only processes of that very group count there"


def test_version_1_tells_a_limit_of_levels_that_a_container_does_not_see(limits):
    files = {GROUP: "4:cpu,memory:/pod/box"} | group(
        "sys/fs/cgroup/memory", 1, used=300, cached=100, limit_in_bytes=NONE_OF_64K_PAGES
    )
    files["sys/fs/cgroup/memory/memory.stat"] += f"\nhierarchical_memory_limit {1000 * MIB}"
    files |= {f"sys/fs/cgroup/memory/pod/box/{name}": text for name, text in group("x", 1).items()}
    inner = "sys/fs/cgroup/memory/pod/box/memory.stat"
    files["sys/fs/cgroup/memory/pod/box/memory.limit_in_bytes"] = NONE_OF_64K_PAGES
    assert limits(files) == []
    assert limits(files | {inner: f"hierarchical_memory_limit {1000 * MIB}"}) == [(f"/{inner}", 1000, 1000, False)]
    assert limits(files | {inner: f"hierarchical_memory_limit {NONE}"}) == []


def test_what_has_no_limit_is_not_limited(limits):
    assert limits({GROUP: "0::/pod"} | group("sys/fs/cgroup/pod", used=5, max="max", high="max")) == []
    assert limits({GROUP: ""}) == []


def test_no_more_is_available_than_a_group_leaves(four_nodes):
    limits = (
        MemoryLimit("/a/memory.max", 900 * MIB, 700 * MIB),
        MemoryLimit("/memory.high", 800 * MIB, 750 * MIB, True),
    )
    object.__setattr__(four_nodes, "memory_limits", limits)
    assert four_nodes.capacity_bytes([0, 1]) == 800 * MIB
    assert four_nodes.available_bytes([0, 1]) == four_nodes.free_bytes([0]) == 700 * MIB
    assert four_nodes.available_bytes([0], sharers=2) == 350 * MIB
    object.__setattr__(four_nodes, "memory_limits", ())
    assert four_nodes.capacity_bytes([0, 1]) == four_nodes.available_bytes([0, 1]) == 2 << 30


@pytest.mark.parametrize(
    ("name", "beyond"), [("memory.max", "the kernel kills"), ("memory.high", "the kernel slows this process down")]
)
def test_memory_beyond_a_limit_is_refused_with_its_file(monkeypatch, limits, tmp_path, name, beyond):
    limits({GROUP: "0::/"} | group("sys/fs/cgroup", used=100, **{name.removeprefix("memory."): 1000}))
    monkeypatch.setattr(free_memory, "_GROUPS", ControlGroups(Tree(tmp_path)))
    node = read_topology().allowed_nodes[0]
    free_memory.require(900 * MIB, {node: 1})
    free_memory.require_where_bound(900 * MIB)
    told = rf"/sys/fs/cgroup/{name} limits this process to 1,000 MiB, of which 900 MiB are left \(beyond it {beyond}"
    with pytest.raises(NodeUnavailable, match=rf"{told}.* and 901 MiB were asked for: take a smaller shape"):
        free_memory.require(901 * MIB, {node: 1})
    with pytest.raises(NodeUnavailable, match=told):
        free_memory.require_where_bound(901 * MIB)
