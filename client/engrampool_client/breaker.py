"""When to ask a server: again after a failure, and not at all while it is known to be away."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from engrampool_client.errors import DeadlineError, EngrampoolError, UnavailableError

# Pauses between the tries of a lookup whose connection broke.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.2
# Between the probes of a server that is away.
_FIRST_PROBE_S, _LONGEST_PROBE_S = 0.05, 1.0


class Breaker:
    """Lets lookups through while it is closed. Thread-safe.

    A lookup whose connection broke may be asked again for `retry_s` from the first failure on, until one succeeds; so a
    restarted worker costs a lookup a moment. After `failures` lookups in a row that found the server unreachable,
    loading or silent it opens: then every lookup fails at once, while a thread of its own probes the server, and closes
    it again once that answers. 0 failures: it never opens.

    probe: asks the server for something small; raises EngrampoolError as long as it does not answer.
    opened: told when it opens.
    """

    def __init__(
        self, retry_s: float, failures: int, probe: Callable[[], None], opened: Callable[[], None], target: str
    ) -> None:
        self._retry_s, self._failures, self._probe, self._opened = retry_s, failures, probe, opened
        self._target = target
        self._lock = threading.Lock()
        self._failing_since: float | None = None
        self._failed = 0
        self._closing = threading.Event()
        self._prober: threading.Thread | None = None
        self._refusal: UnavailableError | None = None

    @property
    def is_open(self) -> bool:
        """Whether lookups fail at once."""
        return self._refusal is not None

    def check(self) -> None:
        """Raise UnavailableError, reason "breaker-open", while it is open."""
        if self._refusal is not None:
            raise UnavailableError(str(self._refusal), self._refusal.reason)

    def succeeded(self) -> None:
        """Note that a lookup was answered."""
        if self._failing_since is not None or self._failed:
            with self._lock:
                self._failing_since, self._failed = None, 0

    def failed(self, error: EngrampoolError) -> None:
        """Note that a lookup was given up. What a server that answers says against a lookup does not count."""
        if not isinstance(error, UnavailableError | DeadlineError) or error.reason == "breaker-open":
            return
        with self._lock:
            self._failed += 1
            if not self._failures or self._failed < self._failures or self.is_open or self._closing.is_set():
                return
            text = (
                f"{self._target} failed {self._failed} lookups in a row, the last with: {error}; it is probed in the "
                "background, and no lookup waits for it meanwhile"
            )
            self._refusal = UnavailableError(text, "breaker-open")
            self._prober = threading.Thread(target=self._watch, name="engrampool-breaker", daemon=True)
            self._prober.start()
        self._opened()

    def pause_s(self, error: Exception, attempt: int) -> float | None:
        """Seconds to wait before trying again after the failure number `attempt` (from 0 on), None not to."""
        # A server that answered, if only "loading", is not a broken connection.
        if not isinstance(error, UnavailableError) or error.reason is not None:
            return None
        now = time.monotonic()
        with self._lock:
            if self._failing_since is None:
                self._failing_since = now
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**attempt)
            return pause_s if now + pause_s - self._failing_since < self._retry_s else None

    def close(self) -> None:
        """Probe no more."""
        with self._lock:
            self._closing.set()
            prober = self._prober
        if prober is not None:
            prober.join()

    def _watch(self) -> None:
        pause_s = _FIRST_PROBE_S
        while not self._closing.wait(pause_s):
            with suppress(EngrampoolError):
                self._probe()
                with self._lock:
                    self._failing_since, self._failed, self._refusal = None, 0, None
                return
            pause_s = min(2 * pause_s, _LONGEST_PROBE_S)
