"""A process that answers lookups, forked by the supervisor, which watches it through a pipe."""

import asyncio
import os
import signal
from collections.abc import Callable

import uvloop

from engrampool_server.answer.grpc_server import GrpcServer
from engrampool_server.answer.shared_state import SharedState
from engrampool_server.config import ServerConfig
from engrampool_server.processes.reports import Reporter


def answer(config: ServerConfig, shared: SharedState, reporter: Reporter, *, serving: bool) -> None:
    """Answer calls on the port of `config` until SIGTERM, then drain. To be called in a fresh child.

    serving: lookups in the models that `shared` has; else every lookup is UNAVAILABLE, as tables are still loading.
    Raises ListenError.
    """
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if config.event_loop == "uvloop":
        factory = uvloop.new_event_loop

    async def life() -> None:
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stopping.set)
        loop.add_reader(reporter.life, os._exit, 1)
        server = GrpcServer(config, shared)
        await server.start()
        if serving:
            server.hold(shared.models)
        reporter.ready()
        while not stopping.is_set():
            reporter.beat()
            try:
                await asyncio.wait_for(stopping.wait(), reporter.beat_s)
            except TimeoutError:
                continue
        await server.stop()

    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(life())
    finally:
        shared.metrics.flush()  # what ended as the last thing that the loop did, too
