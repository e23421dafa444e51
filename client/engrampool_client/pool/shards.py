"""The servers of one model: which holds which rows, and a lookup's way to them."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from engrampool_client.compute.forms import form_of
from engrampool_client.compute.served import BRIEF, DESCRIBE, ServedModel, choose, merged, read_spec
from engrampool_client.config import ClientConfig
from engrampool_client.errors import EngrampoolError, ProtocolError, SpecError, UnavailableError, together
from engrampool_client.lanes.split import SideBySide
from engrampool_client.lookup.delivery import Rows
from engrampool_client.lookup.exchange import Exchange, Route, slowest
from engrampool_client.lookup.sent import Part, Request
from engrampool_client.lookup.small import Small
from engrampool_client.lookup.workers import Workers
from engrampool_client.pool.discovery import Servers
from engrampool_client.pool.endpoint import Endpoint
from engrampool_client.pool.replicas import ReplicaSet
from engrampool_client.pool.together import Together
from engrampool_client.stats import Stats
from engrampool_proto.spec import ModelSpec, Shard, ShardMap
from engrampool_proto.v1 import pool_pb2
from engrampool_proto.wire import ServerTimes

if TYPE_CHECKING:  # it needs numba
    from engrampool_client.pool.spread import Spread

# How soon to look again for the addresses of a name that has none.
_PAUSE_S = 0.1
# While every row is held by somebody that answered, how long to wait for the others.
_GRACE_S = 0.25
# How often to look for servers that are away or new, and how long one may take to answer then.
_LOOK_S, _LOOK_TIMEOUT_S = 1.0, 1.0
# So many are looked at, or made ready, at once.
_LOOKS = 64
# Looks that take so long do not end any more. Closing waits no longer than this for them.
_STUCK_S, _CLOSE_S = 10.0, 2.0
_log = logging.getLogger("engrampool")


class Shards:
    """All servers of one version of a model. Thread-safe once connected.

    servers: where they are, now and later. closing: set, and the servers woken, before it is closed.
    """

    def __init__(self, servers: Servers, config: ClientConfig, closing: threading.Event) -> None:
        self._servers, self._config, self._closing = servers, config, closing
        self._lock = threading.Lock()
        self._sets: tuple[ReplicaSet, ...] = ()
        self._routes: dict[int, Route] = {}
        self._fan_out: Workers | None = None
        self._spread: Spread | None = None
        self._watcher: threading.Thread | None = None
        # Threads are started as they are needed, so where nobody is away there are none.
        self._lookers = ThreadPoolExecutor(_LOOKS, "engrampool-look")
        # By address: those that are used, and those that are known and are not, with what stands against them.
        self._open: dict[str, Endpoint] = {}
        self._away: dict[str, Endpoint] = {}
        self._suspects: set[Endpoint] = set()
        self.troubles: dict[str, str] = {}

    def connect(
        self, model: str | None, version: str | None, timeout_s: float, known: ModelSpec | None = None
    ) -> ServedModel:
        """Find out what is served, by whom; a name that has no address yet is waited for as a server is.

        known: a specification that need not be sent again. Raises PoolError if it cannot be had, SpecError if rows are
        missing.
        """
        until, left_s = time.monotonic() + timeout_s, timeout_s
        while True:
            addresses, complete = self._servers.find(model, version)
            if self._know(addresses):
                break
            if self._closing.is_set():
                raise UnavailableError(f"connecting to {self._servers.text} was given up")
            if time.monotonic() + _PAUSE_S >= until:
                why = "it stands for no server" if complete else "the name cannot be looked up"
                raise UnavailableError(f"{self._servers.text} had no address within {timeout_s} s: {why}")
            self._closing.wait(_PAUSE_S)
            left_s = until - time.monotonic()
        self._found = self._ask_all(model, version, left_s, [] if known is None else [known])
        self.served = _checked(self._found)
        return self.served

    def open(self, stats: Stats) -> None:
        """Be ready for lookups."""
        self._stats = stats
        ready = {address: partial(self._away[address].open, served, stats) for address, served in self._found.items()}
        if len(ready) == 1:
            ready.popitem()[1]()
        for opening in [self._lookers.submit(one) for one in ready.values()]:
            opening.result()
        for address in self._found:
            self._admit(self._away[address])
        self._routes = _routes(self.served.spec, self._sets)
        more = len(self._sets) - 1
        if more:
            self._fan_out = Workers(self._config.max_steps * more, "engrampool-shard")
            if form_of(self._config.compiled).compiled:
                from engrampool_client.pool.spread import Spread

                self._spread = Spread(self.served.spec, self._routes, len(self._sets))
        if len(self._open) + len(self._away) > 1 or self._servers.may_change:
            watcher = threading.Thread(target=self._watch, name="engrampool-shards", daemon=True)
            watcher.start()
            self._watcher = watcher  # now that it can be joined

    @property
    def attached(self) -> bool:
        """Whether a server of each shard lets its memory be read, now."""
        for one in self._sets:
            for endpoint in one.replicas:
                if endpoint.attached:
                    break
            else:
                return False
        return bool(self._sets)

    @property
    def direct(self) -> bool:
        """Whether lookups that are not read from attached memory find connections of the direct lane."""
        return bool(self._sets) and all(any(endpoint.direct for endpoint in one.replicas) for one in self._sets)

    @property
    def breaker_open(self) -> bool:
        """Whether some shard's servers are all away."""
        return any(all(endpoint.breaker.is_open for endpoint in one.replicas) for one in self._sets)

    @property
    def sets(self) -> Sequence[ReplicaSet]:
        """One a shard, with the servers that are used."""
        return self._sets

    @property
    def away(self) -> Mapping[str, Endpoint]:
        """By address: servers that are known, and not used. They change at any time: copy them first."""
        return self._away

    @property
    def in_trouble(self) -> dict[str, str]:
        """Address -> why, of the servers that do not answer, or hold something else than they should, for people."""
        # Copies, and no lock: it is asked in the child of a fork, too.
        troubles, used = dict(self.troubles), {one.target: one.in_trouble for one in dict(self._open).values()}
        away = {address: troubles[address] for address in dict(self._away) if address in troubles}
        return away | {address: why for address, why in used.items() if why is not None}

    @property
    def sharded(self) -> bool:
        """Whether no server holds all rows."""
        return len(self._sets) > 1

    def cuts(self) -> dict[int, list[int]]:
        """Layer -> the rows at which another shard begins, ascending."""
        starts: dict[int, set[int]] = {}
        for served in self._found.values():
            for layer, (start, _) in served.parts.items():
                starts.setdefault(layer, set()).add(start)
        return {layer: sorted(rows) for layer, rows in starts.items()}

    def ask(self, exchange: Exchange, spin_s: float) -> None:
        """Have every row of the exchange come: from each shard its own, all at once. Raises PoolError."""
        if exchange.landing.ready:  # layers of no rows
            exchange.landing.hand_over()
        if self._fan_out is None:
            self._sets[0].ask(exchange, spin_s).receive()
            return
        parts = exchange.spread(self._routes)
        if not parts:
            return
        # Where a request can be sent at once, so are all, and one answer after the other is taken in: while this thread
        # reads the first, the others are worked on. What cannot is asked for by threads.
        requests = [self._sets[shard].ask(part, spin_s, prompt=True) for shard, part in parts.items()]
        mine = [request for request in requests if request.sent] or requests[:1]
        with SideBySide(self._fan_out, exchange.delivery) as others:
            try:
                for request in requests:
                    if request not in mine:
                        others.begin(request.receive_aside)
                while mine:
                    mine.pop(0).receive()
            finally:
                for request in mine:
                    request.abandon()
        exchange.times = slowest(part.times for part in parts.values())

    @property
    def sends(self) -> int | None:
        """`send` may well send what is more bytes of rows than this, now; None: nothing."""
        if self._spread is None:  # as of `send`; each call counts where caches are cold
            return self._sets[0].sends if len(self._sets) == 1 else None
        return 0 if all(one.sends == 0 for one in self._sets) else None

    def send(self, small: Small, deadline: float) -> "Request | None":
        """Have a small request sent at once, to each shard that has some of its rows; None if that cannot be."""
        if self._spread is None:
            return self._sets[0].send(small, deadline)
        parts: list[tuple[Part, Mapping[int, Rows]]] = []
        for shard, part in self._spread.of(small).items():
            request = self._sets[shard].send(part, deadline)
            if request is None:
                for sent, _ in parts:
                    sent.let_go(None)
                return None
            parts.append((request, part.rows))
        return Together(small.what[2], parts)

    def read(self, small: Small) -> ServerTimes | None:
        """Copy its rows from a server's memory, where one holds all; None if that cannot be."""
        read = (endpoint.read(small) for endpoint in self._sets[0].replicas)
        return next((times for times in read if times is not None), None)

    def stop(self) -> None:
        """End what waits for a server, without waiting for that; `close` is to follow."""
        for endpoint in self._endpoints():
            endpoint.stop()

    def forked(self) -> None:
        """In the child of a fork: let go of the connections without a word, for they are the parent's."""
        for endpoint in (*self._open.values(), *self._away.values()):
            endpoint.forked()

    def close(self) -> None:
        """End the connections, and every lookup on one."""
        self.stop()  # all of them before one is waited for
        if self._watcher is not None:
            # Soon: all that looks finds its connection ended, unless Ctrl-C left a lock of gRPC's taken.
            self._watcher.join(_CLOSE_S)
        self._lookers.shutdown(wait=False, cancel_futures=True)
        for endpoint in self._endpoints():
            endpoint.close()
        if self._fan_out is not None:
            self._fan_out.close(wait=False)

    def _endpoints(self) -> list[Endpoint]:
        with self._lock:
            return [*self._open.values(), *self._away.values()]

    # --- who is there

    def _know(self, addresses: Iterable[str]) -> bool:
        """Look for servers there from now on, unless all is closing; whether any are known."""
        with self._lock:
            for address in addresses:
                if address not in self._open and address not in self._away and not self._closing.is_set():
                    self._away[address] = Endpoint(address, self._config, self._closing)
            return bool(self._open or self._away) and not self._closing.is_set()

    def _ask_all(
        self, model: str | None, version: str | None, timeout_s: float, specs: list[ModelSpec]
    ) -> dict[str, ServedModel]:
        """What each server holds, of those that answer in time. Raises PoolError if too few do.

        specs: those that are known by now. Another is sent and read once, by the first server that has it.
        """

        def spec_of(endpoint: Endpoint, held: pool_pb2.Model) -> ModelSpec:
            known = next((spec for spec in specs if spec.digest == held.spec_digest), None)
            if known is None and held.spec_json:
                specs.append(known := read_spec(held))
            if known is None:
                request = pool_pb2.DescribeRequest(model=held.name, include_spec=True).SerializeToString()
                answer = endpoint.describe(max(_LOOK_TIMEOUT_S, until - time.monotonic()), request)
                specs.append(known := choose(answer, held.name, held.version).spec)
            return known

        found, refused = dict[str, ServedModel](), list[EngrampoolError]()
        until = time.monotonic() + timeout_s
        pool = ThreadPoolExecutor(len(self._away), "engrampool-connect")
        try:
            request = BRIEF if specs or len(self._away) > 1 else DESCRIBE  # of one, all at once
            asked = {pool.submit(one.describe, timeout_s, request): address for address, one in self._away.items()}
            left = set(asked)
            while left and time.monotonic() < until + _GRACE_S and not self._closing.is_set():
                done, left = wait(left, _GRACE_S, "FIRST_COMPLETED")
                for future in done:
                    address = asked[future]
                    try:
                        served = choose(future.result(), model, version, partial(spec_of, self._away[address]))
                    except EngrampoolError as error:
                        if len(asked) == 1:
                            raise
                        self.troubles[address] = str(error)
                        refused.append(error)
                        continue
                    # The first that answers says which version it is, where none was named.
                    model, version = served.spec.name, served.version
                    found[address] = served
                if not done and found:
                    with suppress(SpecError):
                        _checked(found)
                        break
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if not found:
            troubles = "; ".join(f"{address}: {text}" for address, text in self.troubles.items())
            raise together(refused)(f"none of {', '.join(self._away)} serves the model: {troubles or 'no answer'}")
        return found

    def _admit(self, endpoint: Endpoint) -> None:
        """Use a server, which is open, from now on."""
        with self._lock:
            self._open[endpoint.target] = endpoint
            same = next((one for one in self._sets if one.parts == endpoint.served.parts), None)
            if same is None:
                same = ReplicaSet(endpoint.served.parts, self._suspects, self._stats)
                self._sets = (*self._sets, same)
            same.use((*same.replicas, endpoint))
            # Last: whoever looks at both without the lock finds it in one.
            del self._away[endpoint.target]
            self.troubles.pop(endpoint.target, None)

    def _watch(self) -> None:
        """Look for servers that were away, that hold other rows by now, and for new addresses of names."""
        seen, said = 0, ""
        while True:
            seen = self._servers.wait(seen, _LOOK_S)
            if self._closing.is_set():
                return
            try:
                self._look_around()
                said = ""
            except Exception as error:  # looking goes on whatever happens
                if repr(error) != said and not self._closing.is_set():
                    said = repr(error)
                    _log.exception("looking for servers failed, and is tried again")

    def _look_around(self) -> None:
        """Look once at all that are away or suspect, side by side: it takes as long as one look."""
        addresses, complete = self._servers.find(self.served.spec.name, self.served.version)
        self._know(addresses)
        if complete:
            self._forget(addresses)
        suspects = {endpoint for endpoint in self._open.values() if endpoint.in_trouble is not None}
        while self._suspects:
            suspects.add(self._suspects.pop())
        looks = [self._lookers.submit(self._safely, self._try, endpoint) for endpoint in list(self._away.values())]
        # Others were let go of meanwhile.
        examined = [endpoint for endpoint in suspects if self._open.get(endpoint.target) is endpoint]
        looks += [self._lookers.submit(self._safely, self._examine, endpoint) for endpoint in examined]
        wait(looks, _STUCK_S)

    def _safely(self, look: Callable[[Endpoint], None], endpoint: Endpoint) -> None:
        """Look at a server; whatever goes wrong is its trouble, and logged once unless it is one of ours."""
        try:
            look(endpoint)
        except Exception as error:
            ours = isinstance(error, EngrampoolError)
            text = str(error) if ours else repr(error)
            # gRPC has its own ways to say that a channel is closed.
            if not ours and not self._closing.is_set() and self.troubles.get(endpoint.target) != text:
                _log.exception("looking for %s failed, and is tried again", endpoint.target)
            self.troubles[endpoint.target] = text

    def _try(self, endpoint: Endpoint) -> None:
        """Use a server that was away, if it holds a shard of ours now. Raises EngrampoolError and what nobody knows."""
        served = self._look(endpoint)
        if served.parts not in [one.parts for one in self._sets]:
            rows = dict(served.parts)
            raise SpecError(f"it holds rows {rows}, which are no shard of this client's")
        try:
            endpoint.open(served, self._stats)
        except BaseException:  # it is half open
            self._renew(endpoint)
            raise
        self._admit(endpoint)

    def _look(self, endpoint: Endpoint) -> ServedModel:
        """What the server holds of our version. Raises PoolError."""

        def ours(held: pool_pb2.Model) -> ModelSpec:
            spec = self.served.spec
            if held.spec_digest != spec.digest:
                raise ProtocolError(f"its specification has digest {held.spec_digest}, this client's {spec.digest}")
            return spec

        return choose(endpoint.describe(_LOOK_TIMEOUT_S), self.served.spec.name, self.served.version, ours)

    def _examine(self, endpoint: Endpoint) -> None:
        """Use a server no more that does not answer, or holds other rows than it did; it may come back."""
        try:
            served = self._look(endpoint)
        except EngrampoolError as error:
            self.troubles[endpoint.target] = str(error)
            self._let_go(endpoint)
            raise
        if served.parts != endpoint.served.parts:
            self.troubles[endpoint.target] = f"it holds rows {dict(served.parts)} by now"
            self._let_go(endpoint)
            return
        # Its limits may be others, and those of its set with them.
        before, endpoint.served = endpoint.served, served
        if (before.max_rows, before.max_answer_bytes) != (served.max_rows, served.max_answer_bytes):
            with self._lock:
                for one in self._sets:
                    if endpoint in one.replicas:
                        one.use(one.replicas)

    def _let_go(self, endpoint: Endpoint) -> None:
        """Use a server no more, unless it is the last of its shard; look for it, on new connections, from now on."""
        with self._lock:
            used = next((one for one in self._sets if endpoint in one.replicas), None)
            if used is None or len(used.replicas) == 1:
                return
            # First: whoever looks at both without the lock finds it in one.
            if not self._closing.is_set():
                self._away[endpoint.target] = Endpoint(endpoint.target, self._config, self._closing)
            used.use(tuple(other for other in used.replicas if other is not endpoint))
            del self._open[endpoint.target]
        endpoint.close()

    def _renew(self, endpoint: Endpoint) -> None:
        """Have a server that could not be opened looked for on new connections."""
        with self._lock:  # first, as closing may take a while
            if not self._closing.is_set():
                self._away[endpoint.target] = Endpoint(endpoint.target, self._config, self._closing)
        endpoint.close()

    def _forget(self, addresses: Collection[str]) -> None:
        """Let go of servers that are away, and that no target stands for any more."""
        with self._lock:
            gone = [self._away.pop(address) for address in set(self._away) - set(addresses)]
        for endpoint in gone:
            endpoint.close()


def _checked(found: Mapping[str, ServedModel]) -> ServedModel:
    """What servers hold together. Raises SpecError unless that is every row of one version, in ranges that agree."""
    served = merged(found.values())
    shards = [Shard(address, layer, *rows) for address, one in found.items() for layer, rows in one.parts.items()]
    ShardMap(served.spec.name, served.version, tuple(shards)).check(served.spec)
    return served


def _routes(spec: ModelSpec, sets: Sequence[ReplicaSet]) -> dict[int, Route]:
    routes = {}
    for layer in spec.layers:
        ranges = sorted((one.parts[layer][0], number) for number, one in enumerate(sets) if layer in one.parts)
        starts, shards = zip(*ranges, strict=True)
        routes[layer] = Route(np.array(starts, np.uint64), np.array(shards, np.int64))
    return routes
