"""The standard health service, grpc.health.v1.Health."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engrampool_server.answer import peers

# Watches at one time in one process: each takes some 30 KiB, and whoever reaches the port may have them.
MOST_WATCHES = 1024
NOT_SERVING, SERVING = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One status for all `services`: NOT_SERVING from construction on, then what `set` was given, until `end`.

    The servicer of grpc_health leaves a watch open for as long as its client does, and stopping waits for open calls:
    one client that watches health would hold up every stop for all of drain_s. Here `end` ends the watches.
    """

    def __init__(self, *services: str) -> None:
        self._services = services
        self._status = NOT_SERVING
        self._ended = False
        self._changed = asyncio.Event()
        self._watches: Counter[str] = Counter()  # by peer

    def set(self, status: int) -> None:
        """Answer `status`, and tell who watches."""
        self._status = status
        self._changed.set()
        self._changed = asyncio.Event()

    def end(self) -> None:
        """Answer NOT_SERVING from now on; whoever watches is told so, and the watch ends."""
        self._ended = True
        self.set(NOT_SERVING)

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The status of one service; NOT_FOUND for one that is not here."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:200]!r} here")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and at every change; SERVICE_UNKNOWN for one that is not here, as the protocol has it.

        RESOURCE_EXHAUSTED for too many: a peer may have no more than it leaves free.
        """
        peer = peers.of_call(context.peer())
        if self._watches[peer] + 1 > MOST_WATCHES - (self._watches.total() + 1):
            text = f"{self._watches[peer]} watches are open from {peer}, and {self._watches.total()} in all"
            text = f"{text}, of {MOST_WATCHES}; a peer may have no more than are free; ask by Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._watches[peer] += 1
        try:
            async for status in self._statuses(request.service):
                yield health_pb2.HealthCheckResponse(status=status)
        finally:
            self._watches[peer] -= 1
            self._watches += Counter()  # without those that have none

    async def _statuses(self, service: str) -> AsyncIterator[int]:
        told = None
        while True:
            changed = self._changed
            status = self._status if service in self._services else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != told:
                yield status
                told = status
                continue  # it may have changed while it was sent
            if self._ended:
                return
            await changed.wait()
