"""The memory that tables live in, as far as the system's calls go; segments.py has the kinds that outlive a server.

Every kind is shared by several worker processes without a second copy: they are forked once the tables are loaded.
"""

import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import EngrampoolError

_MAP_HUGETLB = 0x40000
_MADV_POPULATE_WRITE = 23
_MLOCK_ONFAULT = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class OutOfMemoryError(EngrampoolError, MemoryError):
    """The system did not give the memory that a table needs."""


def allocate(nbytes: int, kind: str) -> npt.NDArray[np.uint8]:
    """Uint8 [nbytes], zeroed, page-aligned, of this process and its forks; freed with its last view.

    kind: "anon": transparent huge pages where the system gives them; "hugetlb": reserved huge pages.

    Raises OutOfMemoryError if the system refuses.
    """
    try:
        if kind == "hugetlb":
            size = -(-nbytes // huge_page_bytes()) * huge_page_bytes()
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB)
        else:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            advise_huge_pages(memory)
    except OSError as error:
        raise OutOfMemoryError(f"allocating {nbytes / 2**30:.1f} GiB of {kind} memory: {error}") from error
    return np.frombuffer(memory, np.uint8, nbytes)


def advise_huge_pages(memory: mmap.mmap) -> None:
    """Ask for transparent huge pages."""
    # A kernel without them says EINVAL; the table then lies in small pages.
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return


def can_populate() -> bool:
    """Whether the kernel knows `populate` (Linux 5.14)."""
    return not _LIBC.madvise(0, 0, _MADV_POPULATE_WRITE)


def populate(view: npt.NDArray[np.uint8]) -> None:
    """Give the pages that `view`, C-contiguous, lies in their memory; where `can_populate` is false, do nothing.

    Raises OutOfMemoryError where there is none left. Without this, a file system that is full would be a SIGBUS at the
    first write, and the end of the process.
    """
    start, length = _pages(view)
    if _LIBC.madvise(start, length, _MADV_POPULATE_WRITE) and ctypes.get_errno() != errno.EINVAL:
        # EFAULT: the first write would have been a SIGBUS.
        full = ctypes.get_errno() == errno.EFAULT
        why = "the file system that they lie in is full" if full else os.strerror(ctypes.get_errno())
        raise OutOfMemoryError(f"no memory is left for the tables: {why}")


def lock_pages(table: npt.NDArray[np.uint8], present: bool) -> None:
    """Keep `table` in RAM (mlock): all of it now if it is `present`, else each page from its first use on.

    Raises OutOfMemoryError if the system refuses.
    """
    start, length = _pages(table)
    if _LIBC.mlock(start, length) if present else _LIBC.mlock2(start, length, _MLOCK_ONFAULT):
        error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        raise OutOfMemoryError(f"locking {table.nbytes / 2**30:.1f} GiB of memory: {error}") from error


def protect(table: npt.NDArray[np.uint8], page_bytes: int = mmap.PAGESIZE) -> None:
    """Make the pages of `table` read-only, in this process and in forks to come: a stray write is a crash, not a row.

    table: one that `allocate` or a segment gave, from its first byte on.
    page_bytes: of its memory; a reserved huge page cannot be protected in part.
    """
    start, length = _pages(table, page_bytes)
    if _LIBC.mprotect(start, length, mmap.PROT_READ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    table.flags.writeable = False


def huge_page_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """The size of a reserved huge page; 2 MiB where the system does not say."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) * 1024
    return 2 << 20


def _pages(view: npt.NDArray[np.uint8], page_bytes: int = mmap.PAGESIZE) -> tuple[int, int]:
    """Address and length of the pages around `view`."""
    start = view.ctypes.data // page_bytes * page_bytes
    stop = -(-(view.ctypes.data + view.nbytes) // page_bytes) * page_bytes
    return start, stop - start
