"""What all connections of the direct lane in one process have in common: the lookups, their bounds, and counts."""

import threading

import grpc
import numpy as np
import numpy.typing as npt

from engrampool_proto import frames, wire
from engrampool_proto.kernels import serve
from engrampool_proto.v1 import pool_pb2
from engrampool_server.answer.lookups import SMALL_REQUEST_BYTES, Job, Lookups
from engrampool_server.telemetry.metrics import Metrics

# What the loop gathers before it sends. More would leave the processor's nearest cache.
GATHERED_BYTES = 160 << 10
_MAX_TEXT_BYTES = 3000

Buffer = npt.NDArray[np.uint8]


class Resources:
    """For all connections of a process, in whichever thread.

    buckets_us: bounds of the buckets of times. piece_bytes: at most so many bytes of rows are gathered at a time where
    Python does it. spin_s: how long the next request of a connection is looked for without sleeping.
    """

    def __init__(self, lookups: Lookups, metrics: Metrics, max_request_bytes: int, spin_s: float = 0.0) -> None:
        self.lookups, self.metrics, self.max_request_bytes = lookups, metrics, max_request_bytes
        self._spin_s = spin_s
        self.buckets_us = metrics.buckets_us
        self.piece_bytes = 2 * lookups.chunk_bytes
        self._answers = metrics.answers_of_direct()
        # Counts that are no cells are one thread's at a time.
        self._counting = threading.Lock()

    def limits(self, patience_s: float, progress_bytes: int) -> npt.NDArray[np.int64]:
        """What `serve` goes by: int64 [LIMIT_WORDS]."""
        lookups = self.lookups
        words = np.zeros(serve.LIMIT_WORDS, np.int64)
        words[serve.PATIENCE], words[serve.PROGRESS] = round(patience_s * 1e9), progress_bytes
        words[serve.SPIN], words[serve.MAX_REQUEST] = round(self._spin_s * 1e9), self.max_request_bytes
        words[serve.MAX_ROWS], words[serve.MAX_ANSWER] = (
            lookups.limits.max_rows_per_request,
            lookups.limits.max_answer_bytes,
        )
        words[serve.INLINE], words[serve.HELD] = lookups.inline_bytes, lookups.held_in_pieces
        words[serve.IN_FLIGHT], words[serve.SHARE] = lookups.in_flight.limit_bytes, lookups.in_flight.share_bytes
        words[serve.LARGE_BUFFER] = SMALL_REQUEST_BYTES
        words[serve.ANSWERS], words[serve.SLOW_US] = self._answers.ctypes.data, lookups.slow.limit_us
        if lookups.emulation is not None:
            words[serve.TIER :] = lookups.emulation.words
        return words

    def take_buffer(self, nbytes: int) -> Buffer:
        """Memory for a request or for rows, whose address is a multiple of 8."""
        return np.empty(nbytes, np.uint8)

    def refusal(self, error: Exception, number: int = 0, peer: str = "") -> bytes:
        """Count one of Refusals, and log it if a `peer` asked; gives the frame that says it."""
        code, reason = self.lookups.refused(error)
        self.ended(code)
        if peer:
            self.lookups.refusals.note("Direct", peer, reason, str(error), lambda: number)
        text = str(error).encode()[:_MAX_TEXT_BYTES].decode(errors="ignore")
        refusal = pool_pb2.Refusal(code=code.value[0], reason=reason, text=text)
        return frames.frame(frames.REFUSED, refusal.SerializeToString(), number)

    def cut(self, reason: str) -> None:
        """Count a connection that is cut off."""
        with self._counting:
            self.metrics.direct_cut.labels(reason).inc()

    def ended(self, code: grpc.StatusCode) -> None:
        """Count a lookup, or a connection, that was not answered."""
        with self._counting:
            self.metrics.direct_lookups.labels(code.name).inc()

    def answered(self, job: Job, times: wire.ServerTimes) -> None:
        """Count a lookup that Python answered, where the loop counts its own."""
        model = job.model.spec.name
        cells = self.metrics.times_of_direct(model)
        for row, micros in zip(cells, (times.queue_us, times.gather_us, times.total_us), strict=True):
            serve.observe(row.ctypes.data, self.buckets_us, micros)
        for layer, rows, nbytes in job.counts:
            count = self.metrics.rows_of_direct(model, layer)
            serve.count(count.ctypes.data, rows)
            serve.count(count.ctypes.data + count.itemsize, nbytes)
        serve.count(self._answers.ctypes.data, 1)
