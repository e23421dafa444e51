"""One lookup at work: planned by the version that is current, asked for, handed over, kept for later ones."""

import threading
from collections.abc import Callable

from engrampool_client.errors import EngrampoolError, PoolError, ProtocolError, StepCancelledError, UnknownVersionError
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.plan import Plan
from engrampool_client.pool.following import Following
from engrampool_client.pool.version import Generation
from engrampool_client.stats import Stats

# What is to be asked for by a version, None if nothing is; and the plan that it came from, if there is one.
MakePlan = Callable[[Generation], tuple[Exchange | None, Plan | None]]


class Lookup:
    """From a batch to its rows: `plan`, and `ask` if that says so, by one thread at a time. `run` is both.

    Whatever happens, the delivery has ended after that. closing: set while the client closes. hinted: the rows are for
    the cache only. spin_s: see `Client`. asked_bytes: of rows that were asked for.
    """

    def __init__(
        self,
        delivery: Delivery,
        make_plan: MakePlan,
        following: Following,
        stats: Stats,
        closing: threading.Event,
        *,
        hinted: bool = False,
        spin_s: float = 0.0,
    ) -> None:
        self.delivery, self.asked_bytes = delivery, 0
        self._make_plan, self._following, self._stats, self._closing = make_plan, following, stats, closing
        self._hinted, self._spin_s = hinted, spin_s
        self._blank = delivery.blank
        self._by: Generation | None = None
        self._exchange: Exchange | None = None
        self._plan: Plan | None = None

    def run(self) -> None:
        """All of it, in this thread."""
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
                self._leave()
        return more

    def ask(self) -> None:
        """Have servers send what the plan lacks, and hand it over."""
        try:
            while not self._fetch():
                self._let_go()
                if self._blank is not None:
                    self.delivery.stand_in(self._blank)  # not what the last version's cache had
                if not self._prepare():
                    return
        except BaseException as error:
            self._failed(error)
        finally:
            self._leave()

    def _prepare(self) -> bool:
        """Plan by the current version; whether something is to be asked for."""
        self._by = self._following.enter()
        self._exchange, self._plan = self._make_plan(self._by)
        if self._exchange is not None and not self.delivery.ended:
            return True
        self._came()
        return False

    def _fetch(self) -> bool:
        """Have the rows come. False if the servers hold the version no more, and lookups go by another by now."""
        exchange, by, delivery = self._exchange, self._by, self.delivery
        assert exchange is not None
        assert by is not None
        try:
            self.asked_bytes = exchange.answer_bytes
            by.shards.ask(exchange, delivery, self._spin_s)
        except UnknownVersionError:
            # Of what was handed over already, the rest must be of the same version.
            if delivery.rows or not self._following.moved_on(by, delivery):
                raise
            return False
        self._came()
        return True

    def _came(self) -> None:
        """Every row is there."""
        plan, times = self._plan, None if self._exchange is None else self._exchange.times
        if plan is not None and not self._hinted:
            for source, nbytes in plan.sources.items():
                self._stats.came(source, nbytes)
        if plan is not None and self._hinted:
            plan.keep(hinted=True)
        elif not self.delivery.done:
            missing = [layer for layer in self.delivery.layers if layer not in self.delivery.rows]
            raise ProtocolError(f"the lookup ended without the rows of layer {missing[0]}")
        self.delivery.end(None, times)
        if plan is not None and not self._hinted:
            plan.keep()  # afterwards: nobody need wait for it

    def _let_go(self) -> None:
        """Of the version, and of memory for what was fetched."""
        plan, by = self._plan, self._by
        self._exchange = self._plan = self._by = None
        if plan is not None:
            plan.close(again=self.delivery.error is None)  # else, to be safe, nobody has it
        if by is not None:
            self._following.leave(by)

    def _leave(self) -> None:
        self._let_go()
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
