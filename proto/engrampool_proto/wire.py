"""The two hot messages, LookupRequest and LookupResponse, without the copies of the protobuf runtime.

What is written here is byte for byte what the generated code writes, and either reads what the other wrote
(tests/proto/test_wire.py holds the two against each other). The gain is that ids and rows are viewed where they lie:
reading a `bytes` field of a generated message copies it, every time.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import WireError
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.protobuf import (
    BYTES,
    FIXED32,
    FIXED64,
    U32,
    U64,
    VARINT,
    Budget,
    fields,
    merged_fields,
    put_bytes,
    put_message,
    put_varint,
    read_varint,
    varint,
)

Ids = npt.NDArray[np.unsignedinteger[Any]]

SERVICE = "engrampool.v1.Pool"
# Trailing metadata of a refused call: which of the reasons in docs/PROTOCOL.md it was.
REASON_KEY = "engrampool-reason"

# Found here, as to make one takes longer than to use it.
_LITTLE = {np.dtype(name): np.dtype(name).newbyteorder("<") for name in ("u4", "u8", "i4")}
# ServerTimes { queue_us, gather_us, total_us }, each a tag byte and a fixed32, so that they can be filled in last.
_TIMES = struct.Struct("<BIBIBI")
_TIMES_START = bytes((2 << 3 | BYTES, _TIMES.size))
_NUMBER = bytes([6 << 3 | FIXED64])
_TIMES_TAGS = (1 << 3 | FIXED32, 2 << 3 | FIXED32, 3 << 3 | FIXED32)


@dataclass(frozen=True, eq=False)
class LookupRequest:
    """What LookupRequest of pool.proto says. `tables` holds (layer, ids [N]) pairs; `tokens` is None if not given."""

    model: str
    version: str
    tables: tuple[tuple[int, Ids], ...] = ()
    tokens: TokenBatch | None = None
    layers: tuple[int, ...] = ()
    number: int = 0


@dataclass(frozen=True)
class ServerTimes:
    """Where the server's time went, in microseconds."""

    queue_us: int
    gather_us: int
    total_us: int

    @property
    def send_us(self) -> int:
        """What is left of the whole."""
        return max(0, self.total_us - self.queue_us - self.gather_us)


@dataclass(frozen=True, eq=False)
class TableRows:
    """A run of rows of one table: `rows` are the bytes from position `first` of the ids asked for on."""

    layer: int
    first: int
    rows: memoryview


@dataclass(frozen=True, eq=False)
class LookupResponse:
    """What LookupResponse of pool.proto says; `tables[i].rows` are views into the message."""

    tables: tuple[TableRows, ...]
    times: ServerTimes | None


def encode_request(request: LookupRequest, number: int = 0) -> bytes:
    """The message's bytes. number: in place of the request's own, if not 0.

    Raises WireError for ids that are neither uint32 nor uint64.
    """
    parts: list[bytes | memoryview] = [_request_start(request.model, request.version)]
    for layer, ids in request.tables:
        if ids.dtype not in (np.uint32, np.uint64):
            raise WireError(f"row ids of layer {layer} must be uint32 or uint64; they are {ids.dtype}")
        data = little(ids)
        parts += _ids_start(layer, 2 if ids.dtype == np.uint32 else 3, len(data)), data
    if request.tokens is not None:
        put_message(parts, 4, _token_fields(request.tokens))
    if request.layers:
        put_bytes(parts, 5, b"".join(map(varint, request.layers)))
    if number := number or request.number:
        parts.append(_NUMBER + number.to_bytes(8, "little"))
    return b"".join(parts)


@lru_cache(maxsize=256)  # decode asks for the same few shapes over and over
def _request_start(model: str, version: str) -> bytes:
    parts: list[bytes | memoryview] = []
    put_bytes(parts, 1, model.encode())
    put_bytes(parts, 2, version.encode())
    return b"".join(parts)


@lru_cache(maxsize=256)
def _ids_start(layer: int, number: int, nbytes: int) -> bytes:
    """What goes before the bytes of a table's ids."""
    table: list[bytes | memoryview] = []
    put_varint(table, 1, layer)
    table.append(varint(number << 3 | BYTES) + varint(nbytes))
    size = sum(map(len, table)) + nbytes
    return b"".join([varint(3 << 3 | BYTES) + varint(size), *table])


def _token_fields(batch: TokenBatch) -> list[bytes | memoryview]:
    fields: list[bytes | memoryview] = []
    put_bytes(fields, 1, little(batch.tokens))
    put_bytes(fields, 2, little(batch.query_start_loc))
    put_bytes(fields, 3, little(batch.lookback))
    put_varint(fields, 4, batch.lookback.shape[1])
    if batch.dead is not None:
        put_bytes(fields, 5, little(batch.dead.view(np.uint8)))
    if batch.lookback_dead is not None:
        put_bytes(fields, 6, little(batch.lookback_dead.view(np.uint8)))
    return fields


def parse_request(data: bytes | memoryview) -> LookupRequest:
    """Read a LookupRequest; its ids and tokens are read-only views into `data`, its flags are arrays of their own.

    Raises WireError for malformed bytes, BatchError for a token batch whose parts do not fit together.
    """
    budget = Budget()
    model, version, named = "", "", 0
    tables: list[tuple[int, Ids]] = []
    token_messages: list[memoryview] = []
    layers: list[int] = []
    for number, kind, value in fields(memoryview(data), budget):
        if number == 1 and kind == BYTES:
            model = _text("model", value)
        elif number == 2 and kind == BYTES:
            version = _text("version", value)
        elif number == 3 and kind == BYTES:
            tables.append(_parse_ids(value, budget))
        elif number == 4 and kind == BYTES:
            token_messages.append(value)
        elif number == 5 and kind == VARINT:
            layers.append(value & U32)
        elif number == 5 and kind == BYTES:
            position = 0
            while position < len(value):
                budget.spend()
                layer, position = read_varint(value, position)
                layers.append(layer & U32)
        elif number == 6 and kind == FIXED64:
            named = value
    tokens = _parse_tokens(token_messages, budget) if token_messages else None
    return LookupRequest(model, version, tuple(tables), tokens, tuple(layers), named)


def _parse_ids(data: memoryview, budget: Budget) -> tuple[int, Ids]:
    layer, raw, dtype = 0, memoryview(b""), np.dtype("<u4")
    for number, kind, value in fields(data, budget):
        if number == 1 and kind == VARINT:
            layer = value & U32
        elif number in (2, 3) and kind == BYTES:
            raw, dtype = value, np.dtype("<u4" if number == 2 else "<u8")
    if len(raw) % dtype.itemsize:
        raise WireError(f"row ids of layer {layer} are {len(raw)} bytes, no multiple of {dtype.itemsize}")
    return layer, np.frombuffer(raw, dtype)


def _parse_tokens(messages: list[memoryview], budget: Budget) -> TokenBatch:
    raw = {number: memoryview(b"") for number in (1, 2, 3, 5, 6)}
    width = 0
    for number, kind, value in merged_fields(messages, budget):
        if number in raw and kind == BYTES:
            raw[number] = value
        elif number == 4 and kind == VARINT:
            width = value & U32
    for number, name in ((1, "tokens"), (2, "query_start_loc"), (3, "lookback")):
        if len(raw[number]) % 4:
            raise WireError(f"{name} is {len(raw[number])} bytes, no multiple of 4")
    bounds = np.frombuffer(raw[2], "<i4")
    shape = (max(0, len(bounds) - 1), width)
    lookback = _shaped("lookback", np.frombuffer(raw[3], "<i4"), shape)
    dead = np.frombuffer(raw[5], np.uint8) != 0 if len(raw[5]) else None
    lookback_dead = _shaped("lookback_dead", np.frombuffer(raw[6], np.uint8) != 0, shape) if len(raw[6]) else None
    return TokenBatch(np.frombuffer(raw[1], "<i4"), bounds, lookback, dead, lookback_dead)


def _shaped(name: str, array: npt.NDArray[Any], shape: tuple[int, int]) -> npt.NDArray[Any]:
    if array.size != shape[0] * shape[1]:
        raise WireError(
            f"{name} has {array.size} entries; {shape[0]} requests of width {shape[1]} need {shape[0] * shape[1]}"
        )
    return array.reshape(shape)


class ResponseWriter:
    """A LookupResponse whose rows are gathered straight into the message.

    tables: (layer, first, bytes of rows) of each table, in order.
    rows: one writable uint8 array a table, to be filled before `message` is given away.
    with_times: leave room for ServerTimes; `set_times` fills them in.
    """

    def __init__(self, tables: Sequence[tuple[int, int, int]], with_times: bool) -> None:
        pieces, size = _layout(tuple(tables), with_times)
        self.message, self._buffer = _uninitialised_bytes(size)
        array = np.frombuffer(self._buffer, np.uint8)
        self.rows: list[npt.NDArray[np.uint8]] = []
        position = 0
        for piece in pieces:
            if isinstance(piece, bytes):
                end = position + len(piece)
                self._buffer[position:end] = piece
            else:
                end = position + piece
                self.rows.append(array[position:end])
            position = end
        self._times_at = position if with_times else None
        if with_times:
            self.set_times(ServerTimes(0, 0, 0))

    def set_times(self, times: ServerTimes) -> None:
        """Fill in the server's times. Only for a writer made with them."""
        assert self._times_at is not None
        _TIMES.pack_into(self._buffer, self._times_at, *_times_fields(times))


def _times_fields(times: ServerTimes) -> tuple[int, ...]:
    values = (times.queue_us, times.gather_us, times.total_us)
    (a, b, c), (x, y, z) = _TIMES_TAGS, [min(U32, max(0, int(us))) for us in values]
    return a, x, b, y, c, z


@lru_cache(maxsize=256)  # decode asks for the same few shapes over and over
def _layout(tables: tuple[tuple[int, int, int], ...], with_times: bool) -> tuple[list[bytes | int], int]:
    """A message's header bytes, with the sizes of the rows between them as numbers, and its size."""
    pieces: list[bytes | int] = []
    for layer, first, nbytes in tables:
        head: list[bytes | memoryview] = []
        put_varint(head, 1, layer)
        put_varint(head, 2, first)
        if nbytes:
            head.append(varint(3 << 3 | BYTES) + varint(nbytes))
        body = b"".join(head)
        pieces += [varint(1 << 3 | BYTES) + varint(len(body) + nbytes) + body, nbytes]
    if with_times:
        pieces.append(_TIMES_START)
    size = sum([len(p) if isinstance(p, bytes) else p for p in pieces]) + (_TIMES.size if with_times else 0)
    return pieces, size


def response_start(layer: int, first: int, nbytes: int) -> bytes:
    """A LookupResponse of one run of rows, up to these `nbytes` of rows, which are its end."""
    start = _layout(((layer, first, nbytes),), False)[0][0]
    assert isinstance(start, bytes)
    return start


def times_response(times: ServerTimes) -> bytes:
    """A LookupResponse of nothing but times."""
    return _TIMES_START + _TIMES.pack(*_times_fields(times))


def parse_response(data: bytes) -> LookupResponse:
    """Read a LookupResponse; rows are views into `data`. Raises WireError for malformed bytes."""
    budget = Budget()
    tables: list[TableRows] = []
    times_messages: list[memoryview] = []
    for number, kind, value in fields(memoryview(data), budget):
        if number == 1 and kind == BYTES:
            tables.append(_parse_rows(value, budget))
        elif number == 2 and kind == BYTES:
            times_messages.append(value)
    return LookupResponse(tuple(tables), _parse_times(times_messages, budget) if times_messages else None)


def _parse_times(messages: list[memoryview], budget: Budget) -> ServerTimes:
    if len(messages) == 1 and len(messages[0]) == _TIMES.size:  # as `ResponseWriter` has them
        a, queue_us, b, gather_us, c, total_us = _TIMES.unpack(messages[0])
        if (a, b, c) == _TIMES_TAGS:
            return ServerTimes(queue_us, gather_us, total_us)
    found = {1: 0, 2: 0, 3: 0}
    for number, kind, value in merged_fields(messages, budget):
        if number in found and kind == FIXED32:
            found[number] = value
    return ServerTimes(found[1], found[2], found[3])


def _parse_rows(data: memoryview, budget: Budget) -> TableRows:
    layer = first = 0
    rows = memoryview(b"")
    for number, kind, value in fields(data, budget):
        if number == 1 and kind == VARINT:
            layer = value & U32
        elif number == 2 and kind == VARINT:
            first = value & U64
        elif number == 3 and kind == BYTES:
            rows = value
    return TableRows(layer, first, rows)


def _uninitialised_bytes(size: int) -> tuple[bytes, memoryview]:
    """A bytes object that may still be written, as CPython's PyBytes_FromStringAndSize(NULL, size) offers.

    gRPC sends nothing but exact `bytes`; gathering into one saves the copy from a buffer to a message. The view does
    not keep the bytes alive: hold both, and write only until the bytes are shared.
    """
    message: bytes = _new_bytes(None, size)
    return message, _view_of_memory(_bytes_address(message), size, _PYBUF_WRITE)


_PYBUF_WRITE = 0x200
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes, _new_bytes.restype = [ctypes.c_char_p, ctypes.c_ssize_t], ctypes.py_object
_bytes_address = ctypes.pythonapi.PyBytes_AsString
_bytes_address.argtypes, _bytes_address.restype = [ctypes.py_object], ctypes.c_void_p
_view_of_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.argtypes, _view_of_memory.restype = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int], ctypes.py_object


def little(array: npt.NDArray[Any]) -> memoryview:
    """An array's bytes, little-endian and C-contiguous, without a copy where it is so already."""
    plain: npt.NDArray[Any] = np.ascontiguousarray(array, _LITTLE.get(array.dtype) or array.dtype.newbyteorder("<"))
    return plain.reshape(-1).view(np.uint8).data


def _text(name: str, value: memoryview) -> str:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise WireError(f"{name} is not UTF-8") from error
