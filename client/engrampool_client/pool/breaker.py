"""When to ask a server: again after a failure, and not at all while it is known to be away."""

import logging
import threading
import time
from collections.abc import Callable
from math import inf

from engrampool_client.errors import DeadlineError, EngrampoolError, UnavailableError
from engrampool_client.event import Event

# Pauses between the tries of a lookup whose connection broke.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.2
# Between the probes of a server that is away.
_FIRST_PROBE_S, _LONGEST_PROBE_S = 0.05, 1.0
# For how long a server that answered a probe is not taken for silent, whatever deadlines pass meanwhile.
_VOUCHED_S = 1.0
# A probe that takes so long does not end any more. Closing waits no longer than this for one.
_STUCK_S, _CLOSE_S = 10.0, 2.0
_log = logging.getLogger("engrampool")


class Breaker:
    """Lets lookups through while it is closed. Thread-safe.

    A lookup whose connection broke may be asked again for `retry_s` from the first failure on, until one succeeds; so a
    restarted worker costs a lookup a moment. After `failures` lookups in a row that found the server unreachable,
    loading or silent it opens: then every lookup fails at once, while a thread of its own probes the server, and closes
    it again once that answers. 0 failures: it never opens.

    A deadline that passed is silence only if the server was asked and said nothing. Whether it was given enough time
    for that, nobody knows: so where silence is what fills the count, the server is probed first, with time enough, and
    the breaker opens only if it does not answer that either.

    The probes begin with the first failure that counts, or with a doubt, and go on until one is answered, whether or
    not the breaker opens: they find out whether only the connection was lost, and whether the server is in trouble.

    probe: asks the server for something small; raises UnavailableError or DeadlineError if it does not answer.
    opened: told when it opens.
    trouble: why the server is taken to be away, for people; None while it is not.
    """

    def __init__(
        self, retry_s: float, failures: int, probe: Callable[[], None], opened: Callable[[], None], target: str
    ) -> None:
        self._retry_s, self._failures, self._probe, self._opened = retry_s, failures, probe, opened
        self._target = target
        # Whoever gives a step up may take it, in whatever the thread is doing: garbage collection does that, too.
        self._lock = threading.RLock()
        self._failing_since: float | None = None
        self._failed, self._vouched_until = 0, 0.0
        self._closing = Event()
        self._prober: threading.Thread | None = None
        self._probing, self._said = False, ""
        self._ends_by = inf  # when the probe that is under way should have ended
        self._refusal: UnavailableError | None = None
        self.trouble: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether lookups fail at once."""
        return self._refusal is not None

    @property
    def why_open(self) -> str | None:
        """Why lookups fail at once; None while they do not."""
        refusal = self._refusal
        return None if refusal is None else str(refusal)

    @property
    def failures(self) -> int:
        """Lookups in a row that found the server unreachable, loading or silent."""
        return self._failed

    @property
    def probing(self) -> bool:
        """Whether the server is probed now, or will be in a moment."""
        return self._probing

    def check(self) -> None:
        """Raise UnavailableError, reason "breaker-open", while it is open."""
        refusal = self._refusal
        if refusal is not None:
            if self._is_stuck():
                with self._lock:
                    self._begin_probing()
            raise UnavailableError(str(refusal), refusal.reason)

    def succeeded(self) -> None:
        """Note that a lookup was answered."""
        if self._failing_since is not None or self._failed:
            with self._lock:
                self._failing_since, self._failed = None, 0

    def failed(self, error: EngrampoolError) -> None:
        """Note that a lookup was given up.

        What a server that answers says against a lookup does not count; nor does a deadline with a reason: either the
        server gave it, or it was not asked.
        """
        silent = isinstance(error, DeadlineError)
        if not isinstance(error, UnavailableError | DeadlineError) or error.reason == "breaker-open":
            return
        if silent and (error.reason is not None or time.monotonic() < self._vouched_until):
            return
        with self._lock:
            self._failed += 1
            if not self._begin_probing() or self.is_open or not self._is_full:
                return
            if silent and self.trouble is None:  # whoever probes it opens it
                return
            self._refuse(error)
        self._opened()

    def doubt(self) -> None:
        """Have the server probed, as it did not answer something that is not counted."""
        if time.monotonic() >= self._vouched_until:
            with self._lock:
                self._begin_probing()

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

    def stop(self) -> None:
        """Begin no more probes, without waiting for one that is under way."""
        with self._lock:
            self._closing.set()

    def close(self) -> None:
        """Probe no more."""
        self.stop()
        if self._prober is not None:
            self._prober.join(_CLOSE_S)

    @property
    def _is_full(self) -> bool:
        return 0 < self._failures <= self._failed

    def _begin_probing(self) -> bool:
        """Have the server probed. False if there can be no thread for it now: who does not probe must not open."""
        if self._closing.is_set():
            return False
        if self._probing and not self._is_stuck():
            return True
        prober = threading.Thread(target=self._watch, name="engrampool-breaker", daemon=True)
        try:
            prober.start()
        except RuntimeError as error:
            _log.warning("%s cannot be probed: %s", self._target, error)
            return False
        self._prober, self._probing = prober, True
        return True

    def _is_stuck(self) -> bool:
        """Whether a probe is under way that will not end: Ctrl-C in another thread may leave a lock of gRPC's taken."""
        return self._probing and time.monotonic() > self._ends_by

    def _refuse(self, error: EngrampoolError) -> None:
        text = (
            f"{self._target} failed {self._failed} lookups in a row, the last with: {error}; it is probed in the "
            "background, and no lookup waits for it meanwhile"
        )
        self._refusal = UnavailableError(text, "breaker-open")
        self.trouble = str(error)

    def _watch(self) -> None:
        with self._lock:  # by now it is open, or it may be silent
            pause_s = _FIRST_PROBE_S if self.is_open else 0.0
        while not self._closing.wait(pause_s):
            self._ends_by = time.monotonic() + _STUCK_S
            trouble = self._trouble()
            self._ends_by = inf
            with self._lock:
                if self._prober is not threading.current_thread():
                    return  # it was taken for stuck
                if trouble is None:
                    self._failing_since, self._failed, self._refusal, self.trouble = None, 0, None, None
                    self._vouched_until, self._probing = time.monotonic() + _VOUCHED_S, False
                    return
                self.trouble = str(trouble)
                opened = not self.is_open and self._is_full and not self._closing.is_set()
                if opened:
                    self._refuse(trouble)
            if opened:
                self._opened()
            pause_s = min(max(2 * pause_s, _FIRST_PROBE_S), _LONGEST_PROBE_S)

    def _trouble(self) -> EngrampoolError | None:
        """Probe it: what it did not answer with, None if it answered, be it with a refusal."""
        try:
            self._probe()
        except (UnavailableError, DeadlineError) as error:
            return error
        except EngrampoolError:
            return None
        except Exception as error:  # probing goes on whatever happens: nobody else closes the breaker again
            if not self._closing.is_set() and repr(error) != self._said:
                self._said = repr(error)
                _log.exception("probing %s failed", self._target)
            return UnavailableError(f"{self._target} cannot be probed: {error!r}")
        return None
