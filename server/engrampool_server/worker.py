"""A process that answers lookups, forked by the supervisor, which watches it through a pipe."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import uvloop

from engrampool_proto.registry import Published
from engrampool_server.config import ServerConfig
from engrampool_server.server import Server
from engrampool_server.shared import Shared


@dataclass(frozen=True)
class Link:
    """A child's side of what connects it to the supervisor.

    life: a pipe's end that reads as closed once the supervisor is gone, however it ended.
    report: a pipe's end for lines that say how the child is: empty for a sign of life, else a JSON object.
    beat_s: how often to give a sign of life.
    """

    life: int
    report: int
    beat_s: float

    def beat(self) -> None:
        """Give a sign of life."""
        self._say(b"\n")

    def ready(self) -> None:
        """Say that this process does its work now."""
        self._say(b'{"ready": true}\n')

    def failed(self, why: str) -> None:
        """Say why this process ends."""
        self._say(json.dumps({"failed": why[:2000]}).encode() + b"\n")

    def loaded(self, nbytes: int, of_bytes: int) -> None:
        """Say how many bytes of tables are in memory, of those that are to be."""
        self._say(json.dumps({"loaded": nbytes, "of": of_bytes}).encode() + b"\n")

    def published(self, published: Sequence[Published], revision: int) -> None:
        """Say what is published, and at which revision of the registry."""
        records = [[one.model, one.version, one.to_json().decode()] for one in published]
        self._say(json.dumps({"published": records, "revision": revision}).encode() + b"\n")

    def _say(self, line: bytes) -> None:
        # A full pipe is one that nobody reads, as while the supervisor is held by a debugger.
        with suppress(BlockingIOError):
            while line:
                line = line[os.write(self.report, line) :]


def answer(config: ServerConfig, shared: Shared, link: Link, *, serving: bool) -> None:
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
        loop.add_reader(link.life, os._exit, 1)
        server = Server(config, shared)
        await server.start()
        if serving:
            server.hold(shared.models)
        link.ready()
        while not stopping.is_set():
            link.beat()
            try:
                await asyncio.wait_for(stopping.wait(), link.beat_s)
            except TimeoutError:
                continue
        await server.stop()

    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(life())
    finally:
        shared.metrics.flush()  # what ended as the last thing that the loop did, too
