"""Every lookup of a client: begun as steps, in the caller's thread or others, and ended with it."""

import math
import os
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Generic

import numpy as np
import numpy.typing as npt

from engrampool_client import forks
from engrampool_client.config import ClientConfig, bounded_s, positive_s
from engrampool_client.errors import (
    EngrampoolError,
    ForkedError,
    OverloadedError,
    PoolError,
    StepCancelledError,
)
from engrampool_client.lookup.deadlines import Deadlines
from engrampool_client.lookup.delivery import Delivery, Rows, in_callback
from engrampool_client.lookup.landing import Out, check_outs, zeros
from engrampool_client.lookup.query import Query, Recorder, RowQuery, Sizes, TokenQuery, candidates_batch
from engrampool_client.lookup.sent import Sent
from engrampool_client.lookup.small import Cached, Small
from engrampool_client.lookup.step import Step
from engrampool_client.lookup.work import Lookup, V, Versions
from engrampool_client.lookup.workers import Job, Workers
from engrampool_client.stats import Stats
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec


class Lookups(Generic[V]):
    """Every lookup of a client. To be used in this order: `open`; then `begin`, `run`, `hint`; `close` at any time.

    forked: why there can be none, in the child of a fork. workers: the threads that lookups run in.
    """

    def __init__(self, config: ClientConfig, versions: Versions[V], closing: threading.Event) -> None:
        """closing: set while the client closes."""
        self._config, self._versions, self._closing = config, versions, closing
        self._timeout_s, self._masks = bounded_s(config.timeout_s), config.on_failure == "mask"
        self.workers = Workers(config.max_steps, "engrampool")
        self._deadlines, self._made_by = Deadlines(), os.getpid()
        self.forked: ForkedError | None = None

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
        version, small, cached = self._versions.current, None, None
        sizes = version.planner.sizes(query)
        check_outs(self._spec, out, sizes.shapes)
        here = instead_of is None and not ahead
        if here:
            above = version.shards.sends
            if above is not None and sizes.nbytes > above:
                small = version.planner.small(query, out, sizes)
            if small is None and not version.shards.attached:
                cached = version.planner.cached(query, out, sizes)
        if small is None and cached is None:
            query.own()
        step = self._step(query, out, timeout_s, sizes)
        if small is not None and self._send(step.delivery, small, sizes, out, version):
            return step
        if cached is not None and self._begin_cached(step.delivery, cached, out, version):
            return step
        query.own()
        lookup = self._lookup(step.delivery, query, out)
        at_once = here and version.planner.plans_at_once(query)
        if at_once and not self._closing.is_set():
            self._plan_here(lookup)
            return step
        job = Job(step.delivery, lookup.plan, lookup.ask, ahead)
        if instead_of is not None:
            # Once the new step is done, nothing is written into the old one's arrays either.
            step.delivery.on_cancel(instead_of.cancel)
        if instead_of is None or instead_of.delivery.given_up:  # what was given up brings nothing more
            self._submit(job)
        else:
            # It is referred to until then, or it would be cancelled.
            instead_of.delivery.on_idle(partial(self._submit_late, job, instead_of))
            instead_of.delivery.attend()
        return step

    def run(self, query: Query, out: Out | None, timeout_s: float | None) -> dict[int, Rows]:
        """As `Client.lookup`: all of it in this thread."""
        self.check_process()
        sizes = self._versions.current.planner.sizes(query)
        query.own()
        check_outs(self._spec, out, sizes.shapes)
        step = self._step(query, out, timeout_s, sizes, waits=True)
        try:
            if self._closing.is_set():
                raise PoolError("the client is closed")
            self._lookup(step.delivery, query, out).run(self._config.spin_s)
        except BaseException as error:
            while True:
                try:
                    interrupted = StepCancelledError("the lookup was interrupted")
                    step.delivery.end(error if isinstance(error, PoolError) else interrupted)
                    step.delivery.give_up(interrupted)  # nothing is written any more, whoever was at it
                    break
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

        delivery = Delivery(query.layers, time.monotonic() + self._timeout_s, on_end=ended, whole=True)
        if not self._stats.hint_began(delivery, nbytes, self._config.hint_bytes):
            return False
        lookup = self._lookup(delivery, query, None, hinted=True)
        try:
            self._deadlines.watch(delivery)
            self._submit(Job(delivery, lookup.plan, lookup.ask, ahead=True, hint=True))
        except (PoolError, RuntimeError):  # the client is closed, or the system gives no thread
            delivery.end(None)
            return False
        return True

    def _hint(self, query: TokenQuery, candidates: npt.ArrayLike, chain: bool) -> bool:
        return self.hint(query.batch, candidates, chain)

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
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else positive_s("timeout_s", timeout_s))
        hint = partial(self._hint, query) if self._config.cache_bytes and isinstance(query, TokenQuery) else None
        delivery = Delivery(
            query.layers, deadline, zeros(sizes.shapes, out) if self._masks else None, self._ended, waits
        )
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
        self._receive_by(delivery, sent)
        return True

    def _receive_by(self, delivery: Delivery, sent: Sent) -> None:
        try:
            delivery.receiver = sent
            delivery.on_cancel(sent.give_up)
            if delivery.ended:
                sent.end()
            self._deadlines.look_by(sent.attend_at)
        except BaseException:  # nobody may know of it
            sent.end()
            raise

    def _begin_cached(self, delivery: Delivery, cached: Cached, out: Out | None, version: V) -> bool:
        """Hand over what the cache has, and have the rest sent, in this thread; whether that can be.

        Raises PoolError.
        """
        if self._closing.is_set():
            return False
        by, passed_on = self._versions.enter(), False
        try:
            if by is not version:
                return False
            cached.find(delivery)
            small, above, request = cached.small, by.shards.sends, None
            if small is None:
                self._keep(delivery, cached)
                delivery.end(None)
                return True
            delivery.begin_work()
            if above is not None and small.nbytes > above:
                request = by.shards.send(small, delivery.deadline)
            if request is None:
                passed_on = True
                self._ask_otherwise(delivery, cached, out, by, sent=False)
                return True
            again = partial(self._ask_otherwise, delivery, cached, out, by, sent=True)
            left, before = partial(self._versions.leave, by), (delivery.end_work, partial(self._keep, delivery, cached))
            sent = Sent(
                delivery, request, small.given, self.workers, self._config.spin_s, again, left, cached.place, before
            )
            passed_on = True
            self._receive_by(delivery, sent)
            return True
        except BaseException as error:
            delivery.end(error if isinstance(error, EngrampoolError) else StepCancelledError("it was interrupted"))
            if passed_on or not isinstance(error, EngrampoolError):
                raise
            return True  # it was given up meanwhile
        finally:
            if not passed_on:
                self._versions.leave(by)
                if delivery.working:
                    delivery.end_work()

    def _ask_otherwise(self, delivery: Delivery, cached: Cached, out: Out | None, by: V, sent: bool) -> None:
        """Have a thread of the client ask for what the cache lacks, and is missing. Raises PoolError."""
        plan = cached.otherwise(delivery, sent)
        lookup = Lookup(delivery, cached.query(), out, self._versions, self._stats, self._closing, by=by, plan=plan)
        try:
            self._submit(Job(delivery, _planned, lookup.ask))
        except PoolError:  # else it may have been taken on, and leaves by itself
            lookup.leave()
            raise

    def _keep(self, delivery: Delivery, cached: Cached) -> None:
        """Count the rows of a lookup that has all of them, and let the cache have what came."""
        if delivery.error is None:
            for source, nbytes in cached.sources.items():
                self._stats.count_bytes(source, nbytes)
            cached.keep()
        cached.close(again=delivery.error is None)

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

    def _plan_here(self, lookup: Lookup[V]) -> None:
        """Plan it in this thread: if the cache has all of it, no other is woken. Raises PoolError."""
        if lookup.plan():
            try:
                self._submit(Job(lookup.delivery, _planned, lookup.ask))
            except BaseException:
                lookup.let_go()
                raise

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


def _planned() -> bool:
    return True
