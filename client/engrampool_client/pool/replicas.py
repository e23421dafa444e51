"""Servers that hold the same rows: which of them a lookup asks, and when it asks another as well."""

import time
from collections.abc import Mapping, Sequence
from itertools import count
from math import inf
from typing import NamedTuple

from engrampool_client.errors import (
    DeadlineError,
    PoolError,
    RejectedError,
    UnavailableError,
    UnknownModelError,
    UnknownVersionError,
)
from engrampool_client.lanes.native import first_to_answer
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.sent import Part
from engrampool_client.lookup.small import Small
from engrampool_client.pool.endpoint import Endpoint, EndpointRequest
from engrampool_client.pool.latency import HedgeBudget
from engrampool_client.pool.raced import Raced
from engrampool_client.stats import Stats
from engrampool_proto.wire import ServerTimes

# Where there are other replicas, one may take so long, and so long for each byte: far more than one that is well does.
_PATIENCE_S, _PATIENCE_S_PER_BYTE = 0.1, 1e-8
# What one may take, so many times as long, where all were asked in vain; twice as long in every round after that.
_SHARE = 16.0
# A server is slow that takes so many times as long as the best, or as this.
_SLOW, _FAST_S = 3.0, 100e-6
# No answer is late before this.
_LEAST_LATE_S = 1e-3
# What is given up to be asked for elsewhere is lost, so it is given more time than what is asked for twice.
_CANCEL_AFTER = 2.0
# Refusals that are about what the server holds, and not about the request.
_HELD_ELSEWHERE = ("not-held", "unknown-layer", "partial-model")


class ReplicaSet:
    """Servers that hold the same rows. parts: layer -> (first row, one past the last).

    They take turns, but for those that are slow: they are only tried now and then. Where the answer of one is late, the
    next is asked as well and the first that answers is listened to (a hedge), as far as a budget allows. Over gRPC, or
    split over connections, an answer cannot be seen to begin: there the lookup is given up and asked for elsewhere.

    What one refuses is asked of each other one once, as that may have room, or hold what this one holds no more; unless
    the request itself is refused: that is final. What is more than all of them take in one request is asked for in
    several, one after the other.

    suspects: of all sets: servers that may hold others, or have other limits, by now, as what they refused says.
    """

    def __init__(self, parts: Mapping[int, tuple[int, int]], suspects: set[Endpoint], stats: Stats) -> None:
        self.parts, self._suspects, self.stats = dict(parts), suspects, stats
        self.replicas: tuple[Endpoint, ...] = ()  # replaced as a whole
        # What each of them takes in one request, and in bytes what surely is no more than that.
        self._max_rows: float = inf
        self._max_answer_bytes: float = inf
        self.fits_bytes: float = inf
        self._turn = count()
        self.budget = HedgeBudget()

    def use(self, replicas: tuple[Endpoint, ...]) -> None:
        """Ask these from now on, within the limits of each."""
        limits = [endpoint.served for endpoint in replicas]
        self._max_rows = max(1, min((one.max_rows for one in limits), default=1))
        self._max_answer_bytes = max(1, min((one.max_answer_bytes for one in limits), default=1))
        row_bytes = min((table.row_bytes for one in limits[:1] for table in one.spec.tables), default=1)
        self.fits_bytes = min(self._max_answer_bytes, self._max_rows * row_bytes)
        self.replicas = replicas

    def ask(self, exchange: Exchange, spin_s: float, *, prompt: bool = False) -> "ReplicaRequest":
        """A request that any of them may answer, sent to one by now if that takes but a moment.

        prompt: stop trying to send it when an answer to it would be late, as there are other shards to ask.
        """
        return ReplicaRequest(self, exchange, spin_s, prompt=prompt)

    def ask_anyway(self, exchange: Exchange, spin_s: float) -> "ReplicaRequest":
        """As `ask`, of a request that is within limits, or cannot be cut so that it is: the server says so then."""
        return ReplicaRequest(self, exchange, spin_s, anyway=True)

    @property
    def sends(self) -> int | None:
        """As of `Endpoint`: of several servers over the direct lane only, as no other shows when an answer begins."""
        if len(self.replicas) == 1:
            return self.replicas[0].sends
        sends = None
        for endpoint in self.replicas:
            if endpoint.attached:
                return None
            sends = 0 if endpoint.sends == 0 else sends
        return sends

    def send(self, small: Small, deadline: float) -> Part | None:
        """Have a small request sent to one of them at once; None if that cannot be."""
        nbytes = small.nbytes
        if nbytes > self.fits_bytes:
            return None
        replicas = self.in_order(nbytes)
        if len(replicas) == 1:
            return replicas[0].send(small, deadline)
        for at, endpoint in enumerate(replicas):
            request = endpoint.send_direct(small, deadline)
            if request is not None:
                self.budget.earn()
                turned, patience_s = (*replicas[at:], *replicas[:at]), _patience_s(nbytes, deadline)
                late_s = max(_LEAST_LATE_S, _late_s(turned, nbytes, whole=False))
                return Raced(small, deadline, turned, request, late_s, patience_s, self.budget, self.stats)
        return None

    def suspect(self, endpoint: Endpoint) -> None:
        """Have it looked at: it may hold something else than it did."""
        self._suspects.add(endpoint)

    def pieces(self, exchange: Exchange) -> list[Exchange]:
        """What is asked for, in as many lookups as the limits demand; tokens in one, as `Exchange.split` has it."""
        tables = [(len(ids), exchange.landing.shapes[layer][-1]) for layer, ids in exchange.asked_tables or ()]
        count, most = 1, max((rows for rows, _ in tables), default=0)
        while True:
            rows = [-(-rows // count) for rows, _ in tables]
            nbytes = sum(some * row_bytes for some, (_, row_bytes) in zip(rows, tables, strict=True))
            over = max(sum(rows) / self._max_rows, nbytes / self._max_answer_bytes)
            if over <= 1 or count >= most:
                return exchange.split(count)
            count = min(most, max(count + 1, int(count * over)))

    def in_order(self, nbytes: int) -> Sequence[Endpoint]:
        """Attached ones first, those that are known to be away last; the others take turns, but for slow ones."""
        replicas = self.replicas
        if len(replicas) <= 1:
            return replicas
        turn = next(self._turn) % len(replicas)
        turned = (*replicas[turn:], *replicas[:turn])
        recent = {endpoint: endpoint.latency.recent_s(nbytes) for endpoint in turned}
        slow_s = _SLOW * max(_FAST_S, min((seconds for seconds in recent.values() if seconds is not None), default=0.0))

        def place(endpoint: Endpoint) -> tuple[bool, bool, int]:
            speed, seconds = 1, recent[endpoint]
            if seconds is not None and seconds > slow_s:
                speed = 0 if endpoint.latency.due(nbytes, time.monotonic()) else 2
            return endpoint.in_trouble is not None, not endpoint.attached, speed

        return sorted(turned, key=place)


class _Sent(NamedTuple):
    """A request to the first of the replicas. since, and when its answer is late: by time.monotonic."""

    replicas: Sequence[Endpoint]
    request: EndpointRequest
    since: float
    late: float


class ReplicaRequest:
    """A request to servers that hold the same rows. sent: whether one has it by now.

    Exactly one of `receive` and `abandon` is to be called.
    """

    def __init__(
        self, replicas: ReplicaSet, exchange: Exchange, spin_s: float, *, prompt: bool = False, anyway: bool = False
    ) -> None:
        self._set, self._exchange, self._delivery, self._spin_s = replicas, exchange, exchange.delivery, spin_s
        self._first: _Sent | None = None
        self.sent = False
        fits = anyway or exchange.answer_bytes <= replicas.fits_bytes
        # Only then, as each takes a turn.
        in_order = replicas.in_order(exchange.answer_bytes) if fits else ()
        if in_order:
            if len(in_order) == 1 and not prompt:
                request = in_order[0].ask(exchange, self._delivery.deadline, spin_s)
                self._first = _Sent(in_order, request, 0.0, inf)
            else:
                self._first = self._ask_first(in_order, self._patience(in_order))
            self.sent = self._first.request.sent is not None

    def abandon(self) -> None:
        """Do without the answer."""
        if self._first is not None:
            self._first.request.abandon()

    def receive_aside(self) -> None:
        """As `receive`, in a thread beside the caller's, of a request that could not be sent before."""
        self._spin_s, first = 0.0, self._first
        if first is not None:
            self._first = self._ask_first(first.replicas, self._patience(first.replicas))
        self.receive()

    def receive(self) -> None:
        """Have the rows come from one replica, or another if that one cannot. Raises PoolError."""
        first = self._first
        if first is not None:
            if len(first.replicas) > 1:
                self._receive_from_any(first)
                return
            try:
                first.request.receive()
            except RejectedError:
                self._set.suspect(first.replicas[0])
                raise
            return
        pieces = self._set.pieces(self._exchange)
        if not self._set.replicas:
            raise UnavailableError("no server is known that holds these rows", "no-replica")
        for piece in pieces:
            self._set.ask_anyway(piece, self._spin_s).receive()
        if len(pieces) > 1:
            self._exchange.times = _sum(pieces)

    def _patience(self, replicas: Sequence[Endpoint]) -> float:
        return self._delivery.deadline if len(replicas) == 1 else _deadline(self._exchange, self._delivery)

    def _ask_first(self, replicas: Sequence[Endpoint], deadline: float) -> _Sent:
        since = time.monotonic()
        late = since + max(_LEAST_LATE_S, _late_s(replicas, self._exchange.answer_bytes, whole=False))
        request = replicas[0].ask(self._exchange, deadline, self._spin_s, min(deadline, late))
        return _Sent(replicas, request, since, late)

    def _receive_from_any(self, first: _Sent) -> None:
        """From the first that can."""
        exchange, delivery, its = self._exchange, self._delivery, self._set
        its.budget.earn()
        begin, deadline, cancel_after_s = time.monotonic(), _deadline(exchange, delivery), inf
        request: EndpointRequest | None = first.request
        if first.request.sent is not None:
            first.request.renew(deadline)  # others' answers were read since it was sent
            first = self._raced(first, deadline)
            request, begin = first.request, max(begin, first.since)
        elif its.budget.ready and not first.replicas[0].attached:
            late_s = _late_s(first.replicas, exchange.answer_bytes, whole=True)
            cancel_after_s = max(_LEAST_LATE_S, late_s) * _CANCEL_AFTER
            request = None  # one that has less time
        # First each for a moment; if none could, those that were only slow, or could not be reached, in rounds that are
        # twice as long each, as far as the step's time goes: one that is frozen keeps the others waiting for no longer
        # than they took themselves. One that refused has said what it has to say, and so has, by then, one that was
        # late before its time was up.
        waiting, slow, away = list(first.replicas), [], []
        patient = cancelled = last = False
        share_s = 0.0
        while True:
            endpoint, nbytes = waiting.pop(0), exchange.answer_bytes
            attached = endpoint.attached
            early = begin + cancel_after_s < deadline
            if request is None:
                request = endpoint.ask(exchange, min(deadline, begin + cancel_after_s), self._spin_s)
            try:
                # A share that was missed is no deadline.
                request.receive(patient=patient, early=early or (patient and deadline < delivery.deadline))
                if not attached:
                    endpoint.latency.ended(nbytes, time.monotonic() - begin)
                if cancelled:
                    its.stats.hedge_won()
                return
            except PoolError as error:
                late, took_s = isinstance(error, DeadlineError), time.monotonic() - begin
                # Given less time than it takes, or none, it has not shown that it takes more.
                fair = error.reason != "not-asked" and took_s > (endpoint.latency.recent_s(nbytes) or 0.0)
                if late and fair and not attached:
                    endpoint.latency.ended(nbytes, inf)
                if isinstance(error, RejectedError | UnknownModelError | UnknownVersionError):
                    its.suspect(endpoint)
                if isinstance(error, RejectedError) and error.reason not in _HELD_ELSEWHERE:
                    raise
                if late and (not patient or time.monotonic() >= deadline):
                    slow.append(endpoint)
                elif isinstance(error, UnavailableError) and not patient:
                    away.append(endpoint)
                if delivery.given_up or time.monotonic() >= delivery.deadline or not (waiting or slow or away):
                    raise
                if late and early:
                    cancelled = True
                    its.budget.spend()
                    its.stats.hedged()
            exchange.restart()
            if exchange.landing.complete:  # only the end of the answer was lost
                return
            begin, request, cancel_after_s = time.monotonic(), None, inf
            left_s = delivery.deadline - begin
            if not waiting:
                waiting, slow, away = sorted(slow or away, key=_in_trouble), [], []
                share_s = 2 * share_s if patient else _SHARE * _patience_s(exchange.answer_bytes)
                patient, last = True, left_s < 3 * share_s * len(waiting)  # there is no time for a longer one
            if not patient:
                deadline = _deadline(exchange, delivery)
            elif last or not (waiting[1:] or slow):
                # One that is gone leaves the others their share of what is left.
                deadline = begin + left_s / len(waiting)
            else:
                deadline = begin + share_s

    def _raced(self, first: _Sent, deadline: float) -> _Sent:
        """Wait until somebody begins to answer, and ask a second one if the first is late; gives whom to listen to."""
        its, replicas, nbytes = self._set, first.replicas, self._exchange.answer_bytes
        chosen, other = first, None
        sent = first.request.sent
        assert sent is not None
        # What came while this thread was busy with another shard's answer is not late, whenever it is looked at.
        if not sent.begins(min(deadline, first.late)):
            if first.late < deadline and its.budget.ready:
                turned = ((*replicas[at:], *replicas[:at]) for at in range(1, len(replicas)))
                asked = (self._ask_first(others, deadline) for others in turned)
                other = next((one for one in asked if one.request.sent is not None), None)
            second = None if other is None else other.request.sent
            if other is None or second is None:
                first_to_answer([sent], deadline)
            else:
                its.budget.spend()
                its.stats.hedged()
                if first_to_answer([sent, second], deadline) is second:
                    chosen, other = other, first
                    replicas[0].latency.ended(nbytes, inf)
                    replicas[0].breaker.doubt()
                    its.stats.hedge_won()
                other.request.abandon()
        now = time.monotonic()
        for one in (first,) if chosen is first else (first, chosen):
            one.replicas[0].latency.began(nbytes, now - one.since)
        return chosen


def _sum(pieces: Sequence[Exchange]) -> ServerTimes | None:
    """The servers' times of a lookup in pieces that ran one after the other."""
    times = [piece.times for piece in pieces if piece.times is not None]
    if not times:
        return None
    return ServerTimes(*(sum(getattr(one, name) for one in times) for name in ("queue_us", "gather_us", "total_us")))


def _deadline(exchange: Exchange, delivery: Delivery) -> float:
    """Until when one replica may take, where there are others to go to."""
    return min(delivery.deadline, time.monotonic() + _patience_s(exchange.answer_bytes, delivery.deadline))


def _patience_s(nbytes: int, deadline: float = inf) -> float:
    return min(_PATIENCE_S + _PATIENCE_S_PER_BYTE * nbytes, (deadline - time.monotonic()) / 2)


def _in_trouble(endpoint: Endpoint) -> bool:
    return endpoint.in_trouble is not None


def _late_s(replicas: Sequence[Endpoint], nbytes: int, *, whole: bool) -> float:
    """When an answer is late by the measure of the best of them; inf if that is not known."""
    known = (endpoint.latency.late_s(nbytes, whole=whole) for endpoint in replicas)
    return min((late_s for late_s in known if late_s is not None), default=inf)
