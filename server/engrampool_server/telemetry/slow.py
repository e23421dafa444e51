"""Lookups that took longer than they should: counted by the hop that took most of it, and told in the log."""

import threading

from engrampool_proto.wire import ServerTimes
from engrampool_server.telemetry import log
from engrampool_server.telemetry.metrics import Metrics
from engrampool_server.telemetry.told import Told


class SlowLookups:
    """Of one process. Thread-safe. limit_us: what takes longer is slow; 0 for nothing is."""

    def __init__(self, metrics: Metrics, limit_s: float) -> None:
        self.limit_us = round(limit_s * 1e6)
        self._metrics, self._told = metrics, Told()
        self._lock = threading.Lock()

    def over(self, times: ServerTimes) -> bool:
        """Whether that is slow, and to be `note`d."""
        return 0 < self.limit_us < times.total_us

    def note(self, method: str, request: int, peer: str, rows: int, times: ServerTimes) -> None:
        """Count a slow lookup, and log it. request: its number, 0 where the caller gave none. peer: see peers.py."""
        hops = {"queue": times.queue_us, "gather": times.gather_us, "send": times.send_us}
        hop = max(hops, key=lambda name: hops[name])
        with self._lock:
            self._metrics.slow.labels(hop).inc()
        untold = self._told.due()
        if untold is None:
            return
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
