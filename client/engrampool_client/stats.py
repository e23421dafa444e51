"""What a client counts: plain numbers, cheap enough for every step. metrics.py shows them to Prometheus."""

import logging
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from math import inf
from typing import Protocol

from engrampool_client.errors import (
    EngrampoolError,
    ForbiddenError,
    StepCancelledError,
    TlsError,
    UnauthenticatedError,
)
from engrampool_proto.wire import ServerTimes

# Upper bounds in seconds. A wait that matters begins at some tens of microseconds.
WAIT_BOUNDS_S = (0.0, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2e-3, 3e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.25, 1.0)
# A wait shorter than this is none: the rows were there, and looking took that long.
_NO_WAIT_S = 10e-6
OUTCOMES = ("ok", "masked", "cancelled", "failed")
# Where the bytes of rows came from: over the network; from this client's cache; from its warm-up file; from the
# server's memory, attached; not at all, as another token of the step has the same rows.
SOURCES = ("wire", "cache", "warm", "attached", "duplicate")
# Where a lookup's time goes: in the client, until servers are asked; on the way to a server and back; and, as that
# says, until it begins to work, in copying rows (and hashing, if it does so), and in sending them.
HOPS = ("client", "network", "queue", "gather", "send")
# Who comes as soon as that for rows after they were asked for knows well enough when they came.
AT_ONCE_S = 1e-3
# Of slow lookups, a line in so long; what is slow meanwhile is only counted.
_TOLD_EVERY_S = 1.0
# Of steps that are masked as servers do not know this client, which nothing but somebody who reads this ends.
_UNTRUSTED_EVERY_S = 60.0
_log = logging.getLogger("engrampool")
# What became of bytes that were asked for on a hint.
HINT_FATES = ("asked", "dropped", "failed")


class Waits:
    """A histogram of waits. counts: by WAIT_BOUNDS_S, each bucket's own, and those beyond."""

    def __init__(self) -> None:
        self.counts = [0] * (len(WAIT_BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one; with a lock."""
        self.counts[bisect_left(WAIT_BOUNDS_S, seconds)] += 1
        self.sum_s += seconds


class ServerHops:
    """Of one server, by hop, all but the client's own: how many were measured, and their seconds in all."""

    def __init__(self, address: str = "") -> None:
        self.address = address
        self.counts = dict.fromkeys(HOPS[1:], 0)
        self.sums_s = dict.fromkeys(HOPS[1:], 0.0)


class Answered(Protocol):
    """Told of a lookup whose rows came over the network, all of them."""

    def __call__(self, nbytes: int, times: ServerTimes | None, first_s: float | None, number: int) -> None:
        """nbytes: of rows. times: the server's, None if they were lost. number: that it was asked for by.

        first_s: from asking until the first of the answer came; None if that lay there before somebody looked.
        """


class Stats:
    """Counters of one client. Thread-safe to write; numbers read at once may be a step apart from each other.

    waits: by layer. masked_tokens: by layer. steps: ended, by outcome. bytes: of rows, by source. hint_bytes: by fate.
    hops: by hop, of all servers. servers: by address, those that were ever used.
    begun, retries, breaker_opened: since the client was made. hedges, hedges_won: see `hedged` and `hedge_won`.
    slow: hops that took longer than `slow_s` (0 for none), which the log tells of.
    """

    def __init__(self, layers: Iterable[int], slow_s: float = 0.0) -> None:
        # A step may come to its end by garbage collection, in whatever the thread is doing.
        self._lock = threading.RLock()
        self._pending: dict[object, int] = {}
        self._pending_hints: dict[object, int] = {}
        self.waits = {layer: Waits() for layer in layers}
        self._slow_s, self._told_s, self._untrusted_told_s = slow_s, -inf, -inf
        self.slow: Counter[str] = Counter(dict.fromkeys(HOPS, 0))
        self.hops = {hop: Waits() for hop in HOPS}
        self.servers: dict[str, ServerHops] = {}
        self.masked_tokens = dict.fromkeys(self.waits, 0)
        self.steps: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.bytes: Counter[str] = Counter(dict.fromkeys(SOURCES, 0))
        self.hint_bytes: Counter[str] = Counter(dict.fromkeys(HINT_FATES, 0))
        self.begun = self.retries = self.breaker_opened = 0
        self.hedges = self.hedges_won = 0

    @property
    def in_flight(self) -> int:
        """Steps begun and not ended."""
        return len(self._pending)

    @property
    def pending_bytes(self) -> int:
        """Bytes of rows of steps that have not ended."""
        return sum(list(self._pending.values()))

    @property
    def pending_hint_bytes(self) -> int:
        """Bytes of rows of hints that have not ended."""
        return sum(list(self._pending_hints.values()))

    def began(self, step: object, nbytes: int, limit_bytes: int | None = None) -> bool:
        """Count a step and its rows as pending, unless those would be more than the limit together with others."""
        with self._lock:
            if limit_bytes is not None and self._pending and sum(list(self._pending.values())) + nbytes > limit_bytes:
                return False
            self._pending[step] = nbytes
            self.begun += 1
            return True

    def waited(self, layer: int, seconds: float) -> None:
        """Count what `Step.rows` took."""
        with self._lock:
            waits = self.waits[layer]
            waits.counts[0 if seconds < _NO_WAIT_S else bisect_left(WAIT_BOUNDS_S, seconds)] += 1
            waits.sum_s += seconds

    def asked(self, begun: float) -> None:
        """Count that servers were asked for a lookup now. begun: by time.perf_counter."""
        seconds = time.perf_counter() - begun
        with self._lock:
            self.hops["client"].add(seconds)
        if 0 < self._slow_s < seconds and self._tells("client"):
            _log.warning("a lookup waited %.3f s in this client before any server was asked", seconds)

    def server(self, address: str) -> ServerHops:
        """Where lookups at that server are counted."""
        with self._lock:
            return self.servers.setdefault(address, ServerHops(address))

    def answered(
        self, server: ServerHops, nbytes: int, times: ServerTimes | None, first_s: float | None, number: int
    ) -> None:
        """Count a lookup that a server answered; see `Answered`."""
        with self._lock:
            self.bytes["wire"] += nbytes
            if times is None:
                return
            queue_s, gather_s = times.queue_us / 1e6, times.gather_us / 1e6
            hops = [("queue", queue_s), ("gather", gather_s), ("send", times.send_us / 1e6)]
            if first_s is not None:
                hops.append(("network", max(0.0, first_s - queue_s - gather_s)))
            for hop, seconds in hops:
                self.hops[hop].add(seconds)
                server.counts[hop] += 1
                server.sums_s[hop] += seconds
        if 0 < self._slow_s < (total_s := sum([seconds for _, seconds in hops])):
            slowest = max(hops, key=lambda one: one[1])[0]
            if self._tells(slowest):
                each = ", ".join(f"{hop} {seconds:.3f}" for hop, seconds in hops)
                text = "slow lookup %016x: %.3f s at %s for %d bytes, most of it %s (%s)"
                _log.warning(text, number, total_s, server.address, nbytes, slowest, each)

    def _tells(self, hop: str) -> bool:
        """Count a slow one; whether the log is to tell of it."""
        now = time.monotonic()
        with self._lock:
            self.slow[hop] += 1
            tells = now >= self._told_s + _TOLD_EVERY_S
            if tells:
                self._told_s = now
        return tells

    def ended(
        self, step: object, error: EngrampoolError | None, complete: bool, masked: Mapping[int, int] | None = None
    ) -> None:
        """Count the end of a step, once. complete: whether there are rows for every layer, if only masked ones.

        masked: layer -> tokens that it went without.
        """
        outcome = "ok"
        if error is not None:
            outcome = "masked" if complete else "cancelled" if isinstance(error, StepCancelledError) else "failed"
        with self._lock:
            if self._pending.pop(step, None) is None:
                return
            self.steps[outcome] += 1
            for layer, tokens in (masked or {}).items():
                self.masked_tokens[layer] += tokens
            now = time.monotonic()
            tells = (
                outcome == "masked"
                and isinstance(error, UnauthenticatedError | ForbiddenError | TlsError)
                and now >= self._untrusted_told_s + _UNTRUSTED_EVERY_S
            )
            if tells:
                self._untrusted_told_s = now
        if tells:
            _log.error("steps are masked until this client's credentials are mended: %s", error)

    def count_bytes(self, source: str, nbytes: int) -> None:
        """Count bytes of rows."""
        with self._lock:
            self.bytes[source] += nbytes

    def hint_began(self, hint: object, nbytes: int, limit_bytes: int) -> bool:
        """Count the rows of a hint as pending, unless they would be more than the limit with the others."""
        with self._lock:
            if self.pending_hint_bytes + nbytes > limit_bytes:
                self.hint_bytes["dropped"] += nbytes
                return False
            self._pending_hints[hint] = nbytes
            return True

    def hint_ended(self, hint: object, asked_bytes: int, good: bool) -> None:
        """Count the end of a hint, once. asked_bytes: of its rows, those that the cache missed."""
        with self._lock:
            if self._pending_hints.pop(hint, None) is not None:
                self.hint_bytes["asked" if good else "failed"] += asked_bytes

    def forked(self) -> None:
        """In the child of a fork: what another thread was about to count is the parent's."""
        self._lock = threading.RLock()
        self._pending, self._pending_hints = {}, {}

    def retried(self) -> None:
        """Count a lookup that was asked again."""
        with self._lock:
            self.retries += 1

    def hedged(self) -> None:
        """Count a lookup that a second server was asked for, as the first was late."""
        with self._lock:
            self.hedges += 1

    def hedge_won(self) -> None:
        """Count one of those whose rows came from the second."""
        with self._lock:
            self.hedges_won += 1

    def opened(self) -> None:
        """Count that the breaker opened."""
        with self._lock:
            self.breaker_opened += 1
