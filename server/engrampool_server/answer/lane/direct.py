"""The direct lane: lookups over plain sockets, for callers that gRPC let in. docs/PROTOCOL.md has its frames.

What may be asked, what is refused and what is counted is lookups.py's, as it is for gRPC; here are only frames. An
answer is gathered into buffers that the kernel copies from, and into one more while the last one is still on its way.
"""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import cast

import grpc
import numpy as np
import numpy.typing as npt

from engrampool_proto import frames, wire
from engrampool_proto.v1 import pool_pb2
from engrampool_server.answer import peers
from engrampool_server.answer.lane.callers import Callers
from engrampool_server.answer.lane.entrance import Entrance
from engrampool_server.answer.lookups import (
    SMALL_REQUEST_BYTES,
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
from engrampool_server.telemetry import log
from engrampool_server.telemetry.metrics import Metrics

_TICKET_VALID_S = 10.0
# A connection without a ticket may stay for so long.
_HELLO_S = 5.0
# How long a refusal that ends the connection may take to arrive, while what the peer still sends is thrown away.
_LINGER_S = 2.0
# Within so long a caller takes the next piece of its answer, and a request that has begun ends or goes on by so much.
_PATIENCE_S = 10.0
_PROGRESS_BYTES = 1 << 20
_ACCEPT_AGAIN_S = 1.0
# A caller that vanished without a word is noticed after so long: one that is idle by the system's questions, the first
# of them after _KEEP_IDLE_S, and one that was sent something as that is not acknowledged.
_KEEP_IDLE_S, _KEEP_EVERY_S, _UNACKNOWLEDGED_S = 30, 10, 60
# Beside the rows, in a buffer: heads and the end of the answer.
_MARGIN_BYTES = 64 << 10
# What frames of a stranger and of a caller are read into. A larger request has memory of its own, which grows as bytes
# come: whoever only promises them takes little.
_HELLO_BYTES = frames.HEADER.size + frames.MAX_TICKET_BYTES + 1
_READ_BYTES = SMALL_REQUEST_BYTES
_FIRST_BYTES = 1 << 20
_GROWTH = 4
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
        self._connections: Callers[_Connection] = Callers()
        self._empty = asyncio.Event()
        # Of 0.5 to 4 MiB, two of gRPC's chunks were the fastest.
        self.piece_bytes = 2 * lookups.chunk_bytes
        self._buffer_bytes = max(lookups.inline_bytes, self.piece_bytes) + _MARGIN_BYTES
        self._spare: list[_Buffer] = []
        self.waste = memoryview(bytearray(_READ_BYTES))

    def start(self) -> None:
        """Take connections."""
        self.loop = asyncio.get_running_loop()
        self._listening = True
        self.loop.add_reader(self._entrance.listener.fileno(), self._accept)

    def admit_one(self, peer: str) -> pool_pb2.OpenDirectResponse:
        """Let a caller of that peer in, once. Raises RefusedError."""
        ticket = self._entrance.tickets.issue(_TICKET_VALID_S, peer)
        if ticket is None:
            text = "too many tickets are asked for at this moment; try again later"
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
        for connection in self._connections:
            connection.leave()
        try:
            await asyncio.wait_for(self._gone(), drain_s)
        except TimeoutError:
            for connection in self._connections:
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
        try:
            connection = _Connection(self, peers.of_connection(accepted))
            displaced = self._connections.come(connection, connection.peer)
        except OSError:  # it left already
            accepted.close()
            return
        except RefusedError as error:
            with accepted, suppress(OSError):
                accepted.send(self.refusal(error))
            return
        if displaced is not None:  # which has its transport: those after it came one by one
            displaced.cut("stranger")
        self._metrics.direct_connections.set(len(self._connections))
        task = self.loop.create_task(self._connect(accepted, connection))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    def _accept_again(self) -> None:
        if self._listening:
            self.loop.add_reader(self._entrance.listener.fileno(), self._accept)

    async def _connect(self, accepted: socket.socket, connection: "_Connection") -> None:
        try:
            if accepted.family != socket.AF_UNIX:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_IDLE_S)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEP_EVERY_S)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_S * 1000)
            await self.loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError:  # it left already
            accepted.close()
            self.left(connection)

    # --- for connections

    def admit(self, connection: "_Connection", ticket: bytes) -> bool:
        """Whether the ticket lets the connection in."""
        good = self._entrance.tickets.take(ticket)
        if good:
            self._connections.admitted(connection)
        return good

    def left(self, connection: "_Connection") -> None:
        """Forget a connection."""
        self._connections.left(connection)
        self._metrics.direct_connections.set(len(self._connections))
        if not self._connections:
            self._empty.set()

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
    """One caller: says hello with its ticket, then asks for one thing at a time.

    peer: whose it is; see peers.py.
    """

    def __init__(self, lane: DirectLane, peer: str) -> None:
        self._lane, self.peer = lane, peer
        self._kind = frames.HELLO  # of the frame that may come next
        self._view = self._small = memoryview(bytearray(_HELLO_BYTES))
        self._filled = 0
        self._form: _Form | None = None  # of the last small request
        # Answering: what comes meanwhile comes too early. Ending: what comes is thrown away. Leaving: the answer under
        # way is the last one.
        self._answering = self._ending = self._leaving = self._gone = False
        self._unwanted: tuple[int, RefusedError] | None = None  # a request to be read to this end, then refused
        self._paused = self._unread = False
        self._resumed: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None  # to the end of anything but waiting for a request
        self._held = 0  # bytes in flight, of the request and its answer
        self._shown = False  # whether Prometheus saw them

    # --- the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Whatever the system does not take at once pauses us: only then is a buffer still in use after `write`.
        self._transport.set_write_buffer_limits(high=0)
        self._within(_HELLO_S, "no-hello")

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._ending or self._answering:  # whatever it is, it will not be read
            return self._lane.waste
        if self._unwanted is not None:
            return self._lane.waste[: self._unwanted[0] - self._filled]
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._ending:
            return
        if self._answering:
            self.abort()
            return
        self._filled += nbytes
        if self._unwanted is not None:
            self._pass_over(*self._unwanted)
        elif self._filled >= frames.HEADER.size:
            self._read()
        elif self._timer is None:
            self._await_rest(0)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._unread:
            self._unread = False
            self._no_timer()
            self._transport.resume_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._no_timer()
        if not self._answering:  # else whoever does lets go, once nothing is gathered any more
            self._let_go()
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

    def cut(self, reason: str) -> None:
        """Close at once, for a reason to be counted."""
        self._lane.cut(reason)
        self._transport.abort()

    # --- bounds

    def _within(self, seconds: float, reason: str) -> None:
        """Have the connection cut off after that time, unless `_no_timer` is called before."""
        self._no_timer()
        self._timer = self._lane.loop.call_later(seconds, self.cut, reason)

    def _no_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _await_rest(self, before: int) -> None:
        """Have a request that has begun end or go on in time. before: bytes of it that were there the last time."""
        if before and self._filled - before < _PROGRESS_BYTES:
            self.cut("slow-request")
        else:
            self._timer = self._lane.loop.call_later(_PATIENCE_S, self._await_rest, self._filled)

    def _reserve(self, nbytes: int) -> None:
        """Count bytes as in flight, until `_let_go`. Raises RefusedError."""
        self._lane.lookups.reserve(nbytes, self.peer)
        self._held += nbytes

    def _let_go(self) -> None:
        """Nothing of a request or an answer is in memory any more."""
        held, self._held = self._held, 0
        self._lane.lookups.release(held, self.peer)
        if self._shown:
            self._shown = False
            self._lane.lookups.show_in_flight()

    def _show(self) -> None:
        """Have Prometheus see what is in flight, and later that it is no more."""
        self._shown = True
        self._lane.lookups.show_in_flight()

    def _fail(self) -> None:
        """Something went wrong that no caller can be told: it is to be raised, and this connection ends."""
        self._let_go()
        self._lane.ended(grpc.StatusCode.INTERNAL)
        self.cut("failed")

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
        if self._filled < total:
            if self._timer is None:
                self._await_rest(0)
            if self._filled == len(self._view):
                self._grow(total)
            return
        if self._filled > total:
            self._end(_malformed("one frame at a time: wait for the answer"))
            return
        if hello:
            ticket = bytes(self._view[frames.HEADER.size : total])
            self._filled = 0
            self._greet(ticket)
            return
        if self._timer is not None:
            self._no_timer()
        (timeout_us,) = frames.TIMEOUT.unpack_from(self._view, frames.HEADER.size)
        message = self._view[_MESSAGE_AT:total].toreadonly()
        self._view, self._filled = self._small, 0
        self._ask(message, timeout_us / 1e6 if timeout_us else None)

    def _grow(self, total: int) -> None:
        """Have room for more of a frame of `total` bytes; where there is none, for nothing of it."""
        size = min(total, max(_FIRST_BYTES, _GROWTH * len(self._view)))
        try:
            self._reserve(size - self._held)
        except RefusedError as error:
            self._let_go()
            self._view = self._small
            self._unwanted = total, error
            return
        self._show()
        larger = np.empty(size, np.uint8).data
        larger[: self._filled] = self._view
        self._view = larger

    def _pass_over(self, total: int, error: RefusedError) -> None:
        """Refuse a request that there was no room for, once all of it came: the next one may come after it."""
        if self._filled == total:
            self._unwanted, self._filled = None, 0
            self._no_timer()
            self._refuse(error)

    def _greet(self, ticket: bytes) -> None:
        if not self._lane.admit(self, ticket):
            text = "the ticket is not good, or no more; ask for one by OpenDirect"
            self._end(RefusedError(grpc.StatusCode.UNAUTHENTICATED, "bad-ticket", text))
            return
        self._no_timer()
        self._kind = frames.REQUEST
        self._view = self._small = memoryview(bytearray(_READ_BYTES))
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
            if job.answer_bytes + len(message) <= lookups.inline_bytes:
                self._reserve(job.answer_bytes)
                self._answer_small(job, form, message, arrived, timeout_s)
            else:
                self._reserve(lookups.bytes_in_pieces(job))
                self._answering = True
                self._task = self._lane.loop.create_task(self._answer_large(job, arrived, timeout_s))
        except Refusals as error:
            self._let_go()
            self._refuse(error)
        except BaseException:
            self._fail()
            raise

    def _answer_small(
        self, job: Job, form: "_Form | None", message: memoryview, arrived: float, timeout_s: float | None
    ) -> None:
        """In one go, within the call that brought the request. form: that of the request, if it is known.

        Raises one of Refusals.
        """
        lane = self._lane
        begin = time.perf_counter()
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
        buffer = lane.take_buffer(layout.nbytes)
        answer, times = layout.fill(buffer, arrived, begin)
        self._transport.write(answer)
        if self._paused:
            self._answering = True
            self._form = None  # which would keep the buffer for as long as the connection is open
            self._show()
            self._task = lane.loop.create_task(self._wait_sent(buffer, timeout_s))
        else:
            lane.give_back(buffer)
            self._let_go()
        lane.answered(job, times)

    async def _wait_sent(self, buffer: _Buffer, timeout_s: float | None) -> None:
        """The end of a small answer that the system did not take at once."""
        try:
            with self._deadline(timeout_s):
                await self._sent()
        except _GoneError:
            return
        finally:
            self._let_go()
        self._lane.give_back(buffer)
        self._answered()

    async def _answer_large(self, job: Job, arrived: float, timeout_s: float | None) -> None:
        """Piece by piece, each gathered while the one before it is sent; others have their turn between two."""
        lane = self._lane
        buffers: list[_Buffer] = []
        self._show()
        try:
            deadline = None if timeout_s is None else arrived + timeout_s
            with self._deadline(timeout_s):
                times = await self._send_pieces(job, buffers, arrived, deadline)
        except _GoneError:
            lane.ended(grpc.StatusCode.CANCELLED)
            return
        except Refusals as error:
            self._answered()
            self._refuse(error)
            return
        except BaseException:
            self._fail()
            raise
        finally:
            self._let_go()
        # Only where everything was sent: else the system may still read them.
        for buffer in buffers:
            lane.give_back(buffer)
        self._answered()
        lane.answered(job, times)

    async def _send_pieces(
        self, job: Job, buffers: list[_Buffer], arrived: float, deadline: float | None
    ) -> wire.ServerTimes:
        """Send an answer from `buffers`, which are taken here. Raises _GoneError, one of Refusals."""
        lane, lookups = self._lane, self._lane.lookups
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
        return times

    @contextmanager
    def _deadline(self, timeout_s: float | None) -> Iterator[None]:
        """Close the connection when its caller waits no more."""
        timer = None if timeout_s is None else self._lane.loop.call_later(timeout_s, self.abort)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _answered(self) -> None:
        """Be ready for the next request."""
        self._answering = False
        if self._leaving:
            self._transport.close()

    async def _sent(self) -> None:
        """Until the system has taken all that was written. Raises _GoneError, as for a caller who reads nothing."""
        if self._paused and not self._gone:
            timer = self._lane.loop.call_later(_PATIENCE_S, self.cut, "unread-answer")
            try:
                while self._paused and not self._gone:
                    self._resumed = self._lane.loop.create_future()
                    await self._resumed
            finally:
                timer.cancel()
        if self._gone or self._transport.is_closing():
            raise _GoneError

    def _wake(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)

    def _refuse(self, error: Exception) -> None:
        """Say no to a request; the next one may come."""
        self._transport.write(self._lane.refusal(error))
        if self._paused:  # a caller who only asks, and never listens
            self._unread = True
            self._transport.pause_reading()
            self._within(_PATIENCE_S, "unread-answer")

    def _end(self, error: RefusedError) -> None:
        """Say why, and close. What the peer still sends is read, or the system would take back what we said."""
        self._ending = True
        self._let_go()
        self._transport.write(self._lane.refusal(error))
        self._transport.write_eof()
        self._no_timer()
        self._timer = self._lane.loop.call_later(_LINGER_S, self.abort)


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
