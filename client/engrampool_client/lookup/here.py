"""Small lookups begun in the caller's own thread: read from memory, found in the cache, or sent for who waits."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Generic

from engrampool_client.errors import EngrampoolError, PoolError, StepCancelledError
from engrampool_client.lookup.deadlines import Deadlines
from engrampool_client.lookup.delivery import Delivery, Rows
from engrampool_client.lookup.landing import Out
from engrampool_client.lookup.query import Query, RowQuery, Sizes
from engrampool_client.lookup.sent import Sent
from engrampool_client.lookup.small import Cached, Small
from engrampool_client.lookup.work import Lookup, V, Version, Versions
from engrampool_client.lookup.workers import Job, Workers
from engrampool_client.stats import Stats
from engrampool_proto.spec import ModelSpec


class Here(Generic[V]):
    """Has small lookups begun in the thread that calls. To be used after `open`."""

    def __init__(
        self,
        versions: Versions[V],
        workers: Workers,
        deadlines: Deadlines,
        closing: threading.Event,
        spin_s: float,
        submit: Callable[[Job], None],
    ) -> None:
        """submit: has a thread of the client do a job, or raises PoolError. closing: set while the client closes."""
        self._versions, self._workers, self._deadlines, self._closing = versions, workers, deadlines, closing
        self._spin_s, self._submit = spin_s, submit

    def open(self, spec: ModelSpec, stats: Stats) -> None:
        """Be ready for lookups of that model."""
        self._spec, self._stats = spec, stats

    def small(self, query: Query, out: Out | None, sizes: Sizes, version: V) -> Small | Cached | None:
        """What a step needs to be begun here; None if it is not to be."""
        small, shards, planner = None, version.shards, version.planner
        above, reads = shards.sends, reads_memory(version)
        if reads or (above is not None and sizes.nbytes > above):
            small = planner.small(query, out, sizes, reads)
        if small is None and not shards.attached:
            return planner.cached(query, out, sizes)
        return small

    def begin(self, delivery: Delivery, small: Small | Cached, sizes: Sizes, out: Out | None, version: V) -> bool:
        """Begin a step; whether that could be. Raises PoolError."""
        if isinstance(small, Cached):
            return self._find(delivery, small, out, version)
        if reads_memory(version):
            return self.read(delivery, small, version)
        sent = self.send(delivery, small, sizes, out, version, self._submit_rest)
        if sent is None:
            return False
        self._deadlines.look_by(sent.attend_at)
        return True

    def read(self, delivery: Delivery, small: Small, version: V) -> bool:
        """Copy its rows from attached memory; whether that could be."""
        if self._closing.is_set():
            return False
        small.trace = delivery.trace
        try:
            by = self._versions.enter()
            try:
                with delivery.writing():
                    times = by.shards.read(small) if by is version else None
            finally:
                self._versions.leave(by)
            if times is not None:
                delivery.arrived(dict(small.given))
                delivery.end(None, times)
            return times is not None
        except BaseException as error:
            delivery.end(StepCancelledError("the lookup was interrupted"))  # unless it was given up, or has its rows
            if isinstance(error, EngrampoolError):
                return True
            raise

    def send(
        self,
        delivery: Delivery,
        small: Small,
        sizes: Sizes,
        out: Out | None,
        version: V,
        rest: Callable[[Lookup[V]], None],
    ) -> Sent | None:
        """Have it sent, and its rows come in those that wait; None if that could not be.

        rest: has what did not come this way asked for by others, or raises PoolError.
        """
        if self._closing.is_set():  # who closes from here on gives it up
            return None
        by, sent, small.trace = self._versions.enter(), None, delivery.trace
        try:
            request = by.shards.send(small, delivery.deadline) if by is version else None
            if request is None:
                return None
            self._stats.asked(delivery.begun)
            again = partial(self._leave_rest, delivery, small.ids, sizes, out, by, rest)
            left = partial(self._versions.leave, by)
            sent = delivery.receiver = Sent(delivery, request, small.given, self._workers, self._spin_s, again, left)
        finally:
            if sent is None:  # else it leaves it, which may be as soon as others know of it
                self._versions.leave(by)
        self._receive_by(delivery, sent)
        return sent

    def _receive_by(self, delivery: Delivery, sent: Sent) -> None:
        try:
            delivery.receiver = sent
            delivery.on_cancel(sent.give_up)
            if delivery.ended:
                sent.end()
        except BaseException:  # nobody may know of it
            sent.end()
            raise

    def _leave_rest(
        self,
        delivery: Delivery,
        ids: Rows,
        sizes: Sizes,
        out: Out | None,
        by: V,
        rest: Callable[[Lookup[V]], None],
    ) -> None:
        """Have what is missing asked for by whatever way there is. Raises PoolError."""
        missing = {layer: rows for layer, rows in sizes.ids(ids).items() if layer not in delivery.rows}
        query = RowQuery(self._spec, missing)
        if delivery.rows:
            out = None if out is None else {layer: given for layer, given in out.items() if layer in query.layers}
        rest(Lookup(delivery, query, out, self._versions, self._stats, self._closing, by=by))

    def _submit_rest(self, lookup: Lookup[V]) -> None:
        """Have a thread of the client do it. Raises PoolError."""
        try:
            self._submit(Job(lookup.delivery, lookup.plan, lookup.ask))
        except PoolError:  # else it may have been taken on, and leaves the version itself
            lookup.let_go()
            raise

    # --- with a cache

    def _find(self, delivery: Delivery, cached: Cached, out: Out | None, version: V) -> bool:
        """Hand over what the cache has, and have the rest sent; whether that can be. Raises PoolError."""
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
            small.trace = delivery.trace
            if above is not None and small.nbytes > above:
                request = by.shards.send(small, delivery.deadline)
            if request is None:
                passed_on = True
                self._ask_otherwise(delivery, cached, out, by, sent=False)
                return True
            self._stats.asked(delivery.begun)
            again = partial(self._ask_otherwise, delivery, cached, out, by, sent=True)
            left, before = partial(self._versions.leave, by), (delivery.end_work, partial(self._keep, delivery, cached))
            sent = Sent(delivery, request, small.given, self._workers, self._spin_s, again, left, cached.place, before)
            passed_on = True
            self._receive_by(delivery, sent)
            self._deadlines.look_by(sent.attend_at)
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
            self._submit(Job(delivery, planned, lookup.ask))
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


def reads_memory(version: Version) -> bool:
    """Whether what is small may well be read from memory, now, and is not sent for."""
    shards = version.shards
    return shards.attached and not shards.sharded and shards.sends is None


def planned() -> bool:
    """What was planned already is to be asked for."""
    return True
