"""The direct lane: lookups over plain sockets, for callers that gRPC let in. docs/PROTOCOL.md has its frames.

What may be asked, what is refused and what is counted is lookups.py's, as it is for gRPC; here are only frames. An
answer is gathered into buffers that the kernel copies from, and into one more while the last one is still on its way.
"""

import asyncio
import socket
import time
from typing import cast

import grpc
import numpy as np
import numpy.typing as npt

from engrampool_proto import frames, wire
from engrampool_proto.v1 import pool_pb2
from engrampool_server import log
from engrampool_server.entrance import Entrance
from engrampool_server.lookups import (
    Job,
    Lookups,
    Piece,
    Refusals,
    RefusedError,
    check_deadline,
    cut,
    invalid,
    server_times,
)
from engrampool_server.metrics import Metrics

_TICKET_VALID_S = 10.0
# A connection without a ticket may stay for so long, and there may be so many of them.
_HELLO_S = 5.0
_MAX_STRANGERS = 64
# How long a refusal that ends the connection may take to arrive, while what the peer still sends is thrown away.
_LINGER_S = 2.0
# For a caller without a deadline to take its answer.
_PATIENCE_S = 600.0
_ACCEPT_AGAIN_S = 1.0
# Beside the rows, in a buffer: heads and the end of the answer.
_MARGIN_BYTES = 64 << 10
_READ_BYTES = 64 << 10
_SPARE_BUFFERS = 16
_MAX_TEXT_BYTES = 3000
_MESSAGE_AT = frames.HEADER.size + frames.TIMEOUT.size
_END_BYTES = len(frames.end(wire.ServerTimes(0, 0, 0)))

_Buffer = npt.NDArray[np.uint8]


class DirectLane:
    """Takes connections from the entrance, on the event loop that `start` is called on."""

    def __init__(self, lookups: Lookups, metrics: Metrics, entrance: Entrance, max_request_bytes: int) -> None:
        self.lookups, self.max_request_bytes = lookups, max_request_bytes
        self._metrics, self._entrance = metrics, entrance
        self._ok = metrics.direct_lookups.labels(grpc.StatusCode.OK.name)
        self._listening = False
        self._arriving: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()
        self._strangers: dict[_Connection, None] = {}  # in the order of their arrival
        self._empty = asyncio.Event()
        # Of 0.5 to 4 MiB, two of gRPC's chunks were the fastest.
        self.piece_bytes = 2 * lookups.limits.stream_chunk_bytes
        self._buffer_bytes = max(lookups.inline_bytes, self.piece_bytes) + _MARGIN_BYTES
        self._spare: list[_Buffer] = []
        self.waste = memoryview(bytearray(_READ_BYTES))

    def start(self) -> None:
        """Take connections."""
        self.loop = asyncio.get_running_loop()
        self._listening = True
        self.loop.add_reader(self._entrance.listener.fileno(), self._accept)

    def admit_one(self) -> pool_pb2.OpenDirectResponse:
        """Let a caller in, once. Raises RefusedError."""
        ticket = self._entrance.tickets.issue(_TICKET_VALID_S)
        if ticket is None:
            text = "too many tickets were asked for and not used; try again later"
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded", text)
        return pool_pb2.OpenDirectResponse(
            host=self._entrance.host.strip("[]"),
            port=self._entrance.port,
            unix_path=self._entrance.unix_path,
            ticket=ticket,
            valid_ms=round(_TICKET_VALID_S * 1e3),
        )

    async def stop(self, drain_s: float) -> None:
        """Take no more connections, let answers under way end for up to `drain_s`, close."""
        if not self._listening:
            return
        self._listening = False
        self.loop.remove_reader(self._entrance.listener.fileno())
        if self._arriving:
            await asyncio.wait(self._arriving)
        for connection in list(self._connections):
            connection.leave()
        try:
            await asyncio.wait_for(self._gone(), drain_s)
        except TimeoutError:
            for connection in list(self._connections):
                connection.abort()
            await self._gone()

    async def _gone(self) -> None:
        while self._connections:
            self._empty.clear()
            await self._empty.wait()

    def _accept(self) -> None:
        """Take one connection: where there are more, other workers may be idle."""
        try:
            accepted, _ = self._entrance.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no more descriptors, say
            log.event("direct-accept-failed", level="warning", error=error.strerror)
            self.loop.remove_reader(self._entrance.listener.fileno())
            self.loop.call_later(_ACCEPT_AGAIN_S, self._accept_again)
            return
        accepted.setblocking(False)
        task = self.loop.create_task(self._connect(accepted))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    def _accept_again(self) -> None:
        if self._listening:
            self.loop.add_reader(self._entrance.listener.fileno(), self._accept)

    async def _connect(self, accepted: socket.socket) -> None:
        if accepted.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # callers may vanish without a word
        try:
            await self.loop.connect_accepted_socket(lambda: _Connection(self), accepted)
        except OSError:  # it left already
            accepted.close()

    # --- for connections

    def arrived(self, connection: "_Connection") -> None:
        """Note a connection, without a ticket as yet."""
        self._connections.add(connection)
        self._strangers[connection] = None
        if len(self._strangers) > _MAX_STRANGERS:
            next(iter(self._strangers)).abort()
        self._metrics.direct_connections.set(len(self._connections))

    def admit(self, connection: "_Connection", ticket: bytes) -> bool:
        """Whether the ticket lets the connection in."""
        good = self._entrance.tickets.take(ticket)
        if good:
            self._strangers.pop(connection, None)
        return good

    def left(self, connection: "_Connection") -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        self._strangers.pop(connection, None)
        self._metrics.direct_connections.set(len(self._connections))
        if not self._connections:
            self._empty.set()

    def answered(self, job: Job, times: wire.ServerTimes) -> None:
        """Count a lookup that was answered."""
        self.lookups.count("Direct", job, times)
        self._ok.inc()

    def ended(self, code: grpc.StatusCode) -> None:
        """Count a lookup, or a connection, that was not."""
        self._metrics.direct_lookups.labels(code.name).inc()

    def take_buffer(self, nbytes: int) -> _Buffer:
        """A buffer of at least `nbytes`, to be given back once nobody reads it."""
        if nbytes > self._buffer_bytes:
            return np.empty(nbytes, np.uint8)
        return self._spare.pop() if self._spare else np.empty(self._buffer_bytes, np.uint8)

    def give_back(self, buffer: _Buffer) -> None:
        """Keep a buffer for the next answer."""
        if buffer.size == self._buffer_bytes and len(self._spare) < _SPARE_BUFFERS:
            self._spare.append(buffer)


class _GoneError(Exception):
    """The caller closed its connection in the midst of an answer."""


class _Connection(asyncio.BufferedProtocol):
    """One caller: says hello with its ticket, then asks for one thing at a time."""

    def __init__(self, lane: DirectLane) -> None:
        self._lane = lane
        self._kind = frames.HELLO  # of the frame that may come next
        self._view = self._small = memoryview(bytearray(_READ_BYTES))
        self._filled = 0
        self._form: _Form | None = None  # of the last small request
        # Answering: what comes meanwhile comes too early. Ending: what comes is thrown away. Leaving: the answer under
        # way is the last one.
        self._answering = self._ending = self._leaving = self._gone = False
        self._paused = self._unread = False
        self._resumed: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    # --- the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Whatever the system does not take at once pauses us: only then is a buffer still in use after `write`.
        self._transport.set_write_buffer_limits(high=0)
        self._timer = self._lane.loop.call_later(_HELLO_S, self.abort)
        self._lane.arrived(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._ending or self._answering:  # whatever it is, it will not be read
            return self._lane.waste
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._ending:
            return
        if self._answering:
            self.abort()
            return
        self._filled += nbytes
        if self._filled >= frames.HEADER.size:
            self._read()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._unread:
            self._unread = False
            self._transport.resume_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._timer.cancel()
        self._lane.left(self)
        self._wake()

    # --- the lane's calls

    def leave(self) -> None:
        """Close, once the answer under way is sent."""
        self._leaving = True
        if not self._answering:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    # --- frames

    def _read(self) -> None:
        """Look at what is there, from a header on."""
        length, head, kind = frames.HEADER.unpack_from(self._view)
        if kind != self._kind:
            self._end(_malformed(f"a frame of kind {self._kind} was due; this is of kind {kind}"))
            return
        hello = kind == frames.HELLO
        if head != (length if hello else frames.TIMEOUT.size) or head > min(length, frames.MAX_TICKET_BYTES):
            self._end(_malformed(f"a frame of kind {kind} has no head of {head} bytes out of {length}"))
            return
        if not hello and length - head > self._lane.max_request_bytes:
            text = f"the request is {length - head} bytes, at most {self._lane.max_request_bytes}; split it"
            self._end(invalid(text, "too-many-rows"))
            return
        total = frames.HEADER.size + length
        if total > len(self._view):
            larger = np.empty(total, np.uint8).data  # pages of it come into being as they are written
            larger[: self._filled] = self._view[: self._filled]
            self._view = larger
        if self._filled < total:
            return
        if self._filled > total:
            self._end(_malformed("one frame at a time: wait for the answer"))
            return
        if hello:
            ticket = bytes(self._view[frames.HEADER.size : total])
            self._filled = 0
            self._greet(ticket)
            return
        (timeout_us,) = frames.TIMEOUT.unpack_from(self._view, frames.HEADER.size)
        message = self._view[_MESSAGE_AT:total].toreadonly()
        self._view, self._filled = self._small, 0
        self._ask(message, timeout_us / 1e6 if timeout_us else None)

    def _greet(self, ticket: bytes) -> None:
        if not self._lane.admit(self, ticket):
            text = "the ticket is not good, or no more; ask for one by OpenDirect"
            self._end(RefusedError(grpc.StatusCode.UNAUTHENTICATED, "bad-ticket", text))
            return
        self._timer.cancel()
        self._kind = frames.REQUEST
        self._transport.write(frames.frame(frames.READY))

    def _ask(self, message: memoryview, timeout_s: float | None) -> None:
        arrived = time.perf_counter()
        lookups = self._lane.lookups
        form: _Form | None = self._form
        try:
            if form is None or not form.fits(message):
                job, form = lookups.check(message), None
            else:
                job = form.job
            lookups.reserve(job)
        except Refusals as error:
            self._refuse(error)
            return
        if job.answer_bytes + len(message) <= lookups.inline_bytes:
            self._answer_small(job, form, message, arrived, timeout_s)
        else:
            self._answering = True
            self._task = self._lane.loop.create_task(self._answer_large(job, arrived, timeout_s))

    def _answer_small(
        self, job: Job, form: "_Form | None", message: memoryview, arrived: float, timeout_s: float | None
    ) -> None:
        """In one go, within the call that brought the request. form: that of the request, if it is known."""
        lane = self._lane
        begin = time.perf_counter()
        try:
            remaining_s = None if timeout_s is None else timeout_s - (begin - arrived)
            if form is not None:
                check_deadline(remaining_s)
                for table, (_, ids) in zip(job.tables, job.request.tables, strict=True):
                    table.check(ids)
                layout = form.layout
            else:
                layout = _Layout(cut(job.resolve(remaining_s), lane.piece_bytes))
                if job.request.tokens is None and len(message) <= len(self._small) - _MESSAGE_AT:
                    self._form = _Form(message, job, layout)
        except Refusals as error:
            lane.lookups.release(job)
            self._refuse(error)
            return
        buffer = lane.take_buffer(layout.nbytes)
        try:
            answer, times = layout.fill(buffer, arrived, begin)
            self._transport.write(answer)
        except BaseException:
            lane.lookups.release(job)
            self.abort()
            raise
        if self._paused:
            self._answering = True
            lane.lookups.show_in_flight()
            self._task = lane.loop.create_task(self._wait_sent(job, buffer, timeout_s))
        else:
            lane.give_back(buffer)
            lane.lookups.release(job)
        lane.answered(job, times)

    async def _wait_sent(self, job: Job, buffer: _Buffer, timeout_s: float | None) -> None:
        """The end of a small answer that the system did not take at once."""
        timer = self._lane.loop.call_later(_PATIENCE_S if timeout_s is None else timeout_s, self.abort)
        try:
            await self._sent()
            self._lane.give_back(buffer)
            self._answered()
        except _GoneError:
            pass
        finally:
            timer.cancel()
            self._lane.lookups.release(job)
            self._lane.lookups.show_in_flight()

    async def _answer_large(self, job: Job, arrived: float, timeout_s: float | None) -> None:
        """Piece by piece, each gathered while the one before it is sent; others have their turn between two."""
        lane, lookups = self._lane, self._lane.lookups
        timer = lane.loop.call_later(_PATIENCE_S if timeout_s is None else timeout_s, self.abort)
        buffers: list[_Buffer] = []
        lookups.show_in_flight()
        try:
            deadline = None if timeout_s is None else arrived + timeout_s
            begin, pieces = await lookups.resolve_pieces(job, deadline, lane.piece_bytes)
            gathered = time.perf_counter() - begin
            size = max(map(_frame_bytes, pieces)) + _END_BYTES
            buffers += [lane.take_buffer(size) for _ in pieces[:2]]

            def fill(at: int) -> "asyncio.Future[tuple[int, float]]":
                return lane.loop.run_in_executor(lookups.threads, _timed_fill, buffers[at % 2], pieces[at])

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
        except _GoneError:
            lane.ended(grpc.StatusCode.CANCELLED)
            return
        except Refusals as error:
            self._answered()
            self._refuse(error)
            return
        except BaseException:
            self.abort()
            raise
        finally:
            timer.cancel()
            lookups.release(job)
            lookups.show_in_flight()
        # Only where everything was sent: else the system may still read them.
        for buffer in buffers:
            lane.give_back(buffer)
        self._answered()
        lane.answered(job, times)

    def _answered(self) -> None:
        """Be ready for the next request."""
        self._answering = False
        if self._leaving:
            self._transport.close()

    async def _sent(self) -> None:
        """Until the system has taken all that was written. Raises _GoneError."""
        while self._paused and not self._gone:
            self._resumed = self._lane.loop.create_future()
            await self._resumed
        if self._gone or self._transport.is_closing():
            raise _GoneError

    def _wake(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)

    def _refuse(self, error: Exception) -> None:
        """Say no to a request; the next one may come."""
        self._say_no(error)
        if self._paused:  # a caller who only asks, and never listens
            self._unread = True
            self._transport.pause_reading()

    def _end(self, error: RefusedError) -> None:
        """Say why, and close. What the peer still sends is read, or the system would take back what we said."""
        self._ending = True
        self._say_no(error)
        self._transport.write_eof()
        self._timer.cancel()
        self._timer = self._lane.loop.call_later(_LINGER_S, self.abort)

    def _say_no(self, error: Exception) -> None:
        code, reason = self._lane.lookups.refused(error)
        self._lane.ended(code)
        text = str(error).encode()[:_MAX_TEXT_BYTES].decode(errors="ignore")
        refusal = pool_pb2.Refusal(code=code.value[0], reason=reason, text=text)
        self._transport.write(frames.frame(frames.REFUSED, refusal.SerializeToString()))


def _malformed(text: str) -> RefusedError:
    return invalid(text, "malformed-message")


def _start(piece: Piece) -> bytes:
    return frames.rows_start(piece.table.spec.layer, piece.first, piece.nbytes)


def _frame_bytes(piece: Piece) -> int:
    return len(_start(piece)) + piece.nbytes


def _fill(buffer: _Buffer, piece: Piece) -> int:
    """Write the frame of a piece; gives where it ends. Raises BatchError."""
    start = _start(piece)
    stop = len(start) + piece.nbytes
    buffer.data[: len(start)] = start
    piece.table.gather(piece.ids, buffer[len(start) : stop])
    return stop


def _timed_fill(buffer: _Buffer, piece: Piece) -> tuple[int, float]:
    begin = time.perf_counter()
    return _fill(buffer, piece), time.perf_counter() - begin


class _Layout:
    """Where everything of a small answer is in its buffer. nbytes: of the buffer."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces
        self._buffer: _Buffer | None = None
        self.nbytes = sum(map(_frame_bytes, pieces)) + _END_BYTES

    def fill(self, buffer: _Buffer, arrived: float, begin: float) -> tuple[memoryview, wire.ServerTimes]:
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

    def _bind(self, buffer: _Buffer) -> None:
        self._buffer, self._view = buffer, buffer[: self.nbytes].data
        self._runs: list[tuple[bytes, int, int, Piece, _Buffer]] = []
        at = 0
        for piece in self._pieces:
            start = _start(piece)
            rows_at = at + len(start)
            stop = rows_at + piece.nbytes
            self._runs.append((start, at, rows_at, piece, buffer[rows_at:stop]))
            at = stop


class _Form:
    """A request for rows by id, and how it was answered, for those like it: all but the ids is the same.

    The ids are views into where the request lies, and so become those of the next request that lies there.
    """

    def __init__(self, message: memoryview, job: Job, layout: _Layout) -> None:
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
        """Whether a request, in the same place, is of this form."""
        return len(message) == self._nbytes and all(message[start:stop] == same for start, stop, same in self._between)
