"""Lookups over gRPC, for the blocking client."""

import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import grpc
import grpc.experimental

from engrampool_client.compute.served import DESCRIBE
from engrampool_client.config import ClientConfig
from engrampool_client.errors import (
    DeadlineError,
    EngrampoolError,
    OverloadedError,
    PoolError,
    ProtocolError,
    TlsError,
    UnavailableError,
    from_rpc,
    is_no_grpc,
)
from engrampool_client.event import Event
from engrampool_client.lanes.credentials import Credentials
from engrampool_client.lookup.exchange import Exchange
from engrampool_proto.segment import boot_id
from engrampool_proto.v1 import pool_pb2
from engrampool_proto.wire import SERVICE

_METHOD = f"/{SERVICE}/"
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Channels of equal options would share one connection, and several connections are asked for on purpose.
    ("grpc.use_local_subchannel_pool", 1),
    # A worker that restarts is back in less than gRPC's own second. A server that was away for long is tried every half
    # second: until gRPC tries, a breaker's probe is refused without a word to the server.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # How long a try to connect may take, by its old name.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # A connection may be forgotten on the way without a word. While a call is under way, it is asked for a sign of life
    # so often, and given up without one; servers of ours take as many pings as anybody sends. The last of these is the
    # time that counts: gRPC 1.85 never looks at keepalive_timeout_ms. Rows on their way are ahead of the answer to a
    # ping, so it is long enough for the 4 MB that a system buffers on a link of 10 Mbit/s.
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_timeout_ms", 4000),
    ("grpc.http2.ping_timeout_ms", 4000),
    # A proxy that the environment names is for the way out, and no way to a pool.
    ("grpc.enable_http_proxy", 0),
    # The thread that reads a stream also drives its connection: without this gRPC hands every message from one to
    # another.
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
)
# Answers above this size come as a stream: it is faster from here on (bench/transport.py), and the first layer's rows
# do not wait for the last layer's.
STREAM_ABOVE_BYTES = 2 << 20
# So do those above this size whose layers are taken one by one: below it another message costs all rows more than the
# first layer gains.
LAYERS_ABOVE_BYTES = 512 << 10
# Ends of calls are taken in so many at a time: each has come by then, and a thread is woken for all of them.
_ENDED_CALLS = 16
# Small lookups that are begun at one time, those that were given up and whose answers are on their way among them.
_MOST_STREAMS = 64
# What gRPC says of a server that ended the connection before it said anything.
_ENDED = "Socket closed"
# How soon to ask again a server that answers "loading".
_RETRY_LOADING_S = 0.2


class _Connection:
    """A channel of gRPC's.

    calls: under way on it; whoever closes it at zero ends none. lost: Ctrl-C may have come while gRPC held a lock of
    the channel's, and then every other call on it, and its end, waits for ever: it is neither used any more, nor
    closed. To set it is one step, which another Ctrl-C cannot come into.

    shown: the credentials that it was made by. metadata: of every call. streams: that requests hold, kept here as well:
    to free one in the child of a fork may take it for ever. ending: of them, those whose end nobody has taken in yet.
    """

    def __init__(self, target: str, credentials: Credentials) -> None:
        self.shown = credentials.shown
        self.channel = credentials.channel(target, _OPTIONS)
        self.metadata = credentials.metadata
        self.lookup = self.channel.unary_unary(_METHOD + "Lookup")
        self.lookup_stream = self.channel.unary_stream(_METHOD + "LookupStream")
        self.calls, self.lost = 0, False
        self.streams: set[Iterator[bytes]] = set()
        self.ending: deque[Iterator[bytes]] = deque()

    def begin(self, message: bytes, timeout_s: float) -> Iterator[bytes]:
        """A stream, whose answer whoever iterates over it waits for."""
        try:
            stream: Iterator[bytes] = self.lookup_stream(message, timeout=timeout_s, metadata=self.metadata)
            return stream
        except KeyboardInterrupt:
            self.lose()
            raise

    def cancel(self, call: grpc.Call) -> None:
        """End a call on it, from any thread."""
        try:
            call.cancel()
        except KeyboardInterrupt:
            self.lose(call)
            raise

    def lose(self, call: grpc.Call | None = None) -> None:
        """Ctrl-C came into what is done with it, or with a call on it."""
        self.lost = True
        # gRPC's objects take their locks once more when they are freed, by whoever collects garbage, or at Python's
        # end: with one reference too many they never are.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((self, call)))


class GrpcLane:
    """One connection to a server. Thread-safe. credentials: of the client; None for none, in plain text."""

    def __init__(self, target: str, credentials: Credentials | None = None) -> None:
        self.target, self._credentials = target, credentials or Credentials(ClientConfig())
        # A step that is given up takes it, in whatever the thread is doing: garbage collection does that, too.
        self._lock = threading.RLock()
        self._closed = False
        self._connection = _Connection(target, self._credentials)
        # Others that calls are still under way on, or that nobody may touch any more.
        self._former: set[_Connection] = set()

    def describe(self, timeout_s: float, request: bytes = DESCRIBE) -> bytes:
        """The bytes of a DescribeResponse, waiting for a server that does not listen yet, is loading or is overloaded.

        request: the bytes of a DescribeRequest, by default for all that there is.
        Raises UnavailableError after `timeout_s`, which says why the last try failed; and other PoolErrors at once.
        """
        deadline = time.monotonic() + timeout_s
        pause = Event()
        last: PoolError | None = None
        while True:
            remaining_s = max(0.0, deadline - time.monotonic())
            try:
                # Without gRPC's own waiting for a server, which would keep to itself why there is none.
                return self._control("Describe", request, remaining_s)
            except (UnavailableError, DeadlineError, OverloadedError) as error:
                if is_no_grpc(error):
                    text = f"{self.target} is no engrampool server, nor any other of gRPC (its metrics port?): {error}"
                    raise ProtocolError(text) from error
                explained = self.explained(error)
                if isinstance(explained, TlsError):
                    raise explained from error.__cause__
                # That time ran out while it was tried once more says less than why it failed before.
                if last is None or not isinstance(error, DeadlineError):
                    last = error
            if deadline - time.monotonic() <= _RETRY_LOADING_S or self._closed:
                silent = isinstance(last, DeadlineError) and last.reason is None
                why = "nothing there answers; it may hang, or packets may be lost on the way: " if silent else ""
                text = f"no server at {self.target} was ready within {timeout_s:.3g} s: {why}{last}"
                raise UnavailableError(text, last.reason) from last
            pause.wait(_RETRY_LOADING_S)

    def explained(self, error: EngrampoolError) -> EngrampoolError:
        """The error of a call, or what a handshake of our own says of a server that ended the connection: TlsError."""
        if isinstance(error, UnavailableError) and not isinstance(error, TlsError) and _ENDED in str(error):
            return self._credentials.diagnose(self.target) or error
        return error

    def open_direct(self, timeout_s: float) -> pool_pb2.OpenDirectResponse:
        """Ask for a way into the direct lane. Raises PoolError."""
        answer = self._control(
            "OpenDirect", pool_pb2.OpenDirectRequest(tls=self._credentials.tls).SerializeToString(), timeout_s
        )
        try:
            return pool_pb2.OpenDirectResponse.FromString(answer)
        except Exception as error:  # the runtime's DecodeError has no stable home across protobuf versions
            raise ProtocolError(f"OpenDirect was answered with something else: {error}") from error

    def attach(self, model: str, version: str, timeout_s: float) -> pool_pb2.AttachResponse:
        """Ask where the tables of `model` can be mapped. Raises PoolError."""
        request = pool_pb2.AttachRequest(model=model, version=version, boot_id=boot_id())
        answer = self._control("Attach", request.SerializeToString(), timeout_s)
        try:
            return pool_pb2.AttachResponse.FromString(answer)
        except Exception as error:  # the runtime's DecodeError has no stable home across protobuf versions
            raise ProtocolError(f"Attach was answered with something else: {error}") from error

    def stats(self, timeout_s: float) -> pool_pb2.StatsResponse:
        """Ask for every metric of the server. Raises PoolError."""
        answer = self._control("Stats", b"", timeout_s)
        try:
            return pool_pb2.StatsResponse.FromString(answer)
        except Exception as error:  # the runtime's DecodeError has no stable home across protobuf versions
            raise ProtocolError(f"Stats was answered with something else: {error}") from error

    def ask(self, exchange: Exchange, deadline: float, *, spin_s: float = 0.0) -> "_Call":
        """See `Lane`. The call begins when its answer is received: gRPC sends and waits in one."""
        return _Call(self, exchange, deadline)

    @property
    def full(self) -> bool:
        """Whether so many calls are under way, wanted or not, that no more are begun before they have a place.

        Those that are over count no more, as they are taken in when another is begun.
        """
        connection = self._connection
        return len(connection.streams) - len(connection.ending) >= _MOST_STREAMS

    @property
    def has_ended_calls(self) -> bool:
        """Whether `end_calls` has enough to do."""
        return len(self._connection.ending) >= _ENDED_CALLS

    def end_calls(self) -> None:
        """Take in the ends of calls that have brought their rows, or were cancelled."""
        connection = self.enter()
        try:
            for _ in range(len(connection.ending)):
                try:
                    stream = connection.ending.popleft()
                except IndexError:  # another thread took it
                    return
                with suppress(grpc.RpcError):
                    for _ in stream:
                        pass
                connection.streams.discard(stream)
        finally:
            self.leave(connection)

    def forked(self) -> None:
        """See `Lane`. gRPC's connections are not touched."""

    def stop(self) -> None:
        """See `Lane`."""
        self.close()

    def renew(self, old: "_Connection | None" = None) -> None:
        """Have later calls go by a new connection. Those under way end on the old one, which may be well after all.

        old: only if that is the one that they would go by; any if None.
        """
        with self._lock:
            if self._closed or old not in (None, self._connection):
                return
            self._replace()
        self._close_former()

    def close(self) -> None:
        """End the connection, and every call on it."""
        with self._lock:
            self._closed = True
            connections = {self._connection, *self._former}
        for connection in connections:
            if not connection.lost:
                connection.channel.close()

    def _control(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """Call what a server that is well answers at once. Raises PoolError.

        If it does not, the connection may be one that was forgotten on the way: the next call goes by a new one.
        """
        connection = self.enter()
        try:
            answer: bytes = connection.channel.unary_unary(_METHOD + method)(
                request, timeout=timeout_s, metadata=connection.metadata
            )
            return answer
        except grpc.RpcError as rpc_error:
            error = from_rpc(rpc_error, self.target)
            if isinstance(error, DeadlineError) and error.reason is None:
                self.renew(connection)
            raise error from rpc_error
        except KeyboardInterrupt:
            connection.lose()
            raise
        finally:
            self.leave(connection)

    def enter(self) -> _Connection:
        """The connection for a call; `leave` is to follow."""
        self._credentials.look()
        shown = self._credentials.shown  # by other lanes, too: each has to find out that they changed
        with self._lock:
            if self._connection.shown != shown or self._connection.lost:
                self._replace()
            self._connection.calls += 1
            return self._connection

    def leave(self, connection: _Connection) -> None:
        """A call on it has ended."""
        with self._lock:
            connection.calls -= 1
        if self._former:
            self._close_former()

    def _replace(self) -> None:
        """With the lock: have later calls go by a new connection."""
        old, self._connection = self._connection, _Connection(self.target, self._credentials)
        self._former.add(old)

    def _close_former(self) -> None:
        """Close those that are not used any more, and on which no call is under way."""
        with self._lock:
            idle = {one for one in self._former if not one.calls and not one.lost}
            self._former -= idle
        for connection in idle:
            connection.channel.close()


class _Call:
    """A lookup over gRPC."""

    def __init__(self, lane: GrpcLane, exchange: Exchange, deadline: float) -> None:
        self._lane, self._exchange, self._deadline = lane, exchange, deadline

    def receive(self) -> bool:
        """See `Request`. Whatever it raises once the lookup was given up, the delivery knows better."""
        lane, exchange = self._lane, self._exchange
        timeout_s = self._deadline - time.monotonic()
        if timeout_s <= 0:
            text = f"{lane.target} was not asked: the deadline had passed before (DEADLINE_EXCEEDED)"
            raise DeadlineError(text, "not-asked")
        connection, stream = lane.enter(), None
        number = exchange.number = new_number()
        traced, trace = None, exchange.delivery.trace
        if trace is not None:
            traced = trace.asked(lane.target, "grpc", exchange.answer_bytes, number)
        try:
            if not _streamed(exchange):
                # In this thread alone: half the time of a call that can be cancelled. It is short, and a step that is
                # given up meanwhile does not wait for it.
                _take(exchange, connection.lookup(exchange.encode(), timeout=timeout_s, metadata=connection.metadata))
            else:
                stream = connection.begin(exchange.encode(), timeout_s)
                if exchange.answer_bytes > STREAM_ABOVE_BYTES:
                    exchange.delivery.on_cancel(partial(connection.cancel, stream))
                for message in stream:
                    _take(exchange, message)
        except grpc.RpcError as failed:
            error = from_rpc(failed, lane.target)
            error.number = number
            if traced is not None:
                traced.gave_up(str(error))
            raise error from failed
        except KeyboardInterrupt:
            connection.lose(stream)
            raise
        finally:
            lane.leave(connection)
        exchange.landing.check_complete()
        if traced is not None:
            traced.received(exchange.times)
        return True

    def abandon(self) -> None:
        """See `Request`. Nothing has begun."""


def new_number() -> int:
    """Of a lookup, by which the server's log and this client's name it: 64 bits that nobody else chooses."""
    return int.from_bytes(os.urandom(8), "little") or 1


def _streamed(exchange: Exchange) -> bool:
    above = STREAM_ABOVE_BYTES
    if not exchange.delivery.whole and len(exchange.landing.missing()) > 1:
        above = min(above, LAYERS_ABOVE_BYTES)
    return exchange.answer_bytes > above


def _take(exchange: Exchange, message: bytes) -> None:
    if exchange.landing.owned:
        exchange.add(message)
    else:
        with exchange.delivery.writing():
            exchange.add(message)
    exchange.landing.hand_over()
