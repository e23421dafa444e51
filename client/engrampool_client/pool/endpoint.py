"""One server: the ways to it, and whether it is asked at all."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Literal, TypeVar

import numpy as np

from engrampool_client.errors import (
    DeadlineError,
    EngrampoolError,
    PoolError,
    StepCancelledError,
    UnavailableError,
)
from engrampool_client.lanes.attach import AttachLane
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.lanes.native import Connection, Direct, DirectLane
from engrampool_client.lanes.split import SideBySide
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange, slowest
from engrampool_client.lookup.served import BRIEF, ServedModel
from engrampool_client.pool.breaker import Breaker
from engrampool_client.pool.latency import Latency
from engrampool_client.settings import SPLIT_ABOVE_BYTES
from engrampool_client.stats import Stats

Attach = Literal["auto", "off"]
Lane = Literal["attached", "direct", "grpc"]
_Answer = TypeVar("_Answer")
_PROBE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Ways:
    """Which ways to a server are taken, and how often it is tried; see `Client`."""

    connections: int
    attach: Attach
    direct: Direct
    retry_s: float
    breaker_failures: int
    max_steps: int


class Endpoint:
    """The lanes to the server at `target`, of which a lookup takes the best that there is. Thread-safe.

    To be used in this order: `describe`, `open`, `ask`; `close` at any time. served: what it was opened for.
    latency: for whoever asks to keep, and to compare with that of other servers.
    """

    def __init__(self, target: str, ways: Ways, closing: threading.Event) -> None:
        """closing: set when the client closes, so that nobody waits to ask again."""
        self.target, self._ways, self._closing = target, ways, closing
        self.latency = Latency()
        self._lanes = [GrpcLane(target) for _ in range(ways.connections)]
        self._attach: AttachLane | None = None
        self._direct: DirectLane | None = None
        self._opened = self._closed = False
        # Of its own: a part of a lookup must never wait for a place behind the lookup that waits for it.
        self._parts = ThreadPoolExecutor(max(1, ways.max_steps * (ways.connections - 1)), "engrampool-part")

    def describe(self, timeout_s: float, request: bytes = BRIEF) -> bytes:
        """The bytes of a DescribeResponse; see `GrpcLane.describe`."""
        return self._lanes[0].describe(timeout_s, request)

    def open(self, served: ServedModel, stats: Stats) -> None:
        """Make ready for lookups in what `describe` said is served."""
        ways, lane = self._ways, self._lanes[0]
        self.served, self._stats = served, stats
        self.breaker = Breaker(ways.retry_s, ways.breaker_failures, self._probe, stats.opened, self.target)
        self._opened = True
        if ways.attach == "auto" and served.attach:
            attach = partial(lane.attach, served.spec.name, served.version)
            self._attach = AttachLane(partial(self._asked, attach), served)
        if ways.direct == "auto" and served.direct:
            most = ways.max_steps * ways.connections
            self._direct = DirectLane(partial(self._asked, lane.open_direct), self.target, most, self.breaker.doubt)

    @property
    def attached(self) -> bool:
        """Whether lookups read the server's memory, now."""
        return self._attach is not None and self._attach.attached

    @property
    def direct(self) -> bool:
        """Whether the next lookup that is not read from attached memory finds a connection of the direct lane."""
        return self._direct is not None and self._direct.open

    @property
    def lane(self) -> Lane:
        """What the next lookup by row ids goes over."""
        if self.attached:
            return "attached"
        return "direct" if self.direct else "grpc"

    @property
    def why_not_attached(self) -> str | None:
        """Why lookups do not read the server's memory, for people; None if they do."""
        if self._ways.attach == "off":
            return 'the client was made with attach="off"'
        if self._attach is None:
            return "the server has no tables that a client can map"
        if self._attach.attached:
            return None
        return self._attach.reason or "the server's leave has run out, and it is asked again"

    @property
    def why_not_direct(self) -> str | None:
        """Why lookups that are not read from memory go over gRPC, for people; None if they do not."""
        if self._ways.direct == "off":
            return 'the client was made with direct="off"'
        if self._direct is None:
            return "the server has no direct lane"
        return None if self._direct.open else self._direct.reason or "a connection is being opened"

    @property
    def direct_connections(self) -> int:
        """Connections of the direct lane that it has."""
        return 0 if self._direct is None else self._direct.connections

    @property
    def direct_opened(self) -> int:
        """Connections of the direct lane that were opened so far."""
        return 0 if self._direct is None else self._direct.opened

    @property
    def in_trouble(self) -> str | None:
        """Why the server is taken to be away, for people; None while it is not, or was asked for nothing yet."""
        return self.breaker.trouble if self._opened else None

    def begin(self, exchange: Exchange, deadline: float, send_by: float | None = None) -> Connection | None:
        """Only send the request, if that takes but a moment: `ask` or `abandon` is to follow. None if it does not.

        send_by: when to stop trying, by time.monotonic.
        """
        if self._direct is None or self._splits(exchange) or self.breaker.is_open or self.attached:
            return None
        if time.monotonic() >= deadline:  # or a good connection would be lost by a request that is cut short
            return None
        return self._direct.begin(exchange, deadline, send_by)

    def abandon(self, begun: Connection) -> None:
        """Do without the answer of what has begun."""
        assert self._direct is not None
        self._direct.abandon(begun)

    def ask(
        self,
        exchange: Exchange,
        delivery: Delivery,
        spin_s: float,
        deadline: float,
        begun: Connection | None = None,
        *,
        patient: bool = True,
        early: bool = False,
    ) -> None:
        """Have every row of the exchange come, over several connections if it is a large one.

        deadline: by time.monotonic, the step's or an earlier one. begun: what `begin` gave. patient: ask again where
        the connection breaks, instead of leaving it to others. early: a deadline that is missed says nothing against
        the server, and never does where it had passed before anything was sent (reason "not-asked"). Raises PoolError.
        """
        try:
            self._ask(exchange, delivery, spin_s, deadline, begun, patient, early)
        except (ValueError, RuntimeError) as error:  # what gRPC and executors have to say that they are closed
            if not self._closed or isinstance(error, EngrampoolError):
                raise
            raise UnavailableError(f"{self.target} is asked no more, as it was away", "left") from error

    def _ask(
        self,
        exchange: Exchange,
        delivery: Delivery,
        spin_s: float,
        deadline: float,
        begun: Connection | None,
        patient: bool,
        early: bool,
    ) -> None:
        parts = exchange.split(len(self._lanes)) if begun is None and self._splits(exchange) else [exchange]
        if len(parts) == 1:
            self._fetch(self._lanes[0], exchange, delivery, spin_s, deadline, patient, early, begun)
            return
        with SideBySide(self._parts, delivery) as others:
            for lane, part in zip(self._lanes[1:], parts[1:], strict=False):
                others.begin(self._fetch, lane, part, delivery, 0.0, deadline, patient, early)
            self._fetch(self._lanes[0], parts[0], delivery, spin_s, deadline, patient, early)
        exchange.times = slowest(parts)

    def _splits(self, exchange: Exchange) -> bool:
        """Whether it is large enough for several connections."""
        return len(self._lanes) > 1 and exchange.answer_bytes > SPLIT_ABOVE_BYTES and not self.attached

    def _fetch(
        self,
        lane: GrpcLane,
        exchange: Exchange,
        delivery: Delivery,
        spin_s: float,
        deadline: float,
        patient: bool,
        early: bool,
        begun: Connection | None = None,
    ) -> None:
        """Ask until the answer is whole, the error is one that asking again does not mend, or time is up."""
        nbytes = exchange.answer_bytes
        for attempt in count():
            try:
                if begun is None and self._attach is not None and self._attach.fetch(exchange, delivery):
                    self._stats.came("attached", nbytes)
                    return
                if begun is None:
                    self.breaker.check()
                    if time.monotonic() >= deadline:
                        text = f"{self.target} was not asked: the deadline had passed before (DEADLINE_EXCEEDED)"
                        raise DeadlineError(text, "not-asked")
                asked, begun = begun, None
                if self._direct is None or not self._direct.fetch(exchange, deadline, delivery, spin_s, asked):
                    lane.fetch(exchange, max(0.0, deadline - time.monotonic()), delivery)
                break
            except PoolError as error:
                pause_s = self.breaker.pause_s(error, attempt) if patient else None
                if pause_s is None or time.monotonic() + pause_s >= deadline or delivery.given_up:
                    against = _against(error, delivery, early)
                    if against is not None:
                        self.breaker.failed(against)
                    elif early and error.reason is None:
                        self.breaker.doubt()
                    raise
                if delivery.pause(pause_s) or self._closing.is_set():
                    raise
                self._stats.retried()
                exchange.restart()
                if exchange.complete:  # only the end of the answer was lost
                    break
        self.breaker.succeeded()
        self._stats.came("wire", nbytes)

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
        try:
            for lane in self._lanes:
                exchange = Exchange.of_rows(self.served, {layer: np.full(1, start, np.uint64)})
                lane.fetch(exchange, _PROBE_TIMEOUT_S, Delivery([layer]))
        except DeadlineError:
            for lane in self._lanes:
                lane.renew()
            if self._direct is not None:
                self._direct.renew()
            raise

    def forked(self) -> None:
        """In the child of a fork: let go of the direct lane's connections. gRPC's are not touched."""
        if self._direct is not None:
            self._direct.forked()

    def stop(self) -> None:
        """End what waits for the server, without waiting for that; `close` is to follow."""
        self._closed = True
        if self._opened:
            self.breaker.stop()
        for ended in (self._attach, self._direct):
            if ended is not None:
                ended.stop()
        for lane in self._lanes:
            lane.close()

    def close(self) -> None:
        """End the connections, and every lookup on one."""
        self.stop()
        for lane in (self._attach, self._direct):
            if lane is not None:
                lane.close()
        if self._opened:
            self.breaker.close()
        self._parts.shutdown(wait=False)


def _against(error: PoolError, delivery: Delivery, early: bool) -> EngrampoolError | None:
    """What a lookup that was given up says against the server, None if nothing."""
    if error is delivery.error or (early and isinstance(error, DeadlineError)):
        return None  # rows came, for a step that was given up; or nobody knows what would have come
    if isinstance(error, StepCancelledError | UnavailableError):
        # Whoever waits for a step may have given it up just before the call itself did.
        return delivery.error or error
    return error
