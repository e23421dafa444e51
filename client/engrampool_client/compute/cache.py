"""Rows that this process asked for before: a bounded cache of whole n-grams, asked before the network is.

An entry is all rows of one n-gram of one order in one layer. It has an exact key (`keys` of the hash family) within a
group (which layer and order), so that what is found is what the server would have sent.
"""

import ctypes
import errno
import json
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_client import private_files
from engrampool_client.compute.file_rows import FileRows, sums_of
from engrampool_client.compute.forms import NUMPY, Entries, Form
from engrampool_client.compute.index import NOBODY, WAYS, Groups, Index, Keys
from engrampool_client.errors import CacheFileError
from engrampool_proto.spec import canonical_json

Bytes = npt.NDArray[np.uint8]

# A file: magic, length and xxh3-64 of the header as uint64, the header as JSON; from the next page on the index; from
# the next page on the rows; and from the next multiple of 8 on the xxh3-64 of each row as uint64. The header has one of
# the index and these sums together. Numbers are little-endian.
_MAGIC = b"EPCACHE2"
_FIRST_BYTES = len(_MAGIC) + 8 + 8
_SUM_BYTES = 8
# What a header counts, and of how many there is no file.
_COUNTS = {"ways": 0, "sets": 0, "entries": -1, "entry_bytes": 0}
_MAX_HEADER = 1 << 20
_PAGE = 4096
_AGAIN = "delete it, and save it again from a cache that is in use"
_OLD = "Delete it, and save one from a client of this version"
_MADV_POPULATE_WRITE = 23
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_SAVE_BYTES = 8 << 20  # copied while the lock is held
_POPULATE_BYTES = 4 << 20  # had while no other thread can map memory


_holding = threading.local()


def holds_a_cache() -> bool:
    """Whether this thread holds a cache: then it must wait for nobody who may want it."""
    lock: threading.Lock | None = getattr(_holding, "lock", None)
    return lock is not None and lock.locked()  # where Ctrl-C came, the lock may be another thread's by now


class HotRows:
    """A bounded set of entries under exact keys, set-associative; the least used of a full set make room.

    nbytes: the most that it takes, rows and index together; all of that memory is taken at once.
    entry_bytes: of one entry. form: what the index is worked by.

    held: for the caller's `with`, over `find` and the copying of what it found, and over `put`: rows move at any `put`.
    rows: uint8 [rows, entry_bytes]; `find` says which.
    hits, misses: entries asked for. evicted: entries that had to go. filled: entries held.
    hinted_bytes: put with `hinted`, that is fetched before anybody asked; of them hinted_used_bytes were found at least
        once, and hinted_wasted_bytes went before that or were not kept at all. The rest is held and may yet be used.

    Several threads may use it with the lock held. Raises ValueError where `nbytes` does not hold one set, MemoryError.
    """

    def __init__(self, nbytes: int, entry_bytes: int, form: Form = NUMPY) -> None:
        slot_bytes = entry_bytes + Index.SLOT_BYTES + Index.AGE_BYTES
        # Rows are numbered in 32 bits.
        sets = min(nbytes // (slot_bytes * WAYS), (2**31 - 1) // WAYS)
        if entry_bytes < 1 or sets < 1:
            raise ValueError(
                f"a cache of entries of {entry_bytes} bytes takes {slot_bytes * WAYS} bytes at least, not {nbytes}"
            )
        rows = np.empty((sets * WAYS, entry_bytes), np.uint8)
        _populate(rows)
        self._begin(form.index.empty(sets), rows, None)

    def _begin(self, index: Index, rows: Bytes, file: FileRows | None) -> None:
        self.lock = threading.Lock()  # by `held` alone
        self.rows = rows
        self._file = file
        self.hits = self.misses = self.evicted = self.filled = 0
        self.hinted_bytes = self.hinted_used_bytes = self.hinted_wasted_bytes = 0
        self._index = index

    @property
    def read_only(self) -> bool:
        """Whether it is a file's."""
        return self._file is not None

    @property
    def damaged(self) -> int:
        """Entries of a file that were found to be other bytes than were saved, and are missed; 0 if it is no file's."""
        return 0 if self._file is None else self._file.damaged

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry."""
        return int(self.rows.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that hold something: the index, and the rows that are filled."""
        return self._index.nbytes + self.filled * self.entry_bytes

    def find(self, keys: Keys, groups: Groups) -> Keys:
        """Where the entries of `keys` are in `rows`: int64 [N], -1 for what is not there. What is found is kept longer.

        keys: int64 [N], any values, each as often as wanted. groups: uint8 [N]. The answer holds until the next `put`.
        """
        if self._file is not None and not self._file.untouched():
            self.misses += len(keys)
            return np.full(len(keys), -1, np.int64)
        found, hits, used = self._index.find(keys, groups)
        if self._file is not None:
            at = np.flatnonzero(found >= 0)
            wrong = at[~self._file.right(found.take(at))]
            found[wrong] = -1
            hits -= len(wrong)
        self.hits += hits
        self.misses += len(keys) - hits
        self.hinted_used_bytes += used * self.entry_bytes
        return found

    def put(self, keys: Keys, groups: Groups, entries: Bytes, hinted: bool = False) -> None:
        """Keep these entries, the last `put` may make room for them; those that are there already stay as they are.

        keys: int64 [M], none twice in a group. groups: uint8 [M]. entries: uint8 [M, entry_bytes]; copied.
        hinted: they were fetched on a guess; counted apart until they are found.
        Of more new keys than a set has ways the last are not kept. Raises ValueError if this is a file's.
        """
        if self.read_only:
            raise ValueError("this cache is a file's, opened to be read: make a HotRows(nbytes, ...) to put entries in")
        if hinted:
            self.hinted_bytes += len(keys) * self.entry_bytes
        came, evicted, wasted = self._index.put(keys, groups, entries, self.rows, hinted)
        self.filled += came
        self.evicted += evicted
        self.hinted_wasted_bytes += wasted * self.entry_bytes

    def find_small(self, entries: Entries, tokens: int, state: Keys, ids: Bytes) -> tuple[int, int, int, int]:
        """As `find`, of a small batch, whose rows are copied at once. Not of a file.

        Gives how many entries are missing, and the rest of what `Entries.find` does.
        """
        hits, used, found_bytes, same_bytes, id_bytes = entries.find(self._index, self.rows, tokens, state, ids)
        missing = tokens * entries.each - hits
        self.hits += hits
        self.misses += missing
        self.hinted_used_bytes += used * self.entry_bytes
        return missing, found_bytes, same_bytes, id_bytes

    def put_small(self, entries: Entries, tokens: int, state: Keys) -> None:
        """As `put`, of what came of a small batch."""
        came, evicted, wasted = entries.keep(self._index, self.rows, tokens, state)
        self.filled += came
        self.evicted += evicted
        self.hinted_wasted_bytes += wasted * self.entry_bytes

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it the index and the rows are this thread's."""
        _holding.lock = self.lock
        with self.lock:
            yield
        _holding.lock = None

    def save(self, path: Path, version: str, layout: dict[str, Any], max_bytes: int | None = None) -> None:
        """Write the entries to a file for `open`, the most used first; of `max_bytes` at most, or all that are held.

        Its owner alone may read it: n-grams can be worked out from the keys.

        version: of the model whose rows they are. layout: JSON types; what the keys and entries mean.
        Do not hold the lock: it is taken here for some entries at a time, and what goes meanwhile is left out. The file
        appears under its name when it is whole. Raises ValueError where `max_bytes` does not hold the index, OSError.
        """
        private_files.check_replaceable(path)
        with self.held():
            index = self._index.copy()
        slots = np.flatnonzero(index.groups != NOBODY)
        # A file's own rows lie in that order already.
        slots = slots[np.argsort((index.rows if self.read_only else index.ages)[slots], kind="stable")]
        header = {
            "version": version,
            "layout": layout,
            "ways": WAYS,
            "sets": len(index.keys) // WAYS,
            "entries": len(slots),
            "entry_bytes": self.entry_bytes,
            "index_xxh3": "0" * 16,
        }
        if max_bytes is not None:
            rows_at = _places(header)[1]
            if rows_at > max_bytes:
                raise ValueError(f"the file's index alone takes {rows_at} bytes, more than max_bytes={max_bytes}")
            room = max_bytes // _SUM_BYTES * _SUM_BYTES - rows_at
            slots = slots[: max(0, room) // (self.entry_bytes + _SUM_BYTES)]
            # With fewer digits the header is no longer than it was.
            header["entries"] = len(slots)
        index_at, rows_at, sums_at, _ = _places(header)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            with private_files.create(unfinished) as file:
                kept = np.zeros(len(index.keys), np.bool_)
                sums = np.zeros(len(slots), np.uint64)
                step = max(1, _SAVE_BYTES // self.entry_bytes)
                file.seek(rows_at)
                for start in range(0, len(slots), step):
                    part = slots[start : start + step]
                    with self.held():
                        copied = self.rows.take(index.rows[part], axis=0)
                        now = self._index
                        same = (now.keys[part] == index.keys[part]) & (now.groups[part] == index.groups[part])
                        if self._file is not None:  # damage is not made right by being saved again
                            same &= self._file.right(index.rows[part])
                    file.write(copied.data)
                    sums[start : start + len(part)] = sums_of(copied)
                    kept[part] = same
                index.rows[slots] = np.arange(len(slots))
                index.groups[~kept] = NOBODY
                packed, packed_sums = index.bytes(), sums.astype("<u8").tobytes()
                header["index_xxh3"] = _hexdigest(packed, packed_sums)
                file.seek(0)
                file.write(_encode(header))
                file.seek(index_at)
                file.write(packed)
                file.seek(sums_at)
                file.write(packed_sums)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: Path, version: str, layout: dict[str, Any], form: Form = NUMPY) -> "HotRows":
        """A file's entries, to be read: `find` works, `put` raises. Processes of a host share its memory.

        Its rows are looked at as they are found. It may be replaced or removed meanwhile, but not cut short: to read
        what is no longer there of a mapping ends the process. Once it was written to it is used no more.
        Raises CacheFileError if it is not there, damaged, or made for another version or layout.
        """
        try:
            with path.open("rb") as file:
                header = _read_header(path, file.read(_FIRST_BYTES + _MAX_HEADER))
                _check(path, header, version, layout)
                index_at, rows_at, sums_at, total = _places(header)
                size = os.fstat(file.fileno()).st_size
                if size != total:
                    raise CacheFileError(f"{path} has {size} bytes and should have {total}: {_AGAIN}")
                # The mapping outlives the file's name: a cache in use may be saved over.
                whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
                rows = whole[rows_at : rows_at + header["entries"] * header["entry_bytes"]]
                rows, sums = rows.reshape(header["entries"], header["entry_bytes"]), whole[sums_at:]
                checked = FileRows(path, file.fileno(), rows, sums.view("<u8"))
        except OSError as error:
            raise CacheFileError(f"{path} cannot be read ({error.strerror}): save one there, or name none") from error
        packed = whole[index_at : index_at + _index_bytes(header)]
        if _hexdigest(packed.data, sums.data) != header["index_xxh3"]:
            raise CacheFileError(f"{path} is damaged, its index is not what was written: {_AGAIN}")
        index = form.index.of(packed)
        filled = index.rows[index.groups != NOBODY]
        if len(filled) and not 0 <= int(filled.min()) <= int(filled.max()) < len(rows):
            raise CacheFileError(f"{path} is damaged, its index names rows that it has not: {_AGAIN}")
        cache = cls.__new__(cls)
        cache._begin(index, rows, checked)
        cache.filled = len(filled)
        return cache


def _populate(rows: Bytes) -> None:
    """Have the memory of `rows` now: had page by page as entries come, it would hold up every thread of the process.

    A kernel before Linux 5.14 knows no such call; there it is had as entries come.
    """
    start = -(-rows.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (rows.ctypes.data + rows.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    for at in range(start, stop, _POPULATE_BYTES):
        if _LIBC.madvise(at, min(_POPULATE_BYTES, stop - at), _MADV_POPULATE_WRITE):
            if ctypes.get_errno() == errno.ENOMEM:
                raise MemoryError(f"no memory is left for a cache of {rows.nbytes} bytes")
            return


def _hexdigest(*parts: bytes | memoryview) -> str:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return str(digest.hexdigest())


def _index_bytes(header: dict[str, Any]) -> int:
    return int(header["sets"]) * WAYS * Index.SLOT_BYTES


def _places(header: dict[str, Any]) -> tuple[int, int, int, int]:
    """Where the index, the rows and their sums begin, and where the file ends."""
    index_at = -(-len(_encode(header)) // _PAGE) * _PAGE
    rows_at = -(-(index_at + _index_bytes(header)) // _PAGE) * _PAGE
    entries = int(header["entries"])
    sums_at = -(-(rows_at + entries * int(header["entry_bytes"])) // _SUM_BYTES) * _SUM_BYTES
    return index_at, rows_at, sums_at, sums_at + entries * _SUM_BYTES


def _encode(header: dict[str, Any]) -> bytes:
    text = canonical_json(header)
    return _MAGIC + struct.pack("<QQ", len(text), xxhash.xxh3_64_intdigest(text)) + text


def _read_header(path: Path, begin: bytes) -> dict[str, Any]:
    """The header in a file's first bytes. Raises CacheFileError."""
    if not begin.startswith(_MAGIC) or len(begin) < _FIRST_BYTES:
        raise CacheFileError(f"{path} is no cache file of this version of engrampool: {_AGAIN}")
    length, checksum = struct.unpack_from("<QQ", begin, len(_MAGIC))
    text = begin[_FIRST_BYTES : _FIRST_BYTES + length]
    if len(text) == length and xxhash.xxh3_64_intdigest(text) == checksum:
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            header: dict[str, Any] = json.loads(text)
            counted = all(type(header[name]) is int and header[name] > no for name, no in _COUNTS.items())
            if counted and {"version", "layout", "index_xxh3"} <= set(header):
                return header
    raise CacheFileError(f"{path} is damaged, its header is not what was written: {_AGAIN}")


def _check(path: Path, header: dict[str, Any], version: str, layout: dict[str, Any]) -> None:
    """Raise CacheFileError unless the file is of that version and layout."""
    if header["version"] != version:
        raise CacheFileError(
            f"{path} holds rows of version {header['version']}, the model's is {version}: they may differ. {_OLD}"
        )
    if canonical_json(header["layout"]) != canonical_json(layout) or header["ways"] != WAYS:
        raise CacheFileError(f"{path} was saved for the layout {header['layout']}, this client's is {layout}. {_OLD}")
