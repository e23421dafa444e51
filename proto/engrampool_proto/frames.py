"""Frames of the direct lane, as docs/PROTOCOL.md lays them down: a header of 32 bytes, and a body.

All of a header is fixed, so that a loop without Python reads and writes frames of rows and of ids.
"""

import struct
from collections.abc import Sequence

from engrampool_proto import wire

# Kind; which handle (of a request) or layer (of rows); number of the request; its timeout in microseconds, 0 for none
# (of a request), or the first row (of rows); bytes of the body.
HEADER = struct.Struct("<IIQQQ")
# Client to server.
HELLO, REGISTER, LOOKUP, REQUEST = 1, 2, 3, 4
# Server to client.
READY, ROWS, END, REFUSED = 16, 17, 18, 19

MAX_TICKET_BYTES = 64
# Of the bodies of REGISTER, READY, END and REFUSED: they are read whole before anything is made of them.
MAX_SMALL_BYTES = 4096
# Of one connection.
MAX_HANDLES = 64
# Body of an END: the server's times, in microseconds.
TIMES = struct.Struct("<QQQ")
# Each layer's ids begin at a multiple of this, counted from the beginning of the frame.
ALIGNMENT = 8


def frame(kind: int, body: bytes = b"", number: int = 0) -> bytes:
    """A small frame."""
    return HEADER.pack(kind, 0, number, 0, len(body)) + body


def register(handle: int, model: str, version: str, layers: Sequence[int]) -> bytes:
    """The frame after which `handle` (below MAX_HANDLES) stands for these layers, ascending, of a model's version."""
    body = wire.encode_request(wire.LookupRequest(model, version, (), None, tuple(layers)))
    return HEADER.pack(REGISTER, handle, 0, 0, len(body)) + body


def lookup_start(handle: int, number: int, timeout_us: int, counts: Sequence[int], nbytes: int) -> bytes:
    """What goes before the ids of a LOOKUP. counts: ids of each layer of the handle. nbytes: of all ids, padded."""
    counted = struct.pack(f"<{len(counts)}Q", *counts)
    return HEADER.pack(LOOKUP, handle, number, timeout_us, len(counted) + nbytes) + counted


def request_start(number: int, timeout_us: int, nbytes: int) -> bytes:
    """What goes before a LookupRequest of `nbytes`."""
    return HEADER.pack(REQUEST, 0, number, timeout_us, nbytes)


def rows_start(number: int, layer: int, first: int, nbytes: int) -> bytes:
    """What goes before `nbytes` of rows, the first of which is row `first` of those asked for of the layer."""
    return HEADER.pack(ROWS, layer, number, first, nbytes)


def end(number: int, times: wire.ServerTimes) -> bytes:
    """The frame after the last rows."""
    return frame(END, TIMES.pack(times.queue_us, times.gather_us, times.total_us), number)


def padded(nbytes: int) -> int:
    """How many bytes ids of `nbytes` take in a LOOKUP."""
    return -nbytes // ALIGNMENT * -ALIGNMENT
