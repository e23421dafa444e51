"""The memory that tables live in.

Every kind can later be shared by several worker processes without a second copy: anonymous and hugetlb memory by fork
(private pages stay shared while nobody writes), a /dev/shm file by its descriptor as well.
"""

import ctypes
import mmap
import os
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import EngrampoolError

_MAP_HUGETLB = 0x40000
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class OutOfMemoryError(EngrampoolError, MemoryError):
    """The system did not give the memory that a table needs."""


def allocate(nbytes: int, kind: str, lock: bool = False) -> npt.NDArray[np.uint8]:
    """Uint8 [nbytes], zeroed, page-aligned; freed with its last view.

    kind: "anon": private memory, transparent huge pages where the system gives them; "shm": a file in /dev/shm that has
        no name any more, so that nothing is left behind however the process ends; "hugetlb": reserved huge pages.
    lock: keep it in RAM (mlock).

    Raises OutOfMemoryError if the system refuses.
    """
    try:
        if kind == "shm":
            memory = _map_shm(nbytes)
        elif kind == "hugetlb":
            size = -(-nbytes // huge_page_bytes()) * huge_page_bytes()
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB)
        else:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _advise_huge_pages(memory)
        table = np.frombuffer(memory, np.uint8, nbytes)
        if lock and _LIBC.mlock(table.ctypes.data, nbytes):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        doing = "locking" if lock else "allocating"
        raise OutOfMemoryError(f"{doing} {nbytes / 2**30:.1f} GiB of {kind} memory: {error}") from error
    return table


def huge_page_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """The size of a reserved huge page; 2 MiB where the system does not say."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) * 1024
    return 2 << 20


def _map_shm(nbytes: int) -> mmap.mmap:
    path = Path("/dev/shm") / f"engrampool-{os.getpid()}-{secrets.token_hex(4)}"  # noqa: S108
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()
        # Reserve every page now: a full /dev/shm is an error here, and would be a SIGBUS at first touch.
        os.posix_fallocate(descriptor, 0, nbytes)
        memory = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED)
    finally:
        os.close(descriptor)
    _advise_huge_pages(memory)
    return memory


def _advise_huge_pages(memory: mmap.mmap) -> None:
    # A kernel without transparent huge pages says EINVAL; the table then lies in small pages.
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return
