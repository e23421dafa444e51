import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_server.machine import Machine, Room, usable_cores

MIB, GIB = 1 << 20, 1 << 30
UNLIMITED_V1 = 9223372036854771712

MEMINFO = """\
MemTotal:       67108864 kB
MemFree:         1048576 kB
MemAvailable:   33554432 kB
HugePages_Total:    1024
HugePages_Free:      800
HugePages_Rsvd:      300
HugePages_Surp:        0
Hugepagesize:       2048 kB
"""
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max open files            1024                 524288               files
Max locked memory         65536                8388608              bytes
"""
NO_CAPABILITIES = "Name:\tserve\nCapEff:\t0000000000000000\n"
# Bit 14, CAP_IPC_LOCK, alone.
LOCK_CAPABILITY = "Name:\tserve\nCapEff:\t0000000000004000\n"


@pytest.fixture
def root(tmp_path):
    """A machine without control groups, of which a test writes more."""
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/limits": LIMITS, "proc/self/status": NO_CAPABILITIES})
    return tmp_path


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(str(text))


def v2(limit, use=0, inactive_file=0):
    return {"memory.max": limit, "memory.current": use, "memory.stat": f"anon 7\ninactive_file {inactive_file}\nslab 1"}


def v1(limit, use=0, inactive_file=0):
    # The group's own figure, without its children's, must not be taken for the total.
    stat = f"inactive_file 0\ntotal_inactive_file {inactive_file}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": use, "memory.stat": stat}


def group(root, path, files):
    write(root / "sys/fs/cgroup" / path, files)


def test_the_real_machine_reads():
    machine = Machine.read()
    assert machine.mem_available_bytes > 0
    assert machine.descriptor_limit > 0
    assert machine.huge_page_bytes >= MIB


def test_meminfo_and_limits(root):
    machine = Machine.read(root)
    assert machine.mem_available_bytes == 32 * GIB
    assert (machine.huge_page_bytes, machine.huge_pages_total) == (2 * MIB, 1024)
    # Pages promised to a mapping are still counted as free.
    assert machine.huge_pages_available == 500
    assert machine.descriptor_limit == 524288
    assert machine.lock_limit_bytes == 8388608
    assert machine.memory_room is None
    assert machine.huge_page_room is None


def test_unlimited_limits(root):
    write(root, {"proc/self/limits": "Max locked memory         8388608              unlimited            bytes"})
    machine = Machine.read(root)
    assert machine.lock_limit_bytes is None
    assert machine.descriptor_limit is None


@pytest.mark.parametrize(
    ("status", "uid_map", "limit"),
    [
        (NO_CAPABILITIES, "0 0 4294967295", 8388608),
        (LOCK_CAPABILITY, "         0          0 4294967295\n", None),
        # A rootless container's capability means nothing to mlock.
        (LOCK_CAPABILITY, "0 1000 1", 8388608),
    ],
)
def test_who_may_lock_without_limit(root, status, uid_map, limit):
    write(root, {"proc/self/status": status, "proc/self/uid_map": uid_map})
    assert Machine.read(root).lock_limit_bytes == limit


@pytest.mark.parametrize(
    ("files", "room"),
    [
        (v2(8 * GIB, 3 * GIB), 5 * GIB),
        (v2(8 * GIB, 3 * GIB, inactive_file=GIB), 6 * GIB),
        (v2(2 * GIB, 3 * GIB), 0),
        (v2("max", 3 * GIB), None),
        ({"memory.max": 8 * GIB}, 8 * GIB),
        ({"memory.current": 8 * GIB}, None),
        ({}, None),
    ],
)
def test_a_group_of_version_2(root, files, room):
    write(root, {"proc/self/cgroup": "0::/pod/server\n"})
    group(root, "pod/server", files)
    assert Machine.read(root).memory_room == (None if room is None else Room("/pod/server", room))


@pytest.mark.parametrize(
    ("files", "room"),
    [
        (v1(8 * GIB, 3 * GIB), 5 * GIB),
        (v1(8 * GIB, 3 * GIB, inactive_file=GIB), 6 * GIB),
        (v1(UNLIMITED_V1, 3 * GIB), None),
    ],
)
def test_a_group_of_version_1(root, files, room):
    write(root, {"proc/self/cgroup": "5:cpu,cpuacct:/other\n4:memory:/docker/a\n0::/\n"})
    group(root, "memory/docker/a", files)
    group(root, "memory/other", v1(MIB))
    assert Machine.read(root).memory_room == (None if room is None else Room("/docker/a", room))


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)) | st.just(("max", 0)), min_size=1, max_size=4))
def test_the_tightest_ancestor_counts(tmp_path_factory, levels):
    root = tmp_path_factory.mktemp("root")
    path = ""
    for number, (limit, use) in enumerate(levels):
        group(root, path.lstrip("/"), v2(limit, use))
        if number < len(levels) - 1:
            path += f"/{number}"
    write(root, {"proc/self/cgroup": f"0::{path or '/'}\n"})
    rooms = [max(0, limit - use) for limit, use in levels if limit != "max"]
    found = Machine.read(root).memory_room
    assert (found.available_bytes if found else None) == min(rooms, default=None)


def test_the_tightest_ancestor_is_named(root):
    write(root, {"proc/self/cgroup": "0::/kubepods/pod/server\n"})
    group(root, "kubepods", v2(64 * GIB, 40 * GIB))
    group(root, "kubepods/pod", v2(16 * GIB, 4 * GIB))
    group(root, "kubepods/pod/server", v2("max", 4 * GIB))
    assert Machine.read(root).memory_room == Room("/kubepods/pod", 12 * GIB)


@pytest.mark.parametrize(
    ("cgroup", "mount", "files"),
    [
        # The container's own group is mounted as the root, and its path is still the host's.
        ("4:memory:/docker/a\n", "memory", v1(8 * GIB)),
        ("0::/../../system.slice\n", "", v2(8 * GIB)),
        ("0::/\n", "", v2(8 * GIB)),
    ],
)
def test_a_group_mounted_as_the_root(root, cgroup, mount, files):
    write(root, {"proc/self/cgroup": cgroup})
    group(root, mount, files)
    # A path that leads out of the mount must not be followed there.
    group(root, "../../system.slice", v2(GIB))
    assert Machine.read(root).memory_room == Room("/", 8 * GIB)


def test_both_versions_at_once(root):
    write(root, {"proc/self/cgroup": "4:memory:/a\n0::/b\n"})
    group(root, "memory/a", v1(9 * GIB))
    group(root, "b", v2(8 * GIB))
    assert Machine.read(root).memory_room == Room("/b", 8 * GIB)


@pytest.mark.parametrize(
    ("page_kib", "cgroup", "path", "files"),
    [
        (2048, "0::/a\n", "a", {"hugetlb.2MB.max": 8 * GIB, "hugetlb.2MB.current": GIB, "hugetlb.1GB.max": 0}),
        (1048576, "0::/a\n", "a", {"hugetlb.1GB.max": 8 * GIB, "hugetlb.1GB.current": GIB, "hugetlb.2MB.max": 0}),
        (
            2048,
            "3:hugetlb:/a\n",
            "hugetlb/a",
            {"hugetlb.2MB.limit_in_bytes": 8 * GIB, "hugetlb.2MB.usage_in_bytes": GIB},
        ),
    ],
)
def test_huge_pages_of_a_group(root, page_kib, cgroup, path, files):
    write(root, {"proc/self/cgroup": cgroup, "proc/meminfo": f"Hugepagesize: {page_kib} kB\n"})
    group(root, path, files)
    assert Machine.read(root).huge_page_room == Room("/a", 7 * GIB)


def test_a_machine_of_which_nothing_can_be_read(tmp_path):
    machine = Machine.read(tmp_path)
    assert machine == Machine(None, None, 0, 2 * MIB, 0, 0, None, None, None, None)


def test_files_with_nonsense_in_them_count_as_no_limit(root):
    write(root, {"proc/meminfo": "\n:\nMemAvailable\n", "proc/self/cgroup": "\n0:\n0::/a\n", "proc/self/status": "x"})
    group(root, "a", {"memory.max": "12 apples", "memory.stat": "\n\n"})
    (root / "proc/self/limits").write_bytes(b"\xff\nMax open files\n")
    machine = Machine.read(root)
    assert (machine.mem_available_bytes, machine.memory_room, machine.descriptor_limit) == (None, None, None)


@pytest.mark.parametrize(("blocks", "available"), [(1000, 300 * 4096), (0, None)])
def test_free_space_of_dev_shm(root, monkeypatch, blocks, available):
    def statvfs(path):
        assert path == root / "dev/shm"
        return os.statvfs_result((1 << 20, 4096, blocks, 400, 300, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert Machine.read(root).shm_available_bytes == available


def test_the_mode_of_transparent_huge_pages(root):
    write(root, {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"})
    assert Machine.read(root).transparent_huge_pages == "never"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/pod/server\n", {"pod/cpu.max": "max 100000\n"}, 8),
        ("0::/pod/server\n", {"pod/cpu.max": "300000 100000\n", "pod/server/cpu.max": "max 100000\n"}, 3),
        ("0::/pod/server\n", {"pod/server/cpu.max": "150000 100000\n"}, 2),
        ("0::/pod/server\n", {"pod/server/cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("0::/a\n", {"a/cpu.max": "what\n"}, 8),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 8),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "50000\n"}, 5),
        ("", {}, 8),
    ],
)
def test_cores_that_may_be_used(root, monkeypatch, cgroup, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write(root, {"proc/self/cgroup": cgroup})
    write(root / "sys/fs/cgroup", files)
    assert usable_cores(root) == cores
