"""Every lookup of a client: begun as steps, in the caller's thread or others, and ended with it."""

import math
import os
import threading
import time
from collections.abc import Mapping
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
from engrampool_client.lookup.delivery import Delivery, Finisher, Rows, Valid, in_callback
from engrampool_client.lookup.here import Here, planned, reads_memory
from engrampool_client.lookup.landing import Finishing, Out, check_outs, check_valid, zeros
from engrampool_client.lookup.query import Query, Recorder, Sizes, TokenQuery, candidates_batch
from engrampool_client.lookup.step import Step
from engrampool_client.lookup.work import Lookup, V, Versions
from engrampool_client.lookup.workers import Job, Workers
from engrampool_client.stats import Stats
from engrampool_client.tracing.spans import Spans
from engrampool_proto.errors import BatchError
from engrampool_proto.spec import ModelSpec


class Lookups(Generic[V]):
    """Every lookup of a client. To be used in this order: `open`; then `begin`, `run`, `hint`; `close` at any time.

    forked: why there can be none, in the child of a fork. workers: the threads that lookups run in.
    """

    def __init__(self, config: ClientConfig, versions: Versions[V], closing: threading.Event) -> None:
        """closing: set while the client closes. Raises ValueError where steps are to be traced and cannot be."""
        self._config, self._versions, self._closing = config, versions, closing
        self._timeout_s, self._masks = bounded_s(config.timeout_s), config.on_failure == "mask"
        self.workers = Workers(config.max_steps, "engrampool")
        self._deadlines, self._made_by = Deadlines(), os.getpid()
        self._here = Here(versions, self.workers, self._deadlines, closing, config.spin_s, self._submit)
        self._spans = Spans() if config.trace else None
        self.forked: ForkedError | None = None

    def open(self, spec: ModelSpec, stats: Stats, recorder: Recorder | None) -> None:
        """Be ready for lookups of that model. recorder: writes down what is asked for."""
        self._spec, self._stats, self._recorder = spec, stats, recorder
        self._here.open(spec, stats)
        forks.watch(self)

    def begin(
        self,
        query: Query,
        out: Out | None,
        timeout_s: float | None,
        ahead: bool = False,
        instead_of: Step | None = None,
        valid: Mapping[int, Valid] | None = None,
    ) -> Step:
        """As `Client.prefetch`.

        instead_of: a step whose rows, if any still come, are let in before this one is planned.
        """
        self.check_process()
        version, small = self._versions.current, None
        sizes = version.planner.sizes(query)
        out, finisher = self._finisher(query, out, valid, sizes)
        here = instead_of is None and not ahead and query.ready is None
        if here:
            small = self._here.small(query, out, sizes, version)
        if small is None and query.ready is None:
            query.own()
        delivery = self._delivery(query, out, timeout_s, sizes, finisher)
        hint = partial(self._hint_next, query) if self._config.cache_bytes and isinstance(query, TokenQuery) else None
        # Before it counts: whatever happens from there on, a step that is lost ends by itself.
        step = Step(delivery, self._stats, hint)
        self._begin(delivery, query, sizes)
        if query.ready is not None:
            lookup = self._lookup(delivery, query, out)
            self._submit(Job(delivery, partial(self._plan_later, lookup, query, out, sizes, ahead), lookup.ask, ahead))
            return step
        if small is not None and self._here.begin(delivery, small, sizes, out, version):
            return step
        query.own()
        lookup = self._lookup(delivery, query, out)
        if here and version.planner.plans_at_once(query) and not self._closing.is_set():
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

    def run(
        self, query: Query, out: Out | None, timeout_s: float | None, valid: Mapping[int, Valid] | None = None
    ) -> dict[int, Rows]:
        """As `Client.lookup`: all of it in this thread."""
        self.check_process()
        version, small = self._versions.current, None
        sizes = version.planner.sizes(query)
        out, finisher = self._finisher(query, out, valid, sizes)
        reads = reads_memory(version)
        if reads or version.shards.sends == 0:  # over gRPC it would gain nothing
            small = version.planner.small(query, out, sizes, reads)
        if small is None:
            query.own()
        delivery = self._delivery(query, out, timeout_s, sizes, finisher, waits=True)
        todo: list[Lookup[V]] = []  # what does not come here
        try:
            self._begin(delivery, query, sizes, waits=True)
            if self._closing.is_set():
                raise PoolError("the client is closed")
            sent = None
            if small is not None and not reads:
                sent = self._here.send(delivery, small, sizes, out, version, todo.append)
            if sent is not None:
                sent.attend_at = math.inf  # this thread comes for the rows
                delivery.wait_for(lambda: delivery.ended or bool(todo), None)
            elif small is None or not reads or not self._here.read(delivery, small, version):
                query.own()
                todo.append(self._lookup(delivery, query, out))
            while todo:
                todo[-1].run(self._config.spin_s)
                todo.pop()
        except BaseException as error:
            while True:
                try:
                    interrupted = StepCancelledError("the lookup was interrupted")
                    delivery.end(error if isinstance(error, PoolError) else interrupted)
                    delivery.give_up(interrupted)  # nothing is written any more, whoever was at it
                    while todo:
                        todo[-1].let_go()
                        todo.pop()
                    break
                except KeyboardInterrupt:  # once more: it must be over first
                    continue
            raise
        return self._taken(delivery)

    def hint(self, query: TokenQuery) -> bool:
        """As `Client.hint`."""
        self.check_process()
        now = self._versions.current
        if now.shards.attached or not query.num_tokens:
            return False
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

    def _hint_next(self, query: TokenQuery, candidates: npt.ArrayLike, chain: bool) -> bool:
        """As `Step.hint`, of a step that asks for `query`."""
        if query.ready is not None:
            return False
        guessed = candidates_batch(query.batch, candidates, chain, self._spec)
        return self.hint(TokenQuery(self._spec, guessed, list(self._spec.layers)))

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
        if self._spans is not None:
            self._spans.flush()
        self.workers.close(wait)
        self._deadlines.close(wait)

    def _finisher(
        self, query: Query, out: Out | None, valid: Mapping[int, Valid] | None, sizes: Sizes
    ) -> tuple[Out | None, Finisher | None]:
        """Arrays that rows may be written into as they come, and who has the last word. Raises BatchError."""
        apart = check_outs(self._spec, out, sizes.shapes)
        if out is not None:  # the caller may use the dicts for the next step
            out = {layer: given if isinstance(given, np.ndarray) else dict(given) for layer, given in out.items()}
        if valid is not None:
            check_valid(valid, sizes.shapes, out)
            valid = dict(valid)
        if not (apart or valid or query.holes or query.ready is not None):
            return out, None
        finishing = Finishing(self._spec, out, apart, valid, query.holes)
        return None if out is None else {layer: out[layer] for layer in out if layer not in apart}, finishing

    def _delivery(
        self,
        query: Query,
        out: Out | None,
        timeout_s: float | None,
        sizes: Sizes,
        finisher: Finisher | None,
        waits: bool = False,
    ) -> Delivery:
        """Of a lookup; `_begin` is to follow. waits: whether its caller does, until all of it is there."""
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else positive_s("timeout_s", timeout_s))
        blank = zeros(sizes.shapes, out) if self._masks else None
        delivery = Delivery(query.layers, deadline, blank, self._ended, waits)
        delivery.finisher = finisher
        if self._spans is not None:
            delivery.trace = self._spans.begin(sizes.what, query.num_tokens, sizes.nbytes)
        return delivery

    def _begin(self, delivery: Delivery, query: Query, sizes: Sizes, waits: bool = False) -> None:
        """Count it, and see to its deadline. waits: its rows are none of those that wait for a caller.

        Raises OverloadedError, PoolError.
        """
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
        if self._recorder is not None and query.ready is None:
            query.record(self._recorder)

    def _plan_later(self, lookup: Lookup[V], query: Query, out: Out | None, sizes: Sizes, ahead: bool) -> bool:
        """In a thread of the client: wait for what is asked for, then as `begin`; whether `lookup` is to ask."""
        delivery, ready = lookup.delivery, query.ready
        try:
            if ready is not None and not delivery.done and not self._closing.is_set():
                with self.workers.held():
                    ready()
                if not delivery.done and self._begin_later(delivery, query, out, sizes, ahead):
                    return False
        except EngrampoolError as error:
            delivery.end(error)
        except BaseException as error:
            failure = PoolError(f"what the lookup was to wait for failed: {error!r}")
            failure.__cause__ = error
            delivery.end(failure)
        return lookup.plan()

    def _begin_later(self, delivery: Delivery, query: Query, out: Out | None, sizes: Sizes, ahead: bool) -> bool:
        """What was waited for is there: begin the lookup if it is small; whether it was. Raises BatchError."""
        query.own()
        version = self._versions.current
        if version.planner.sizes(query).shapes != sizes.shapes:
            raise BatchError("arrays that were given to be filled later have other shapes by now")
        if self._recorder is not None:
            query.record(self._recorder)
        small = None if ahead else self._here.small(query, out, sizes, version)
        if small is None or not self._here.begin(delivery, small, sizes, out, version):
            return False
        delivery.receiver_came()
        return True

    def _taken(self, delivery: Delivery) -> dict[int, Rows]:
        """The rows of a lookup that has ended, as `Step.rows` has them."""
        rows = {}
        for layer in delivery.layers:
            self._stats.waited(layer, 0.0)  # they are there, or never come
            if layer not in delivery.rows:
                assert delivery.error is not None
                raise delivery.error
            rows[layer] = delivery.rows[layer]
        return rows

    def _ended(self, delivery: Delivery) -> None:
        if (receiver := delivery.receiver) is not None:
            receiver.end()  # first: whoever is interrupted here is followed by another
            delivery.receiver = None
        masked = None
        if delivery.error is not None:
            masked = {layer: int(np.count_nonzero(~valid)) for layer, valid in list(delivery.valid.items())}
        complete = len(delivery.rows) == len(delivery.layers)
        outcome = self._stats.ended(delivery, delivery.error, complete, masked)
        self._deadlines.forget(delivery)
        if outcome is not None and self._spans is not None and delivery.trace is not None:
            tokens = max((masked or {}).values(), default=0)
            self._spans.ended(delivery.trace, outcome, delivery.error, tokens, delivery.arrived_s)

    def _plan_here(self, lookup: Lookup[V]) -> None:
        """Plan it in this thread: if the cache has all of it, no other is woken. Raises PoolError."""
        if lookup.plan():
            try:
                self._submit(Job(lookup.delivery, planned, lookup.ask))
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
