"""The memory that tables live in, as the kernel shows it."""

import gc
import mmap
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engrampool_server.memory.memory import OutOfMemoryError, allocate, huge_page_bytes

MIB = 1 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def free_huge_pages() -> int:
    found = re.search(r"^HugePages_Free: +(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


KINDS = [
    "anon",
    pytest.param(
        "hugetlb",
        marks=pytest.mark.skipif(
            free_huge_pages() < 2, reason="no huge pages are reserved; `sysctl vm.nr_hugepages=32` does"
        ),
    ),
]


def mapping_of(address: int) -> dict[str, int]:
    """Fields of the mapping around `address` in /proc/self/smaps, in bytes; empty if nothing is mapped there."""
    inside: dict[str, int] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            if inside is not None:
                return inside
            start, stop = (int(part, 16) for part in bounds.groups())
            inside = {} if start <= address < stop else None
        elif inside is not None and line.endswith(" kB"):
            name, value, _ = line.split()
            inside[name.rstrip(":")] = int(value) * 1024
    return inside or {}


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nbytes", [1, mmap.PAGESIZE, 3 * MIB + 5])
def test_memory_is_zeroed_aligned_writable_and_as_long_as_asked(kind, nbytes):
    table = allocate(nbytes, kind)
    assert (table.dtype, table.shape) == (np.uint8, (nbytes,))
    assert table.ctypes.data % mmap.PAGESIZE == 0
    assert not table.any()
    table[:] = 7
    assert table.sum(dtype=np.int64) == 7 * nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_two_allocations_do_not_share_memory(kind):
    one, other = allocate(MIB, kind), allocate(MIB, kind)
    one[:] = 1
    assert not other.any()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_goes_with_its_last_view_and_leaves_nothing_behind(kind):
    descriptors = open_descriptors()
    table = allocate(64 * MIB, kind)
    view = table[5:].reshape(-1, 1)
    address = table.ctypes.data
    del table
    gc.collect()
    assert mapping_of(address)["Size"] >= 64 * MIB
    view[:] = 1
    del view
    gc.collect()
    assert mapping_of(address).get("Size", 0) < 64 * MIB
    assert open_descriptors() <= descriptors


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_to_protected_memory_ends_the_process(kind):
    program = (
        "import ctypes, mmap, sys; from engrampool_server.memory.memory import *\n"
        f"table = allocate(5000, {kind!r}); table[:] = 7\n"
        f"protect(table, huge_page_bytes() if {kind!r} == 'hugetlb' else mmap.PAGESIZE)\n"
        "print(table.sum(), table.flags.writeable, flush=True)\n"
        "ctypes.memset(table.ctypes.data + int(sys.argv[1]), 1, 1)"
    )
    for at in ("0", "4999"):
        done = subprocess.run([sys.executable, "-c", program, at], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "35000 False\n"), done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_too_much_is_an_error_that_says_how_much_of_what(kind):
    with pytest.raises(OutOfMemoryError, match=rf"allocating 1073741824\.0 GiB of {kind} memory") as caught:
        allocate(1 << 60, kind)
    assert isinstance(caught.value, MemoryError)


@pytest.mark.skipif(free_huge_pages() > 0, reason="huge pages are reserved here")
def test_no_reserved_huge_pages_is_an_error_too():
    with pytest.raises(OutOfMemoryError, match=r"of hugetlb memory"):
        allocate(MIB, "hugetlb")


def test_locked_memory_stays_and_a_refused_lock_is_an_error():
    """In a process of its own, whose limit is 1 MiB; bounds apply where CAP_IPC_LOCK is dropped."""
    program = (
        "import resource; from engrampool_server.memory.memory import *\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))\n"
        "for present in (True, False):\n"
        "    table = allocate(1 << 19, 'anon'); lock_pages(table, present)\n"
        "    print(next(line for line in open('/proc/self/status') if line.startswith('VmLck')).split()[1])\n"
        "    del table\n"
        "try: lock_pages(allocate(1 << 22, 'anon'), True)\n"
        "except OutOfMemoryError as error: print(error)\n"
    )
    launcher = (
        "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)\n"  # PR_CAPBSET_DROP, CAP_IPC_LOCK
        "os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", launcher, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *locked, refused = done.stdout.splitlines()
    assert locked == ["512", "512"]
    assert refused.startswith("locking 0.0 GiB of memory: [Errno")


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="transparent huge pages are off on this machine"
)
def test_anon_memory_lies_in_transparent_huge_pages():
    table = allocate(16 * MIB, "anon")
    table[:] = 1
    assert mapping_of(table.ctypes.data)["AnonHugePages"] >= 8 * MIB


def test_the_size_of_a_huge_page_is_the_systems(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 5 kB\nHugepagesize:    1048576 kB\n")
    assert huge_page_bytes(path) == 1 << 30
    path.write_text("MemTotal: 5 kB\n")
    assert huge_page_bytes(path) == 2 * MIB
