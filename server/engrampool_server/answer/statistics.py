"""What the call Stats answers: every metric of the server, for callers who have gRPC alone."""

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

from prometheus_client import Metric

from engrampool_proto.v1 import pool_pb2

# Metrics are read once in so long, however many ask: it takes milliseconds.
EVERY_S = 0.5


class Statistics:
    """Reads metrics for whoever asks. To be used on one event loop.

    read: gives every metric of the server. threads: what it is called in, so that the loop answers lookups meanwhile.
    """

    def __init__(self, read: Callable[[], Iterable[Metric]], threads: Executor) -> None:
        self._read, self._threads = read, threads
        self._reading: asyncio.Future[bytes] | None = None
        self._begun_s = 0.0

    async def answer(self) -> bytes:
        """A StatsResponse."""
        now = time.monotonic()
        if self._reading is None or (self._reading.done() and now - self._begun_s >= EVERY_S):
            self._begun_s = now
            self._reading = asyncio.get_running_loop().run_in_executor(self._threads, self._response)
        # Others wait for the same reading, so the end of one call must not end it.
        return await asyncio.shield(self._reading)

    def _response(self) -> bytes:
        samples = [
            pool_pb2.Sample(name=sample.name, labels=sample.labels, value=sample.value)
            for metric in self._read()
            for sample in metric.samples
        ]
        return pool_pb2.StatsResponse(unix_s=time.time(), samples=samples).SerializeToString()
