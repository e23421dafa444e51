"""Answers of the direct lane that Python gives: lookups that the loop leaves to it, and refusals."""

import time
from collections.abc import Callable

import grpc
import numpy as np
import numpy.typing as npt

from engrampool_proto import frames, wire
from engrampool_proto.kernels.sockets import ENDED, SCRATCH_WORDS, send_from
from engrampool_proto.kernels.tier import await_due
from engrampool_server.answer.emulation import Reading
from engrampool_server.answer.in_flight import Peer
from engrampool_server.answer.lane.resources import Resources
from engrampool_server.answer.lookups import Job, Piece, Refusals, check_deadline, cut

# Within so long a caller takes the next of what it is sent.
PATIENCE_S = 10.0


class CutError(Exception):
    """The connection ends here. reason: as it is counted; "" for one that the caller ended."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Answerer:
    """Answers on one connection, in its thread, and counts what it holds.

    peer: whom that is counted for; another one, of another place, only while nothing is held.
    leaving: int64 [1], not 0 once no more requests are taken.
    """

    def __init__(self, resources: Resources, peer: Peer, line: int, leaving: npt.NDArray[np.int64]) -> None:
        self._resources, self.peer, self._line, self._leaving = resources, peer, line, leaving
        self._scratch = np.zeros(SCRATCH_WORDS, np.int64)
        self._held = 0  # bytes in flight, of the request and its answer

    # --- bytes in flight

    def reserve_request(self, nbytes: int) -> None:
        """Count a request that takes so many bytes by now. Raises RefusedError; then nothing of it is counted."""
        try:
            self._reserve(nbytes - self._held)
        except Refusals:
            self.let_go()
            raise

    def _reserve(self, nbytes: int, rows: int = 0) -> None:
        self._resources.lookups.reserve(nbytes, self.peer, rows)
        self._held += nbytes

    def let_go(self) -> None:
        """Nothing of a request or an answer is in memory any more."""
        held, self._held = self._held, 0
        self._resources.lookups.release(held, self.peer)

    # --- answers

    def answer(self, read: Callable[[], Job], nbytes: int, number: int, arrived_ns: int, timeout_us: int) -> None:
        """Answer what `read` gives, or refuse what it raises. Raises CutError.

        nbytes: of the request. arrived_ns: when it began to come, by time.monotonic_ns. timeout_us: from then on; 0 for
        none.
        """
        lookups = self._resources.lookups
        until = arrived_ns + timeout_us * 1000 if 0 < timeout_us < 1 << 50 else -1
        try:
            job = read()
            inline = job.answer_bytes + nbytes <= lookups.inline_bytes
            self._reserve(job.answer_bytes if inline else lookups.bytes_in_pieces(job), job.rows)
            begin = time.monotonic_ns()
            remaining_s = None if until < 0 else (until - begin) / 1e9
            check_deadline(remaining_s)
            pieces = cut(job.resolve(remaining_s), self._resources.piece_bytes)
        except Refusals as error:
            self.refuse(error, number)
            return
        try:
            resolved, emulation = time.monotonic_ns(), lookups.emulation
            reading = None if emulation is None else emulation.read(job.answer_bytes, resolved)
            gathered = resolved - begin + self._send_pieces(pieces, number, until, reading)
            end = time.monotonic_ns()
            times = wire.ServerTimes((begin - arrived_ns) // 1000, gathered // 1000, (end - arrived_ns) // 1000)
            self._send(np.frombuffer(frames.end(number, times), np.uint8), until)
        except CutError:
            self._resources.ended(grpc.StatusCode.CANCELLED)
            raise
        self._resources.answered(job, times)
        if lookups.slow.over(times):
            who = self.peer if isinstance(self.peer, str) else self.peer.name
            lookups.slow.note("Direct", number, who, job.rows, times)

    def _send_pieces(self, pieces: list[Piece], number: int, until: int, reading: Reading | None) -> int:
        """Gather and send them; gives the nanoseconds that gathering took."""
        size, gathered = frames.HEADER.size + max(piece.nbytes for piece in pieces), 0
        buffer = self._resources.take_buffer(size)
        for piece in pieces:
            begin = time.monotonic_ns()
            stop = frames.HEADER.size + piece.nbytes
            start = frames.rows_start(number, piece.table.spec.layer, piece.first, piece.nbytes)
            buffer[: frames.HEADER.size] = np.frombuffer(start, np.uint8)
            piece.table.gather(piece.ids, buffer[frames.HEADER.size : stop])
            if reading is not None:
                due = reading.due_ns(piece.nbytes, begin)
                self._check_sent(await_due(self._line, due, until, self._leaving, self._scratch), until)
            gathered += time.monotonic_ns() - begin
            self._send(buffer[:stop], until)
        return gathered

    def refuse(self, error: Exception, number: int) -> None:
        """Say no to a request; the next one may come. Raises CutError, as for a caller that only asks."""
        self.let_go()
        self._send(np.frombuffer(self._resources.refusal(error, number), np.uint8), -1)

    def send(self, frame: bytes) -> None:
        """Send a frame of ours. Raises CutError."""
        self._send(np.frombuffer(frame, np.uint8), -1)

    def _send(self, data: npt.NDArray[np.uint8], until: int) -> None:
        self._check_sent(send_from(self._line, data, until, round(PATIENCE_S * 1e9), self._scratch), until)

    @staticmethod
    def _check_sent(sent: int, until: int) -> None:
        """Raise CutError for what is no number of bytes."""
        if sent == ENDED:
            raise CutError("")
        if sent < 0:
            raise CutError("" if 0 <= until <= time.monotonic_ns() else "unread-answer")
