"""One socket of the direct lane: a request sent on it, and the answer received where it belongs."""

import select
import socket
import struct
import threading
import time
from contextlib import nullcontext
from functools import lru_cache

import grpc

from engrampool_client.errors import PoolError, ProtocolError, from_status
from engrampool_client.lookup.exchange import Exchange
from engrampool_proto import frames, wire
from engrampool_proto.errors import WireError
from engrampool_proto.v1 import pool_pb2

# To get in. A port that is blocked costs this once, when a client is made.
OPEN_TIMEOUT_S = 1.0
# A server that is well sends some of its answer within so long. Where nothing came, the connection may be one that was
# forgotten on the way without a word; gRPC, which asks for signs of life, finds out.
_SILENCE_S = 2.0
# Of a connection that is idle: when the system first asks for a sign of life, how often then, and how often in vain.
_KEEP_IDLE_S, _KEEP_EVERY_S, _KEEP_TRIES = 10, 2, 3
# Answers up to half this size are read whole into memory of ours, and copied from there.
_SCRATCH_BYTES = 256 << 10
# Requests up to this size fit into what the system buffers for a connection.
_MAY_BLOCK_BYTES = 64 << 10
_TIMEVAL = struct.Struct("@ll")
_HEADER_BYTES = frames.HEADER.size
# The header of the last frame, as servers of ours write it.
_END = frames.end(wire.ServerTimes(0, 0, 0))[:_HEADER_BYTES]
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class SilentError(ConnectionError):
    """For too long nothing came, though the lookup has more time."""


class AnswerRefusedError(Exception):
    """The server refused the request; the connection is as good as before."""

    def __init__(self, error: PoolError) -> None:
        super().__init__()
        self.error = error


class Connection:
    """One socket that the server has let in. One lookup at a time; only `shut` may be called meanwhile."""

    def __init__(self, way_in: pool_pb2.OpenDirectResponse, target: str) -> None:
        """Raises OSError, PoolError."""
        self._target = target
        self._socket = _connected(way_in, target)
        # Whoever gives a step up takes it, in whatever the thread is doing: garbage collection does that, too.
        self._lock = threading.RLock()
        self.answering = False  # whether there is an answer, or a part of one, still to be received
        self._turn = 0  # counts lookups, so that one that is over cannot be given up; -1 once one was
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = self._end = 0  # what was received into it, and not looked at yet
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._quick = True  # whether it may pay to look for the next answer without sleeping
        self._limit_s = 0.0  # of a wait, as the system knows it
        # The last request, and the last sign of life between two of them, by time.monotonic.
        self.asked_at = self.heard_at = 0.0
        self.answered = False  # whether it ever did
        try:
            deadline = time.monotonic() + OPEN_TIMEOUT_S
            self._allow(deadline)
            self._socket.sendall(frames.frame(frames.HELLO, way_in.ticket))
            length, head, kind = self._header(deadline, _SCRATCH_BYTES)
            if kind == frames.REFUSED and head == length:
                raise _refusal(self._head(head, deadline), target)
            if (kind, length) != (frames.READY, 0):
                raise ProtocolError(f"{target}: the direct lane answered a hello with a frame of kind {kind}")
            self.heard_at = time.monotonic()
        except BaseException:
            self._socket.close()
            raise

    def send(self, exchange: Exchange, deadline: float, send_by: float | None = None) -> None:
        """Ask. Raises OSError if the connection broke, TimeoutError at the deadline or, of a large request, `send_by`.

        Half of a request on its way is of no use: what is not sent in time ends the connection.
        """
        self._start = self._end = 0
        self.answering = True
        self.asked_at = time.monotonic()
        request = exchange.encode()
        timeout_us = max(1, int(self._allow(deadline) * 1e6))
        start = frames.request_start(timeout_us, len(request))
        if send_by is None or len(request) <= _MAY_BLOCK_BYTES:
            send_by = deadline
        else:
            self._allow(send_by)
        sent = self._socket.sendmsg((start, request))
        while sent < len(start):
            self._allow(send_by)
            sent += self._socket.send(start[sent:])
        sent -= len(start)
        while sent < len(request):  # a large one, or a server that is busy
            self._allow(send_by)
            sent += self._socket.send(memoryview(request)[sent:])

    def begins(self, exchange: Exchange, until: float, spin_s: float) -> bool:
        """Whether the answer to what was sent, or the end of the connection, comes by `until` (time.monotonic).

        `receive` is to follow, or the end. spin_s: how long to look for it without sleeping.
        """
        begin = time.perf_counter()
        place = self._scratch[: self.listen(exchange)]
        spin_s = spin_s if self._quick else 0.0
        try:
            while True:
                try:
                    self._end = self._socket.recv_into(place, 0, socket.MSG_DONTWAIT)
                    break
                except BlockingIOError:
                    if time.perf_counter() - begin < spin_s and time.monotonic() < until:
                        continue
                    # Not by the socket's own timeouts: the system keeps those to a few milliseconds only.
                    if not self._poll.poll(max(0.0, until - time.monotonic()) * 1e3):
                        self._quick = False
                        return False
        except OSError:  # which `receive` will find, too
            return True
        self._quick = time.perf_counter() - begin < 2 * spin_s
        return True

    def promises(self) -> bool:
        """Of a connection that can be read: whether the answer that begins is no refusal, nor is this the end."""
        try:
            header = self._socket.recv(_HEADER_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return False
        return bool(header) and (len(header) < _HEADER_BYTES or frames.HEADER.unpack(header)[2] != frames.REFUSED)

    def fileno(self) -> int:
        """Its number, as the system knows it."""
        return self._socket.fileno()

    def receive(self, exchange: Exchange, deadline: float, spin_s: float) -> None:
        """Take the answer in. Raises OSError if the connection broke, TimeoutError, AnswerRefusedError, PoolErrors."""
        at_once = self.listen(exchange)
        if not self._end:
            self._await(deadline, at_once, spin_s)
        if at_once > _HEADER_BYTES and self._all_at_once(exchange):
            return
        landing = exchange.landing
        while True:
            length, head, kind = self._header(deadline, at_once)
            if kind == frames.ROWS:
                layer, nbytes = self._rows(exchange, length, head, deadline, at_once > _HEADER_BYTES)
                landing.received(layer, nbytes)
                landing.hand_over()
            elif kind == frames.END and head == length:
                break
            elif kind == frames.REFUSED and head == length:
                refusal = _refusal(self._head(head, deadline), self._target)
                self._over()
                raise AnswerRefusedError(refusal)
            else:
                raise ProtocolError(f"{self._target}: a frame of kind {kind} has no place in an answer")
        exchange.times = _times(self._head(head, deadline))
        landing.check_complete()
        self._over()

    def listen(self, exchange: Exchange) -> int:
        """Have the step's end be the answer's, if it is a long one; once more does no harm.

        Gives how many bytes to ask the system for while the next frame is not known.
        """
        if exchange.answer_bytes <= _SCRATCH_BYTES // 2:
            return _SCRATCH_BYTES  # it is short: a step that is given up meanwhile does not wait for it
        turn = self._turn
        exchange.delivery.on_cancel(lambda: self._give_up(turn))
        return _HEADER_BYTES  # and not a byte of what belongs elsewhere

    def _all_at_once(self, exchange: Exchange) -> bool:
        """Take a small answer in, if it came as such answers do: whole, in one frame a layer. Else nothing is taken."""
        landing = exchange.landing
        runs, end_at, nbytes = _answer_layout(landing.missing())
        scratch = self._scratch
        if (self._start, self._end) != (0, nbytes) or scratch[end_at : end_at + len(_END)] != _END:
            return False
        for _, start, at, rows_at, _ in runs:
            if scratch[at:rows_at] != start:
                return False
        exchange.times = _times(bytes(scratch[end_at + _HEADER_BYTES : nbytes]))
        self._start = self._end
        self._over()
        with nullcontext() if landing.owned else exchange.delivery.writing():
            for layer, _, _, rows_at, stop in runs:
                landing.destination(layer, 0, stop - rows_at)[:] = scratch[rows_at:stop]
                landing.received(layer, stop - rows_at)
        landing.hand_over()
        landing.check_complete()
        return True

    def shut(self) -> None:
        """Have whoever waits on it, now or later, fail with OSError."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the server closed it, or `close` did
            return

    def __del__(self) -> None:
        """Of one that was lost."""
        if hasattr(self, "_socket"):
            self._socket.close()

    def close(self) -> None:
        """Give the socket back. Only by whoever uses it."""
        with self._lock:
            self._turn = -1  # another may have its number from now on
            self._socket.close()

    def let_go(self) -> None:
        """In the child of a fork: close this process's end of it, which the parent does not notice."""
        self._turn = -1
        self._socket.close()

    def _over(self) -> None:
        """The end of a lookup: from now on it cannot be given up any more. Raises OSError if it was."""
        with self._lock:
            if self._turn < 0:
                raise ConnectionAbortedError("given up")
            self._turn += 1
            self.answering = False
            self.heard_at, self.answered = time.monotonic(), True

    def _give_up(self, turn: int) -> None:
        """The server takes the end of the connection as the end of its work for us."""
        with self._lock:
            if self._turn == turn:
                self._turn = -1
                self.shut()

    # --- receiving

    def _await(self, deadline: float, at_once: int, spin_s: float) -> None:
        """Wait for the beginning of an answer, at first without sleeping, unless the last one took too long for that.

        To sleep and to be woken can take as long as all the rest of a small lookup, most of all where the processor
        goes to sleep as well.
        """
        begin = time.perf_counter()
        if self._quick:
            place = self._scratch[:at_once]
            while not self._end and time.perf_counter() - begin < spin_s:
                try:
                    self._end = self._socket.recv_into(place, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                if not self._end:
                    raise ConnectionError("the server closed the connection")
        self._have(1, deadline, at_once)
        self._quick = time.perf_counter() - begin < 2 * spin_s

    def _rows(self, exchange: Exchange, length: int, head: int, deadline: float, short: bool) -> tuple[int, int]:
        """Have the rest of a ROWS frame where it belongs. Gives its layer, and bytes of rows."""
        nbytes, landing = length - head, exchange.landing
        due = landing.next_row()
        known = b"" if due is None else frames.rows_start(*due, nbytes)[_HEADER_BYTES:]
        if due is not None and self._start == self._end and nbytes and head == len(known) and not short:
            # Which rows these must be is known before the head is read. So all is received at once: the head, to be
            # compared; the rows, where they belong; and the header of the frame that must follow.
            places = [
                self._scratch[:head],
                landing.destination(*due, nbytes),
                self._scratch[head : head + _HEADER_BYTES],
            ]
            if landing.owned:
                self._fill(places, deadline)
            else:
                with exchange.delivery.writing():
                    self._fill(places, deadline)
            self._start, self._end = head, head + _HEADER_BYTES
            if self._scratch[:head] != known and _parsed(bytes(self._scratch[:head]), nbytes) != due:
                raise ProtocolError(f"rows of layer {due[0]} from row {due[1]} on are due; these are others")
            return due[0], nbytes
        found = self._head(head, deadline)
        layer, first = due if due is not None and found == known else _parsed(found, nbytes)
        place = landing.destination(layer, first, nbytes)
        if short:  # nobody waits for the network with the caller's memory in hand, unless he can be told to leave it
            self._have(nbytes, deadline, _SCRATCH_BYTES)
        if landing.owned:
            self._rest_of_rows(place, deadline)
        else:
            with exchange.delivery.writing():
                self._rest_of_rows(place, deadline)
        return layer, nbytes

    def _rest_of_rows(self, place: memoryview, deadline: float) -> None:
        """Write to `place` what was received of it already, and receive the rest there."""
        have = min(self._end - self._start, len(place))
        place[:have] = self._scratch[self._start : self._start + have]
        self._start += have
        if have < len(place):
            self._fill([place[have:]], deadline)

    def _header(self, deadline: float, at_once: int) -> tuple[int, int, int]:
        """Length, head length and kind of the next frame. at_once: bytes to ask the system for, if it is not there."""
        if self._end - self._start < _HEADER_BYTES:
            self._have(_HEADER_BYTES, deadline, at_once)
        length, head, kind = frames.HEADER.unpack_from(self._scratch, self._start)
        if head > min(length, frames.MAX_HEAD_BYTES):
            raise ProtocolError(f"{self._target}: a frame with a head of {head} bytes out of {length}")
        self._start += _HEADER_BYTES
        return length, head, kind

    def _head(self, nbytes: int, deadline: float) -> bytes:
        """The next bytes, few of them."""
        if self._end - self._start < nbytes:
            self._have(nbytes, deadline, nbytes)
        start = self._start
        self._start = start + nbytes
        return bytes(self._scratch[start : self._start])

    def _have(self, nbytes: int, deadline: float, at_once: int) -> None:
        """Wait until `nbytes` are in the scratch memory, less than half of which they are."""
        kept = self._end - self._start
        if kept == 0:
            self._start = self._end = 0
        elif self._start > _SCRATCH_BYTES // 2:
            self._scratch[:kept] = bytes(self._scratch[self._start : self._end])
            self._start, self._end = 0, kept
        while self._end - self._start < nbytes:
            stop = min(self._start + max(nbytes, at_once), _SCRATCH_BYTES)
            self._end += self._received([self._scratch[self._end : stop]], deadline)

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
                    text = f"{self._target} sent nothing for {_SILENCE_S:g} s"
                    raise SilentError(text) from error
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


@lru_cache(maxsize=256)  # decode asks for the same few shapes over and over
def _answer_layout(
    runs: tuple[tuple[int, int], ...],
) -> tuple[tuple[tuple[int, bytes, int, int, int], ...], int, int]:
    """Where all is in an answer of one frame a run, for the (layer, bytes) of each.

    Gives (layer, what comes before the rows, where that is, where the rows are, where they end) of each run, and where
    the answer's last frame begins and ends.
    """
    found, at = [], 0
    for layer, nbytes in runs:
        start = frames.rows_start(layer, 0, nbytes)
        stop = at + len(start) + nbytes
        found.append((layer, start, at, at + len(start), stop))
        at = stop
    return tuple(found), at, at + len(frames.end(wire.ServerTimes(0, 0, 0)))


def _times(head: bytes) -> wire.ServerTimes | None:
    try:
        return wire.parse_times_response(head)
    except WireError as error:
        raise ProtocolError(f"the answer cannot be read: {error}") from error


def _parsed(head: bytes, nbytes: int) -> tuple[int, int]:
    try:
        return frames.parse_rows_head(head, nbytes)
    except WireError as error:
        raise ProtocolError(f"the answer cannot be read: {error}") from error


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
            connected.settimeout(OPEN_TIMEOUT_S)
            connected.connect(way_in.unix_path)
        except BaseException:
            connected.close()
            raise
    else:
        host = way_in.host or _host(target)
        if not host:
            raise OSError(f"{target} has no host to connect to")
        connected = socket.create_connection((host, way_in.port), OPEN_TIMEOUT_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_IDLE_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEP_EVERY_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEP_TRIES)
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
