"""One server: the ways to it, and whether it is asked at all."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from engrampool_client.compute.forms import form_of
from engrampool_client.compute.served import BRIEF, ServedModel
from engrampool_client.config import ClientConfig, Connections
from engrampool_client.errors import (
    DeadlineError,
    EngrampoolError,
    PoolError,
    SpecError,
    StepCancelledError,
    UnavailableError,
)
from engrampool_client.lanes.attach import AttachLane
from engrampool_client.lanes.connection import Connection
from engrampool_client.lanes.credentials import Credentials
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.lanes.native import NativeLane, NativeRequest
from engrampool_client.lanes.split import SideBySide
from engrampool_client.lanes.streamed import STREAMED_ABOVE_BYTES, StreamedRequest
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange, slowest
from engrampool_client.lookup.landing import Landing
from engrampool_client.lookup.small import Small
from engrampool_client.lookup.workers import Job, Workers
from engrampool_client.pool.breaker import Breaker
from engrampool_client.pool.latency import Latency
from engrampool_client.stats import Stats
from engrampool_proto.wire import ServerTimes

if TYPE_CHECKING:  # it needs numba
    from engrampool_client.lanes.small import SmallRequest

Lane = Literal["attached", "direct", "grpc"]
_Answer = TypeVar("_Answer")
_PROBE_TIMEOUT_S = 1.0
# Threads that rows of a large lookup are copied by from attached memory, unless there are more connections.
_GATHER_WAYS = 2
# Answers above this size are split where there are several connections.
SPLIT_ABOVE_BYTES = 4 << 20
# Connections that a large lookup takes by itself, over the direct lane: each needs a core on either side.
_MOST_BY_ITSELF = 4


class Endpoint:
    """The lanes to the server at `target`, of which a lookup takes the best that there is. Thread-safe.

    To be used in this order: `describe`, `open`, `ask`; `close` at any time. served: what it was opened for.
    latency: for whoever asks to keep, and to compare with that of other servers.
    """

    def __init__(self, target: str, config: ClientConfig, closing: threading.Event) -> None:
        """closing: set when the client closes, so that nobody waits to ask again."""
        self.target, self._config, self._closing = target, config, closing
        self.latency = Latency()
        self._ways = connections_of(config.connections, "direct")
        credentials = self._credentials = Credentials(config)
        self._lanes = [GrpcLane(target, credentials) for _ in range(connections_of(config.connections, "grpc"))]
        self._attach: AttachLane | None = None
        self._native: NativeLane | None = None
        self._small: type[SmallRequest] | None = None
        self._opened = self._closed = False
        # Of its own: a part of a lookup must never wait for a place behind the lookup that waits for it.
        self._parts = Workers(max(1, config.max_steps * (self._ways - 1)), "engrampool-part")

    def describe(self, timeout_s: float, request: bytes = BRIEF) -> bytes:
        """The bytes of a DescribeResponse; see `GrpcLane.describe`."""
        return self._lanes[0].describe(timeout_s, request)

    def open(self, served: ServedModel, stats: Stats) -> None:
        """Make ready for lookups in what `describe` said is served."""
        config, lane = self._config, self._lanes[0]
        self.served, self._stats, self._hops = served, stats, stats.server(self.target)
        self.breaker = Breaker(config.retry_s, config.breaker_failures, self._probe, stats.opened, self.target)
        self._opened = True
        if config.attach == "auto" and served.attach:
            attach = partial(lane.attach, served.spec.name, served.version)
            form, ways = form_of(config.compiled), min(max(_GATHER_WAYS, self._ways), len(os.sched_getaffinity(0)))
            asked, emulate = partial(self._asked, attach), config.emulate
            self._attach = AttachLane(asked, served, form, self._parts, ways, emulate, self.target)
        if config.emulate is not None and not self.attached:
            raise SpecError(f"emulate needs memory that is attached, and it is not: {self.why_not_attached}")
        if config.direct == "auto" and served.direct and config.emulate is None:
            most = config.max_steps * self._ways
            kind = Connection
            if form_of(config.compiled).compiled:
                from engrampool_client.lanes.compiled import CompiledConnection
                from engrampool_client.lanes.small import SmallRequest

                kind, self._small = CompiledConnection, SmallRequest
            open_direct, secure = partial(self._asked, lane.open_direct), self._credentials.secure
            self._native = NativeLane(open_direct, self.target, most, self.breaker.doubt, kind, secure)

    @property
    def attached(self) -> bool:
        """Whether lookups read the server's memory, now."""
        return self._attach is not None and self._attach.attached

    @property
    def direct(self) -> bool:
        """Whether the next lookup that is not read from attached memory finds a connection of the direct lane."""
        return self._native is not None and self._native.open

    @property
    def lane(self) -> Lane:
        """What the next lookup by row ids goes over."""
        if self.attached:
            return "attached"
        return "direct" if self.direct else "grpc"

    @property
    def why_not_attached(self) -> str | None:
        """Why lookups do not read the server's memory, for people; None if they do."""
        if self._config.attach == "off":
            return 'the client was made with attach="off"'
        if self._attach is None:
            return "the server has no tables that a client can map"
        if self._attach.attached:
            return None
        return self._attach.reason or "the server's leave has run out, and it is asked again"

    @property
    def why_not_direct(self) -> str | None:
        """Why lookups that are not read from memory go over gRPC, for people; None if they do not."""
        if self._config.direct == "off":
            return 'the client was made with direct="off"'
        if self._native is None:
            return "the server has no direct lane"
        return None if self._native.open else self._native.reason or "a connection is being opened"

    @property
    def direct_connections(self) -> int:
        """Connections of the direct lane that it has."""
        return 0 if self._native is None else self._native.connections

    @property
    def direct_opened(self) -> int:
        """Connections of the direct lane that were opened so far."""
        return 0 if self._native is None else self._native.opened

    @property
    def in_trouble(self) -> str | None:
        """Why the server is taken to be away, for people; None while it is not, or was asked for nothing yet."""
        return self.breaker.trouble if self._opened else None

    def ask(
        self, exchange: Exchange, deadline: float, spin_s: float = 0.0, send_by: float | None = None
    ) -> "EndpointRequest":
        """A request for every row of the exchange, sent by now if that takes but a moment.

        deadline: by time.monotonic, the step's or an earlier one. send_by: when to stop trying to send it, likewise.
        spin_s: how long to look for the answer without sleeping.
        """
        sent, tried = None, False
        if not (
            self._native is None
            or self.breaker.is_open
            or self.attached
            or self.ways(exchange) > 1
            or time.monotonic() >= deadline  # or a good connection would be lost by a request that is cut short
        ):
            sent, tried = self._native.ask(exchange, deadline, spin_s=spin_s, send_by=send_by), True
        return EndpointRequest(self, exchange, deadline, spin_s, sent, tried)

    @property
    def sends(self) -> int | None:
        """`send` may well send what is more bytes of rows than this, now; None: nothing."""
        native = self._native
        if self._config.emulate is not None or self.attached or self.breaker.is_open:
            return None
        if native is None:
            return None if self._lanes[0].full else STREAMED_ABOVE_BYTES
        return None if self._small is None or not native.idle else 0

    def send(self, small: Small, deadline: float) -> "SmallRequest | StreamedRequest | None":
        """Have a small request sent, all of it at once; None if that cannot be."""
        if self._native is not None:
            return self.send_direct(small, deadline)
        return None if self.attached or time.monotonic() >= deadline else self._begin(small, deadline)

    def send_direct(self, small: Small, deadline: float) -> "SmallRequest | None":
        """As `send`, on the direct lane. Where no connection is idle, one more is opened for later."""
        native, left_s = self._native, deadline - time.monotonic()
        if native is None or self._small is None or self.attached or self.breaker.is_open or left_s <= 0:
            return None
        connection = native.take()
        if connection is None:
            return None
        try:
            if self._small.send_now(connection, small, left_s):
                return self._small(native, connection, small, self._answered, self.breaker.failed)
        except OSError:  # it broke, or takes nothing
            pass
        native.drop(connection)
        return None

    def read(self, small: Small) -> ServerTimes | None:
        """Copy what is small from attached memory; None if that cannot be."""
        times = None if self._attach is None else self._attach.read(small)
        if times is not None:
            self._stats.count_bytes("attached", small.nbytes)
        return times

    def _begin(self, small: Small, deadline: float) -> StreamedRequest | None:
        lane = self._lanes[0]
        try:
            request = StreamedRequest(lane, small, self.served, deadline, self._answered, self.breaker.failed)
        except (ValueError, RuntimeError):  # what gRPC has to say that it is closed
            return None
        if lane.has_ended_calls:
            with suppress(RuntimeError):  # the system gives no thread
                nobodys = Delivery(small.what[2])
                # It takes no place from parts that somebody waits for.
                nobodys.end(StepCancelledError("the lookups have ended"))
                self._parts.submit(Job(nobodys, _unplanned, lane.end_calls))
        return request

    def _answered(self, nbytes: int, times: ServerTimes | None, first_s: float | None, number: int) -> None:
        """Count a lookup whose rows came over the network; as of `Answered`."""
        self.breaker.succeeded()
        self._stats.answered(self._hops, nbytes, times, first_s, number)

    def ways(self, exchange: Exchange) -> int:
        """How many connections it goes over: several only if it is large."""
        if self._ways == 1 or exchange.answer_bytes <= SPLIT_ABOVE_BYTES or self.attached:
            return 1
        if self._config.connections != "auto":
            return self._ways
        # Those that are not there yet are for the next lookups: over gRPC several gain nothing.
        return 1 if self._native is None else max(1, self._native.ready(self._ways))

    def _asked(self, call: Callable[[float], _Answer], timeout_s: float) -> _Answer:
        """Call what a lane asks the server for within a time; if it does not answer, it is probed. Raises PoolError."""
        try:
            return call(timeout_s)
        except (UnavailableError, DeadlineError):
            self.breaker.doubt()
            raise
        except ValueError as error:  # gRPC's way to say that a channel is closed
            if not self._closed or isinstance(error, EngrampoolError):
                raise
            raise UnavailableError(f"{self.target} is asked no more", "left") from error

    def _probe(self) -> None:
        """Ask for one row that it holds, over gRPC. Raises PoolError.

        If there is no answer in time, all connections may be lost: whatever is asked next goes by new ones.
        """
        layer, (start, _) = next(iter(self.served.parts.items()))
        table = self.served.spec.table(layer)
        try:
            for lane in self._lanes:
                landing = Landing(Delivery([layer]), {layer: (1, table.row_bytes)})
                exchange = Exchange.of_ids(self.served, {layer: np.full(1, start, table.id_dtype)}, landing)
                lane.ask(exchange, time.monotonic() + _PROBE_TIMEOUT_S).receive()
        except DeadlineError:
            for lane in self._lanes:
                lane.renew()
            if self._native is not None:
                self._native.renew()
            raise

    def forked(self) -> None:
        """In the child of a fork: let go of the direct lane's connections. gRPC's are not touched."""
        if self._native is not None:
            self._native.forked()

    def stop(self) -> None:
        """End what waits for the server, without waiting for that; `close` is to follow."""
        self._closed = True
        if self._opened:
            self.breaker.stop()
        for ended in (self._attach, self._native):
            if ended is not None:
                ended.stop()
        for lane in self._lanes:
            lane.close()

    def close(self) -> None:
        """End the connections, and every lookup on one."""
        self.stop()
        for lane in (self._attach, self._native):
            if lane is not None:
                lane.close()
        if self._opened:
            self.breaker.close()
        self._parts.close(wait=False)


def connections_of(setting: Connections, lane: str) -> int:
    """Over how many connections a large lookup goes by this setting, where it goes by that lane to the server."""
    if setting != "auto":
        return setting
    return max(1, min(_MOST_BY_ITSELF, len(os.sched_getaffinity(0)) // 2)) if lane == "direct" else 1


class EndpointRequest:
    """A request to one server. sent: on the direct lane, if it was by now.

    Exactly one of `receive` and `abandon` is to be called.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        exchange: Exchange,
        deadline: float,
        spin_s: float,
        sent: NativeRequest | None,
        tried: bool,
    ) -> None:
        """tried: whether the direct lane was asked to send it: if it could not, gRPC is next."""
        self._endpoint, self._exchange, self._deadline, self._spin_s = endpoint, exchange, deadline, spin_s
        self.sent, self._tried = sent, tried

    def renew(self, deadline: float) -> None:
        """Give it until then, by time.monotonic."""
        self._deadline = deadline
        if self.sent is not None:
            self.sent.deadline = deadline

    def abandon(self) -> None:
        """Do without the answer."""
        if self.sent is not None:
            self.sent.abandon()

    def receive(self, *, patient: bool = True, early: bool = False) -> None:
        """Have every row come, over several connections if it is a large request.

        patient: ask again where the connection breaks, instead of leaving it to others. early: a deadline that is
        missed says nothing against the server, and never does where it had passed before anything was sent (reason
        "not-asked"). Raises PoolError.
        """
        endpoint = self._endpoint
        try:
            ways = endpoint.ways(self._exchange) if self.sent is None else 1
            if ways > 1:
                self._receive_parts(ways, patient, early)
            else:
                self._fetch(endpoint._lanes[0], self._exchange, self._spin_s, patient, early, self.sent, self._tried)
        except (ValueError, RuntimeError) as error:  # what gRPC and threads have to say that they are closed
            if not endpoint._closed or isinstance(error, EngrampoolError):
                raise
            raise UnavailableError(f"{endpoint.target} is asked no more, as it was away", "left") from error

    def _receive_parts(self, ways: int, patient: bool, early: bool) -> None:
        lanes, parts = self._endpoint._lanes, self._exchange.split(ways, between_runs=True)
        with SideBySide(self._endpoint._parts, self._exchange.delivery) as others:
            for at, part in enumerate(parts[1:], 1):
                others.begin(self._fetch, lanes[at % len(lanes)], part, 0.0, patient, early)
            self._fetch(lanes[0], parts[0], self._spin_s, patient, early)
        if len(parts) > 1:
            self._exchange.times = slowest(part.times for part in parts)

    def _fetch(
        self,
        lane: GrpcLane,
        exchange: Exchange,
        spin_s: float,
        patient: bool,
        early: bool,
        sent: NativeRequest | None = None,
        tried: bool = False,
    ) -> None:
        """Ask until the answer is whole, the error is one that asking again does not mend, or time is up."""
        endpoint, deadline, nbytes = self._endpoint, self._deadline, exchange.answer_bytes
        asked_at, lay_there = (0.0, False) if sent is None else (sent.connection.asked_at, sent.lies_there)
        for attempt in count():
            try:
                if sent is None and endpoint._attach is not None:
                    gather = endpoint._attach.ask(exchange, deadline)
                    if gather is not None:
                        gather.receive()
                        endpoint._stats.count_bytes("attached", nbytes)
                        return
                    if endpoint._config.emulate is not None:
                        raise UnavailableError(f"emulate: not attached now: {endpoint.why_not_attached}")
                if sent is None:
                    endpoint.breaker.check()
                    asked_at, lay_there = time.monotonic(), False
                    if endpoint._native is not None and not tried:
                        sent = endpoint._native.ask(exchange, deadline, spin_s=spin_s)
                request, sent, tried = sent, None, False
                if request is None or not request.receive():
                    lane.ask(exchange, deadline).receive()
                break
            except PoolError as error:
                if not self._again(error, attempt, patient, early):
                    raise
                exchange.restart()
                if exchange.landing.complete:  # only the end of the answer was lost
                    break
        first_s = None
        if exchange.times is not None and not lay_there:  # it was received as it came, so sending took no longer
            first_s = time.monotonic() - asked_at - exchange.times.send_us / 1e6
        endpoint._answered(nbytes, exchange.times, first_s, exchange.number)

    def _again(self, error: PoolError, attempt: int, patient: bool, early: bool) -> bool:
        """Whether to ask again, after a pause; what the error says against the server is counted, if not."""
        endpoint, delivery = self._endpoint, self._exchange.delivery
        pause_s = endpoint.breaker.pause_s(error, attempt) if patient else None
        if pause_s is None or time.monotonic() + pause_s >= self._deadline or delivery.given_up:
            against = _against(error, delivery, early)
            if against is not None:
                endpoint.breaker.failed(against)
            elif early and error.reason is None:
                endpoint.breaker.doubt()
            return False
        if delivery.pause(pause_s) or endpoint._closing.is_set():
            return False
        endpoint._stats.retried()
        return True


def _unplanned() -> bool:
    return True


def _against(error: PoolError, delivery: Delivery, early: bool) -> EngrampoolError | None:
    """What a lookup that was given up says against the server, None if nothing."""
    if error is delivery.error or (early and isinstance(error, DeadlineError)):
        return None  # rows came, for a step that was given up; or nobody knows what would have come
    if isinstance(error, StepCancelledError | UnavailableError):
        # Whoever waits for a step may have given it up just before the call itself did.
        return delivery.error or error
    return error
