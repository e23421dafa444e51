"""The server's life: bind, check the machine, load, serve, drain, stop."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Sequence
from wsgiref.simple_server import WSGIServer

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from engrampool_proto import __version__
from engrampool_proto.errors import EngrampoolError
from engrampool_proto.wire import SERVICE
from engrampool_server import log
from engrampool_server.config import ServerConfig
from engrampool_server.health import SERVING, Health
from engrampool_server.machine import Machine
from engrampool_server.metrics import CallMetrics, Metrics
from engrampool_server.preflight import Need, check, raise_soft_limits
from engrampool_server.service import Limits, PoolService
from engrampool_server.setting_kinds import split_address
from engrampool_server.table_files import PackedModel
from engrampool_server.tables import load

# Ids are at most 8 bytes; the rest of a request is small beside them.
_REQUEST_MARGIN_BYTES = 1 << 20
# gRPC keeps the bound on messages in a C int.
_INT32_MAX = 2**31 - 1
_PROGRESS_S = 5.0


class ListenError(EngrampoolError):
    """An address cannot be listened on: in use, not of this machine, or not permitted."""


class Server:
    """One server of one process. `run` is the whole life; `start`, `load` and `stop` are its parts.

    address, metrics_address: "HOST:PORT" once started, with the port that port 0 became.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._metrics = Metrics()
        limits = Limits(
            config.max_rows_per_request, config.max_answer_bytes, config.max_in_flight_bytes, config.stream_chunk_bytes
        )
        self._service = PoolService(limits, self._metrics, config.gather_threads)
        self._health = Health("", SERVICE)
        self._packed: list[PackedModel] = []
        self._grpc: grpc.aio.Server | None = None
        self._metrics_http: tuple[WSGIServer, threading.Thread] | None = None
        self._cancel_load = threading.Event()
        self._stop = asyncio.Event()
        self.address = self.metrics_address = ""

    async def run(self) -> None:
        """Start, load, serve until SIGTERM or SIGINT, then drain and stop.

        Raises ListenError, PreflightError, TableFileError, OutOfMemoryError; nothing is left running then.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop, signal.Signals(number).name)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await self.start()
            loading = asyncio.create_task(self.load())
            await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                await loading
                await stopping
            else:
                self._cancel_load.set()
                await asyncio.gather(loading, return_exceptions=True)
        finally:
            stopping.cancel()
            await self.stop()

    def request_stop(self, reason: str) -> None:
        """Have `run` end. Only from the event loop's thread."""
        log.event("stopping", reason=reason)
        self._stop.set()

    async def start(self) -> None:
        """Open the models, check the machine, listen. Health says NOT_SERVING, lookups are UNAVAILABLE."""
        config = self._config
        log.event("starting", version=__version__, models=[str(path) for path in config.models])
        for directory in config.models:
            packed = PackedModel.open(directory)
            self._packed.append(packed)
            log.event("opened", model=packed.spec.name, version=packed.version, table_bytes=packed.spec.nbytes)
        _refuse_duplicates(self._packed)
        self._preflight()
        self._listen_metrics()
        options = [
            # Two servers on one port would each get some of the connections, a stale one too.
            ("grpc.so_reuseport", 0),
            ("grpc.max_send_message_length", -1),
            (
                "grpc.max_receive_message_length",
                min(config.max_rows_per_request * 8 + _REQUEST_MARGIN_BYTES, _INT32_MAX),
            ),
        ]
        self._grpc = grpc.aio.server(interceptors=[CallMetrics(self._metrics)], options=options)
        handlers = grpc.method_handlers_generic_handler(SERVICE, self._service.handlers())
        self._grpc.add_generic_rpc_handlers((handlers,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        host, _ = split_address(config.listen)
        try:
            port = self._grpc.add_insecure_port(config.listen)
        except RuntimeError as error:
            raise ListenError(f"cannot listen on {config.listen}: in use, or not an address of this machine") from error
        self.address = f"{host}:{port}"
        await self._grpc.start()
        log.event("listening", listen=self.address, metrics=self.metrics_address or "off")

    def _preflight(self) -> None:
        table_bytes = sum(packed.spec.nbytes for packed in self._packed)
        need = Need(
            table_bytes,
            files=sum(len(packed.files) for packed in self._packed),
            tables=sum(len(packed.spec.tables) for packed in self._packed),
            answer_bytes=self._config.max_in_flight_bytes,
        )
        raise_soft_limits(need, self._config.lock_memory)
        report = check(need, self._config.memory, self._config.lock_memory, Machine.read())
        for line in report.warnings:
            log.event("preflight", level="warning", warning=line)
        report.raise_if_short()
        self._metrics.to_load_bytes.set(table_bytes)

    def _listen_metrics(self) -> None:
        if self._config.metrics == "off":
            return
        host, port = split_address(self._config.metrics)
        try:
            server, thread = start_http_server(port, host.strip("[]"), self._metrics.registry)
        except OSError as error:
            raise ListenError(f"cannot listen on {self._config.metrics} for metrics: {error.strerror}") from error
        self._metrics_http = (server, thread)
        self.metrics_address = f"{host}:{server.server_port}"

    async def load(self) -> None:
        """Read every table, then turn health to SERVING. Raises what reading and allocating raise."""
        config, metrics = self._config, self._metrics
        total = sum(packed.spec.nbytes for packed in self._packed)
        begin = reported = time.monotonic()
        done = 0
        lock = threading.Lock()

        def progress(nbytes: int) -> None:
            nonlocal done, reported
            with lock:
                done += nbytes
                metrics.loaded_bytes.inc(nbytes)
                now = time.monotonic()
                if now - reported < _PROGRESS_S:
                    return
                reported = now
                eta_s = (total - done) * (now - begin) / done
            log.event("loading", bytes=done, of_bytes=total, eta_s=round(eta_s, 1))

        for packed in self._packed:
            model_begin = time.monotonic()
            held = await asyncio.to_thread(
                load, packed, config.memory, config.lock_memory, config.load_threads, self._cancel_load, progress
            )
            packed.close()
            self._service.add(held)
            name, seconds = held.spec.name, time.monotonic() - model_begin
            # Gauges add up: two versions of one model share its name.
            metrics.load_seconds.labels(name).inc(seconds)
            metrics.model_info.labels(name, held.version, held.spec.digest).set(1)
            for table in held.tables.values():
                metrics.table_bytes.labels(name, str(table.spec.layer)).inc(table.rows.nbytes)
                metrics.table_rows.labels(name, str(table.spec.layer)).inc(len(table.rows))
            log.event("loaded", model=name, version=held.version, seconds=round(seconds, 3))
        self._service.ready = True
        self._health.set(SERVING)
        metrics.serving.set(1)
        log.event("serving", listen=self.address, metrics=self.metrics_address or "off")

    async def stop(self) -> None:
        """NOT_SERVING, no new calls, let those in flight finish for up to drain_s, stop. Twice is once."""
        self._cancel_load.set()
        if self._grpc is not None:
            self._health.end()
            self._metrics.serving.set(0)
            begin = time.monotonic()
            await self._grpc.stop(self._config.drain_s)
            self._grpc = None
            log.event("stopped", drained_s=round(time.monotonic() - begin, 3))
        self._service.close()
        for packed in self._packed:
            packed.close()
        if self._metrics_http is not None:
            server, thread = self._metrics_http
            self._metrics_http = None
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            await asyncio.to_thread(thread.join)


def _refuse_duplicates(models: Sequence[PackedModel]) -> None:
    seen: dict[tuple[str, str], PackedModel] = {}
    for packed in models:
        key = (packed.spec.name, packed.version)
        if key in seen:
            where = f"{seen[key].directory} and {packed.directory}"
            raise EngrampoolError(f"model {key[0]}, version {key[1]}, is given twice: {where}")
        seen[key] = packed


def run(config: ServerConfig) -> None:
    """Serve until told to stop, on the event loop that the config names."""
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if config.event_loop == "uvloop":
        factory = uvloop.new_event_loop

    async def life() -> None:
        await Server(config).run()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(life())
