"""One lookup at work: planned by the version that is current, asked for, handed over, kept for later."""

import threading
from typing import Generic, Protocol, TypeVar

from engrampool_client.errors import (
    EngrampoolError,
    PoolError,
    ProtocolError,
    StepCancelledError,
    UnknownVersionError,
)
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.landing import Out
from engrampool_client.lookup.plan import Plan, Planner
from engrampool_client.lookup.query import Query
from engrampool_client.lookup.sent import Request
from engrampool_client.lookup.small import Cached, Small
from engrampool_client.stats import Stats
from engrampool_proto.wire import ServerTimes


class Asked(Protocol):
    """Whoever has the rows of an exchange come, from wherever they are."""

    @property
    def attached(self) -> bool:
        """Whether rows are only read from memory, now."""

    @property
    def sends(self) -> int | None:
        """`send` may well send what is more bytes of rows than this, now; None: nothing."""

    def ask(self, exchange: Exchange, spin_s: float) -> None:
        """Have every row come. Raises PoolError."""

    def send(self, small: Small, deadline: float) -> Request | None:
        """Have a small request sent at once; None if that cannot be."""

    @property
    def sharded(self) -> bool:
        """Whether no server holds all rows."""

    def read(self, small: Small) -> ServerTimes | None:
        """Copy its rows from a server's memory, where one holds all; None if that cannot be."""


class Version(Protocol):
    """One version of a model: how its lookups are planned, and who is asked."""

    planner: Planner

    @property
    def shards(self) -> Asked:
        """Who is asked."""


V = TypeVar("V", bound=Version)


class Versions(Protocol[V]):
    """Whoever knows by which version lookups go."""

    @property
    def current(self) -> V:
        """What lookups begin by now."""

    def enter(self) -> V:
        """What a lookup goes by from beginning to end; `leave` is to follow."""

    def leave(self, version: V) -> None:
        """Go by it no more."""

    def forked(self) -> None:
        """In the child of a fork: let go of the connections without a word, for they are the parent's."""

    def moved_on(self, version: V, delivery: Delivery) -> bool:
        """Whether lookups go by another version by now, which is waited for."""


class Lookup(Generic[V]):
    """From a query to its rows: `plan`, and `ask` if that says so, by one thread at a time. `run` is both.

    Whatever happens, the delivery has ended after that. closing: set while the client closes. hinted: the rows are for
    the cache only. asked_bytes: of rows that were asked for.
    """

    def __init__(
        self,
        delivery: Delivery,
        query: Query,
        out: Out | None,
        versions: Versions[V],
        stats: Stats,
        closing: threading.Event,
        *,
        hinted: bool = False,
        by: V | None = None,
        plan: Cached | None = None,
    ) -> None:
        """by: a version that was entered already, to begin by. plan: what was planned by it; `ask` is to follow."""
        self.delivery, self.asked_bytes = delivery, 0
        self._query, self._out, self._versions, self._stats, self._closing = query, out, versions, stats, closing
        self._hinted, self._spin_s = hinted, 0.0
        self._blank, self._by = delivery.blank if plan is None else plan.blank, by
        self._plan: Plan | None = plan

    def run(self, spin_s: float) -> None:
        """All of it, in this thread. spin_s: see `ClientConfig`."""
        self._spin_s = spin_s
        if self.plan():
            self.ask()

    def plan(self) -> bool:
        """Do what needs no server; whether `ask` is to follow."""
        more = False
        try:
            if self._closing.is_set():
                raise StepCancelledError("the client was closed")
            if not self.delivery.done:  # else it was cancelled while it waited, or is too late
                self.delivery.begin_work()
                more = self._prepare()
        except BaseException as error:
            self._failed(error)
        finally:
            if not more:
                self.leave()
        return more

    def ask(self) -> None:
        """Have servers send what the plan lacks, and hand it over."""
        try:
            while not self._fetch():
                self.let_go()
                if self._blank is not None:
                    self.delivery.stand_in(self._blank)  # not what the last version's cache had
                if not self._prepare():
                    return
        except BaseException as error:
            self._failed(error)
        finally:
            self.leave()

    def _prepare(self) -> bool:
        """Plan by the current version; whether something is to be asked for."""
        if self._by is None:
            self._by = self._versions.enter()
        by = self._by
        if self._hinted:
            self._plan = by.planner.plan_hint(self.delivery, self._query)
        else:
            self._plan = by.planner.plan(self.delivery, self._query, self._out, by.shards.attached)
        if self._plan.exchange is not None and self.delivery.error is None:
            return True
        self._end(self._plan)
        return False

    def _fetch(self) -> bool:
        """Have the rows come. False if the servers hold the version no more, and lookups go by another by now."""
        plan, by, delivery = self._plan, self._by, self.delivery
        assert plan is not None
        assert plan.exchange is not None
        assert by is not None
        try:
            self.asked_bytes = plan.exchange.answer_bytes
            if not self._hinted:
                self._stats.asked(delivery.begun)
            by.shards.ask(plan.exchange, self._spin_s)
        except UnknownVersionError:
            # Of what was handed over already, the rest must be of the same version.
            if delivery.rows or not self._versions.moved_on(by, delivery):
                raise
            return False
        self._end(plan)
        return True

    def _end(self, plan: Plan) -> None:
        """Every row is there."""
        delivery, times = self.delivery, None if plan.exchange is None else plan.exchange.times
        if self._hinted:
            plan.keep(hinted=True)
            delivery.end(None, times)
            return
        for source, nbytes in plan.sources.items():
            self._stats.count_bytes(source, nbytes)
        if len(delivery.rows) < len(delivery.layers):
            missing = [layer for layer in delivery.layers if layer not in delivery.rows]
            raise ProtocolError(f"the lookup ended without the rows of layer {missing[0]}")
        delivery.end(None, times)
        plan.keep()  # afterwards: nobody need wait for it

    def let_go(self) -> None:
        """Of the version, and of memory for what was fetched; of one that was planned, if it is not to be asked for."""
        plan, by = self._plan, self._by
        self._plan = self._by = None
        if plan is not None:
            plan.close(again=self.delivery.error is None)  # else, to be safe, nobody has it
        if by is not None:
            self._versions.leave(by)

    def leave(self) -> None:
        """As `let_go`, and nobody works on it any more."""
        self.let_go()
        self.delivery.end_work()

    def _failed(self, error: BaseException) -> None:
        """Whatever is raised within a lookup is how it ends. Raises it again unless it is what steps fail with."""
        closing = self._closing.is_set()
        if isinstance(error, EngrampoolError):
            closed = closing and isinstance(error, PoolError)
            self.delivery.end(StepCancelledError("the client was closed") if closed else error)
        elif not isinstance(error, Exception):  # KeyboardInterrupt: the caller waits no more
            self.delivery.end(StepCancelledError("the lookup was interrupted"))
            raise error
        elif closing:  # gRPC has its own ways to say that a channel is closed
            self.delivery.end(StepCancelledError("the client was closed"))
        else:
            self.delivery.end(PoolError(f"unexpected failure in the client: {error!r}"))
            raise error
