"""The servers of one model: which holds which rows, and a lookup's way to them."""

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import numpy as np

from engrampool_client.delivery import Delivery
from engrampool_client.discovery import Servers
from engrampool_client.endpoint import Endpoint, Ways
from engrampool_client.errors import EngrampoolError, SpecError, UnavailableError
from engrampool_client.exchange import Exchange, Route, slowest
from engrampool_client.replicas import ReplicaSet
from engrampool_client.served import ServedModel, choose, merged
from engrampool_client.stats import Stats
from engrampool_proto.spec import ModelSpec, Shard, ShardMap

# While every row is held by somebody that answered, how long to wait for the others.
_GRACE_S = 0.25
# How often to look for servers that are away or new, and how long one may take to answer then.
_LOOK_S, _LOOK_TIMEOUT_S = 1.0, 1.0
_log = logging.getLogger("engrampool")


class Shards:
    """All servers of one version of a model. Thread-safe once connected.

    servers: where they are, now and later. closing: set, and the servers woken, before it is closed.
    """

    def __init__(self, servers: Servers, ways: Ways, closing: threading.Event) -> None:
        self._servers, self._ways, self._closing = servers, ways, closing
        self._lock = threading.Lock()
        self._sets: tuple[ReplicaSet, ...] = ()
        self._routes: dict[int, Route] = {}
        self._fan_out: ThreadPoolExecutor | None = None
        self._watcher: threading.Thread | None = None
        # By address: those that are used, and those that are known and are not, with what stands against them.
        self._open: dict[str, Endpoint] = {}
        self._away: dict[str, Endpoint] = {}
        self._suspects: set[Endpoint] = set()
        self.troubles: dict[str, str] = {}

    def connect(self, model: str | None, version: str | None, timeout_s: float) -> ServedModel:
        """Find out what is served, by whom. Raises PoolError if it cannot be had, SpecError if rows are missing."""
        for address in self._servers.find(model, version)[0]:
            self._away[address] = Endpoint(address, self._ways, self._closing)
        if not self._away:
            raise UnavailableError(f"{self._servers.text} has no address now")
        self._found = self._ask_all(model, version, timeout_s)
        self.served = _checked(self._found)
        return self.served

    def open(self, stats: Stats) -> None:
        """Be ready for lookups."""
        self._stats = stats
        for address, served in self._found.items():
            self._admit(address, served)
        self._routes = _routes(self.served.spec, self._sets)
        more = len(self._sets) - 1
        if more:
            self._fan_out = ThreadPoolExecutor(self._ways.max_steps * more, "engrampool-shard")
        if len(self._open) + len(self._away) > 1 or self._servers.may_change:
            self._watcher = threading.Thread(target=self._watch, name="engrampool-shards", daemon=True)
            self._watcher.start()

    @property
    def attached(self) -> bool:
        """Whether a server of each shard lets its memory be read, now."""
        return all(any(endpoint.attached for endpoint in one.replicas) for one in self._sets)

    @property
    def direct(self) -> bool:
        """Whether lookups that are not read from attached memory find connections of the direct lane."""
        return all(any(endpoint.direct for endpoint in one.replicas) for one in self._sets)

    @property
    def breaker_open(self) -> bool:
        """Whether some shard's servers are all away."""
        return any(all(endpoint.breaker.is_open for endpoint in one.replicas) for one in self._sets)

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

    def ask(self, exchange: Exchange, delivery: Delivery, spin_s: float) -> None:
        """Have every row of the exchange come: from each shard its own, all at once. Raises PoolError."""
        delivery.arrived(exchange.whole(exchange.empty_layers()))
        if self._fan_out is None:
            self._sets[0].ask(exchange, delivery, spin_s)
            return
        parts = exchange.spread(self._routes, delivery.writing)
        if not parts:
            return
        # Where a request can be sent at once, so are all, and one answer after the other is taken in: while this thread
        # reads the first, the others are worked on. What cannot is asked for by threads.
        begun = {shard: self._sets[shard].begin(part, delivery) for shard, part in parts.items()}
        mine = [shard for shard, one in begun.items() if one is not None] or [next(iter(parts))]
        others = [
            self._fan_out.submit(self._sets[shard].ask, part, delivery, 0.0)
            for shard, part in parts.items()
            if shard not in mine
        ]
        try:
            for shard in mine:
                self._sets[shard].ask(parts[shard], delivery, spin_s, begun.pop(shard))
        finally:  # whatever became of it, nothing is written once the step has ended
            for one in begun.values():
                if one is not None:
                    one.abandon()
            for other in others:
                other.exception()
        for other in others:
            other.result()
        exchange.times = slowest(list(parts.values()))

    def forked(self) -> None:
        """In the child of a fork: let go of the connections without a word, for they are the parent's."""
        for endpoint in (*self._open.values(), *self._away.values()):
            endpoint.forked()

    def close(self) -> None:
        """End the connections, and every lookup on one."""
        self._close_all()
        if self._watcher is not None:
            self._watcher.join()  # soon: what it waits for is closed
            self._close_all()  # what it may have opened meanwhile
        if self._fan_out is not None:
            self._fan_out.shutdown(wait=False)

    def _close_all(self) -> None:
        with self._lock:
            endpoints = [*self._open.values(), *self._away.values()]
        for endpoint in endpoints:
            endpoint.close()

    # --- who is there

    def _ask_all(self, model: str | None, version: str | None, timeout_s: float) -> dict[str, ServedModel]:
        """What each server holds, of those that answer in time. Raises PoolError if too few do."""
        found: dict[str, ServedModel] = {}
        pool = ThreadPoolExecutor(len(self._away), "engrampool-connect")
        try:
            asked = {pool.submit(one.describe, timeout_s): address for address, one in self._away.items()}
            left, until = set(asked), time.monotonic() + timeout_s + _GRACE_S
            while left and time.monotonic() < until and not self._closing.is_set():
                done, left = wait(left, _GRACE_S, "FIRST_COMPLETED")
                for future in done:
                    address = asked[future]
                    try:
                        served = choose(future.result(), model, version)
                    except EngrampoolError as error:
                        if len(asked) == 1:
                            raise
                        self.troubles[address] = str(error)
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
            raise UnavailableError(f"none of {', '.join(self._away)} serves the model: {troubles or 'no answer'}")
        return found

    def _admit(self, address: str, served: ServedModel) -> None:
        """Use a server from now on."""
        endpoint = self._away[address]
        endpoint.open(served, self._stats)
        with self._lock:
            del self._away[address]
            self.troubles.pop(address, None)
            self._open[address] = endpoint
            same = next((one for one in self._sets if one.parts == served.parts), None)
            if same is None:
                same = ReplicaSet(served.parts, self._suspects, self._stats)
                self._sets = (*self._sets, same)
            same.replicas = (*same.replicas, endpoint)

    def _watch(self) -> None:
        """Look for servers that were away, that hold other rows by now, and for new addresses of names."""
        seen = 0
        while True:
            seen = self._servers.wait(seen, _LOOK_S)
            if self._closing.is_set():
                return
            addresses, complete = self._servers.find(self.served.spec.name, self.served.version)
            with self._lock:
                for address in addresses:
                    if address not in self._open and address not in self._away:
                        self._away[address] = Endpoint(address, self._ways, self._closing)
            if complete:
                self._forget(addresses)
            self._suspects.update(endpoint for endpoint in self._open.values() if endpoint.breaker.is_open)
            while self._suspects:
                endpoint = self._suspects.pop()
                if self._open.get(endpoint.target) is endpoint:  # else it was let go of meanwhile
                    self._examine(endpoint)
            for address, endpoint in list(self._away.items()):
                if self._closing.is_set():
                    return
                if (served := self._look(endpoint)) is not None:
                    self._admit(address, served)

    def _look(self, endpoint: Endpoint) -> ServedModel | None:
        """What the server holds, if that is a shard of ours; else `troubles` says what it is instead."""
        try:
            served = choose(endpoint.describe(_LOOK_TIMEOUT_S), self.served.spec.name, self.served.version)
            if served.parts in [one.parts for one in self._sets]:
                return served
            self.troubles[endpoint.target] = f"it holds rows {dict(served.parts)}, which are no shard of this client's"
        except EngrampoolError as error:
            self.troubles[endpoint.target] = str(error)
        except Exception as error:  # looking must go on; and gRPC has its own ways to say that a channel is closed
            if not self._closing.is_set():
                self.troubles[endpoint.target] = repr(error)
                _log.exception("looking for %s failed", endpoint.target)
        return None

    def _examine(self, endpoint: Endpoint) -> None:
        """Use a server no more that does not answer, or holds other rows than it did; it may come back."""
        served = self._look(endpoint)
        if (served is None or served.parts != endpoint.served.parts) and self._leave(endpoint):
            with self._lock:
                self._away[endpoint.target] = Endpoint(endpoint.target, self._ways, self._closing)

    def _forget(self, addresses: Collection[str]) -> None:
        """Let go of servers that are away, and that no target stands for any more."""
        with self._lock:
            gone = [self._away.pop(address) for address in set(self._away) - set(addresses)]
        for endpoint in gone:
            endpoint.close()

    def _leave(self, endpoint: Endpoint) -> bool:
        """Use a server no more, unless it is the last of its shard."""
        with self._lock:
            for one in self._sets:
                if endpoint in one.replicas and len(one.replicas) > 1:
                    one.replicas = tuple(other for other in one.replicas if other is not endpoint)
                    del self._open[endpoint.target]
                    break
            else:
                return False
        endpoint.close()
        return True


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
