"""The process between a server and its registry: it says what is published, and keeps the record of what is held.

That the registry is slow, or away, so holds up nothing else.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from engrampool_proto.registry import Member, Published, Registry, RegistryError, State
from engrampool_server import log
from engrampool_server.link import Link
from engrampool_server.metrics import Metrics

TTL_S = 10
# How long a start waits for the registry before it goes by what the registry said last.
PATIENCE_S = 5.0
_AGAIN_S = 0.01
# More than a socket takes.
_ORDER_BYTES = 1 << 20


class Cache:
    """What is published, in a file. registry: its URL; what another one said is not taken for what this one says."""

    def __init__(self, path: Path, registry: str) -> None:
        self._path, self._registry = path, registry

    def write(self, published: Sequence[Published]) -> None:
        """Put it there, all of it or nothing. That it cannot be written is logged."""
        records = [[one.model, one.version, one.to_json().decode()] for one in published]
        draft = self._path.with_name(f"{self._path.name}.draft")
        try:
            with draft.open("w", encoding="utf-8") as file:
                json.dump({"registry": self._registry, "published": records}, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError as error:
            log.event(
                "registry-cache", level="warning", path=str(self._path), error=f"cannot be written: {error.strerror}"
            )

    def read(self) -> list[Published] | None:
        """What is there; None if it is not there, or of no use, which is logged."""
        try:
            document = json.loads(self._path.read_bytes())
            if document["registry"] != self._registry:
                return None
            return [Published.from_json(model, version, raw.encode()) for model, version, raw in document["published"]]
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
    link: Link,
    *,
    is_first: bool,
) -> None:
    """Tell the supervisor what is published, and the registry what is held at `address`; at SIGTERM leave the registry.

    orders: gives each Member to be registered, as JSON; from then on its lease is kept.
    is_first: the supervisor does not know yet what was published.
    """
    news: SimpleQueue[State | BaseException | None] = SimpleQueue()
    signal.signal(signal.SIGTERM, lambda *_: news.put(None))
    registry = Registry(url)

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            news.put(error)

    for work in (lambda: registry.follow(news.put, threading.Event()), lambda: _keep(registry, address, orders)):
        threading.Thread(target=run, args=(work,), daemon=True).start()
    link.ready()
    begun_s = time.monotonic()
    told: tuple[Published, ...] | None = None
    wanting = cache if is_first else None
    while True:
        link.beat()
        # Before it ever answered: since it was asked.
        waited_s = time.monotonic() - begun_s
        metrics.registry_age.set(min(registry.age_s, waited_s))
        try:
            # What is published may be longer than the pipe takes at once.
            latest = news.get(timeout=_AGAIN_S if link.is_behind else link.beat_s)
        except Empty:
            if wanting is not None and waited_s >= PATIENCE_S:
                published = wanting.read()
                if published is not None:
                    log.event("registry-cache", level="warning", versions=[one.version for one in published])
                    link.published(published, revision=0)
                wanting = None
            continue
        if latest is None:
            registry.leave()
            return
        if isinstance(latest, BaseException):
            raise latest
        wanting = None
        if latest.published != told:
            told = latest.published
            if cache is not None:
                cache.write(told)
            link.published(told, latest.revision)


def _keep(registry: Registry, address: str, orders: socket.socket) -> None:
    """Register what `orders` gives, and keep its lease in between."""
    orders.settimeout(TTL_S / 3)
    while True:
        try:
            record = orders.recv(_ORDER_BYTES)
        except TimeoutError:
            record = b""
        # That the registry is away is logged by who follows it; it is tried again next time.
        with suppress(RegistryError):
            if record:
                registry.join(Member.from_json(address, record), TTL_S)
            else:
                registry.keep()
