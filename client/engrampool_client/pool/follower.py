"""Which version a client goes by: the one that it was made with, or whichever is active by now in a registry."""

import logging
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from engrampool_client.compute.forms import Form
from engrampool_client.compute.served import ServedModel
from engrampool_client.config import ClientConfig
from engrampool_client.errors import FingerprintError, StepCancelledError
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.pool.discovery import Servers
from engrampool_client.pool.version import Version
from engrampool_client.stats import Stats
from engrampool_proto.registry.etcd import RegistryError

# What became of versions that were made active: the last can never be followed, the one before is tried again.
OUTCOMES = ("followed", "failed", "refused")
# How soon to try again, and for how long to wait for its servers then.
_AGAIN_S, _CONNECT_S = 1.0, 5.0
_log = logging.getLogger("engrampool")


class VersionFollower:
    """Holds the version that lookups begin by, and has a thread make the next where another version is active.

    The next one is whole before lookups begin by it, and the last one is closed once the last lookup by it has ended.
    Thread-safe. To be used in this order: `connect`, `open`; then `enter` and `leave`; `close` at any time.

    current: whose version is the active one as far as this client could follow. trouble: why that is another one, None
    if it is not. changes: by outcome.
    """

    def __init__(self, servers: Servers, config: ClientConfig) -> None:
        self.servers, self._config = servers, config
        self.current = Version(servers, config)
        self.trouble: str | None = None
        self.changes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        # Taken by itself: see delivery.py.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._thread: threading.Thread | None = None
        self._coming: Version | None = None
        self._retired: list[Version] = []
        # Lookups that found their version gone, and how many of them know what that means.
        self._doubts = self._settled = 0
        # The version that could not be followed last, when to try again, and the one that never can be.
        self._failed, self._not_before, self._refused = "", 0.0, ""

    def connect(self, model: str | None, version: str | None, timeout_s: float) -> ServedModel:
        """Find out what is served. Raises PoolError, SpecError."""
        self._pinned = version is not None or not self.servers.registered
        served = self.current.connect(*self.servers.start(model, version, timeout_s), timeout_s)
        self._model = served.spec.name
        return served

    def open(self, stats: Stats, form: Form, warm: Path | None) -> None:
        """Be ready for lookups, which `form` computes. Raises as `Version.open` does."""
        self._stats, self._form = stats, form
        self.current.open(stats, form, warm)
        if not self._pinned:
            thread = threading.Thread(target=self._follow, name="engrampool-following", daemon=True)
            thread.start()
            self._thread = thread  # now that it can be joined

    @property
    def pinned(self) -> bool:
        """Whether it stays with the version that it connected to."""
        return self._pinned

    @property
    def ending(self) -> list[str]:
        """Versions that no lookup begins by any more, and whose last lookups are under way."""
        return [version.served.version for version in list(self._retired)]

    def enter(self) -> Version:
        """What a lookup goes by from beginning to end; `leave` is to follow."""
        with self._lock:
            self.current.uses += 1
            return self.current

    def leave(self, version: Version) -> None:
        """Go by it no more."""
        with self._lock:
            version.uses -= 1
            last = not version.uses and version is not self.current
        if last:
            self.servers.wake()

    def moved_on(self, version: Version, delivery: Delivery) -> bool:
        """Whether lookups go by another version than this one, which a server holds no more.

        If that version is active no longer, waits for the next one, until the step's deadline at most.
        """
        if self._thread is None:
            return False
        with self._lock:
            self._doubts = doubt = self._doubts + 1
        self.servers.wake()
        delivery.on_cancel(self._notify)
        with self._lock:
            self._changed.wait_for(
                lambda: self.current is not version or self._settled >= doubt or self._closed or delivery.given_up,
                min(delivery.deadline - time.monotonic(), threading.TIMEOUT_MAX),
            )
            return self.current is not version and not self._closed and not delivery.given_up

    def forked(self) -> None:
        """In the child of a fork: let go of the connections without a word, for they are the parent's."""
        for version in (self.current, *self._retired, self._coming):
            if version is not None:
                version.shards.forked()

    def close(self) -> None:
        """End the connections, and every lookup on one."""
        with self._lock:
            self._closed = True
            versions, coming = [self.current, *self._retired], self._coming
            self._changed.notify_all()
        if coming is not None:
            coming.stop()
        for version in versions:
            version.close()
        self.servers.close()
        if self._thread is not None:
            self._thread.join()

    def _notify(self) -> None:
        with self._lock:
            self._changed.notify_all()

    def _follow(self) -> None:
        seen, looked, said = 0, 0, ""
        while not self._closed:
            seen = self.servers.wait(seen, _AGAIN_S)
            doubts = self._doubts
            try:
                active = self._look(doubts != looked)
                said = ""
            except Exception as error:  # following goes on whatever happens
                if repr(error) != said and not self._closed:
                    said = repr(error)
                    _log.exception("following the active version failed, and is tried again")
                continue  # who has doubts is answered by a look that came to its end
            looked = doubts
            if active in (self.current.served.version, self._refused):  # there is none to wait for
                with self._lock:
                    self._settled = doubts
                    self._changed.notify_all()

    def _look(self, doubted: bool) -> str:
        """Go by the active version if that is another; gives it. doubted: there may be news not heard of yet."""
        if doubted:
            with suppress(RegistryError):
                self.servers.look()
        self._close_idle()
        active = self.servers.active(self._model) or self.current.served.version
        if active == self.current.served.version:
            self.trouble, self._failed = None, ""
        elif active != self._refused and (active != self._failed or time.monotonic() >= self._not_before):
            self._move_to(active)
        return active

    def _close_idle(self) -> None:
        with self._lock:
            idle = [one for one in self._retired if not one.uses]
            self._retired = [one for one in self._retired if one.uses]
        for version in idle:
            version.close()

    def _move_to(self, version: str) -> None:
        """Have lookups begin by that version, if its servers are there and its specification is the same."""
        coming = Version(self.servers, self._config)
        with self._lock:
            if self._closed:
                return
            self._coming = coming
        try:
            ours = self.current.served.spec
            theirs = coming.connect(self._model, version, _CONNECT_S, ours).spec
            if theirs.digest != ours.digest:
                raise FingerprintError(ours.differences(theirs))
            coming.open(self._stats, self._form)
            with self._lock:
                if self._closed:
                    raise StepCancelledError("the client was closed")
                self._retired.append(self.current)
                self.current, self.trouble = coming, None
                self.changes["followed"] += 1
                self._changed.notify_all()
        except Exception as error:  # following goes on whatever happens
            coming.close()
            self._stay(version, error)

    def _stay(self, version: str, error: Exception) -> None:
        """Go on by the current version, and say why."""
        if self._closed:
            return
        self.trouble = f"{self._model} {version} is active and cannot be followed: {error or repr(error)}"
        if version != self._failed:  # else it was said
            _log.warning("going on by %s: %s", self.current.served.version, self.trouble)
        self._failed, self._not_before = version, time.monotonic() + _AGAIN_S
        if isinstance(error, FingerprintError):
            self._refused = version
        self.changes["failed" if self._refused != version else "refused"] += 1
