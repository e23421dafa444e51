"""Answers of the direct lane: what a small one looks like before it is there, and what a refusal says."""

from functools import lru_cache

import grpc

from engrampool_client.errors import PoolError, ProtocolError, from_status
from engrampool_proto import frames, wire
from engrampool_proto.v1 import pool_pb2

_HEADER_BYTES = frames.HEADER.size
# Where the number is in a header: all of a small answer's headers but this is known before the request.
_NUMBER_AT, _NUMBER_END = 8, 16
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@lru_cache(maxsize=256)  # decode asks for the same few shapes over and over
def answer_layout(
    runs: tuple[tuple[int, int], ...],
) -> tuple[tuple[tuple[int, tuple[bytes, bytes], int, int, int], ...], tuple[bytes, bytes], int, int]:
    """Where all is in an answer of one frame a run, for the (layer, bytes) of each.

    Gives (layer, header, where that is, where the rows are, where they end) of each run; the header of the answer's
    last frame, and where that begins and ends. Of a header there is what comes before the number, and what after it.
    """
    found, at = [], 0
    for layer, nbytes in runs:
        rows_at = at + _HEADER_BYTES
        found.append((layer, _around_number(frames.rows_start(0, layer, 0, nbytes)), at, rows_at, rows_at + nbytes))
        at = rows_at + nbytes
    end = frames.end(0, wire.ServerTimes(0, 0, 0))
    return tuple(found), _around_number(end), at, at + len(end)


def _around_number(start: bytes) -> tuple[bytes, bytes]:
    return start[:_NUMBER_AT], start[_NUMBER_END:_HEADER_BYTES]


class RefusalError(Exception):
    """The server refused the request; the connection is as good as before."""

    def __init__(self, error: PoolError) -> None:
        super().__init__()
        self.error = error


def refusal_of(body: bytes, target: str) -> PoolError:
    """The error that the body of a REFUSED stands for. Raises ProtocolError."""
    try:
        refusal = pool_pb2.Refusal.FromString(body)
    except Exception as error:  # the runtime's DecodeError has no stable home across protobuf versions
        raise ProtocolError(f"{target}: a refusal cannot be read: {error}") from error
    code = _CODES.get(refusal.code, grpc.StatusCode.UNKNOWN)
    return from_status(code, refusal.reason or None, refusal.text, target)
