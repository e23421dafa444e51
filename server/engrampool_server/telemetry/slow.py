"""Lookups that took longer than they should: counted by the hop that took most of it, and told in the log."""

import threading
import time

from engrampool_proto.wire import ServerTimes
from engrampool_server.telemetry import log
from engrampool_server.telemetry.metrics import Metrics

# A line in so long from each process: where all lookups are slow, others say no more.
EVERY_S = 1.0


class SlowLookups:
    """Of one process. Thread-safe. limit_us: what takes longer is slow; 0 for nothing is."""

    def __init__(self, metrics: Metrics, limit_s: float) -> None:
        self.limit_us = round(limit_s * 1e6)
        self._metrics = metrics
        self._lock = threading.Lock()
        self._next_s, self._untold = 0.0, 0

    def over(self, times: ServerTimes) -> bool:
        """Whether that is slow, and to be `note`d."""
        return 0 < self.limit_us < times.total_us

    def note(self, method: str, request: int, peer: str, rows: int, times: ServerTimes) -> None:
        """Count a slow lookup, and log it. request: its number, 0 where the caller gave none. peer: see peers.py."""
        hops = {"queue": times.queue_us, "gather": times.gather_us, "send": times.send_us}
        hop = max(hops, key=lambda name: hops[name])
        now = time.monotonic()
        with self._lock:
            self._metrics.slow.labels(hop).inc()
            if now < self._next_s:
                self._untold += 1
                return
            self._next_s, untold, self._untold = now + EVERY_S, self._untold, 0
        log.event(
            "slow-lookup",
            level="warning",
            request=f"{request:016x}",
            method=method,
            peer=peer,
            rows=rows,
            hop=hop,
            queue_ms=times.queue_us / 1e3,
            gather_ms=times.gather_us / 1e3,
            send_ms=times.send_us / 1e3,
            untold=untold,
        )
