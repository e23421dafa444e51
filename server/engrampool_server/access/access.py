"""What a server goes by when it lets callers in: files that are read again when they change, in every process of it."""

import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

from engrampool_proto.security.openssl import Context
from engrampool_proto.security.pem import Pem, PemFiles
from engrampool_proto.security.reread import Reread
from engrampool_server.access.callers import ADMIN, METRICS, Callers, bearer, read_callers
from engrampool_server.config import ServerConfig
from engrampool_server.telemetry import log
from engrampool_server.telemetry.metrics import Metrics

# How often files are looked at. A token that is revoked is out within two seconds.
LOOK_S = 0.5
# A look takes milliseconds, on a disk that answers.
SETTLE_S = 1.0


class Access:
    """Made before the first fork, so that nobody begins with files that are damaged by then. Thread-safe.

    tls: of the server's certificate, its key, and the authorities of clients' certificates; None for plain text.
    callers: None where everybody may call. metrics_tls: what the metrics port speaks TLS by, None where it does not.
    """

    def __init__(
        self,
        tls: Reread[Pem] | None = None,
        callers: Reread[Callers] | None = None,
        metrics_tls: Reread[ssl.SSLContext] | None = None,
        show_damaged: Callable[[str, bool], None] = lambda file, damaged: None,
        lane_tls: bool = False,
    ) -> None:
        """show_damaged: told at each look whether a file, "tls" or "tokens", is of no use.

        lane_tls: whether the direct lane is inside TLS. Raises PemError, NoOpensslError.
        """
        self.tls, self.callers, self.metrics_tls = tls, callers, metrics_tls
        self._lane_tls = lane_tls
        self._lane: tuple[Pem, Context] | None = None
        self.lane_context()  # whoever cannot have one is not to begin
        self._show_damaged = show_damaged
        self._looker: threading.Thread | None = None
        self._look_again_s = 0.0

    @classmethod
    def of(cls, config: ServerConfig, metrics: Metrics) -> Self:
        """What the settings name. Raises PemError, CallersFileError, NoOpensslError."""

        def damaged(file: str, error: Exception) -> None:
            metrics.credentials_damaged.labels(file).inc()
            log.event("credentials-damaged", level="error", file=file, error=f"the last good ones stay: {error}")

        def show(file: str, is_damaged: bool) -> None:
            metrics.credentials_stale.labels(file).set(is_damaged)

        tls = callers = metrics_tls = None
        if config.tls_cert != "off":
            ca = None if config.tls_client_ca == "off" else Path(config.tls_client_ca)
            names = ("tls_client_ca", "tls_cert", "tls_key")
            files = PemFiles(ca, Path(config.tls_cert), Path(config.tls_key), names)
            tls = Reread(files.paths, files.read, partial(damaged, "tls"), LOOK_S)
            if config.tls_metrics and config.metrics != "off":
                metrics_tls = Reread(files.paths, files.server_context, every_s=LOOK_S)
        if config.tokens != "off":
            path = Path(config.tokens)
            callers = Reread([path], partial(read_callers, path), partial(damaged, "tokens"), LOOK_S)
        where = config.listen if config.direct == "auto" else config.direct
        # No network carries a Unix socket.
        lane_tls = config.lane_tls == "on" and where != "off" and not where.startswith("unix:")
        return cls(tls, callers, metrics_tls, show, lane_tls)

    def lane_context(self) -> Context | None:
        """What connections of the direct lane speak TLS by now; None where they do not."""
        if self.tls is None or not self._lane_tls:
            return None
        pem, made = self.tls.value, self._lane
        if made is None or made[0] is not pem:
            made = self._lane = pem, Context(pem, server=True)
        return made[1]

    @property
    def is_open(self) -> bool:
        """Whether everybody who can connect may call."""
        return self.callers is None

    def look(self) -> bool:
        """Read again what has changed, at most every LOOK_S. Whether there are other callers by now."""
        if self.tls is not None:
            if self.tls.look():
                log.event("certificates-replaced")
            self._show_damaged("tls", self.tls.is_damaged)
        if self.metrics_tls is not None:
            self.metrics_tls.look()
        if self.callers is None:
            return False
        changed = self.callers.look()
        self._show_damaged("tokens", self.callers.is_damaged)
        if changed:
            log.event("callers-replaced", callers=len(self.callers.value.names))
        return changed

    def may_scrape(self, authorization: str) -> bool:
        """Whether a scrape with this header, "" for none, may read metrics."""
        if self.callers is None:
            return True
        found = self.callers.value.of_token(bearer(authorization).encode())
        return found is not None and not found.roles.isdisjoint((METRICS, ADMIN))

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Look again and again, on a thread: no handshake and no call waits for a disk. Gives what ends that.

        changed: called there when callers have changed.
        """
        over = threading.Event()

        def run() -> None:
            due = False
            while not over.wait(LOOK_S):
                try:
                    due = self.look() or due
                    if due:
                        changed()
                    due = False
                except Exception as error:  # nobody else in this process would see that a token was revoked
                    log.event("access-failed", level="error", error=repr(error))

        if self._files:
            threading.Thread(target=run, name="access", daemon=True).start()
        return over.set

    def look_aside(self) -> None:
        """Look on a thread that ends, at most every LOOK_S: for a process that forks, and may not wait for a disk.

        Does nothing while the last one still looks.
        """
        now = time.monotonic()
        if not self._files or now < self._look_again_s or (self._looker is not None and self._looker.is_alive()):
            return
        self._look_again_s = now + LOOK_S
        looker = threading.Thread(target=self.look, name="access", daemon=True)
        with suppress(RuntimeError):  # the system gives none now
            looker.start()
            self._looker = looker

    def settle(self) -> None:
        """Before a fork: let a thread that looks end. One that does not waits for a disk, with no lock but ours."""
        if self._looker is not None:
            self._looker.join(SETTLE_S)

    def forked(self) -> None:
        """In the child of a fork: whoever looked is not here."""
        self._looker = None
        for one in self._files:
            one.forked()

    @property
    def _files(self) -> list[Reread[Any]]:
        return [one for one in (self.tls, self.callers, self.metrics_tls) if one is not None]
