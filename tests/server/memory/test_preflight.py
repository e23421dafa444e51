import resource
from dataclasses import replace

import pytest

from engrampool_proto.errors import EngrampoolError
from engrampool_server.memory.preflight import (
    Machine,
    Need,
    PreflightError,
    Room,
    check,
    format_bytes,
    raise_soft_limits,
)

MIB, GIB = 1 << 20, 1 << 30

# Nothing is short here; each test takes something away.
ROOMY = Machine(
    mem_available_bytes=100 * GIB,
    memory_room=None,
    shm_available_bytes=100 * GIB,
    huge_page_bytes=2 * MIB,
    huge_pages_total=51200,
    huge_pages_available=51200,
    huge_page_room=None,
    lock_limit_bytes=None,
    descriptor_limit=1024,
    transparent_huge_pages="madvise",
)
NEED = Need(table_bytes=10 * GIB, files=3, tables=2)
# Of the supervisor and of one worker, for tables of 10 GiB.
PAGE_TABLES = 40 * MIB
# Of the worker, and of four processes beside it.


def short(need, memory, lock_memory, machine):
    return {line.resource: line.short for line in check(need, memory, lock_memory, machine).lines if line.short}


def test_the_real_machine_is_compared():
    lines = check(NEED, "anon", False, Machine.read()).lines
    assert {"host memory", "file descriptors"} <= {line.resource for line in lines}


def test_what_is_not_known_is_no_limit_and_what_is_not_there_is_short():
    machine = Machine(None, None, 0, 2 * MIB, 0, 0, None, None, None, None)
    assert check(NEED, "anon", True, machine).ok
    assert short(NEED, "shm", False, machine) == {"/dev/shm": 10 * GIB}
    assert short(NEED, "hugetlb", False, machine) == {"reserved huge pages": 10 * GIB + 4 * MIB}


@pytest.mark.parametrize("memory", ["anon", "shm", "hugetlb"])
@pytest.mark.parametrize("lock_memory", [False, True])
def test_a_roomy_machine_suffices(memory, lock_memory):
    report = check(NEED, memory, lock_memory, ROOMY)
    assert report.ok
    assert report.warnings == ()
    report.raise_if_short()
    assert all(str(line).endswith(", ok") for line in report.lines)


@pytest.mark.parametrize(
    ("memory", "lock_memory", "field", "exactly", "resource_name", "remedy"),
    [
        ("anon", False, "mem_available_bytes", 10 * GIB + 512 * MIB + PAGE_TABLES, "host memory", "serve fewer tables"),
        ("shm", False, "mem_available_bytes", 10 * GIB + 512 * MIB + PAGE_TABLES, "host memory", "serve fewer tables"),
        ("hugetlb", False, "mem_available_bytes", 512 * MIB, "host memory", "serve fewer tables"),
        ("shm", False, "shm_available_bytes", 10 * GIB, "/dev/shm", "docker --shm-size=10g"),
        ("anon", True, "lock_limit_bytes", 10 * GIB, "locked memory", "ulimit -l unlimited"),
        ("anon", False, "descriptor_limit", 3 + 64 + 64, "file descriptors", "ulimit -n 131"),
    ],
)
def test_each_limit_refuses_at_one_less_than_needed(memory, lock_memory, field, exactly, resource_name, remedy):
    assert short(NEED, memory, lock_memory, replace(ROOMY, **{field: exactly})) == {}
    machine = replace(ROOMY, **{field: exactly - 1})
    assert short(NEED, memory, lock_memory, machine) == {resource_name: 1}
    with pytest.raises(PreflightError) as caught:
        check(NEED, memory, lock_memory, machine).raise_if_short()
    assert resource_name in str(caught.value)
    assert remedy in str(caught.value)
    assert isinstance(caught.value, EngrampoolError)


@pytest.mark.parametrize(
    ("memory", "needed"), [("anon", 10 * GIB + PAGE_TABLES), ("shm", 10 * GIB + PAGE_TABLES), ("hugetlb", 0)]
)
def test_a_group_limits_memory_but_not_huge_pages(memory, needed):
    machine = replace(ROOMY, memory_room=Room("/pod", needed + 512 * MIB))
    assert short(NEED, memory, False, machine) == {}
    machine = replace(ROOMY, memory_room=Room("/pod", needed + 412 * MIB))
    assert short(NEED, memory, False, machine) == {"memory of cgroup /pod": 100 * MIB}
    assert "resources.limits.memory" in str(check(NEED, memory, False, machine))


def test_reserved_huge_pages():
    # Two tables of 10 GiB together, each with a trailer, may end in two pages that are not full.
    machine = replace(ROOMY, huge_pages_total=6000, huge_pages_available=5122)
    assert short(NEED, "hugetlb", False, machine) == {}
    machine = replace(machine, huge_pages_available=5022)
    assert short(NEED, "hugetlb", False, machine) == {"reserved huge pages": 200 * MIB}
    assert "sysctl vm.nr_hugepages=6100" in str(check(NEED, "hugetlb", False, machine))


def test_huge_pages_of_a_group_are_a_limit_of_their_own():
    machine = replace(ROOMY, huge_page_room=Room("/pod", 9 * GIB))
    assert short(NEED, "hugetlb", False, machine) == {"huge pages of cgroup /pod": GIB + 4 * MIB}
    assert "hugepages-2Mi" in str(check(NEED, "hugetlb", False, machine))
    assert short(NEED, "anon", False, machine) == {}


def test_what_lies_in_segments_already_is_not_needed_again():
    machine = replace(ROOMY, mem_available_bytes=GIB, shm_available_bytes=0, huge_pages_available=0)
    present = replace(NEED, present_bytes=10 * GIB)
    assert short(present, "shm", False, machine) == {}
    assert short(present, "hugetlb", False, machine) == {}
    present = replace(NEED, present_bytes=9 * GIB)
    report = check(present, "shm", False, machine)
    assert {line.resource: line.short for line in report.lines if line.short} == {
        "host memory": 512 * MIB + PAGE_TABLES,
        "/dev/shm": GIB,
    }
    assert report.short_bytes == GIB


def test_a_directory_needs_space_and_memory_only_where_it_is_memory_or_locked():
    machine = replace(ROOMY, mem_available_bytes=GIB, directory_available_bytes=10 * GIB)
    assert short(NEED, "file:/mnt", False, machine) == {}
    for lock_memory, in_memory in ((True, False), (False, True)):
        tight = replace(machine, directory_in_memory=in_memory)
        assert short(NEED, "file:/mnt", lock_memory, tight) == {"host memory": 9 * GIB + 512 * MIB + PAGE_TABLES}
    report = check(NEED, "file:/mnt", False, replace(machine, directory_available_bytes=GIB))
    assert "table directory: 10.0 GiB needed, 1.0 GiB available, short by 9.0 GiB: free space in /mnt" in str(report)


def test_limits_of_other_kinds_of_memory_do_not_matter():
    machine = replace(ROOMY, shm_available_bytes=0, huge_pages_available=0, lock_limit_bytes=0)
    assert check(NEED, "anon", False, machine).ok


def test_answers_are_held_beside_the_tables():
    machine = replace(ROOMY, mem_available_bytes=12 * GIB)
    assert check(NEED, "anon", False, machine).ok
    assert short(replace(NEED, answer_bytes=2 * GIB), "anon", False, machine) == {
        "host memory": 512 * MIB + PAGE_TABLES
    }


def test_each_worker_needs_memory_page_tables_and_two_pipes():
    machine = replace(ROOMY, mem_available_bytes=10 * GIB, descriptor_limit=100)
    one, four = (short(replace(NEED, workers=workers), "anon", False, machine) for workers in (1, 4))
    assert four["host memory"] - one["host memory"] == 3 * (64 + 20) * MIB
    assert four["file descriptors"] - one["file descriptors"] == 6
    one, four = (
        short(replace(NEED, workers=n), "hugetlb", False, replace(machine, mem_available_bytes=0)) for n in (1, 4)
    )
    assert four["host memory"] - one["host memory"] == 3 * 64 * MIB


def test_the_error_names_every_resource_that_is_short():
    machine = replace(
        ROOMY,
        mem_available_bytes=4 * GIB,
        memory_room=Room("/pod", GIB),
        shm_available_bytes=64 * MIB,
        descriptor_limit=100,
    )
    report = check(NEED, "shm", True, machine)
    with pytest.raises(PreflightError) as caught:
        report.raise_if_short()
    for part in (
        "host memory: 10.6 GiB needed, 4.0 GiB available, short by 6.6 GiB: ",
        "memory of cgroup /pod: 10.6 GiB needed, 1.0 GiB available, short by 9.6 GiB: ",
        "/dev/shm: 10.0 GiB needed, 64.0 MiB available, short by 10.0 GiB: ",
        "file descriptors: 131 needed, 100 available, short by 31: ",
    ):
        assert part in str(caught.value)
        assert part in str(report)
    assert "locked memory: 10.0 GiB needed, no limit, ok" in str(report)
    assert "locked memory" not in str(caught.value)


@pytest.mark.parametrize(("memory", "warned"), [("anon", True), ("shm", False), ("hugetlb", False)])
def test_transparent_huge_pages_that_are_off_are_a_warning(memory, warned):
    report = check(NEED, memory, False, replace(ROOMY, transparent_huge_pages="never"))
    assert report.ok
    assert bool(report.warnings) == warned
    assert ("\nwarning: transparent huge pages are off" in str(report)) == warned


@pytest.mark.parametrize(
    ("size_bytes", "down", "up"),
    [
        (0, "0.0 MiB", "0.0 MiB"),
        (1, "0.0 MiB", "0.1 MiB"),
        (512 * MIB, "512.0 MiB", "512.0 MiB"),
        (GIB, "1.0 GiB", "1.0 GiB"),
        (GIB + 1, "1.0 GiB", "1.1 GiB"),
        (189 * GIB + GIB // 2, "189.5 GiB", "189.5 GiB"),
    ],
)
def test_format_bytes(size_bytes, down, up):
    assert format_bytes(size_bytes) == down
    assert format_bytes(size_bytes, up=True) == up


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (131, 4096, False),
        (130, 4096, True),
        (130, resource.RLIM_INFINITY, True),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, False),
        (100, 130, False),
    ],
)
def test_the_soft_limit_of_descriptors_is_raised_where_that_suffices(monkeypatch, soft, hard, raised):
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda *call: calls.append(call))
    raise_soft_limits(NEED, lock_memory=False)
    assert calls == ([(resource.RLIMIT_NOFILE, (hard, hard))] if raised else [])


def test_the_soft_limit_of_locked_memory_is_raised_only_to_lock(monkeypatch):
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 16, 1 << 40))
    monkeypatch.setattr(resource, "setrlimit", lambda *call: calls.append(call))
    raise_soft_limits(NEED, lock_memory=False)
    assert calls == []
    raise_soft_limits(NEED, lock_memory=True)
    assert calls == [(resource.RLIMIT_MEMLOCK, (1 << 40, 1 << 40))]


def test_limits_of_this_process_are_really_raised():
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = Need(0, files=soft - 128 if soft != resource.RLIM_INFINITY else 1000)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need.descriptors - 1, hard))
        raise_soft_limits(need, lock_memory=False)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_limit_on_address_space_is_compared_with_tables_and_answers():
    machine = replace(ROOMY, address_limit_bytes=12 * GIB, address_used_bytes=GIB)
    need = replace(NEED, answer_bytes=2 * GIB)
    assert short(NEED, "anon", False, machine) == {}
    for memory in ("anon", "shm", "hugetlb", "file:/mnt"):  # each maps them
        assert short(need, memory, False, replace(machine, directory_available_bytes=None)) == {
            "address space": GIB + 512 * MIB
        }
    assert "ulimit -v unlimited" in str(check(need, "anon", False, machine))
    assert "address space" not in str(check(need, "anon", False, ROOMY))
