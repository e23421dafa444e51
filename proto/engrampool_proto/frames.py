"""Frames of the direct lane, as docs/PROTOCOL.md lays them down: a header of 12 bytes, a head, a body.

What is bulky (rows, requests) is the body, so that whoever reads a frame knows from header and head where the body is
to go, and can have the kernel put it there.
"""

import struct
from functools import lru_cache

from engrampool_proto import wire

# Bytes after the header; of them, bytes of the head; kind.
HEADER = struct.Struct("<IIBxxx")
# Client to server.
HELLO, REQUEST = 1, 2
# Server to client.
READY, ROWS, END, REFUSED = 16, 17, 18, 19

# Of heads: they are small, and read whole before anything is made of them.
MAX_HEAD_BYTES = 4096
MAX_TICKET_BYTES = 64
# Head of a REQUEST: microseconds until the caller stops waiting, 0 for never.
TIMEOUT = struct.Struct("<Q")


def frame(kind: int, head: bytes = b"") -> bytes:
    """A frame without a body."""
    return HEADER.pack(len(head), len(head), kind) + head


def request_start(timeout_us: int, nbytes: int) -> bytes:
    """What goes before a LookupRequest of `nbytes`."""
    return HEADER.pack(TIMEOUT.size + nbytes, TIMEOUT.size, REQUEST) + TIMEOUT.pack(timeout_us)


@lru_cache(maxsize=1024)  # decode asks for the same few shapes over and over
def rows_start(layer: int, first: int, nbytes: int) -> bytes:
    """What goes before the `nbytes` of rows that a ROWS frame holds."""
    head = wire.response_start(layer, first, nbytes)
    return HEADER.pack(len(head) + nbytes, len(head), ROWS) + head


def end(times: wire.ServerTimes) -> bytes:
    """The frame after the last rows."""
    return frame(END, wire.times_response(times))


@lru_cache(maxsize=1024)
def parse_rows_head(head: bytes, nbytes: int) -> tuple[int, int]:
    """(layer, first) of a ROWS frame with `nbytes` of rows. Raises WireError."""
    return wire.parse_response_start(head, nbytes)
