"""Lookups over the server's direct lane, for the blocking client: plain sockets, and rows received where they belong.

docs/PROTOCOL.md has the frames. gRPC is always there beside it: whatever is wrong with the lane, `fetch` says that the
lookup is to go over gRPC, and the lane is tried again later, on a thread of its own.
"""

import logging
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Literal

import grpc

from engrampool_client.errors import DeadlineError, PoolError, ProtocolError, StepCancelledError, from_status
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_proto import frames, wire
from engrampool_proto.errors import WireError
from engrampool_proto.v1 import pool_pb2

Direct = Literal["auto", "off"]

# To get in. A port that is blocked costs this once, when a client is made.
_OPEN_TIMEOUT_S = 1.0
_STUCK_S = 10.0
# A server that is well sends some of its answer within so long. Where nothing came, the connection may be one that was
# forgotten on the way without a word; gRPC, which asks for signs of life, finds out.
_SILENCE_S = 2.0
# Of a connection that is idle: when the system first asks for a sign of life, how often then, and how often in vain.
_KEEP_IDLE_S, _KEEP_EVERY_S, _KEEP_TRIES = 10, 2, 3
# Between tries after one that failed.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# Answers up to half this size are read whole into memory of ours, and copied from there.
_SCRATCH_BYTES = 256 << 10
# Requests up to this size fit into what the system buffers for a connection.
_MAY_BLOCK_BYTES = 64 << 10
_TIMEVAL = struct.Struct("@ll")
_HEADER_BYTES = frames.HEADER.size
# The header of the last frame, as servers of ours write it.
_END = frames.end(wire.ServerTimes(0, 0, 0))[:_HEADER_BYTES]
_log = logging.getLogger("engrampool")
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class DirectLane:
    """Connections of one client, one for each lookup under way at once, up to `most`. Thread-safe.

    open_direct: asks the server, over gRPC, for a way in; raises PoolError. target: as gRPC takes it.
    opened: connections since it was made. reason: why the last one could not be opened, for people; "" if it was.
    silent: told where a connection was given up, as nothing came on it.
    """

    def __init__(
        self,
        open_direct: Callable[[float], pool_pb2.OpenDirectResponse],
        target: str,
        most: int,
        silent: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_direct, self._target, self._most, self._silent = open_direct, target, most, silent
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        # Weakly: one that is lost, as Ctrl-C can come between any two lines, is closed and makes room for another.
        self._open: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._opening = self._closed = False
        self._opening_since = 0.0
        self._not_before, self._pause_s = 0.0, _FIRST_PAUSE_S
        self._opener: threading.Thread | None = None
        self.opened, self.reason = 0, ""
        self._connect()  # here and now, so that the first lookup finds a connection

    @property
    def open(self) -> bool:
        """Whether it has a connection."""
        return bool(self._open)

    @property
    def connections(self) -> int:
        """How many it has."""
        return len(self._open)

    def begin(self, exchange: Exchange, deadline: float, send_by: float | None = None) -> "Connection | None":
        """Only ask; `fetch` is to take the answer in, or `abandon` to give it up. None if that cannot be done now.

        send_by: when to stop trying to send what the system does not take at once, by time.monotonic.
        """
        if deadline <= time.monotonic():  # a request that is begun and not sent would cost the connection
            return None
        try:
            connection = self._idle.pop()
        except IndexError:
            self._want_one()
            return None
        try:
            connection.send(exchange, deadline, send_by)
        except OSError:  # it broke, or takes nothing
            self._drop(connection)
            return None
        return connection

    def abandon(self, begun: "Connection") -> None:
        """Do without the answer; the connection it is on cannot serve another."""
        self._drop(begun)

    def fetch(
        self,
        exchange: Exchange,
        deadline: float,
        delivery: Delivery,
        spin_s: float = 0.0,
        begun: "Connection | None" = None,
    ) -> bool:
        """Ask, unless that has `begun`, and take the whole answer in; `delivery` is told of layers as they complete.

        deadline: by time.monotonic. spin_s: how long to look for the answer without sleeping.
        False if the lane has no connection, or one that broke or was silent for too long meanwhile: what is missing is
        to be asked for over gRPC.
        Raises PoolErrors: refusals, ProtocolError, StepCancelledError, DeadlineError; its reason is "not-asked" where
        the deadline had passed before, which says nothing of the server.
        """
        connection = begun or self.begin(exchange, deadline)
        if connection is None:
            if deadline <= time.monotonic():
                text = f"{self._target} was not asked: the deadline had passed (DEADLINE_EXCEEDED)"
                raise DeadlineError(text, "not-asked")
            return False
        try:
            connection.receive(exchange, deadline, delivery, spin_s)
        except _RefusedError as refused:
            self._put(connection)
            raise refused.error from None
        except PoolError:  # before the next two: a DeadlineError is a TimeoutError, and that an OSError
            if connection.answering:
                self._drop(connection)
            else:  # only the rows are not wanted any more
                self._put(connection)
            raise
        except TimeoutError as error:
            self._distrust(connection)
            raise DeadlineError(f"{self._target}: no answer in time (DEADLINE_EXCEEDED)") from error
        except OSError as error:
            if isinstance(error, _SilentError):
                self._distrust(connection)
                self._silent()
            else:
                self._drop(connection)
            if self._closed or delivery.given_up:
                raise StepCancelledError("the step was cancelled") from error
            exchange.restart()
            return exchange.complete  # if only the end of the answer was lost
        except BaseException:
            self._drop(connection)
            raise
        self._pause_s = _FIRST_PAUSE_S
        self._put(connection)
        return True

    def forked(self) -> None:
        """In the child of a fork: let go of the connections without a word, for they are the parent's."""
        self._closed = True
        self._idle.clear()
        for connection in list(self._open):
            connection.let_go()

    def renew(self) -> None:
        """Have later lookups go by new connections, which are opened as soon as one is wanted."""
        with self._lock:
            self._not_before, self._pause_s = 0.0, _FIRST_PAUSE_S
        self._drop_idle()

    def stop(self) -> None:
        """Open no more connections; `close` is to follow."""
        self._closed = True

    def close(self) -> None:
        """End every connection, and every lookup on one."""
        with self._lock:
            self._closed = True
            connections = list(self._open)
        for connection in connections:
            connection.shut()
        self._drop_idle()
        if self._opener is not None:
            self._opener.join(_OPEN_TIMEOUT_S)  # what it opens after that it closes itself

    def _put(self, connection: "Connection") -> None:
        self._idle.append(connection)
        if self._closed:
            self._drop_idle()

    def _drop_idle(self) -> None:
        while True:
            try:
                self._drop(self._idle.pop())
            except IndexError:
                return

    def _distrust(self, connection: "Connection") -> None:
        """Drop one that was silent, and of the idle ones those that nothing came on since: they may be lost as well.

        One that never answered anything says that the next one will not either: it has time.
        """
        with self._lock:
            if not connection.answered:
                self._not_before = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
                self.reason = (
                    f"it lets callers in, and does not answer; it is tried again after {self._pause_s / 2:g} s"
                )
        good = []
        while True:
            try:
                idle = self._idle.pop()
            except IndexError:
                break
            if idle.heard_at >= connection.asked_at:
                good.append(idle)
            else:
                self._drop(idle)
        self._drop(connection)
        for idle in reversed(good):
            self._put(idle)

    def _drop(self, connection: "Connection") -> None:
        with self._lock:
            self._open.discard(connection)
        connection.close()
        self._want_one()

    def _want_one(self) -> None:
        """Have one more connection opened, for later."""
        with self._lock:
            enough = len(self._open) >= self._most
            now = time.monotonic()
            # One that takes longer than any step of its own may is held by something that will not let it go.
            opening = self._opening and now < self._opening_since + _STUCK_S
            if self._closed or opening or enough or now < self._not_before:
                return
            self._opening, self._opening_since = True, now
            opener = threading.Thread(target=self._connect, name="engrampool-direct", daemon=True)
            try:
                opener.start()
            except RuntimeError:  # the system gives no thread now
                self._opening = False
                return
            self._opener = opener  # now that it can be joined

    def _connect(self) -> None:
        connection, reason = None, ""
        try:
            connection = Connection(self._open_direct(_OPEN_TIMEOUT_S), self._target)
        except (PoolError, OSError, WireError) as error:
            reason = str(error) or repr(error)
        except Exception as error:  # gRPC has its own ways to say that a channel is closed
            if not self._closed:
                _log.exception("the direct lane of %s could not be opened", self._target)
            reason = repr(error)
        with self._lock:
            self._opening, self.reason = False, reason
            if connection is None:
                self._not_before = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
                return
            self._open.add(connection)
            self.opened += 1
        self._put(connection)


class _SilentError(ConnectionError):
    """For too long nothing came, though the lookup has more time."""


class _RefusedError(Exception):
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
            deadline = time.monotonic() + _OPEN_TIMEOUT_S
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
        request = exchange.request
        large = len(request) > _MAY_BLOCK_BYTES and send_by is not None
        self._send(request, deadline, send_by if large else None)

    def begins(self, exchange: Exchange, delivery: Delivery, until: float, spin_s: float) -> bool:
        """Whether the answer to what was sent, or the end of the connection, comes by `until` (time.monotonic).

        `receive` is to follow, or the end. spin_s: how long to look for it without sleeping.
        """
        begin = time.perf_counter()
        place = self._scratch[: self._listen(exchange, delivery)]
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

    def receive(self, exchange: Exchange, deadline: float, delivery: Delivery, spin_s: float) -> None:
        """Take the answer in. Raises OSError if the connection broke, TimeoutError, _RefusedError, PoolErrors."""
        at_once = self._listen(exchange, delivery)
        if not self._end:
            self._await(deadline, at_once, spin_s)
        if at_once > _HEADER_BYTES and self._all_at_once(exchange, delivery):
            return
        while True:
            length, head, kind = self._header(deadline, at_once)
            if kind == frames.ROWS:
                layer, nbytes = self._rows(exchange, delivery, length, head, deadline)
                if exchange.placed(layer, nbytes):
                    delivery.arrived(exchange.whole([layer]))
            elif kind == frames.END and head == length:
                break
            elif kind == frames.REFUSED and head == length:
                refusal = _refusal(self._head(head, deadline), self._target)
                self._over()
                raise _RefusedError(refusal)
            else:
                raise ProtocolError(f"{self._target}: a frame of kind {kind} has no place in an answer")
        exchange.times = _times(self._head(head, deadline))
        exchange.finish()
        self._over()

    def _listen(self, exchange: Exchange, delivery: Delivery) -> int:
        """Have the step's end be the answer's, if it is a long one; once more does no harm.

        Gives how many bytes to ask the system for while the next frame is not known.
        """
        if _is_short(exchange):
            return _SCRATCH_BYTES  # it is short: a step that is given up meanwhile does not wait for it
        turn = self._turn
        delivery.on_cancel(lambda: self._give_up(turn))
        return _HEADER_BYTES  # and not a byte of what belongs elsewhere

    def _all_at_once(self, exchange: Exchange, delivery: Delivery) -> bool:
        """Take a small answer in, if it came as such answers do: whole, in one frame a layer. Else nothing is taken."""
        runs, end_at, nbytes = _answer_layout(exchange.missing())
        scratch = self._scratch
        if (self._start, self._end) != (0, nbytes) or scratch[end_at : end_at + len(_END)] != _END:
            return False
        for _, start, at, rows_at, _ in runs:
            if scratch[at:rows_at] != start:
                return False
        exchange.times = _times(bytes(scratch[end_at + _HEADER_BYTES : nbytes]))
        self._start = self._end
        self._over()
        with nullcontext() if exchange.owned else delivery.writing():
            for layer, _, _, rows_at, stop in runs:
                exchange.place(layer, 0, stop - rows_at)[:] = scratch[rows_at:stop]
        complete = []
        for layer, _, _, rows_at, stop in runs:
            if exchange.placed(layer, stop - rows_at):
                complete.append(layer)
        delivery.arrived(exchange.whole(complete))
        exchange.finish()
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

    def _send(self, request: bytes, deadline: float, send_by: float | None) -> None:
        timeout_us = max(1, int(self._allow(deadline) * 1e6))
        start = frames.request_start(timeout_us, len(request))
        if send_by is not None:
            self._allow(send_by)
        sent = self._socket.sendmsg((start, request))
        while sent < len(start):
            self._allow(deadline if send_by is None else send_by)
            sent += self._socket.send(start[sent:])
        sent -= len(start)
        while sent < len(request):  # a large one, or a server that is busy
            self._allow(deadline if send_by is None else send_by)
            sent += self._socket.send(memoryview(request)[sent:])

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

    def _rows(self, exchange: Exchange, delivery: Delivery, length: int, head: int, deadline: float) -> tuple[int, int]:
        """Have the rest of a ROWS frame where it belongs. Gives its layer, and bytes of rows."""
        nbytes = length - head
        due = exchange.due()
        known = b"" if due is None else frames.rows_start(*due, nbytes)[_HEADER_BYTES:]
        short = _is_short(exchange)
        if due is not None and self._start == self._end and nbytes and head == len(known) and not short:
            # Which rows these must be is known before the head is read. So all is received at once: the head, to be
            # compared; the rows, where they belong; and the header of the frame that must follow.
            places = [self._scratch[:head], exchange.place(*due, nbytes), self._scratch[head : head + _HEADER_BYTES]]
            if exchange.owned:
                self._fill(places, deadline)
            else:
                with delivery.writing():
                    self._fill(places, deadline)
            self._start, self._end = head, head + _HEADER_BYTES
            if self._scratch[:head] != known and _parsed(bytes(self._scratch[:head]), nbytes) != due:
                raise ProtocolError(f"rows of layer {due[0]} from row {due[1]} on are due; these are others")
            return due[0], nbytes
        found = self._head(head, deadline)
        layer, first = due if due is not None and found == known else _parsed(found, nbytes)
        place = exchange.place(layer, first, nbytes)
        if short:  # nobody waits for the network with the caller's memory in hand, unless he can be told to leave it
            self._have(nbytes, deadline, _SCRATCH_BYTES)
        if exchange.owned:
            self._rest_of_rows(place, deadline)
        else:
            with delivery.writing():
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
        self._have(_HEADER_BYTES, deadline, at_once)
        length, head, kind = frames.HEADER.unpack_from(self._scratch, self._start)
        if head > min(length, frames.MAX_HEAD_BYTES):
            raise ProtocolError(f"{self._target}: a frame with a head of {head} bytes out of {length}")
        self._start += _HEADER_BYTES
        return length, head, kind

    def _head(self, nbytes: int, deadline: float) -> bytes:
        """The next bytes, few of them."""
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
                    raise _SilentError(text) from error
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


def first_to_answer(
    asked: Sequence[Connection], exchange: Exchange, delivery: Delivery, deadline: float
) -> Connection | None:
    """Wait for whichever of those that were asked the same begins to answer; None if none does by the deadline.

    One that refuses, or whose connection ends, is only chosen as the last that is left.
    """
    waiting = {connection.fileno(): connection for connection in asked}
    poll = select.poll()
    for fileno, connection in waiting.items():
        connection._listen(exchange, delivery)
        poll.register(fileno, select.POLLIN)
    while ready := poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
        for fileno, _ in ready:
            if len(waiting) == 1 or waiting[fileno].promises():
                return waiting[fileno]
            poll.unregister(fileno)
            del waiting[fileno]
    return None


def _is_short(exchange: Exchange) -> bool:
    """Whether the whole answer fits into the scratch memory of a connection, with room to spare."""
    return exchange.answer_bytes <= _SCRATCH_BYTES // 2


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
