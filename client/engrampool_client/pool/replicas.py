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
from engrampool_client.lanes.native import Connection, first_to_answer
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.pool.endpoint import Endpoint
from engrampool_client.pool.latency import HedgeBudget
from engrampool_client.stats import Stats
from engrampool_proto.wire import ServerTimes

# Where there are other replicas, one may take so long, and so long for each byte: far more than one that is well does.
_PATIENCE_S, _PATIENCE_S_PER_BYTE = 0.1, 1e-8
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
        self.parts, self._suspects, self._stats = dict(parts), suspects, stats
        self.replicas: tuple[Endpoint, ...] = ()  # replaced as a whole
        # What each of them takes in one request, and in bytes what surely is no more than that.
        self._max_rows: float = inf
        self._max_answer_bytes: float = inf
        self._fits_bytes: float = inf
        self._turn = count()
        self._budget = HedgeBudget()

    def use(self, replicas: tuple[Endpoint, ...]) -> None:
        """Ask these from now on, within the limits of each."""
        limits = [endpoint.served for endpoint in replicas]
        self._max_rows = max(1, min((one.max_rows for one in limits), default=1))
        self._max_answer_bytes = max(1, min((one.max_answer_bytes for one in limits), default=1))
        row_bytes = min((table.row_bytes for one in limits[:1] for table in one.spec.tables), default=1)
        self._fits_bytes = min(self._max_answer_bytes, self._max_rows * row_bytes)
        self.replicas = replicas

    def begin(self, exchange: Exchange, delivery: Delivery) -> "_Begun | None":
        """Only send the request to one replica: `ask` or `_Begun.abandon` is to follow. None if that cannot be done."""
        replicas = self._in_order(exchange.answer_bytes)
        if not replicas or exchange.answer_bytes > self._fits_bytes:
            return None
        return self._begin(
            replicas, exchange, _deadline(exchange, delivery) if len(replicas) > 1 else delivery.deadline
        )

    def ask(self, exchange: Exchange, delivery: Delivery, spin_s: float, begun: "_Begun | None" = None) -> None:
        """Have the rows come from one replica, or another if that one cannot. Raises PoolError."""
        pieces = self._pieces(exchange) if begun is None and exchange.answer_bytes > self._fits_bytes else [exchange]
        if len(pieces) == 1:
            self._ask(exchange, delivery, spin_s, begun)
            return
        for piece in pieces:
            self._ask(piece, delivery, spin_s)
        exchange.times = _sum(pieces)

    def _pieces(self, exchange: Exchange) -> list[Exchange]:
        """What is asked for, in as many lookups as the limits demand; tokens in one, as `Exchange.split` has it."""
        tables = [(len(ids), exchange.shapes[layer][-1]) for layer, ids in exchange.asked_tables or ()]
        count, most = 1, max((rows for rows, _ in tables), default=0)
        while True:
            rows = [-(-rows // count) for rows, _ in tables]
            nbytes = sum(some * row_bytes for some, (_, row_bytes) in zip(rows, tables, strict=True))
            over = max(sum(rows) / self._max_rows, nbytes / self._max_answer_bytes)
            if over <= 1 or count >= most:
                return exchange.split(count)
            count = min(most, max(count + 1, int(count * over)))

    def _ask(self, exchange: Exchange, delivery: Delivery, spin_s: float, begun: "_Begun | None" = None) -> None:
        """As `ask`, in one request to each that is asked."""
        replicas = self._in_order(exchange.answer_bytes) if begun is None else begun.replicas
        if not replicas:
            raise UnavailableError("no server is known that holds these rows", "no-replica")
        if len(replicas) == 1:
            try:
                replicas[0].ask(exchange, delivery, spin_s, delivery.deadline, None if begun is None else begun.sent)
            except RejectedError:
                self._suspects.add(replicas[0])
                raise
            return
        self._budget.earn()
        begin, deadline, sent, cancel_after_s = time.monotonic(), _deadline(exchange, delivery), None, inf
        if begun is None:
            begun = self._begin(replicas, exchange, deadline)
        if begun is not None:
            begun = self._raced(begun, exchange, delivery, spin_s, deadline)
            replicas, sent, begin = begun.replicas, begun.sent, max(begin, begun.since)
        elif self._budget.ready and not replicas[0].attached:
            late_s = _late_s(replicas, exchange.answer_bytes, whole=True)
            cancel_after_s = max(_LEAST_LATE_S, late_s) * _CANCEL_AFTER
        # First each for a moment; if none could, those that were only slow, or could not be reached, for as long as the
        # step has. One that refused has said what it has to say.
        waiting, slow, away = list(replicas), [], []
        patient = cancelled = False
        while True:
            endpoint, nbytes = waiting.pop(0), exchange.answer_bytes
            attached = endpoint.attached
            early = begin + cancel_after_s < deadline
            try:
                limit = min(deadline, begin + cancel_after_s)
                endpoint.ask(exchange, delivery, spin_s, limit, sent, patient=patient, early=early)
                if not attached:
                    endpoint.latency.ended(nbytes, time.monotonic() - begin)
                if cancelled:
                    self._stats.hedge_won()
                return
            except PoolError as error:
                late, took_s = isinstance(error, DeadlineError), time.monotonic() - begin
                # Given less time than it takes, or none, it has not shown that it takes more.
                fair = error.reason != "not-asked" and took_s > (endpoint.latency.recent_s(nbytes) or 0.0)
                if late and fair and not attached:
                    endpoint.latency.ended(nbytes, inf)
                if isinstance(error, RejectedError | UnknownModelError | UnknownVersionError):
                    self._suspects.add(endpoint)
                if isinstance(error, RejectedError) and error.reason not in _HELD_ELSEWHERE:
                    raise
                if late:
                    slow.append(endpoint)
                elif isinstance(error, UnavailableError):
                    away.append(endpoint)
                again = not waiting and not patient
                if (
                    delivery.given_up
                    or time.monotonic() >= delivery.deadline
                    or not (waiting or (again and (slow or away)))
                ):
                    raise
                if late and early:
                    cancelled = True
                    self._budget.spend()
                    self._stats.hedged()
            exchange.restart()
            if exchange.complete:  # only the end of the answer was lost
                return
            if not waiting:
                waiting, patient = list(slow or away), True
            begin, sent, cancel_after_s = time.monotonic(), None, inf
            # One that is gone leaves the others their share of what is left.
            patience_s = (delivery.deadline - begin) / len(waiting)
            deadline = begin + patience_s if patient else _deadline(exchange, delivery)

    def _begin(self, replicas: Sequence[Endpoint], exchange: Exchange, deadline: float) -> "_Begun | None":
        since = time.monotonic()
        late = since + max(_LEAST_LATE_S, _late_s(replicas, exchange.answer_bytes, whole=False))
        sent = replicas[0].begin(exchange, deadline, min(deadline, late))
        return None if sent is None else _Begun(replicas, sent, since, late)

    def _raced(
        self, begun: "_Begun", exchange: Exchange, delivery: Delivery, spin_s: float, deadline: float
    ) -> "_Begun":
        """Wait until somebody begins to answer, and ask a second one if the first is late; gives whom to listen to."""
        replicas, nbytes = begun.replicas, exchange.answer_bytes
        chosen, other = begun, None
        # What came while this thread was busy with another shard's answer is not late, whenever it is looked at.
        if not begun.sent.begins(exchange, delivery, min(deadline, begun.late), spin_s):
            if begun.late < deadline and self._budget.ready:
                turned = ((*replicas[at:], *replicas[:at]) for at in range(1, len(replicas)))
                sent = (self._begin(others, exchange, deadline) for others in turned)
                other = next((one for one in sent if one is not None), None)
            if other is None:
                first_to_answer([begun.sent], exchange, delivery, deadline)
            else:
                self._budget.spend()
                self._stats.hedged()
                if first_to_answer([begun.sent, other.sent], exchange, delivery, deadline) is other.sent:
                    chosen, other = other, begun
                    replicas[0].latency.ended(nbytes, inf)
                    replicas[0].breaker.doubt()
                    self._stats.hedge_won()
                other.abandon()
        now = time.monotonic()
        for one in (begun,) if chosen is begun else (begun, chosen):
            one.replicas[0].latency.began(nbytes, now - one.since)
        return chosen

    def _in_order(self, nbytes: int) -> Sequence[Endpoint]:
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


class _Begun(NamedTuple):
    """A request on its way to the first of the replicas. since, and when its answer is late: by time.monotonic."""

    replicas: Sequence[Endpoint]
    sent: Connection
    since: float
    late: float

    def abandon(self) -> None:
        """Do without the answer."""
        self.replicas[0].abandon(self.sent)


def _sum(pieces: Sequence[Exchange]) -> ServerTimes | None:
    """The servers' times of a lookup in pieces that ran one after the other."""
    times = [piece.times for piece in pieces if piece.times is not None]
    if not times:
        return None
    return ServerTimes(*(sum(getattr(one, name) for one in times) for name in ("queue_us", "gather_us", "total_us")))


def _deadline(exchange: Exchange, delivery: Delivery) -> float:
    """Until when one replica may take, where there are others to go to."""
    now = time.monotonic()
    patience_s = _PATIENCE_S + _PATIENCE_S_PER_BYTE * exchange.answer_bytes
    return min(delivery.deadline, now + min(patience_s, (delivery.deadline - now) / 2))


def _late_s(replicas: Sequence[Endpoint], nbytes: int, *, whole: bool) -> float:
    """When an answer is late by the measure of the best of them; inf if that is not known."""
    known = (endpoint.latency.late_s(nbytes, whole=whole) for endpoint in replicas)
    return min((late_s for late_s in known if late_s is not None), default=inf)
