"""Lookups over the server's direct lane, for the blocking client: plain sockets, and rows received where they belong.

docs/PROTOCOL.md has the frames. gRPC is always there beside it: whatever is wrong with the lane, the lookup
goes over gRPC, and the lane is tried again later, on a thread of its own.
"""

import logging
import select
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from math import inf
from typing import Protocol, TypeVar

from engrampool_client.errors import DeadlineError, PoolError, StepCancelledError
from engrampool_client.lanes.answers import RefusalError
from engrampool_client.lanes.connection import Connection, SilentError
from engrampool_client.lanes.dial import OPEN_TIMEOUT_S, Secure
from engrampool_client.lookup.exchange import Exchange
from engrampool_proto.errors import WireError
from engrampool_proto.v1 import pool_pb2

# One that takes longer to be opened than any step of that may is held by something that will not let it go.
_STUCK_S = 10.0
# Between tries after one that failed.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# A server that is well has begun to answer by then. Deadlines may be so short that it could not.
_TIME_ENOUGH_S = 0.1
_log = logging.getLogger("engrampool")


class NativeLane:
    """Connections of one client, one for each lookup under way at once, up to `most`. Thread-safe.

    open_direct: asks the server, over gRPC, for a way in; raises PoolError. target: as gRPC takes it.
    opened: connections since it was made. reason: why the last one could not be opened, for people; "" if it was.
    silent: told where a connection was given up, as nothing came on it. kind: of connections. secure: as of `dial`.
    """

    def __init__(
        self,
        open_direct: Callable[[float], pool_pb2.OpenDirectResponse],
        target: str,
        most: int,
        silent: Callable[[], None] = lambda: None,
        kind: type[Connection] = Connection,
        secure: Secure | None = None,
    ) -> None:
        self._open_direct, self._target, self._most, self.silent = open_direct, target, most, silent
        self._kind, self._secure = kind, secure
        # A step that is given up takes it, in whatever the thread is doing: garbage collection does that, too.
        self._lock = threading.RLock()
        self._idle: list[Connection] = []
        # Weakly: one that is lost, as Ctrl-C can come between any two lines, is closed and makes room for another.
        self._open: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._opening = self._closed = False
        self._opening_since = 0.0
        self._not_before, self._pause_s = 0.0, _FIRST_PAUSE_S
        self._unanswered_s = 0.0  # what connections that never answered were given, since one last did
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

    def ask(
        self, exchange: Exchange, deadline: float, *, spin_s: float = 0.0, send_by: float | None = None
    ) -> "NativeRequest | None":
        """See `Lane`. None if no connection is free, or none takes the request.

        send_by: when to stop trying to send what the system does not take at once, by time.monotonic.
        """
        if deadline <= time.monotonic():  # a request that is begun and not sent would cost the connection
            return None
        connection = self.take()
        if connection is None:
            return None
        try:
            connection.send(exchange, deadline, send_by)
        except OSError:  # it broke, or takes nothing
            self.drop(connection)
            return None
        exchange.number = connection.number
        return NativeRequest(self, connection, exchange, deadline, spin_s)

    @property
    def idle(self) -> bool:
        """Whether the next request finds a connection."""
        return bool(self._idle)

    def ready(self, count: int) -> int:
        """How many of so many connections are idle. Where there are fewer, one more is opened for later."""
        if len(self._open) < count:
            self._want_one()
        return min(count, len(self._idle))

    def take(self) -> Connection | None:
        """A connection for one request, to be `answered`, or `put_back`, or `drop`ped; None if none is free."""
        try:
            return self._idle.pop()
        except IndexError:
            self._want_one()
            return None

    def forked(self) -> None:
        """In the child of a fork: let go of the connections without a word, for they are the parent's."""
        self._closed = True
        self._idle.clear()
        for connection in list(self._open):
            connection.let_go()

    @property
    def target(self) -> str:
        """The server's, as gRPC takes it."""
        return self._target

    def lost(self, connection: Connection, error: OSError, given_up: bool) -> None:
        """Drop one that broke, or was silent. Raises StepCancelledError if that is the client's own doing."""
        if isinstance(error, SilentError):
            self.distrust(connection)
            self.silent()
        else:
            self.drop(connection)
        if self._closed or given_up:
            raise StepCancelledError("the step was cancelled") from error

    def answered(self, connection: Connection) -> None:
        """One has answered as it should: the lane is well."""
        self._pause_s, self._unanswered_s = _FIRST_PAUSE_S, 0.0
        self._idle.append(connection)
        if self._closed:
            self._drop_idle()

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
            self._opener.join(OPEN_TIMEOUT_S)  # what it opens after that it closes itself

    def put_back(self, connection: Connection) -> None:
        """Let another request have it."""
        self._idle.append(connection)
        if self._closed:
            self._drop_idle()

    def _drop_idle(self) -> None:
        while True:
            try:
                self.drop(self._idle.pop())
            except IndexError:
                return

    def distrust(self, connection: Connection, waited_s: float = inf) -> None:
        """Drop one that was silent, and of the idle ones those that nothing came on since: they may be lost as well.

        Those that never answered anything say that the next one will not either, if they were given time enough all
        together: it has time. waited_s: how much this one was.
        """
        with self._lock:
            if not connection.answered:
                self._unanswered_s += waited_s
            if self._unanswered_s >= _TIME_ENOUGH_S:
                self._unanswered_s = 0.0
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
                self.drop(idle)
        self.drop(connection)
        for idle in reversed(good):
            self.put_back(idle)

    def drop(self, connection: Connection) -> None:
        """Close it, as it can serve no other request."""
        with self._lock:
            self._open.discard(connection)
        connection.close()
        self._want_one()

    def _want_one(self) -> None:
        """Have one more connection opened, for later."""
        with self._lock:
            enough = len(self._open) >= self._most
            now = time.monotonic()
            opening = self._opening and now < self._opening_since + _STUCK_S
            if self._closed or opening or enough or now < self._not_before:
                return
            self._opening, self._opening_since = True, now
        # Without the lock: to start a thread takes long enough for garbage to be collected, by code of anybody's.
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
            connection = self._kind(self._open_direct(OPEN_TIMEOUT_S), self._target, self._secure)
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
        self.put_back(connection)


class NativeRequest:
    """A request that was sent on a connection, which is its own until it ends. deadline: may be put off."""

    def __init__(
        self, lane: NativeLane, connection: Connection, exchange: Exchange, deadline: float, spin_s: float
    ) -> None:
        self._lane, self.connection, self.exchange = lane, connection, exchange
        self.deadline, self._spin_s = deadline, spin_s

    def listen(self) -> None:
        """As of `Answering`."""
        self.connection.listen(self.exchange)

    def begins(self, until: float) -> bool:
        """Whether the answer, or the end of the connection, comes by `until` (time.monotonic)."""
        return self.connection.begins(self.exchange, until, self._spin_s)

    def receive(self) -> bool:
        """See `Request`. False where the connection broke, or was silent for too long."""
        lane, connection, exchange = self._lane, self.connection, self.exchange
        try:
            connection.receive(exchange, self.deadline, self._spin_s)
        except RefusalError as refused:
            lane.put_back(connection)
            raise refused.error from None
        except PoolError:  # before the next two: a DeadlineError is a TimeoutError, and that an OSError
            if connection.answering:
                lane.drop(connection)
            else:  # only the rows are not wanted any more
                lane.put_back(connection)
            raise
        except TimeoutError as error:
            lane.distrust(connection, time.monotonic() - connection.asked_at)
            raise DeadlineError(f"{lane.target}: no answer in time (DEADLINE_EXCEEDED)") from error
        except OSError as error:
            lane.lost(connection, error, exchange.delivery.given_up)
            exchange.restart()
            return exchange.landing.complete  # if only the end of the answer was lost
        except BaseException:
            lane.drop(connection)
            raise
        lane.answered(connection)
        return True

    def abandon(self) -> None:
        """See `Request`. The connection it is on cannot serve another."""
        self._lane.drop(self.connection)


class Answering(Protocol):
    """A request that was sent. connection: that its answer comes on."""

    connection: Connection

    def listen(self) -> None:
        """Have the lookup's end, too, wake whoever waits for the answer to begin."""


One = TypeVar("One", bound=Answering)


def first_to_answer(asked: Sequence[One], deadline: float) -> One | None:
    """Wait for whichever of those that asked the same begins to be answered; None if none does by the deadline.

    One that is refused, or whose connection ends, is only chosen as the last that is left.
    """
    waiting = {request.connection.fileno(): request for request in asked}
    poll = select.poll()
    for fileno, request in waiting.items():
        request.listen()
        poll.register(fileno, select.POLLIN)
    while ready := poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
        for fileno, _ in ready:
            if len(waiting) == 1 or waiting[fileno].connection.promises():
                return waiting[fileno]
            poll.unregister(fileno)
            del waiting[fileno]
    return None
