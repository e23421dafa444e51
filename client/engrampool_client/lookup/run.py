"""Lookups at work: begun as steps, planned by the version that is current, asked for, handed over, kept for later."""

import math
import os
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from engrampool_client import forks
from engrampool_client.config import ClientConfig, bounded_s, check_positive
from engrampool_client.errors import (
    EngrampoolError,
    ForkedError,
    OverloadedError,
    PoolError,
    ProtocolError,
    StepCancelledError,
    UnknownVersionError,
)
from engrampool_client.lookup.deadlines import Deadlines
from engrampool_client.lookup.delivery import Delivery, Rows, in_callback
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.landing import Out, check_outs, zeros
from engrampool_client.lookup.plan import Plan, Planner
from engrampool_client.lookup.query import Query, Recorder, RowQuery, Sizes, TokenQuery, candidates_batch
from engrampool_client.lookup.sent import Request, Sent
from engrampool_client.lookup.small import Small
from engrampool_client.lookup.step import Step
from engrampool_client.lookup.workers import Job, Workers
from engrampool_client.stats import Stats
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec


class Asked(Protocol):
    """Whoever has the rows of an exchange come, from wherever they are."""

    @property
    def attached(self) -> bool:
        """Whether rows are only read from memory, now."""

    @property
    def sends(self) -> bool:
        """Whether `send` may well send, now."""

    def ask(self, exchange: Exchange, spin_s: float) -> None:
        """Have every row come. Raises PoolError."""

    def send(self, small: Small, deadline: float) -> Request | None:
        """Have a small request sent at once; None if that cannot be."""


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
    ) -> None:
        """by: a version that was entered already, to begin by."""
        self.delivery, self.asked_bytes = delivery, 0
        self._query, self._out, self._versions, self._stats, self._closing = query, out, versions, stats, closing
        self._hinted, self._spin_s = hinted, 0.0
        self._blank = delivery.blank
        self._by = by
        self._plan: Plan | None = None

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

    def _let_go(self) -> None:
        """Of the version, and of memory for what was fetched."""
        plan, by = self._plan, self._by
        self._plan = self._by = None
        if plan is not None:
            plan.close(again=self.delivery.error is None)  # else, to be safe, nobody has it
        if by is not None:
            self._versions.leave(by)

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


class Lookups(Generic[V]):
    """Every lookup of a client. To be used in this order: `open`; then `begin`, `run`, `hint`; `close` at any time.

    forked: why there can be none, in the child of a fork. workers: the threads that lookups run in.
    """

    def __init__(self, config: ClientConfig, versions: Versions[V], closing: threading.Event) -> None:
        """closing: set while the client closes."""
        self._config, self._versions, self._closing = config, versions, closing
        self._timeout_s, self._masks = bounded_s(config.timeout_s), config.on_failure == "mask"
        self.workers = Workers(config.max_steps, "engrampool")
        self._deadlines = Deadlines()
        self.forked: ForkedError | None = None
        self._made_by = os.getpid()

    def open(self, spec: ModelSpec, stats: Stats, recorder: Recorder | None) -> None:
        """Be ready for lookups of that model. recorder: writes down what is asked for."""
        self._spec, self._stats, self._recorder = spec, stats, recorder
        forks.watch(self)

    def begin(
        self,
        query: Query,
        out: Out | None,
        timeout_s: float | None,
        ahead: bool = False,
        instead_of: Step | None = None,
    ) -> Step:
        """As `Client.prefetch`.

        instead_of: a step whose rows, if any still come, are let in before this one is planned.
        """
        self.check_process()
        version, small = self._versions.current, None
        sizes = version.planner.sizes(query)
        if out is not None:
            check_outs(self._spec, out, sizes.shapes)
        if instead_of is None and not ahead and version.shards.sends:
            try:
                small = version.planner.small(query, out, sizes)
            except EngrampoolError:  # which is how the step ends, as if it were found out later
                small = None
        if small is None:
            query.own()
        step = self._step(query, out, timeout_s, sizes)
        if small is not None:
            if self._send(step.delivery, small, sizes, out, version):
                return step
            query.own()
        lookup = self._lookup(step.delivery, query, out)
        job = Job(step.delivery, lookup.plan, lookup.ask, ahead)
        if instead_of is not None:
            # Once the new step is done, nothing is written into the old one's arrays either.
            step.delivery.on_cancel(instead_of.cancel)
        if instead_of is None or instead_of.delivery.given_up:  # what was given up brings nothing more
            self._submit(job)
        else:
            # It is referred to until then, or it would be cancelled.
            instead_of.delivery.on_idle(partial(self._submit_late, job, instead_of))
        return step

    def run(self, query: Query, out: Out | None, timeout_s: float | None) -> dict[int, Rows]:
        """As `Client.lookup`: all of it in this thread."""
        self.check_process()
        sizes = self._versions.current.planner.sizes(query)
        query.own()
        if out is not None:
            check_outs(self._spec, out, sizes.shapes)
        step = self._step(query, out, timeout_s, sizes, waits=True)
        try:
            if self._closing.is_set():
                raise PoolError("the client is closed")
            self._lookup(step.delivery, query, out).run(self._config.spin_s)
        except BaseException as error:
            over = False
            while not over:
                try:
                    interrupted = StepCancelledError("the lookup was interrupted")
                    step.delivery.end(error if isinstance(error, PoolError) else interrupted)
                    step.delivery.give_up(interrupted)  # nothing is written any more, whoever was at it
                    over = True
                except KeyboardInterrupt:  # once more: it must be over first
                    continue
            raise
        return {layer: step.rows(layer) for layer in step.layers}

    def hint(self, batch: TokenBatch, candidates: npt.ArrayLike, chain: bool) -> bool:
        """As `Step.hint`."""
        self.check_process()
        guessed = candidates_batch(batch, candidates, chain, self._spec)
        now = self._versions.current
        if now.shards.attached or not guessed.num_tokens:
            return False
        query = TokenQuery(self._spec, guessed, list(self._spec.layers))
        nbytes = sum(map(math.prod, query.shapes(now.planner.layout).values()))

        def ended(delivery: Delivery) -> None:
            self._stats.hint_ended(delivery, lookup.asked_bytes, delivery.error is None)
            self._deadlines.forget(delivery)

        delivery = Delivery(query.layers, time.monotonic() + self._timeout_s, on_end=ended)
        if not self._stats.hint_began(delivery, nbytes, self._config.hint_bytes):
            return False
        lookup = self._lookup(delivery, query, None, hinted=True)
        try:
            self._deadlines.watch(delivery)
            self._submit(Job(delivery, lookup.plan, lookup.ask, ahead=True, hint=True))
        except PoolError:
            return False
        except RuntimeError:  # the system gives no thread
            delivery.end(None)
            return False
        return True

    def check_process(self) -> None:
        """Raise ForkedError in a child of the process that the client was made in."""
        if self.forked is not None:
            raise self.forked

    def leave_to_parent(self) -> None:
        """In the child of a fork: connections, threads and locks are the parent's. Nothing is said on any of them."""
        self.forked = ForkedError(
            f"this client was made in process {self._made_by}, and this is a child of it ({os.getpid()}): its "
            "connections are the parent's. Make a client in each process, after the fork",
            "forked",
        )
        self._stats.forked()
        self._deadlines.forked(self.forked)
        self._versions.forked()
        if self._recorder is not None:
            self._recorder.forked()

    def give_up_all(self, error: EngrampoolError) -> None:
        """Give up every step that has not ended, and wait for those who are writing."""
        self._deadlines.give_up_all(error)

    def close(self) -> None:
        """End the threads; in a callback of a step they end a little later."""
        wait = not in_callback()  # some of these threads may wait for the callback, or be in one that closes, too
        self.workers.close(wait)
        self._deadlines.close(wait)

    def _step(self, query: Query, out: Out | None, timeout_s: float | None, sizes: Sizes, waits: bool = False) -> Step:
        """One that counts. waits: the caller does, itself, and its rows are none of those that wait for a caller."""
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else _seconds(timeout_s))
        hint = partial(self.hint, query.batch) if self._config.cache_bytes and isinstance(query, TokenQuery) else None
        delivery = Delivery(query.layers, deadline, zeros(sizes.shapes, out) if self._masks else None, self._ended)
        # Before it counts: whatever happens from there on, a step that is lost ends by itself.
        step = Step(delivery, self._stats, hint)
        if not self._stats.began(delivery, sizes.nbytes, None if waits else self._config.max_pending_bytes):
            raise OverloadedError(
                f"{self._stats.pending_bytes} bytes of rows are pending in this client, of max_pending_bytes "
                f"{self._config.max_pending_bytes}; wait for steps to end, or cancel some",
                "client-full",
            )
        try:
            self._deadlines.watch(delivery, wake=not waits)
        except RuntimeError as failure:
            delivery.end(error := PoolError(f"the system gives the client no thread: {failure}"))
            raise error from failure
        if self._recorder is not None:
            query.record(self._recorder)
        return step

    def _send(self, delivery: Delivery, small: Small, sizes: Sizes, out: Out | None, version: V) -> bool:
        """Have it sent, in this thread, and its rows come in those that wait; whether that could be."""
        if self._closing.is_set():  # who closes from here on gives it up
            return False
        by, sent = self._versions.enter(), None
        try:
            request = by.shards.send(small, delivery.deadline) if by is version else None
            if request is None:
                return False
            again = partial(self._send_again, delivery, small.ids, sizes, out, by)
            left = partial(self._versions.leave, by)
            sent = Sent(delivery, request, small.given, self.workers, self._config.spin_s, again, left)
        finally:
            if sent is None:  # else it leaves it, which may be as soon as others know of it
                self._versions.leave(by)
        delivery.receiver = sent
        delivery.on_cancel(sent.give_up)
        if delivery.ended:
            sent.end()
        self._deadlines.look_by(sent.attend_at)
        return True

    def _send_again(self, delivery: Delivery, ids: Rows, sizes: Sizes, out: Out | None, by: V) -> None:
        """Have a thread of the client ask for what is missing, by whatever way there is. Raises PoolError."""
        missing = {layer: rows for layer, rows in sizes.ids(ids).items() if layer not in delivery.rows}
        query = RowQuery(self._spec, missing)
        if delivery.rows:
            out = None if out is None else {layer: given for layer, given in out.items() if layer in query.layers}
        lookup = Lookup(delivery, query, out, self._versions, self._stats, self._closing, by=by)
        try:
            self._submit(Job(delivery, lookup.plan, lookup.ask))
        except PoolError:  # else it may have been taken on, and leaves it itself
            self._versions.leave(by)
            raise

    def _ended(self, delivery: Delivery) -> None:
        if (receiver := delivery.receiver) is not None:
            receiver.end()  # first: whoever is interrupted here is followed by another
            delivery.receiver = None
        masked = None
        if delivery.error is not None:
            masked = {layer: int(np.count_nonzero(~valid)) for layer, valid in list(delivery.valid.items())}
        complete = len(delivery.rows) == len(delivery.layers)
        self._stats.ended(delivery, delivery.error, complete, masked)
        self._deadlines.forget(delivery)

    def _lookup(self, delivery: Delivery, query: Query, out: Out | None, *, hinted: bool = False) -> Lookup[V]:
        return Lookup(delivery, query, out, self._versions, self._stats, self._closing, hinted=hinted)

    def _submit(self, job: Job) -> None:
        try:
            if self.workers.submit(job):
                return
            error = PoolError("the client is closed")
        except RuntimeError as failure:
            error = PoolError(f"the system gives the client no thread: {failure}")
        job.delivery.end(error)
        raise error

    def _submit_late(self, job: Job, _: Step) -> None:
        with suppress(PoolError):  # the step has ended by it
            self._submit(job)


def _seconds(timeout_s: float) -> float:
    """Until a step's deadline. Raises ValueError for what is no time to wait."""
    check_positive("timeout_s", timeout_s)
    return bounded_s(timeout_s)
