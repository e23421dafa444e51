"""The process that answers Prometheus for all processes of a server."""

import io
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, Metric, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from engrampool_server.telemetry.metrics_files import MetricsMemory

_TICKS = os.sysconf("SC_CLK_TCK")
# For browsers: a page that asks for /metrics, again and again, and may ask for nothing else.
_STATUS = Path(__file__).with_name("status.html").read_text(encoding="ascii").removesuffix("\n")
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
# So long a connection may last, its handshake and its answer included: anybody may open one, each takes a thread.
LONGEST_S = 10.0
# At one time. For another one the oldest has to go: scrapes and probes take milliseconds.
MOST_CONNECTIONS = 64
# Of a request, its headers included; Python alone would take 6 MiB.
_HEAD_BYTES = 64 << 10
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def export(
    listener: socket.socket,
    memory: MetricsMemory,
    processes: "Processes",
    is_ready: Callable[[], bool],
    beat: Callable[[], None],
    beat_s: float,
    scrapes: "Scrapes",
) -> None:
    """Answer on `listener` for ever, see `Http`. beat: called every `beat_s` seconds and after each answer."""
    registry = CollectorRegistry()
    registry.register(memory)
    registry.register(processes)
    with Http(listener, registry, is_ready, beat, scrapes) as server:
        server.serve_forever(beat_s)


@dataclass(frozen=True)
class Scrapes:
    """Who may scrape, and how. context: what the next connection speaks TLS by, None for plain HTTP.

    may: whether a scrape with this header `Authorization`, "" for none, may read metrics.
    """

    context: Callable[[], ssl.SSLContext | None] = lambda: None
    may: Callable[[str], bool] = lambda authorization: True


class Http(ThreadingWSGIServer):
    """Answers /metrics from a registry, and /healthz and /readyz: that this server lives, and that it answers lookups.

    /status is a page that shows what /metrics has.

    listener: listens already, so that a port in use is told before anything is loaded. beat: called after each answer,
    and from time to time.
    """

    def __init__(
        self,
        listener: socket.socket,
        registry: CollectorRegistry,
        is_ready: Callable[[], bool],
        beat: Callable[[], None] = lambda: None,
        scrapes: Scrapes = Scrapes(),
    ) -> None:
        super().__init__(listener.getsockname()[:2], _Silent, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        host, self.server_port = listener.getsockname()[:2]
        self.server_name = str(host)
        self.setup_environ()
        self._beat = beat
        # Those that are open, in the order of their arrival: their sockets, and since when.
        self._open: dict[socket.socket, tuple[socket.socket, float]] = {}
        self._closing = threading.Lock()  # so that nobody shuts a descriptor that is another's by then
        self._metrics = make_wsgi_app(registry)
        self._is_ready, self._scrapes = is_ready, scrapes
        self.set_app(self._answer)

    def service_actions(self) -> None:
        """Again and again, between connections."""
        self._beat()
        self._cut(lambda at, since: since + LONGEST_S <= time.monotonic())

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a connection, in a thread of its own."""
        self._open[request] = request, time.monotonic()
        most = len(self._open) - MOST_CONNECTIONS
        self._cut(lambda at, since: at < most)
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's thread, which alone waits for its handshake."""
        context = self._scrapes.context()
        if context is None:
            super().finish_request(request, client_address)
            return
        with context.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as secured:
            try:
                self._open[request] = secured, self._open[request][1]  # which has the descriptor from now on
                secured.do_handshake()
                super().finish_request(secured, client_address)
            finally:
                self._forget(request)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        self._forget(request)
        super().shutdown_request(request)

    def _forget(self, request: socket.socket) -> None:
        with self._closing:
            self._open.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Of a connection that broke, was cut off, or speaks no TLS, nothing is said: anybody can make such."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def _cut(self, is_over: Callable[[int, float], bool]) -> None:
        """Cut off connections by their place in the order of arrival, and since when they are there."""
        with self._closing:
            for at, (one, since) in enumerate(list(self._open.values())):
                if is_over(at, since):
                    with suppress(OSError):  # the other side has left
                        # Not by the method of TLS, which says goodbye, and takes from who reads what it reads by.
                        socket.socket.shutdown(one, socket.SHUT_RDWR)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics" and self._scrapes.may(environ.get("HTTP_AUTHORIZATION", "")):
            metrics: Iterable[bytes] = self._metrics(environ, start_response)
            return metrics
        if path == "/metrics":
            status, text = "401 Unauthorized", "metrics are for callers with a token of the role metrics, or admin"
        elif path == "/healthz":
            status, text = "200 OK", "alive"
        elif path == "/status":
            status, text = "200 OK", _STATUS
        elif path == "/readyz":
            ready = self._is_ready()
            status, text = ("200 OK", "serving") if ready else ("503 Service Unavailable", "not serving")
        else:
            status, text = "404 Not Found", "there are /metrics, /status, /healthz and /readyz"
        if status == "200 OK" and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, text = "405 Method Not Allowed", "ask by GET"
        body = b"" if environ["REQUEST_METHOD"] == "HEAD" else f"{text}\n".encode()
        kind = "html" if text is _STATUS else "plain"
        headers = [("Content-Type", f"text/{kind}; charset=utf-8"), ("Content-Length", str(len(text) + 1))]
        start_response(status, [*headers, ("Content-Security-Policy", _POLICY), ("X-Content-Type-Options", "nosniff")])
        return [body]


class _Head(io.BufferedIOBase):
    """The beginning of a stream; the rest is not read."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream, self._left = stream, _HEAD_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        """As of a file."""
        most = self._left if size is None or size < 0 else min(size, self._left)
        line = self._stream.readline(most)
        self._left -= len(line)
        return line

    def close(self) -> None:
        """As of a file."""
        self._stream.close()
        super().close()


class _Silent(WSGIRequestHandler):
    raw_requestline: bytes

    def setup(self) -> None:
        """Begin with a connection."""
        super().setup()
        self.rfile = _Head(self.rfile)

    def parse_request(self) -> bool:
        """Whether there is a request: half a line, of a connection that ended, is none."""
        return self.raw_requestline.endswith(b"\n") and super().parse_request()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """The log is for events of the server's life."""


@dataclass(frozen=True)
class _Usage:
    """Of one process. reaped_s: CPU time of its children that ended. anon_bytes: resident memory that is no file's."""

    cpu_s: float
    reaped_s: float
    start_s: float
    virtual_bytes: int
    resident_bytes: int
    anon_bytes: int
    open_fds: int
    max_fds: float


class Processes(Collector):
    """The `process_` metrics of a server that is several processes: `main` and those that it forked.

    pids, inherited: int64 [any] in shared memory; the process ids, 0 where there is none, and how many bytes of
    anonymous memory each found at its start, the tables among them. They are main's, and counted there.
    """

    def __init__(self, main: int, pids: memoryview, inherited: memoryview, proc: Path = Path("/proc")) -> None:
        self._main, self._pids, self._inherited, self._proc = main, pids, inherited, proc
        self._boot_s = float(next(x for x in (proc / "stat").read_text().splitlines() if x[:6] == "btime ").split()[1])
        self._cpu_s = 0.0

    def collect(self) -> Iterator[Metric]:
        """One value a metric, for all processes."""
        main = self._usage(self._main)
        if main is None:
            return
        running = [
            (self._usage(pid), inherited) for pid, inherited in zip(self._pids, self._inherited, strict=True) if pid
        ]
        others = [usage for usage, _ in running if usage is not None]
        # One that ends between the two readings is missed once: a counter must not go back for that.
        self._cpu_s = max(self._cpu_s, main.cpu_s + main.reaped_s + sum(one.cpu_s for one in others))
        own = (max(0, usage.anon_bytes - inherited) for usage, inherited in running if usage is not None)
        shared = max(one.resident_bytes - one.anon_bytes for one in [main, *others])
        resident = shared + main.anon_bytes + sum(own)
        fullest = max([main, *others], key=lambda one: one.open_fds / one.max_fds)
        yield CounterMetricFamily(
            "process_cpu_seconds_total", "CPU time of all processes, those that ended included.", value=self._cpu_s
        )
        yield GaugeMetricFamily(
            "process_resident_memory_bytes",
            "Resident memory of all processes, the tables counted once.",
            value=resident,
        )
        largest = max(one.virtual_bytes for one in [main, *others])
        yield GaugeMetricFamily("process_virtual_memory_bytes", "Address space of the largest process.", value=largest)
        started = main.start_s + self._boot_s
        yield GaugeMetricFamily("process_start_time_seconds", "Start of the server, as Unix time.", value=started)
        yield GaugeMetricFamily(
            "process_open_fds",
            "Open file descriptors of the process that is nearest its limit.",
            value=fullest.open_fds,
        )
        yield GaugeMetricFamily("process_max_fds", "Limit of the process that is nearest it.", value=fullest.max_fds)

    def _usage(self, pid: int) -> _Usage | None:
        directory = self._proc / str(pid)
        try:
            # The name, in parentheses, may hold anything.
            stat = (directory / "stat").read_text().rpartition(")")[2].split()
            resident_bytes, anon_bytes = resident_memory(directory)
            limits = (directory / "limits").read_text().splitlines()
            open_fds = sum(1 for _ in (directory / "fd").iterdir())
        except OSError:  # it ended
            return None
        (max_fds,) = (line.split()[3] for line in limits if line.startswith("Max open files"))
        user, system, reaped_user, reaped_system = (int(ticks) / _TICKS for ticks in stat[11:15])
        return _Usage(
            cpu_s=user + system,
            reaped_s=reaped_user + reaped_system,
            start_s=int(stat[19]) / _TICKS,
            virtual_bytes=int(stat[20]),
            resident_bytes=resident_bytes,
            anon_bytes=anon_bytes,
            open_fds=open_fds,
            max_fds=float("inf") if max_fds == "unlimited" else float(max_fds),
        )


def resident_memory(process: Path = Path("/proc/self")) -> tuple[int, int]:
    """Resident bytes of a process, and those of them that are anonymous: no file's, and not mapped as shared."""
    pages, shared = map(int, (process / "statm").read_text().split()[1:3])
    return pages * _PAGE_BYTES, (pages - shared) * _PAGE_BYTES
