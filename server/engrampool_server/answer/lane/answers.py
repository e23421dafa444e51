"""How the direct lane answers: an answer is gathered into buffers that the kernel copies from.

A small one is sent within the call that brought the request. A large one goes piece by piece, each gathered while the
one before it is still on its way.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import numpy as np

from engrampool_proto import frames, wire
from engrampool_server.answer.lane.resources import Buffer, Resources
from engrampool_server.answer.lookups import Job, Piece, Refusals, RefusedError, check_deadline, cut, server_times

# Within so long a caller takes the next piece of its answer.
PATIENCE_S = 10.0
_END_BYTES = len(frames.end(wire.ServerTimes(0, 0, 0)))


class _GoneError(Exception):
    """The caller closed its connection in the midst of an answer."""


class Answerer:
    """Answers what one connection asks for, one request at a time. peer: whose it is; see peers.py.

    busy: whether an answer is under way. paused: whether the system did not take all that was written.
    """

    def __init__(self, resources: Resources, peer: str) -> None:
        self._resources, self._peer = resources, peer
        self._template: RequestTemplate | None = None  # of the last small request
        self.busy = False
        self._leaving = False  # the answer under way is the last one
        self._gone = self.paused = self._unread = False
        self._resumed: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None  # to the end of waiting for refusals to be read
        self._held = 0  # bytes in flight, of the request and its answer
        self._shown = False  # whether Prometheus saw them

    # --- the connection

    def connected(self, transport: asyncio.Transport) -> None:
        """There is a connection to answer on."""
        self._transport = transport
        # Whatever the system does not take at once pauses us: only then is a buffer still in use after `write`.
        transport.set_write_buffer_limits(high=0)

    def pause(self) -> None:
        """The system did not take all that was written."""
        self.paused = True

    def resume(self) -> None:
        """The system has taken all that was written."""
        self.paused = False
        if self._unread:
            self._unread = False
            self._no_timer()
            self._transport.resume_reading()
        self._wake()

    def lost(self) -> None:
        """The connection is closed."""
        self._gone = True
        self._no_timer()
        if not self.busy:  # else whoever is lets go, once nothing is gathered any more
            self._let_go()
        self._wake()

    def leave(self) -> None:
        """Close, once the answer under way is sent."""
        self._leaving = True
        if not self.busy:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def cut(self, reason: str) -> None:
        """Close at once, for a reason to be counted."""
        self._resources.cut(reason)
        self._transport.abort()

    def _no_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- bytes in flight

    def reserve_request(self, nbytes: int) -> None:
        """Count a request that takes so many bytes by now. Raises RefusedError; then nothing of it is counted."""
        try:
            self._reserve(nbytes - self._held)
        except RefusedError:
            self._let_go()
            raise
        self._show()

    def _reserve(self, nbytes: int) -> None:
        """Count bytes as in flight, until `_let_go`. Raises RefusedError."""
        self._resources.lookups.reserve(nbytes, self._peer)
        self._held += nbytes

    def _let_go(self) -> None:
        """Nothing of a request or an answer is in memory any more."""
        held, self._held = self._held, 0
        self._resources.lookups.release(held, self._peer)
        if self._shown:
            self._shown = False
            self._resources.lookups.show_in_flight()

    def _show(self) -> None:
        """Have Prometheus see what is in flight, and later that it is no more."""
        self._shown = True
        self._resources.lookups.show_in_flight()

    # --- answers

    def welcome(self) -> None:
        """Say that requests may come."""
        self._transport.write(frames.frame(frames.READY))

    def ask(self, message: memoryview, timeout_s: float | None, in_place: bool) -> None:
        """Answer a request, or refuse it. in_place: it lies where the next ones will, as far as they are small."""
        arrived = time.perf_counter()
        lookups = self._resources.lookups
        template = self._template
        try:
            if template is None or not template.fits(message):
                job, template = lookups.check(message), None
            else:
                job = template.job
            if job.answer_bytes + len(message) <= lookups.inline_bytes:
                self._reserve(job.answer_bytes)
                self._answer_small(job, template, message, arrived, timeout_s, in_place)
            else:
                self._reserve(lookups.bytes_in_pieces(job))
                self.busy = True
                self._task = self._resources.loop.create_task(self._answer_large(job, arrived, timeout_s))
        except Refusals as error:
            self._let_go()
            self.refuse(error)
        except BaseException:
            self._fail()
            raise

    def refuse(self, error: Exception) -> None:
        """Say no to a request; the next one may come."""
        self._transport.write(self._resources.refusal(error))
        if self.paused:  # a caller who only asks, and never listens
            self._unread = True
            self._transport.pause_reading()
            self._no_timer()
            self._timer = self._resources.loop.call_later(PATIENCE_S, self.cut, "unread-answer")

    def refuse_for_good(self, error: RefusedError) -> None:
        """Say no to all that may come."""
        self._let_go()
        self._transport.write(self._resources.refusal(error))
        self._transport.write_eof()

    def _fail(self) -> None:
        """Something went wrong that no caller can be told: it is to be raised, and this connection ends."""
        self._let_go()
        self._resources.ended(grpc.StatusCode.INTERNAL)
        self.cut("failed")

    def _answer_small(
        self,
        job: Job,
        template: "RequestTemplate | None",
        message: memoryview,
        arrived: float,
        timeout_s: float | None,
        in_place: bool,
    ) -> None:
        """In one go, within the call that brought the request. template: that it fits, if any.

        Raises one of Refusals.
        """
        resources = self._resources
        begin = time.perf_counter()
        remaining_s = None if timeout_s is None else timeout_s - (begin - arrived)
        if template is not None:
            check_deadline(remaining_s)
            for table, (_, ids) in zip(job.tables, job.request.tables, strict=True):
                table.check(ids)
            layout = template.layout
        else:
            layout = AnswerLayout(cut(job.resolve(remaining_s), resources.piece_bytes))
            if in_place and job.request.tokens is None:
                self._template = RequestTemplate(message, job, layout)
        buffer = resources.take_buffer(layout.nbytes)
        answer, times = layout.fill(buffer, arrived, begin)
        self._transport.write(answer)
        if self.paused:
            self.busy = True
            self._template = None  # which would keep the buffer for as long as the connection is open
            self._show()
            self._task = resources.loop.create_task(self._wait_sent(buffer, timeout_s))
        else:
            resources.give_back(buffer)
            self._let_go()
        resources.answered(job, times)

    async def _wait_sent(self, buffer: Buffer, timeout_s: float | None) -> None:
        """The end of a small answer that the system did not take at once."""
        try:
            with self._deadline(timeout_s):
                await self._sent()
        except _GoneError:
            return
        finally:
            self._let_go()
        self._resources.give_back(buffer)
        self._answered()

    async def _answer_large(self, job: Job, arrived: float, timeout_s: float | None) -> None:
        """Piece by piece, each gathered while the one before it is sent; others have their turn between two."""
        resources = self._resources
        buffers: list[Buffer] = []
        self._show()
        try:
            deadline = None if timeout_s is None else arrived + timeout_s
            with self._deadline(timeout_s):
                times = await self._send_pieces(job, buffers, arrived, deadline)
        except _GoneError:
            resources.ended(grpc.StatusCode.CANCELLED)
            return
        except Refusals as error:
            self._answered()
            self.refuse(error)
            return
        except BaseException:
            self._fail()
            raise
        finally:
            self._let_go()
        # Only where everything was sent: else the system may still read them.
        for buffer in buffers:
            resources.give_back(buffer)
        self._answered()
        resources.answered(job, times)

    async def _send_pieces(
        self, job: Job, buffers: list[Buffer], arrived: float, deadline: float | None
    ) -> wire.ServerTimes:
        """Send an answer from `buffers`, which are taken here. Raises _GoneError, one of Refusals."""
        resources, lookups = self._resources, self._resources.lookups
        begin, pieces = await lookups.resolve_pieces(job, deadline, resources.piece_bytes)
        gathered = time.perf_counter() - begin
        size = max(map(_frame_bytes, pieces)) + _END_BYTES
        buffers += [resources.take_buffer(size) for _ in pieces[:2]]

        def fill(at: int) -> "asyncio.Future[tuple[int, float]]":
            return resources.loop.run_in_executor(lookups.threads, _timed_fill, buffers[at % 2], pieces[at])

        coming = None if lookups.gathers_inline else fill(0)
        for at, piece in enumerate(pieces):
            buffer = buffers[at % 2]
            end, seconds = await coming if coming else _timed_fill(buffer, piece)
            gathered += seconds
            await self._sent()
            if at + 1 < len(pieces):
                coming = coming and fill(at + 1)
                self._transport.write(buffer[:end].data)
                await asyncio.sleep(0)
        times = server_times(arrived, begin, gathered)
        stop = end + _END_BYTES
        buffer[end:stop].data[:] = frames.end(times)
        self._transport.write(buffer[:stop].data)
        await self._sent()
        return times

    @contextmanager
    def _deadline(self, timeout_s: float | None) -> Iterator[None]:
        """Close the connection when its caller waits no more."""
        timer = None if timeout_s is None else self._resources.loop.call_later(timeout_s, self.abort)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _answered(self) -> None:
        """Be ready for the next request."""
        self.busy = False
        if self._leaving:
            self._transport.close()

    async def _sent(self) -> None:
        """Until the system has taken all that was written. Raises _GoneError, as for a caller who reads nothing."""
        if self.paused and not self._gone:
            timer = self._resources.loop.call_later(PATIENCE_S, self.cut, "unread-answer")
            try:
                while self.paused and not self._gone:
                    self._resumed = self._resources.loop.create_future()
                    await self._resumed
            finally:
                timer.cancel()
        if self._gone or self._transport.is_closing():
            raise _GoneError

    def _wake(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)


def _start(piece: Piece) -> bytes:
    return frames.rows_start(piece.table.spec.layer, piece.first, piece.nbytes)


def _frame_bytes(piece: Piece) -> int:
    return len(_start(piece)) + piece.nbytes


def _fill(buffer: Buffer, piece: Piece) -> int:
    """Write the frame of a piece; gives where it ends. Raises BatchError."""
    start = _start(piece)
    stop = len(start) + piece.nbytes
    buffer.data[: len(start)] = start
    piece.table.gather(piece.ids, buffer[len(start) : stop])
    return stop


def _timed_fill(buffer: Buffer, piece: Piece) -> tuple[int, float]:
    begin = time.perf_counter()
    return _fill(buffer, piece), time.perf_counter() - begin


class AnswerLayout:
    """Where everything of a small answer lies in its buffer. nbytes: of the buffer."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces
        self._buffer: Buffer | None = None
        self.nbytes = sum(map(_frame_bytes, pieces)) + _END_BYTES

    def fill(self, buffer: Buffer, arrived: float, begin: float) -> tuple[memoryview, wire.ServerTimes]:
        """Gather into `buffer`; gives what is to be written. arrived, begin: as for `server_times`."""
        if buffer is not self._buffer:  # most often it is that of the answer before
            self._bind(buffer)
        view = self._view
        for start, at, rows_at, piece, rows in self._runs:
            view[at:rows_at] = start
            piece.table.gather(piece.ids, rows)
        times = server_times(arrived, begin, time.perf_counter() - begin)
        view[self.nbytes - _END_BYTES :] = frames.end(times)
        return view, times

    def _bind(self, buffer: Buffer) -> None:
        self._buffer, self._view = buffer, buffer[: self.nbytes].data
        self._runs: list[tuple[bytes, int, int, Piece, Buffer]] = []
        at = 0
        for piece in self._pieces:
            start = _start(piece)
            rows_at = at + len(start)
            stop = rows_at + piece.nbytes
            self._runs.append((start, at, rows_at, piece, buffer[rows_at:stop]))
            at = stop


class RequestTemplate:
    """A request for rows by id, and how it was answered, for those like it: all but the ids is the same.

    The ids are views into where the request lies, and so become those of the next request that lies there.
    """

    def __init__(self, message: memoryview, job: Job, layout: AnswerLayout) -> None:
        self.job, self.layout = job, layout
        self._nbytes = len(message)
        base = np.frombuffer(message, np.uint8).ctypes.data
        self._between: list[tuple[int, int, bytes]] = []  # what is not ids: from, to, bytes
        at = 0
        for _, ids in job.request.tables:
            start = ids.ctypes.data - base if ids.size else at
            self._between.append((at, start, bytes(message[at:start])))
            at = start + ids.nbytes
        self._between.append((at, self._nbytes, bytes(message[at:])))

    def fits(self, message: memoryview) -> bool:
        """Whether a request, in the same place, differs from this one in its ids at most."""
        return len(message) == self._nbytes and all(message[start:stop] == same for start, stop, same in self._between)
