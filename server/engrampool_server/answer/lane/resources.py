"""What all connections of the direct lane in one process have in common: the lookups, buffers, and counts."""

import asyncio

import grpc
import numpy as np
import numpy.typing as npt

from engrampool_proto import frames, wire
from engrampool_proto.v1 import pool_pb2
from engrampool_server.answer.lookups import SMALL_REQUEST_BYTES, Job, Lookups
from engrampool_server.telemetry.metrics import Metrics

# Beside the rows, in a buffer: heads and the end of the answer.
_MARGIN_BYTES = 64 << 10
_SPARE_BUFFERS = 16
_MAX_TEXT_BYTES = 3000

Buffer = npt.NDArray[np.uint8]


class Resources:
    """To be made on the event loop that the connections run on.

    waste: where bytes go that nobody reads.
    piece_bytes: at most so many bytes of rows are gathered, and sent, at a time.
    """

    def __init__(self, lookups: Lookups, metrics: Metrics, max_request_bytes: int) -> None:
        self.lookups, self.max_request_bytes = lookups, max_request_bytes
        self.loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._ok = metrics.direct_lookups.labels(grpc.StatusCode.OK.name)
        # Of 0.5 to 4 MiB, two of gRPC's chunks were the fastest.
        self.piece_bytes = 2 * lookups.chunk_bytes
        self._buffer_bytes = max(lookups.inline_bytes, self.piece_bytes) + _MARGIN_BYTES
        self._spare: list[Buffer] = []
        self.waste = memoryview(bytearray(SMALL_REQUEST_BYTES))

    def take_buffer(self, nbytes: int) -> Buffer:
        """A buffer of at least `nbytes`, to be given back once nobody reads it."""
        if nbytes > self._buffer_bytes:
            return np.empty(nbytes, np.uint8)
        return self._spare.pop() if self._spare else np.empty(self._buffer_bytes, np.uint8)

    def give_back(self, buffer: Buffer) -> None:
        """Keep a buffer for the next answer."""
        if buffer.size == self._buffer_bytes and len(self._spare) < _SPARE_BUFFERS:
            self._spare.append(buffer)

    def refusal(self, error: Exception) -> bytes:
        """Count one of Refusals; gives the frame that says it."""
        code, reason = self.lookups.refused(error)
        self.ended(code)
        text = str(error).encode()[:_MAX_TEXT_BYTES].decode(errors="ignore")
        refusal = pool_pb2.Refusal(code=code.value[0], reason=reason, text=text)
        return frames.frame(frames.REFUSED, refusal.SerializeToString())

    def cut(self, reason: str) -> None:
        """Count a connection that is cut off."""
        self._metrics.direct_cut.labels(reason).inc()

    def answered(self, job: Job, times: wire.ServerTimes) -> None:
        """Count a lookup that was answered."""
        self.lookups.count("Direct", job, times)
        self._ok.inc()

    def ended(self, code: grpc.StatusCode) -> None:
        """Count a lookup, or a connection, that was not."""
        self._metrics.direct_lookups.labels(code.name).inc()
