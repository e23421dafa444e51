"""Tables in named segments of memory, which outlive the server that loaded them: the next start adopts them.

A segment is one file in /dev/shm, in a hugetlbfs or in any directory: the rows of one table, all or a shard's, and a
trailer that says what they are (engrampool_proto/segment.py), written when every block was verified and is stored.
Without that it is partial, and nobody adopts it.

Whoever uses a segment holds a lock on it (flock, shared; exclusive while it is made or freed), on a descriptor that
forks inherit. So the kernel itself lets go of it with the last process of a server, however that ended. A lock counts
only while the path still names the file that was locked.
"""

import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.segment import TRAILER_BYTES, Identity, read_trailer, write_trailer
from engrampool_server.machine import in_memory
from engrampool_server.memory.memory import (
    OutOfMemoryError,
    advise_huge_pages,
    can_populate,
    huge_page_bytes,
    populate,
    protect,
)
from engrampool_server.telemetry import log

# Of a whole segment, by the setting `attach`. Only its owner writes to one, whoever may read it.
MODES = {"off": 0o600, "user": 0o600, "group": 0o640, "all": 0o644}
_SHM = Path("/dev/shm")  # noqa: S108
# How often a damaged segment is asked for before we believe that a server uses it, and not another start that looks.
_PATIENCE = 20


class SegmentError(EngrampoolError):
    """A segment cannot be made, or must not be used; the text names it and what to do."""


@dataclass(frozen=True)
class Backing:
    """Where segments lie, and how.

    page_bytes: sizes are multiples of it. reserve: space is taken before rows are written, since they are to lie on a
    disk. mode: the permissions of a whole segment; until then only its owner may read it.
    """

    directory: Path
    page_bytes: int = mmap.PAGESIZE
    reserve: bool = False
    mode: int = MODES["off"]


@dataclass(frozen=True)
class Place:
    """Where a whole segment can be mapped by others. in_memory: to touch all of it reads no disk."""

    path: Path
    device: int
    inode: int
    nbytes: int
    in_memory: bool


@dataclass(frozen=True)
class Found:
    """A segment that lies somewhere. identity: None while it is partial. nbytes: what it takes."""

    path: Path
    identity: Identity | None
    nbytes: int
    in_use: bool
    modified_ns: int


def file_name(identity: Identity) -> str:
    """Of this user's segment."""
    return f"{_prefix()}{identity.version[:16]}-{identity.layer}-{identity.row_start}-{identity.row_stop}"


def find_backing(memory: str, mounts: Path = Path("/proc/mounts"), attach: str = "off") -> Backing | None:
    """Where segments of the setting `memory` lie; None where it has none: "anon", "hugetlb" without a hugetlbfs.

    attach: the setting, which says who may read them.
    Raises SegmentError for a directory that is not there.
    """
    mode = MODES[attach]
    if memory == "shm":
        return Backing(_SHM, mode=mode)
    if memory == "hugetlb":
        size = huge_page_bytes()
        option = f"pagesize={size >> 30}G" if size >= 1 << 30 else f"pagesize={size >> 20}M"
        for line in mounts.read_text().splitlines():
            _, where, kind, options, *_ = line.split()
            directory = Path(where.encode().decode("unicode_escape"))  # a space is \040 there
            if kind == "hugetlbfs" and option in options.split(",") and os.access(directory, os.W_OK | os.X_OK):
                return Backing(directory, size, mode=mode)
        return None
    if memory.startswith("file:"):
        directory = Path(memory.removeprefix("file:"))
        if not directory.is_dir():
            raise SegmentError(f"{directory}, where tables are to lie (memory), is no directory; create it")
        return Backing(directory, reserve=not in_memory(directory), mode=mode)
    return None


def check_writable(backing: Backing, memory: str) -> None:
    """Raise SegmentError, which names the setting `memory`, where no segment can be made."""
    if backing.directory.is_dir() and not os.access(backing.directory, os.W_OK | os.X_OK):
        read_only = os.statvfs(backing.directory).f_flag & os.ST_RDONLY
        why = "read-only" if read_only else f"not writable for user {os.geteuid()}"
        raise SegmentError(
            f"{backing.directory}, where tables are to lie (memory = {memory!r}), is {why}: mount it writable, or give "
            "memory another place, such as anon"
        )


class Segment:
    """A segment in use by this process, and by its forks. adopted: it was there, whole; else it is to be filled.

    rows: uint8 [num_rows, row_bytes], read-only once whole. Its memory and its lock go with its last view.
    place: where it lies, for others to map once it is whole.
    To be ended by `finish` or `abandon` unless adopted.

    Raises SegmentError if an adopted one cannot be given its permissions.
    """

    def __init__(self, path: Path, descriptor: int, identity: Identity, backing: Backing, *, adopted: bool) -> None:
        self._path, self._descriptor, self._identity, self.adopted = path, descriptor, identity, adopted
        self._mode = backing.mode
        if adopted:
            self._permit()
        status = os.fstat(descriptor)
        self.place = Place(path.absolute(), status.st_dev, status.st_ino, status.st_size, not backing.reserve)
        # mmap keeps a duplicate of the descriptor, which keeps the lock.
        prot = mmap.PROT_READ if adopted else mmap.PROT_READ | mmap.PROT_WRITE
        memory = mmap.mmap(descriptor, _file_bytes(identity, backing), flags=mmap.MAP_SHARED, prot=prot)
        advise_huge_pages(memory)
        self._memory: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self.rows = self._memory[: identity.nbytes].reshape(identity.num_rows, identity.row_bytes)

    def finish(self) -> None:
        """Say that all rows are there and right, make them read-only, and share the segment with other servers.

        Raises SegmentError if they cannot be stored, OutOfMemoryError.
        """
        try:
            # Rows first: after a crash of the machine, no trailer may be there without them.
            os.fsync(self._descriptor)
            populate(self._memory[-TRAILER_BYTES:])
            self._memory[-TRAILER_BYTES:] = np.frombuffer(write_trailer(self._identity), np.uint8)
            os.fsync(self._descriptor)
        except OSError as error:
            raise SegmentError(f"{self._path} cannot be stored: {error.strerror}") from error
        self._permit()
        protect(self._memory)
        self.rows.flags.writeable = False
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        os.close(self._descriptor)

    def _permit(self) -> None:
        """Let those read it who may: the last server that starts says who."""
        try:
            if stat.S_IMODE(os.fstat(self._descriptor).st_mode) != self._mode:
                os.fchmod(self._descriptor, self._mode)
        except OSError as error:
            raise SegmentError(f"permissions of {self._path} cannot be set: {error.strerror}") from error

    def abandon(self) -> None:
        """Free a segment that is not `finish`ed; its memory goes with the last view."""
        if _names(self._path, self._descriptor):
            self._path.unlink()
        os.close(self._descriptor)


def take(
    backing: Backing, identity: Identity, matches: Callable[[npt.NDArray[np.uint8]], bool], wait: Callable[[], None]
) -> Segment:
    """The segment for a table: adopted if it lies there whole, else a new one to be filled.

    matches: whether rows are those of the table, as far as can be said quickly.
    wait: called while another server makes the same one, about every tenth of a second; may raise.

    Raises OutOfMemoryError, SegmentError.
    """
    path = backing.directory / file_name(identity)
    waited = tried = 0
    while True:
        with _opened(path) as descriptor:
            if descriptor is None:
                segment = _create(path, identity, backing)
                if segment is not None:
                    return segment
                continue
            if not _lock(descriptor, fcntl.LOCK_SH):
                waited += 1
                if waited == 2:  # who only looks locks for a moment
                    log.event("waiting", path=str(path), model=identity.model, layer=identity.layer)
                wait()
                continue
            if not _names(path, descriptor):
                continue
            there = _read_trailer(descriptor, backing)
            if there == identity:
                segment = Segment(path, descriptor, identity, backing, adopted=True)
                if matches(segment.rows):
                    log.event(
                        "adopted", path=str(path), model=identity.model, layer=identity.layer, bytes=identity.nbytes
                    )
                    return segment
                del segment
                reason = "damaged"
            else:
                reason = "damaged" if there else "partial"
            if not _free(path, descriptor, backing, reason):
                if tried == _PATIENCE:
                    raise SegmentError(f"{path} is damaged, and a running server uses it: stop that one first")
                tried += 1
                wait()


def nameless(backing: Backing, nbytes: int) -> npt.NDArray[np.uint8]:
    """Uint8 [nbytes] of memory as segments have, for what cannot be adopted; it goes with its last view.

    Raises OutOfMemoryError, SegmentError.
    """
    while True:
        identity = Identity("", secrets.token_hex(8), 0, 1, nbytes)
        segment = _create(backing.directory / file_name(identity), identity, backing)
        if segment is not None:
            segment.abandon()
            return segment.rows.reshape(-1)


def survey(backing: Backing) -> list[Found]:
    """This user's segments, the oldest first."""
    found = []
    for path in backing.directory.glob(f"{_prefix()}*"):
        with suppress(SegmentError), _opened(path) as descriptor:
            if descriptor is not None and _is_name(path):
                status = os.fstat(descriptor)
                identity = _read_trailer(descriptor, backing)
                in_use = not _lock(descriptor, fcntl.LOCK_EX)
                found.append(Found(path, identity, status.st_blocks * 512, in_use, status.st_mtime_ns))
    return sorted(found, key=lambda one: one.modified_ns)


def free(backing: Backing, found: Found, reason: str) -> bool:
    """Free a segment, unless it is in use or another by now."""
    with suppress(SegmentError), _opened(found.path) as descriptor:
        if descriptor is not None and _read_trailer(descriptor, backing) == found.identity:
            return _free(found.path, descriptor, backing, reason)
    return False


def sweep(backing: Backing, wanted: Collection[Identity], others: Collection[tuple[str, str]] = ()) -> list[Found]:
    """Free what is of no use to anyone: partial segments, other versions of the models `wanted`. Returns the rest.

    Other rows of a version that is wanted are of use to the server of another shard.
    others: (model, version) of what is of use as well.
    """
    models = {identity.model for identity in wanted}
    versions = {*others, *((identity.model, identity.version) for identity in wanted)}
    rest = []
    for found in survey(backing):
        one = found.identity
        stale = one is not None and one.model in models and (one.model, one.version) not in versions
        reason = "partial" if one is None else "other version" if stale else ""
        if not (reason and free(backing, found, reason)):
            rest.append(found)
    return rest


def _free(path: Path, descriptor: int, backing: Backing, reason: str) -> bool:
    """Free the segment open as `descriptor` unless another process uses it. A lock held on it is lost."""
    if not _lock(descriptor, fcntl.LOCK_EX) or not _names(path, descriptor):
        return False
    # What was partial before the lock may have been finished meanwhile.
    identity = _read_trailer(descriptor, backing)
    if reason == "partial" and identity is not None:
        return False
    nbytes = os.fstat(descriptor).st_blocks * 512
    path.unlink()
    if nbytes:  # else another start was about to lock what it had just created, and will do so again
        model, layer = (identity.model, identity.layer) if identity else (None, None)
        log.event("freed", path=str(path), model=model, layer=layer, bytes=nbytes, reason=reason)
    return True


def _create(path: Path, identity: Identity, backing: Backing) -> Segment | None:
    """A new segment, locked; None if somebody else was faster."""
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        return None
    except OSError as error:
        raise SegmentError(f"{path} cannot be created: {error.strerror}") from error
    try:
        # Between the two calls another start may have taken it for a leftover.
        if not _lock(descriptor, fcntl.LOCK_EX) or not _names(path, descriptor):
            os.close(descriptor)
            return None
        size = _file_bytes(identity, backing)
        os.ftruncate(descriptor, size)
        if backing.reserve or not can_populate():
            os.posix_fallocate(descriptor, 0, size)
        return Segment(path, descriptor, identity, backing, adopted=False)
    except OSError as error:
        path.unlink()
        os.close(descriptor)
        amount = f"{identity.nbytes / 2**30:.1f} GiB"
        raise OutOfMemoryError(f"allocating {amount} in {backing.directory}: {error.strerror}") from error


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A descriptor of a segment, for reading; None if there is none. Raises SegmentError if it is not ours."""
    try:
        # A pipe must not be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise SegmentError(f"{path} is no segment of ours ({error.strerror}); remove it") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise SegmentError(
                f"{path} is no segment of ours: not a file that only user {os.geteuid()} writes; remove it"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _prefix() -> str:
    return f"engrampool-{os.geteuid()}-"


def _is_name(path: Path) -> bool:
    # Before there were shards, a name had no rows in it; what is left from then is to be freed.
    return re.fullmatch(rf"{_prefix()}[0-9a-f]{{16}}-[0-9]+(-[0-9]+-[0-9]+)?", path.name) is not None


def _file_bytes(identity: Identity, backing: Backing) -> int:
    return -(-(identity.nbytes + TRAILER_BYTES) // backing.page_bytes) * backing.page_bytes


def _read_trailer(descriptor: int, backing: Backing) -> Identity | None:
    """What a segment is; None unless it is whole: trailer, its digest and the file's size agree."""
    size = os.fstat(descriptor).st_size
    if size < TRAILER_BYTES:
        return None
    identity = read_trailer(os.pread(descriptor, TRAILER_BYTES, size - TRAILER_BYTES))
    return identity if identity is not None and size == _file_bytes(identity, backing) else None
