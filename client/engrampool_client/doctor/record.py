"""A recorded stream of row ids: what was asked for and when, to be asked for again (`engrampool doctor`).

No token is written, but row ids are no secret: who has the model's hash constants can work out many n-grams from them,
and rows of the family `identity` are numbered by token. Keep a recording as you would keep the text.

The file begins with one line of JSON, which says what it is, of which model, and how its records are made. A record is

    float64  seconds since the recording began
    uint32   number of layers that follow
    uint64   bytes that they take
    uint64   xxh3-64 of these bytes
    uint64   xxh3-64 of the 28 bytes before
    for each layer: uint32 layer, uint32 columns, uint32 ids, and the ids as the table has them, uint32 or uint64

all little-endian. Columns are the last axis of the ids (heads, where they came from tokens), 0 where there is one axis.
A file that ends within a record was cut short, by a crash or a full disk; what is whole of it is read, and that it ends
so is logged. Of a file that is damaged elsewhere nothing behind the damage is read: there is no telling what it is.
"""

import itertools
import json
import logging
import queue
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_client import private_files
from engrampool_client.errors import RecordError
from engrampool_client.lookup.query import row_ids
from engrampool_proto.errors import BatchError, SpecError
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec

_FORMAT = {"format": "engrampool-record", "format_version": 2}
_START = struct.Struct("<dIQQQ")
_SUM_BYTES = 8
_LAYER = struct.Struct("<III")
_DTYPES = ("uint32", "uint64")
_MAX_HEADER_BYTES = 1 << 20
MAX_WAITING_BYTES = 64 << 20
_log = logging.getLogger("engrampool")

Ids = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Recorded:
    """One lookup. at_s: since the recording began. ids: layer -> row ids [N, columns], or [N] if they had one axis."""

    at_s: float
    ids: Mapping[int, Ids]

    @property
    def num_tokens(self) -> int:
        """The most that any layer has along the first axis: tokens, where the ids came from tokens."""
        return max((len(ids) for ids in self.ids.values()), default=0)


class Recorder:
    """Writes lookups to a file, in a thread of its own. Whatever becomes of the file, no lookup waits for it or fails.

    max_waiting_bytes: of arrays that wait to be written; a lookup beyond that is counted and left out, not waited for.
    waiting_bytes: so many wait. dropped: lookups left out, as the disk could not keep up or took no more. error: why it
    took no more. The file is made anew, for its owner alone. Raises RecordError if it cannot be.
    """

    def __init__(self, path: Path, spec: ModelSpec, version: str, max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        self._path, self._spec, self._max_waiting_bytes = path, spec, max_waiting_bytes
        self.waiting_bytes = self.dropped = 0
        self.error: OSError | None = None
        try:
            # Unbuffered: a fork's child must have nothing of it to write.
            self._file: BinaryIO = private_files.create(path, buffering=0)
        except OSError as error:
            raise RecordError(f"{path} cannot be written to: {error.strerror or error}") from error
        dtypes = {str(table.layer): np.dtype(table.id_dtype).name for table in spec.tables}
        self._header = {**_FORMAT, "model": spec.name, "version": version, "spec_digest": spec.digest, "ids": dtypes}
        self._begin = time.monotonic()
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[float, TokenBatch | dict[int, Any], Sequence[int], int] | None]
        self._waiting, self._closed = queue.SimpleQueue(), False
        self._thread = threading.Thread(target=self._run, name="engrampool-record", daemon=True)
        self._thread.start()

    def tokens(self, batch: TokenBatch, layers: Sequence[int]) -> None:
        """Record a lookup by tokens, which are hashed for it later: the batch's arrays must not change."""
        self._put(batch, layers, batch.tokens.nbytes + batch.lookback.nbytes)

    def rows(self, rows: Mapping[int, Any]) -> None:
        """Record a lookup by row ids, which are copied."""
        # What is no array is refused by the lookup itself.
        if not self._closed and all(isinstance(ids, np.ndarray) for ids in rows.values()):
            owned = {layer: ids.copy() for layer, ids in rows.items()}
            self._put(owned, sorted(owned), sum(ids.nbytes for ids in owned.values()))

    def forked(self) -> None:
        """In the child of a fork: the file is the parent's, and so is what waits to be written to it."""
        self._closed = True

    def close(self) -> None:
        """Write what waits, and close the file."""
        with self._lock:
            self._closed = True
            self._waiting.put(None)
        self._thread.join()

    def _put(self, what: TokenBatch | dict[int, Any], layers: Sequence[int], nbytes: int) -> None:
        with self._lock:
            if self._closed:
                return
            # One that is larger by itself has its turn once nothing waits.
            full = self.waiting_bytes and self.waiting_bytes + nbytes > self._max_waiting_bytes
            if full or self.error is not None:
                self.dropped += 1
                return
            self.waiting_bytes += nbytes
            self._waiting.put((time.monotonic() - self._begin, what, layers, nbytes))

    def _run(self) -> None:
        self._write(json.dumps(self._header).encode() + b"\n")
        while (item := self._waiting.get()) is not None:
            at_s, what, layers, nbytes = item
            try:
                rows = self._spec.hash(what, layers) if isinstance(what, TokenBatch) else what
                written = self._write(_record(self._spec, at_s, rows))
            except (ValueError, TypeError):
                written = True  # not needed: the lookup itself was refused for it
            except MemoryError:
                written = False
            with self._lock:
                self.waiting_bytes -= nbytes
                self.dropped += not written
        with suppress(OSError):
            self._file.close()
        if self.dropped:
            _log.warning("%s lacks %d lookups (%s)", self._path, self.dropped, self.error or "the disk was too slow")

    def _write(self, data: bytes) -> bool:
        """Whether it went; a full disk must not end the model's process, and nothing is written behind a gap."""
        if self.error is None:
            try:
                left = memoryview(data)
                while left:
                    left = left[self._file.write(left) :]
            except OSError as error:
                self.error = error
        return self.error is None


def _record(spec: ModelSpec, at_s: float, rows: Mapping[int, Ids]) -> bytes:
    """The record's bytes. Raises BatchError for ids that are not the table's, ValueError for ids without an axis."""
    parts = []
    for layer in sorted(rows):
        table, ids = spec.table(layer), rows[layer]
        if not ids.ndim:
            raise ValueError(f"ids of layer {layer} have no axis")
        raw = row_ids(table, ids).astype(np.dtype(table.id_dtype).newbyteorder("<"), copy=False).tobytes()
        parts += [_LAYER.pack(layer, ids.shape[-1] if ids.ndim > 1 else 0, ids.size), raw]
    body = b"".join(parts)
    start = _START.pack(at_s, len(rows), len(body), xxhash.xxh3_64_intdigest(body), 0)[:-_SUM_BYTES]
    return start + struct.pack("<Q", xxhash.xxh3_64_intdigest(start)) + body


class Recording:
    """A file that a `Recorder` wrote. model, version, spec_digest: what its ids are of. Raises RecordError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                line = file.readline(_MAX_HEADER_BYTES)
                self._first = file.tell()
            header = json.loads(line)
            if not line.endswith(b"\n") or {key: header[key] for key in _FORMAT} != _FORMAT:
                raise ValueError("another format")
            self.model, self.version = str(header["model"]), str(header["version"])
            self.spec_digest = str(header["spec_digest"])
            if not set(header["ids"].values()) <= set(_DTYPES):
                raise ValueError("ids of another type")
            self._dtypes = {int(layer): np.dtype(name).newbyteorder("<") for layer, name in header["ids"].items()}
        except OSError as error:
            raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecordError(
                f"{path} is no recording of row ids ({error}); make one with Client(record=...)"
            ) from error

    def of(self, spec: ModelSpec) -> Iterator[Recorded]:
        """The lookups as `__iter__` gives them, every id one of `spec`. Raises RecordError unless they are."""
        if self.spec_digest != spec.digest:
            raise RecordError(
                f"{self._path} was recorded with {self.model}, specification {self.spec_digest}; the server holds "
                f"{spec.name}, specification {spec.digest}: its row ids mean other rows there"
            )
        for recorded in self:
            for layer, ids in recorded.ids.items():
                try:
                    row_ids(spec.table(layer), ids)
                except (BatchError, SpecError) as error:
                    raise self._damaged(str(error)) from error
            yield recorded

    def __iter__(self) -> Iterator[Recorded]:
        """The lookups in the order they were asked in. Raises RecordError for bytes that no recorder writes."""
        try:
            with self._path.open("rb") as file:
                left = file.seek(0, 2) - self._first
                file.seek(self._first)
                for number in itertools.count():
                    start = file.read(_START.size)
                    if len(start) < _START.size:
                        break
                    at_s, layers, nbytes, body_sum, start_sum = _START.unpack(start)
                    if xxhash.xxh3_64_intdigest(start[:-_SUM_BYTES]) != start_sum:
                        raise self._damaged(f"lookup {number} is not what was written")
                    if left < _START.size + nbytes:
                        break
                    left -= _START.size + nbytes
                    body = file.read(nbytes)
                    if xxhash.xxh3_64_intdigest(body) != body_sum:
                        raise self._damaged(f"lookup {number} is not what was written")
                    yield Recorded(at_s, self._ids(body, layers))
        except OSError as error:
            raise RecordError(f"{self._path} cannot be read: {error.strerror or error}") from error
        if left:
            _log.warning("%s ends within a lookup, %d bytes of which are left out: it was cut short", self._path, left)

    def _ids(self, body: bytes, layers: int) -> dict[int, Ids]:
        """What follows a record's start. Raises RecordError."""
        ids: dict[int, Ids] = {}
        at = 0
        for _ in range(layers):
            if len(body) < at + _LAYER.size:
                raise self._damaged(f"{layers} layers in {len(body)} bytes")
            layer, columns, count = _LAYER.unpack_from(body, at)
            dtype = self._dtypes.get(layer)
            if dtype is None or layer in ids:
                raise self._damaged(f"a record has layer {layer}, {'the model has not' if dtype is None else 'twice'}")
            at += _LAYER.size
            raw = body[at : at + count * dtype.itemsize]
            at += len(raw)
            if len(raw) != count * dtype.itemsize or (columns and count % columns):
                raise self._damaged(f"{count} ids in rows of {columns}, in {len(raw)} bytes")
            flat = np.frombuffer(raw, dtype)
            ids[layer] = flat.reshape(count // columns, columns) if columns else flat
        if at != len(body):
            raise self._damaged(f"{layers} layers in {len(body)} bytes")
        return ids

    def _damaged(self, what: str) -> RecordError:
        return RecordError(f"{self._path} is damaged: {what}")
