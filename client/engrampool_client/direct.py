"""Lookups over the server's direct lane, for the blocking client: plain sockets, and rows received where they belong.

docs/PROTOCOL.md has the frames. gRPC is always there beside it: whatever is wrong with the lane, `fetch` says that the
lookup is to go over gRPC, and the lane is tried again later, on a thread of its own.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import grpc

from engrampool_client.errors import DeadlineError, PoolError, ProtocolError, StepCancelledError, from_status
from engrampool_client.exchange import Exchange
from engrampool_client.step import Step
from engrampool_proto import frames
from engrampool_proto.errors import WireError
from engrampool_proto.v1 import pool_pb2

Direct = Literal["auto", "off"]

# To get in. A port that is blocked costs this once, when a client is made.
_OPEN_TIMEOUT_S = 1.0
# Between tries after one that failed.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# Answers up to this size are read whole into memory of ours, and copied from there.
_SCRATCH_BYTES = 64 << 10
# Of a larger one, so much is read with its first header; the rest goes where it belongs.
_PEEK_BYTES = 2 << 10
_TIMEVAL = struct.Struct("@ll")
_HEADER_BYTES = frames.HEADER.size
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class DirectLane:
    """Connections of one client, one for each lookup under way at once, up to `most`. Thread-safe.

    open_direct: asks the server, over gRPC, for a way in; raises PoolError. target: as gRPC takes it.
    """

    def __init__(self, open_direct: Callable[[float], pool_pb2.OpenDirectResponse], target: str, most: int) -> None:
        self._open_direct, self._target, self._most = open_direct, target, most
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._opening = self._closed = False
        self._not_before, self._pause_s = 0.0, _FIRST_PAUSE_S
        self._opener = ThreadPoolExecutor(1, "engrampool-direct")
        self._connect()  # here and now, so that the first lookup finds a connection

    def fetch(self, exchange: Exchange, deadline: float, step: Step) -> bool:
        """Ask, and take the whole answer in; `step` is told of layers as they complete.

        deadline: by time.monotonic. False if the lane has no connection, or one that broke meanwhile: what is missing
        is to be asked for over gRPC. Raises PoolErrors: refusals, DeadlineError, ProtocolError, StepCancelledError.
        """
        try:
            connection = self._idle.pop()
        except IndexError:
            self._want_one()
            return False
        try:
            connection.fetch(exchange, deadline, step)
        except _RefusedError as refused:
            self._put(connection)
            raise refused.error from None
        except TimeoutError as error:
            self._drop(connection)
            raise DeadlineError(f"{self._target}: no answer in time (DEADLINE_EXCEEDED)") from error
        except OSError as error:
            self._drop(connection)
            if self._closed or step.given_up():
                raise StepCancelledError("the step was cancelled") from error
            exchange.restart()
            return exchange.complete  # if only the end of the answer was lost
        except BaseException:
            self._drop(connection)
            raise
        self._put(connection)
        return True

    def close(self) -> None:
        """End every connection, and every lookup on one."""
        with self._lock:
            self._closed = True
            connections = list(self._open)
        for connection in connections:
            connection.shut()
        self._drop_idle()
        self._opener.shutdown(wait=True)

    def _put(self, connection: "_Connection") -> None:
        self._idle.append(connection)
        if self._closed:
            self._drop_idle()

    def _drop_idle(self) -> None:
        while True:
            try:
                self._drop(self._idle.pop())
            except IndexError:
                return

    def _drop(self, connection: "_Connection") -> None:
        with self._lock:
            self._open.discard(connection)
        connection.close()

    def _want_one(self) -> None:
        """Have one more connection opened, for later."""
        with self._lock:
            enough = len(self._open) >= self._most
            if self._closed or self._opening or enough or time.monotonic() < self._not_before:
                return
            self._opening = True
            self._opener.submit(self._connect)

    def _connect(self) -> None:
        try:
            connection = _Connection(self._open_direct(_OPEN_TIMEOUT_S), self._target)
        except (PoolError, OSError, WireError):
            with self._lock:
                self._opening = False
                self._not_before = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return
        with self._lock:
            self._opening, self._pause_s = False, _FIRST_PAUSE_S
            self._open.add(connection)
        self._put(connection)


class _RefusedError(Exception):
    """The server refused the request; the connection is as good as before."""

    def __init__(self, error: PoolError) -> None:
        super().__init__()
        self.error = error


class _Connection:
    """One socket that the server has let in. One lookup at a time; only `shut` may be called meanwhile."""

    def __init__(self, way_in: pool_pb2.OpenDirectResponse, target: str) -> None:
        """Raises OSError, PoolError."""
        self._target = target
        self._socket = _connected(way_in, target)
        self._lock = threading.Lock()
        self._turn = 0  # counts lookups, so that one that is over cannot be given up; -1 once one was
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = self._end = 0  # what was received into it, and not looked at yet
        self._limit_s = 0.0  # of a wait, as the system knows it
        try:
            deadline = time.monotonic() + _OPEN_TIMEOUT_S
            self._allow(deadline)
            self._socket.sendall(frames.frame(frames.HELLO, way_in.ticket))
            kind, head, length = self._next(deadline, _SCRATCH_BYTES)
            if kind == frames.REFUSED:
                raise _refusal(head, target)
            if (kind, length) != (frames.READY, 0):
                raise ProtocolError(f"{target}: the direct lane answered a hello with a frame of kind {kind}")
        except BaseException:
            self._socket.close()
            raise

    def fetch(self, exchange: Exchange, deadline: float, step: Step) -> None:
        """As `DirectLane.fetch`. Raises OSError if the connection broke, TimeoutError, _RefusedError, PoolErrors."""
        turn = self._turn
        step._on_cancel(lambda: self._give_up(turn))
        self._send(exchange.request, deadline)
        enough = exchange.answer_bytes <= _SCRATCH_BYTES // 2
        writing: AbstractContextManager[None] = nullcontext()
        while True:
            kind, head, nbytes = self._next(deadline, _SCRATCH_BYTES if enough else _PEEK_BYTES)
            if kind == frames.ROWS:
                try:
                    layer, first = frames.parse_rows_head(head, nbytes)
                except WireError as error:
                    raise ProtocolError(f"the answer cannot be read: {error}") from error
                place = exchange.place(layer, first, nbytes)
                if not exchange.owned:
                    writing = step._writing()
                with writing:
                    self._receive(place, deadline)
                if exchange.placed(layer, nbytes):
                    step._arrived(exchange.whole([layer]))
            elif kind == frames.END and not nbytes:
                break
            elif kind == frames.REFUSED and not nbytes:
                self._over()
                raise _RefusedError(_refusal(head, self._target))
            else:
                raise ProtocolError(f"{self._target}: a frame of kind {kind} has no place in an answer")
        try:
            exchange.times = frames.parse_end(head)
        except WireError as error:
            raise ProtocolError(f"the answer cannot be read: {error}") from error
        exchange.finish()
        self._over()

    def shut(self) -> None:
        """Have whoever waits on it, now or later, fail with OSError."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the server closed it, or `close` did
            return

    def close(self) -> None:
        """Give the socket back. Only by whoever uses it."""
        with self._lock:
            self._turn = -1  # another may have its number from now on
            self._socket.close()

    def _over(self) -> None:
        """The end of a lookup: from now on it cannot be given up any more. Raises OSError if it was."""
        with self._lock:
            if self._turn < 0:
                raise ConnectionAbortedError("given up")
            self._turn += 1

    def _give_up(self, turn: int) -> None:
        """The server takes the end of the connection as the end of its work for us."""
        with self._lock:
            if self._turn == turn:
                self._turn = -1
                self.shut()

    def _send(self, request: bytes, deadline: float) -> None:
        self._allow(deadline)
        timeout_us = max(1, int((deadline - time.monotonic()) * 1e6))
        start = frames.request_start(timeout_us, len(request))
        sent = self._socket.sendmsg((start, request)) - len(start)
        if sent < len(request):
            rest = memoryview(request)
            while sent < len(request):
                self._allow(deadline)
                sent += self._socket.send(rest[max(0, sent) :])

    def _next(self, deadline: float, at_once: int) -> tuple[int, bytes, int]:
        """Kind, head, and bytes of the body of the next frame. at_once: to ask the system for."""
        while self._end - self._start < _HEADER_BYTES:
            self._more(deadline, at_once)
        length, head, kind = frames.HEADER.unpack_from(self._scratch, self._start)
        if head > min(length, frames.MAX_HEAD_BYTES):
            raise ProtocolError(f"{self._target}: a frame with a head of {head} bytes out of {length}")
        self._start += _HEADER_BYTES
        while self._end - self._start < head:
            self._more(deadline, at_once)
        after = self._start + head
        found = bytes(self._scratch[self._start : after])
        self._start = after
        return kind, found, length - head

    def _more(self, deadline: float, at_once: int) -> None:
        """Receive into the scratch memory, in which there is room: a frame's header and head are less than half."""
        kept = self._end - self._start
        if kept == 0:
            self._start = self._end = 0
        elif self._start > _SCRATCH_BYTES // 2:
            self._scratch[:kept] = bytes(self._scratch[self._start : self._end])
            self._start, self._end = 0, kept
        stop = min(self._end + at_once, _SCRATCH_BYTES)
        self._end += self._received(deadline, [self._scratch[self._end : stop]])

    def _receive(self, place: memoryview, deadline: float) -> None:
        """Fill `place`: with what is in the scratch memory already, then straight from the system."""
        nbytes = len(place)
        have = min(self._end - self._start, nbytes)
        place[:have] = self._scratch[self._start : self._start + have]
        self._start += have
        if have < nbytes:  # then the scratch memory is empty, and takes the beginning of what follows
            self._start = self._end = 0
            peek = self._scratch[:_PEEK_BYTES]
            while have < nbytes:
                have += self._received(deadline, [place[have:], peek])
            self._end = have - nbytes

    def _received(self, deadline: float, places: list[memoryview]) -> int:
        """Wait for some bytes. Raises TimeoutError at the deadline, OSError at the end of the connection."""
        while True:
            try:
                count = self._socket.recvmsg_into(places)[0]
            except BlockingIOError:  # time is up, as the system counts it
                self._allow(deadline)
                continue
            if not count:
                raise ConnectionError("the server closed the connection")
            return count

    def _allow(self, deadline: float) -> None:
        """Let the system wait until the deadline, about. Raises TimeoutError if that is now."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        # By the system's own clock a wait takes one call; Python's timeouts take two. To set it takes another, so what
        # was set is left where it is near enough.
        if not 0.9 * self._limit_s <= remaining <= self._limit_s:
            self._limit_s = remaining
            seconds, rest = divmod(max(1, round(remaining * 1e6)), 1_000_000)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(seconds, rest))


def _refusal(head: bytes, target: str) -> PoolError:
    try:
        refusal = pool_pb2.Refusal.FromString(head)
    except Exception as error:  # the runtime's DecodeError has no stable home across protobuf versions
        raise ProtocolError(f"{target}: a refusal cannot be read: {error}") from error
    code = _CODES.get(refusal.code, grpc.StatusCode.UNKNOWN)
    return from_status(code, refusal.reason or None, refusal.text, target)


def _connected(way_in: pool_pb2.OpenDirectResponse, target: str) -> socket.socket:
    """A blocking socket. Raises OSError."""
    if way_in.unix_path:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(_OPEN_TIMEOUT_S)
            connected.connect(way_in.unix_path)
        except BaseException:
            connected.close()
            raise
    else:
        host = way_in.host or _host(target)
        if not host:
            raise OSError(f"{target} has no host to connect to")
        connected = socket.create_connection((host, way_in.port), _OPEN_TIMEOUT_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.settimeout(None)
    return connected


def _host(target: str) -> str:
    """The host of "HOST:PORT" or a gRPC name for one; "" for other names, such as a Unix socket's."""
    scheme, separator, rest = target.partition(":")
    if separator and scheme in ("dns", "ipv4", "ipv6"):
        target = rest.rpartition("/")[2]
    if "," in target or "/" in target or target.startswith("unix"):
        return ""
    host, separator, port = target.rpartition(":")
    if not separator or not port.isdigit() or host.endswith(":"):
        host = target
    return host.removeprefix("[").removesuffix("]")
