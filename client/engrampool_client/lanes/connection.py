"""One socket of the direct lane: a request sent on it, and the answer received where it belongs."""

import os
import select
import socket
import struct
import threading
import time
from contextlib import nullcontext, suppress

import numpy as np

from engrampool_client.errors import ProtocolError
from engrampool_client.lanes.answers import RefusalError, answer_layout, refusal_of
from engrampool_client.lanes.dial import OPEN_TIMEOUT_S, Secure, dial
from engrampool_client.lookup.exchange import Exchange
from engrampool_proto import frames, wire
from engrampool_proto.security.tls_socket import line_of
from engrampool_proto.v1 import pool_pb2

# A server that is well sends some of its answer within so long. Where nothing came, the connection may be one that was
# forgotten on the way without a word; gRPC, which asks for signs of life, finds out.
_SILENCE_S = 2.0
# Answers up to half this size are read whole into memory of ours, and copied from there.
_SCRATCH_BYTES = 256 << 10
# Requests up to this size fit into what the system buffers for a connection.
_MAY_BLOCK_BYTES = 64 << 10
_TIMEVAL = struct.Struct("@ll")
_HEADER_BYTES = frames.HEADER.size
# How a refusal begins.
_REFUSED = frames.frame(frames.REFUSED)[:4]


class SilentError(ConnectionError):
    """For too long nothing came, though the lookup has more time."""


class Connection:
    """One socket that the server has let in. One lookup at a time; besides, only `give_up` and `shut` may be called."""

    def __init__(self, way_in: pool_pb2.OpenDirectResponse, target: str, secure: Secure | None = None) -> None:
        """secure: as of `dial`. Raises OSError, PoolError."""
        self._target = target
        self._socket = dial(way_in, target, secure)
        # Whoever gives a step up takes it, in whatever the thread is doing: garbage collection does that, too.
        self._lock = threading.RLock()
        self.answering = False  # whether there is an answer, or a part of one, still to be received
        self.number = 0  # of the last request
        # What may be asked for by a handle: (model, version, layers) -> handle, the oldest first.
        self._handles: dict[tuple[str, str, tuple[int, ...]], int] = {}
        self.turn = 0  # counts lookups, so that one that is over cannot be given up; -1 once one was
        # What is received and not where it belongs yet; the same as an array.
        self.memory = np.empty(_SCRATCH_BYTES, np.uint8)
        self._scratch = self.memory.data
        self.start = self.stop = 0  # where in it what was not looked at yet begins and ends
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self.quick = True  # whether it may pay to look for the next answer without sleeping
        self._limit_s = 0.0  # of a wait, as the system knows it
        # The last request, and the last sign of life between two of them, by time.monotonic.
        self.asked_at = self.heard_at = 0.0
        self.answered = False  # whether it ever did
        try:
            deadline = time.monotonic() + OPEN_TIMEOUT_S
            self._allow(deadline)
            self._socket.sendall(frames.frame(frames.HELLO, way_in.ticket))
            kind, _, _, nbytes = self._header(deadline, _SCRATCH_BYTES)
            if (kind, nbytes) != (frames.READY, 0):
                raise ProtocolError(f"{target}: the direct lane answered a hello with a frame of kind {kind}")
            self.heard_at = time.monotonic()
        except BaseException:
            self._socket.close()
            raise

    def send(self, exchange: Exchange, deadline: float, send_by: float | None = None) -> None:
        """Ask. Raises OSError if the connection broke, TimeoutError at the deadline or, of a large request, `send_by`.

        Half of a request on its way is of no use: what is not sent in time ends the connection.
        """
        self.start = self.stop = 0
        self.answering = True
        self.asked_at = time.monotonic()
        # Not counted: whoever has a copy of this connection, as after a fork, would count on from the same number.
        self.number = int.from_bytes(os.urandom(8), "little") or 1
        parts = self._request(exchange, max(1, int(self._allow(deadline) * 1e6)))
        nbytes = sum(map(len, parts))
        if send_by is None or nbytes <= _MAY_BLOCK_BYTES:
            send_by = deadline
        else:
            self._allow(send_by)
        sent = self._socket.sendmsg(parts)
        if sent < nbytes:  # a large one, or a server that is busy
            for part in parts:
                while sent < len(part):
                    self._allow(send_by)
                    sent += self._socket.send(memoryview(part)[sent:])
                sent -= len(part)

    def _request(self, exchange: Exchange, timeout_us: int) -> list[bytes | memoryview]:
        """What is to be sent, in parts: a lookup by ids, or whatever else is asked for."""
        tables = exchange.asked_tables
        if not tables:
            request = exchange.encode()
            return [frames.request_start(self.number, timeout_us, len(request)), request]
        asked = exchange.asked
        parts, handle = self._handle((asked.model, asked.version, tuple([layer for layer, _ in tables])))
        counts: list[int] = []
        ids: list[bytes | memoryview] = []
        nbytes = 0
        for _, of_layer in tables:
            counts.append(len(of_layer))
            data = wire.little(of_layer)
            ids.append(data)
            nbytes += len(data)
            if rest := -nbytes % frames.ALIGNMENT:
                ids.append(bytes(rest))
                nbytes += rest
        parts.append(frames.lookup_start(handle, self.number, timeout_us, counts, nbytes))
        return parts + ids

    def _handle(self, what: tuple[str, str, tuple[int, ...]]) -> tuple[list[bytes | memoryview], int]:
        """Frames to be sent before a lookup of this model, version and layers, and the handle that stands for them."""
        handle = self._handles.get(what)
        if handle is not None:
            return [], handle
        handle = len(self._handles)
        if handle == frames.MAX_HANDLES:
            handle = self._handles.pop(next(iter(self._handles)))
        self._handles[what] = handle
        return [frames.register(handle, *what)], handle

    def begin(self, what: tuple[str, str, tuple[int, ...]]) -> int | None:
        """Begin to ask for rows by ids: the handle that stands for model, version and layers.

        None if the system does not take at once what the server is to be told of it first: then the connection is of no
        use any more. Raises OSError if it broke.
        """
        self.start = self.stop = 0
        self.answering = True
        self.asked_at = time.monotonic()
        parts, handle = self._handle(what)
        for part in parts:
            if self._socket.send(part, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) != len(part):
                return None
        return handle

    def begins(self, exchange: Exchange, until: float, spin_s: float) -> bool:
        """Whether the answer to what was sent, or the end of the connection, comes by `until` (time.monotonic).

        `receive` is to follow, or the end. spin_s: how long to look for it without sleeping.
        """
        begin = time.perf_counter()
        place = self._scratch[: self.listen(exchange)]
        spin_s = spin_s if self.quick else 0.0
        try:
            while True:
                try:
                    self.stop = self._socket.recv_into(place, 0, socket.MSG_DONTWAIT)
                    break
                except BlockingIOError:
                    if time.perf_counter() - begin < spin_s and time.monotonic() < until:
                        continue
                    # Not by the socket's own timeouts: the system keeps those to a few milliseconds only.
                    if not self._poll.poll(max(0.0, until - time.monotonic()) * 1e3):
                        self.quick = False
                        return False
        except OSError:  # which `receive` will find, too
            return True
        self.quick = time.perf_counter() - begin < 2 * spin_s
        return True

    def silent(self, since: float) -> bool:
        """Whether it is too long that nothing has come since then, by time.monotonic."""
        return time.monotonic() - since >= _SILENCE_S

    def promises(self) -> bool:
        """Of a connection that can be read: whether the answer that begins is no refusal, nor is this the end."""
        try:
            header = self._socket.recv(_HEADER_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return False
        return bool(header) and (len(header) < _HEADER_BYTES or not header.startswith(_REFUSED))

    def fileno(self) -> int:
        """Its number, as the system knows it."""
        return self._socket.fileno()

    def line(self) -> int:
        """What it is for kernels."""
        return line_of(self._socket)

    def receive(self, exchange: Exchange, deadline: float, spin_s: float) -> None:
        """Take the answer in. Raises OSError if the connection broke, TimeoutError, RefusalError, PoolErrors."""
        at_once = self.listen(exchange)
        if not self.stop:
            self.await_some(exchange, deadline, at_once, spin_s)
        if at_once > _HEADER_BYTES and self._all_at_once(exchange):
            return
        landing = exchange.landing
        while True:
            self.take_rows(exchange, deadline)
            kind, layer, first, nbytes = self._header(deadline, at_once)
            if kind == frames.ROWS:
                self._rows(exchange, layer, first, nbytes, deadline, at_once > _HEADER_BYTES)
                landing.received(layer, nbytes)
                landing.hand_over()
                self._allow(deadline)  # however many frames come, and whether any brings rows
            elif kind == frames.END and nbytes == frames.TIMES.size:
                break
            elif kind == frames.REFUSED:
                refusal = refusal_of(self._body(nbytes, deadline), self._target)
                self._over()
                raise RefusalError(refusal)
            else:
                raise self._no_answer(kind, nbytes)
        exchange.times = wire.ServerTimes(*frames.TIMES.unpack(self._body(nbytes, deadline)))
        landing.check_complete()
        self._over()

    def listen(self, exchange: Exchange) -> int:
        """Have the step's end be the answer's, if it is a long one; once more does no harm.

        Gives how many bytes to ask the system for while the next frame is not known.
        """
        if exchange.answer_bytes <= _SCRATCH_BYTES // 2:
            return _SCRATCH_BYTES  # it is short: a step that is given up meanwhile does not wait for it
        turn = self.turn
        exchange.delivery.on_cancel(lambda: self.give_up(turn))
        return _HEADER_BYTES  # and not a byte of what belongs elsewhere

    def _all_at_once(self, exchange: Exchange) -> bool:
        """Take a small answer in, if it came as such answers do: whole, in one frame a layer. Else nothing is taken."""
        landing = exchange.landing
        runs, end, end_at, nbytes = answer_layout(landing.missing())
        if (self.start, self.stop) != (0, nbytes):
            return False
        scratch, number = self._scratch, self.number.to_bytes(8, "little")
        if scratch[end_at : end_at + _HEADER_BYTES] != number.join(end):
            return False
        for _, start, at, rows_at, _ in runs:
            if scratch[at:rows_at] != number.join(start):
                return False
        exchange.times = wire.ServerTimes(*frames.TIMES.unpack_from(scratch, end_at + _HEADER_BYTES))
        self.start = self.stop
        self._over()
        with nullcontext() if landing.owned else exchange.delivery.writing():
            for layer, _, _, rows_at, stop in runs:
                landing.destination(layer, 0, stop - rows_at)[:] = scratch[rows_at:stop]
                landing.received(layer, stop - rows_at)
        landing.hand_over()
        landing.check_complete()
        return True

    def give_up(self, turn: int) -> None:
        """Have that lookup fail with OSError, unless it is over. Any thread.

        The server takes the end of the connection as the end of its work for us.
        """
        with self._lock:
            if self.turn == turn:
                self.turn = -1
                self.shut()

    def end(self, start: int, end: int, whole: bool) -> wire.ServerTimes | None:
        """Take in the frame at `start` of what was received up to `end`, the answer's last; None if it is a refusal.

        whole: whether all rows came before it. Raises ProtocolError, another PoolError where the server refuses all
        that follows, OSError.
        """
        self.start, self.stop = start, end
        deadline = time.monotonic() + _SILENCE_S
        kind, _, _, nbytes = self._header(deadline, _HEADER_BYTES)
        times = None
        if kind == frames.END and nbytes == frames.TIMES.size and whole:
            times = wire.ServerTimes(*frames.TIMES.unpack(self._body(nbytes, deadline)))
        elif kind == frames.REFUSED:
            self._body(nbytes, deadline)
        else:
            raise self._no_answer(kind, nbytes)
        self._over()
        return times

    def _no_answer(self, kind: int, nbytes: int) -> ProtocolError:
        return ProtocolError(f"{self._target}: a frame of kind {kind} and {nbytes} bytes has no place in an answer")

    def shut(self) -> None:
        """Have whoever waits on it, now or later, fail with OSError."""
        with suppress(OSError):  # the server closed it, or `close` did
            self._socket.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        """Of one that was lost."""
        if hasattr(self, "_socket"):
            self._socket.close()

    def close(self) -> None:
        """Give the socket back. Only by whoever uses it."""
        with self._lock:
            self.turn = -1  # another may have its number from now on
            self._socket.close()

    def let_go(self) -> None:
        """In the child of a fork: close this process's end of it, which the parent does not notice."""
        self.turn = -1
        self._socket.close()

    def _over(self) -> None:
        """The end of a lookup: from now on it cannot be given up any more. Raises OSError if it was."""
        with self._lock:
            if self.turn < 0:
                raise ConnectionAbortedError("given up")
            self.turn += 1
            self.answering = False
            self.heard_at, self.answered = time.monotonic(), True

    # --- receiving

    def take_rows(self, exchange: Exchange, deadline: float) -> None:
        """Have rows come where they belong without Python, as far as that can be: see `compiled.py`."""

    def await_some(self, exchange: Exchange, deadline: float, at_once: int, spin_s: float) -> None:
        """Wait for the beginning of an answer, at first without sleeping, unless the last one took too long for that.

        To sleep and to be woken can take as long as all the rest of a small lookup, most of all where the processor
        goes to sleep as well.
        """
        begin = time.perf_counter()
        if self.quick:
            place = self._scratch[:at_once]
            while not self.stop and time.perf_counter() - begin < spin_s:
                try:
                    self.stop = self._socket.recv_into(place, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                if not self.stop:
                    raise ConnectionError("the server closed the connection")
        self._have(1, deadline, at_once)
        self.quick = time.perf_counter() - begin < 2 * spin_s

    def _rows(self, exchange: Exchange, layer: int, first: int, nbytes: int, deadline: float, short: bool) -> None:
        """Have the body of a ROWS frame where it belongs."""
        landing = exchange.landing
        place = landing.destination(layer, first, nbytes)
        if short:  # nobody waits for the network with the caller's memory in hand, unless he can be told to leave it
            self._have(nbytes, deadline, _SCRATCH_BYTES)
        if landing.owned:
            self._rest_of_rows(place, deadline)
        else:
            with exchange.delivery.writing():
                self._rest_of_rows(place, deadline)

    def _rest_of_rows(self, place: memoryview, deadline: float) -> None:
        """Write to `place` what was received of it already, and receive the rest there.

        With the rest comes the header of the frame that must follow, in one.
        """
        have = min(self.stop - self.start, len(place))
        place[:have] = self._scratch[self.start : self.start + have]
        self.start += have
        if have < len(place):
            self._fill([place[have:], self._scratch[:_HEADER_BYTES]], deadline)
            self.start, self.stop = 0, _HEADER_BYTES

    def _header(self, deadline: float, at_once: int) -> tuple[int, int, int, int]:
        """Kind, layer, first row, and bytes of the body, of the next frame that answers the last request.

        at_once: bytes to ask the system for, if it is not there. Raises ProtocolError for a frame that answers another
        request, and what the server refused all further ones with.
        """
        if self.stop - self.start < _HEADER_BYTES:
            self._have(_HEADER_BYTES, deadline, at_once)
        kind, layer, number, first, nbytes = frames.HEADER.unpack_from(self._scratch, self.start)
        self.start += _HEADER_BYTES
        if number != self.number:
            if kind == frames.REFUSED and not number:
                raise refusal_of(self._body(nbytes, deadline), self._target)
            raise ProtocolError(f"{self._target}: a frame of kind {kind} answers another request")
        return kind, layer, first, nbytes

    def _body(self, nbytes: int, deadline: float) -> bytes:
        """The next bytes, few of them."""
        if nbytes > frames.MAX_SMALL_BYTES:
            raise ProtocolError(f"{self._target}: a frame that is a small one has {nbytes} bytes")
        if self.stop - self.start < nbytes:
            self._have(nbytes, deadline, nbytes)
        start = self.start
        self.start = start + nbytes
        return bytes(self._scratch[start : self.start])

    def _have(self, nbytes: int, deadline: float, at_once: int) -> None:
        """Wait until `nbytes` are in the scratch memory, less than half of which they are."""
        kept = self.stop - self.start
        if kept == 0:
            self.start = self.stop = 0
        elif self.start > _SCRATCH_BYTES // 2:
            self._scratch[:kept] = bytes(self._scratch[self.start : self.stop])
            self.start, self.stop = 0, kept
        while self.stop - self.start < nbytes:
            stop = min(self.start + max(nbytes, at_once), _SCRATCH_BYTES)
            self.stop += self._received([self._scratch[self.stop : stop]], deadline)
            if self.stop - self.start < nbytes:
                self._allow(deadline)  # however little comes, and however often

    def _fill(self, places: list[memoryview], deadline: float) -> None:
        """Receive until all of them are full."""
        left = sum(map(len, places))
        while True:
            # The system wakes us only when all is there.
            count = self._received(places, deadline, socket.MSG_WAITALL)
            left -= count
            if not left:
                return
            self._allow(deadline)
            while count >= len(places[0]):
                count -= len(places.pop(0))
            places[0] = places[0][count:]

    def _received(self, places: list[memoryview], deadline: float, flags: int = 0) -> int:
        """Wait for some bytes. Raises TimeoutError at the deadline, OSError where the connection ended or is silent."""
        while True:
            try:
                count = self._socket.recvmsg_into(places, 0, flags)[0]
            except BlockingIOError as error:  # time is up, as the system counts it
                silent = self._limit_s >= _SILENCE_S
                self._allow(deadline)
                if silent:
                    raise SilentError(f"{self._target} sent nothing for {_SILENCE_S:g} s") from error
                continue
            if not count:
                raise ConnectionError("the server closed the connection")
            return count

    def _allow(self, deadline: float) -> float:
        """Let the system wait until the deadline, about, or for as long as nothing may come or go.

        Gives the seconds until the deadline. Raises TimeoutError if there are none.
        """
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        wait = min(remaining, _SILENCE_S)
        # By the system's own clock a wait takes one call; Python's timeouts take two. To set it takes another, so what
        # was set is left where it is near enough: nothing is settled later than a few milliseconds.
        if not wait <= self._limit_s <= wait + 0.005:
            self._limit_s = min(1.05 * remaining, remaining + 0.005, _SILENCE_S)
            seconds, rest = divmod(max(1, round(self._limit_s * 1e6)), 1_000_000)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(seconds, rest))
        return remaining
