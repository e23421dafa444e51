"""The process between a server and its registry: it says what is published, and keeps the record of what is held.

That the registry is slow, or away, so holds up nothing else.
"""

import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from queue import Empty, SimpleQueue

from engrampool_proto.registry.etcd import ClashError, Member, Published, Registry, RegistryError, State
from engrampool_server.config import ConfigError
from engrampool_server.processes.pool_view import PoolView
from engrampool_server.processes.reports import Reporter
from engrampool_server.telemetry import log
from engrampool_server.telemetry.metrics import Metrics

TTL_S = 10
# How long a start waits for the registry before it goes by what the registry said last.
PATIENCE_S = 5.0
_AGAIN_S = 0.01
# How often a file is told that the registry answers, at most.
_TOUCH_S = 10.0
# More than a socket takes.
_ORDER_BYTES = 1 << 20


class Cache:
    """What is known of a pool, in a file. registry: its URL; what another one said is not taken for what this one says.

    The file's time of change is when the registry answered last.
    """

    def __init__(self, path: Path, registry: str) -> None:
        self._path, self._registry = path, registry
        self._draft = path.with_name(f"{path.name}.draft")

    def check(self) -> None:
        """Raise ConfigError if there is something that a file of ours must not take the place of."""
        for path in (self._path, self._draft):
            with suppress(OSError):  # which is logged once it is read or written
                if not stat.S_ISREG(path.lstat().st_mode):
                    raise ConfigError(f"registry_cache: {path} is there, and is no regular file; name another file")

    def write(self, known: PoolView) -> None:
        """Put it there, all of it or nothing. That it cannot be written is logged."""
        try:
            with self._draft.open("w", encoding="utf-8") as file:
                json.dump({"registry": self._registry, **known.to_json()}, file)
                file.flush()
                os.fsync(file.fileno())
            self._draft.replace(self._path)
        except OSError as error:
            log.event(
                "registry-cache", level="warning", path=str(self._path), error=f"cannot be written: {error.strerror}"
            )

    def touch(self) -> None:
        """Note that the registry answered just now, if the file is there."""
        with suppress(OSError):
            os.utime(self._path)

    @property
    def age_s(self) -> float:
        """Seconds since the registry answered last, by this file; 0 if it is not there."""
        try:
            return max(0.0, time.time() - self._path.stat().st_mtime)
        except OSError:
            return 0.0

    def read(self) -> PoolView | None:
        """What is there; None if it is not there, or of no use, which is logged."""
        try:
            document = json.loads(self._path.read_bytes())
            return PoolView.from_json(document) if document["registry"] == self._registry else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            log.event("registry-cache", level="warning", path=str(self._path), error=f"cannot be read: {error}")
            return None


def register(
    url: str,
    cache: Cache | None,
    address: str,
    orders: socket.socket,
    metrics: Metrics,
    reporter: Reporter,
    *,
    known: PoolView | None,
) -> None:
    """Tell the supervisor what is known, and the registry what is held at `address`; at SIGTERM leave the registry.

    orders: gives each Member to be registered, as JSON; from then on its lease is kept.
    known: what the supervisor knows by now; None for nothing, at its start, when `cache` may know more.
    """
    news: SimpleQueue[State | BaseException | None] = SimpleQueue()
    signal.signal(signal.SIGTERM, lambda *_: news.put(None))
    registry = Registry(url)

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            news.put(error)

    keep = partial(_keep, registry, address, orders, metrics)
    for work in (lambda: registry.follow(news.put, threading.Event()), keep):
        threading.Thread(target=run, args=(work,), daemon=True).start()
    reporter.ready()
    begun_s, touched_s = time.monotonic(), -inf
    # Of what is known before the registry answers.
    age_s = 0.0 if cache is None else cache.age_s
    is_first = known is None
    if known is None:
        known = (cache.read() if cache is not None else None) or PoolView()
    told: PoolView | None = None
    lacking: list[Published] = []
    while True:
        reporter.beat()
        # Before it ever answered: since it was asked.
        waited_s = time.monotonic() - begun_s
        metrics.registry_age.set(min(registry.age_s, age_s + waited_s))
        if cache is not None and registry.age_s < _TOUCH_S <= waited_s - touched_s:
            touched_s = waited_s
            cache.touch()
        try:
            # What is known may be longer than the pipe takes at once.
            latest = news.get(timeout=_AGAIN_S if reporter.behind_bytes else reporter.beat_s)
        except Empty:
            if is_first and waited_s >= PATIENCE_S:
                is_first = False
                if known.published:
                    versions = [version for _, version in known.published]
                    log.event("registry-cache", level="warning", versions=versions, age_s=round(age_s))
                    told = known
                    reporter.known(known)
            continue
        if latest is None:
            registry.leave()
            return
        if isinstance(latest, BaseException):
            raise latest
        is_first = False
        known = known.after(latest)
        if known != told:
            told = known
            if cache is not None:
                cache.write(known)
            reporter.known(known)
        before, lacking = lacking, known.unpublished(latest)
        metrics.versions.labels("unpublished").set(len(lacking))
        if lacking and lacking != before:
            versions = [f"{one.model} {one.version} from {one.location}" for one in lacking]
            log.event("unpublished", level="error", versions=versions)


def _keep(registry: Registry, address: str, orders: socket.socket, metrics: Metrics) -> None:
    """Register what `orders` gives, and keep its lease in between. Says once of each kind why that cannot be."""
    orders.settimeout(TTL_S / 3)
    said: set[str] = set()
    while True:
        try:
            record = orders.recv(_ORDER_BYTES)
        except TimeoutError:
            record = b""
        try:
            if record:
                registry.join(Member.from_json(address, record), TTL_S)
            else:
                registry.keep()
        except (RegistryError, ClashError) as error:  # it is tried again next time
            metrics.unregistered.set(1)
            if str(error) not in said:
                said.add(str(error))
                log.event("not-registered", level="error", error=str(error))
            continue
        metrics.unregistered.set(0)
        if said:
            said.clear()
            log.event("registered")
