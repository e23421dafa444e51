"""gRPC's own floor in Python: the same bytes ready-made, with none of our code between.

Up to 1 MiB as one message, more as a stream of 1 MiB pieces; the C library's memory is pinned as ours is.
"""

import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import numpy as np

from peers import grpc_loop, not_installed
from workload import KINDS, ROW_BYTES, Batch, Rows, Workload

_REQUEST = struct.Struct("<BII")  # kind, first token, tokens
_PIECE = 1 << 20


def missing() -> str | None:
    """Needs uvloop, as our server does."""
    return not_installed("uvloop")


def _cut(answers: list[np.ndarray], start: int, tokens: int) -> list[bytes]:
    whole = b"".join(array[start : start + tokens].tobytes() for array in answers)
    return [whole[piece] for piece in _pieces(len(whole))]


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _PIECE, size)) for start in range(0, size, _PIECE))


@contextmanager
def serve(workload: Workload) -> Iterator[str]:
    """Answers are bytes objects, cut as they will be sent, before the first timed call; gRPC only sends."""
    import grpc

    from engrampool_proto.malloc import pin_malloc

    pin_malloc()
    answers = {kind: list(workload.answers(kind).values()) for kind in KINDS}
    made: dict[tuple[int, int], dict[int, list[bytes]]] = {}  # of one kind and size at a time

    def ready(request: bytes) -> list[bytes]:
        kind, start, tokens = _REQUEST.unpack(request)
        if (kind, tokens) not in made:
            made.clear()
            made[kind, tokens] = {at: _cut(answers[KINDS[kind]], at, tokens) for at in workload.starts(tokens)}
        return made[kind, tokens][start]

    async def unary(request: bytes, context: object) -> bytes:
        return ready(request)[0]

    async def stream(request: bytes, context: object) -> AsyncIterator[bytes]:
        for piece in ready(request):
            yield piece

    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }
    with grpc_loop.serving(handlers) as address:
        yield address


@contextmanager
def connect(address: str, workload: Workload, tokens: int) -> Iterator[Callable[[Batch], Rows]]:
    """Every piece is copied into its place, as rows have to be."""
    import grpc

    from engrampool_proto.malloc import pin_malloc

    pin_malloc()
    size = tokens * workload.token_bytes
    buffer = np.zeros(size, np.uint8)
    parts = np.split(buffer, np.cumsum([tokens * len(heads) * ROW_BYTES for heads in workload.heads.values()])[:-1])
    rows = dict(zip(workload.layers, parts, strict=True))
    view = memoryview(buffer)
    with grpc.insecure_channel(address, grpc_loop.OPTIONS) as channel:
        unary, stream = channel.unary_unary("/bench.Raw/Unary"), channel.unary_stream("/bench.Raw/Stream")

        def fetch(batch: Batch) -> Rows:
            request = _REQUEST.pack(KINDS.index(batch.kind), batch.start, batch.tokens)
            if size <= _PIECE:
                view[:] = unary(request)
            else:
                for piece, message in zip(_pieces(size), stream(request), strict=True):
                    view[piece] = message
            return rows

        yield fetch
