"""What Prometheus sees. docs/METRICS.md is made of this; the dashboards and their tests read metrics by these names."""

import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Literal

import numpy as np
import numpy.typing as npt
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from engrampool_proto import __version__
from engrampool_server.telemetry.counts import Count, Counted, Level, SharedCount, SharedTimes, Times

# A lookup takes 0.1 ms to 100 ms; prometheus_client's own buckets begin at 5 ms.
_SECONDS = (50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2e-3, 3e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.25, 1.0, 5.0)
# A `_created` series beside every counter and bucket set doubles a scrape and is read by nobody.
disable_created_metrics()  # type: ignore[no-untyped-call]
_CALL = ("grpc_type", "grpc_service", "grpc_method")
# Of these every series stays for ever in shared memory, that of a version withdrawn as 0.
INFO = ("engrampool_model_info", "engrampool_part_info")
# How often a process that answers flushes what it counted: so much is lost of one that is killed.
FLUSH_S = 0.25
# Why the direct lane cuts connections off.
CUT_REASONS = ("no-hello", "handshake", "stranger", "slow-request", "unread-answer", "failed", "revoked")

# Files that callers are let in by: certificates and their key, and who may call.
CREDENTIALS = ("tls", "tokens")


class Metrics:
    """The server's metrics, in a registry of their own so that several servers can live in one process.

    Of a server that is several processes, each writes its own; see metrics_files.py.
    What every call counts in is not seen there before `flush`; a collection of the registry has all of it.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._counted: list[Counted[Count] | Counted[Times] | Counted[Level]] = []
        self.started = self._counter("grpc_server_started", "Calls started.", _CALL)
        self.handled = self._counter("grpc_server_handled", "Calls ended, by code.", (*_CALL, "grpc_code"))
        self.received = self._counter("grpc_server_msg_received", "Messages received.", _CALL)
        self.sent = self._counter("grpc_server_msg_sent", "Messages sent; a stream has several.", _CALL)
        self.handling = self._seconds("grpc_server_handling_seconds", "From a call's start to its end.", _CALL)
        table = ("model", "layer")
        method = ("model", "method")
        self.rows = self._counter("engrampool_lookup_rows", "Rows answered.", table)
        self.bytes = self._counter("engrampool_lookup_bytes", "Bytes of rows answered.", table)
        self.lookup = self._seconds(
            "engrampool_lookup_seconds",
            "From a lookup's arrival until its answer was handed to gRPC, or to the system for the method Direct.",
            method,
        )
        self.queue = self._seconds(
            "engrampool_lookup_queue_seconds",
            "Of engrampool_lookup_seconds, from arrival to the start of work.",
            method,
        )
        self.gather = self._seconds(
            "engrampool_lookup_gather_seconds",
            "Of engrampool_lookup_seconds, hashing (if the server did) and copying rows; what is left is sending.",
            method,
        )
        self.refused = self._counter("engrampool_refused", "Calls refused; PROTOCOL.md has the reasons.", ("reason",))
        self.in_flight = self._level(
            "engrampool_in_flight_bytes", "Large requests, and answers being worked on or sent, that are in memory."
        )
        self.in_flight_limit = self._gauge(
            "engrampool_in_flight_limit_bytes",
            "Bound of engrampool_in_flight_bytes: the setting max_in_flight_bytes.",
            mode="livemax",
        )
        self.direct_lookups = self._counter(
            "engrampool_direct_lookups",
            "Lookups over the direct lane that ended, and its connections that were refused, by gRPC's codes.",
            ("code",),
        )
        self.direct_connections = self._gauge("engrampool_direct_connections", "Open connections of the direct lane.")
        self.direct_cut = self._counter(
            "engrampool_direct_cut",
            "Connections of the direct lane that were cut off: no-hello, handshake (no TLS), stranger (no hello "
            "yet, and others came), slow-request, unread-answer, failed (a fault of the server's; the log has it).",
            ("reason",),
        )
        for reason in CUT_REASONS:  # which are all there are
            self.direct_cut.labels(reason)
        self.slow = Counter(
            "engrampool_slow_lookups",
            "Lookups that took longer than the setting slow_lookup_s, by the hop that took most of it: queue, gather, "
            "send.",
            ("hop",),
            registry=registry,
        )
        for hop in ("queue", "gather", "send"):
            self.slow.labels(hop)
        self.table_bytes = self._gauge(
            "engrampool_table_bytes", "Rows held in memory, of a shard those of its part.", table
        )
        self.table_rows = self._gauge("engrampool_table_rows", "Rows held in memory.", table)
        self.node_share = self._gauge(
            "engrampool_table_node_share", "Share of a table's pages, by node of memory.", (*table, "node")
        )
        self.load_seconds = self._gauge("engrampool_load_seconds", "Time that loading took.", ("model",))
        self.loaded_bytes = Counter(
            "engrampool_loaded_bytes", "Tables read and checked, or adopted, so far.", registry=registry
        )
        self.to_load_bytes = self._gauge(
            "engrampool_to_load_bytes", "All rows that were to be read so far, of versions that are gone, too."
        )
        self.serving = self._gauge("engrampool_serving", "1 while health says SERVING, else 0.")
        self.workers = self._gauge("engrampool_workers", "Worker processes that answer lookups.")
        self.worker_restarts = Counter(
            "engrampool_worker_restarts", "Workers replaced because they died or hung.", ("reason",), registry=registry
        )
        self.credentials_damaged = Counter(
            "engrampool_credentials_damaged",
            "Times that changed files of callers or certificates were of no use, so that the last good ones stayed.",
            ("file",),
            registry=registry,
        )
        self.credentials_stale = self._gauge(
            "engrampool_credentials_stale",
            "1 while files of callers or certificates are of no use, and the last good ones are in force.",
            ("file",),
            mode="livemax",
        )
        for file in CREDENTIALS:
            self.credentials_damaged.labels(file)
            self.credentials_stale.labels(file)
        self.log_dropped = Counter(
            "engrampool_log_dropped_lines", "Lines of the log that nobody took in time.", registry=registry
        )
        self._answered: dict[tuple[str, str], tuple[Times, Times, Times]] = {}
        self._tables: dict[tuple[str, int], tuple[Count, Count]] = {}
        self._direct_times: dict[str, npt.NDArray[np.int64]] = {}
        self._direct_rows: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
        self.model_info = self._gauge(
            "engrampool_model_info", "Models held; always 1.", ("model", "version", "spec_digest")
        )
        self.part_info = self._gauge(
            "engrampool_part_info",
            "The shard of each model that is held, as the setting shard names it; always 1.",
            ("model", "version", "shard"),
        )
        self.versions = self._gauge(
            "engrampool_versions",
            "Versions that are to be held (published), are (held), could not be loaded (failed), and that the registry "
            "lost, or had as retired when it was first seen (unpublished).",
            ("state",),
        )
        self.registry_age = self._gauge(
            "engrampool_registry_age_seconds",
            "Since the registry last answered, across a restart where there is a registry_cache; 0 without a registry.",
        )
        self.unregistered = self._gauge(
            "engrampool_unregistered", "1 while the registry does not take what this server holds, else 0."
        )
        self.emulated = self._gauge("engrampool_emulated_tier", "1 where memory is emulated, else 0.", ("tier",))
        build = ("version", "python_version", "grpc_version")
        self._gauge("engrampool_build_info", "Always 1.", build).labels(
            __version__, platform.python_version(), version("grpcio")
        ).set(1)

    def _gauge(
        self, name: str, text: str, labels: tuple[str, ...] = (), mode: Literal["livesum", "livemax"] = "livesum"
    ) -> Gauge:
        """mode: what becomes of the values of several processes; most gauges are set by one, and 0 elsewhere."""
        return Gauge(name, text, labels, registry=self.registry, multiprocess_mode=mode)

    def answered(
        self,
        model: str,
        method: str,
        rows: Iterable[tuple[int, int, int]],
        queue_s: float,
        gather_s: float,
        total_s: float,
    ) -> None:
        """Count a lookup that was answered. rows: (layer, rows, bytes) of each table."""
        # Finding a metric by its labels is dear beside a small lookup, so what was found is kept.
        times = self._answered.get((model, method))
        if times is None:
            times = (
                self.lookup.labels(model, method),
                self.queue.labels(model, method),
                self.gather.labels(model, method),
            )
            self._answered[model, method] = times
        for metric, seconds in zip(times, (total_s, queue_s, gather_s), strict=True):
            metric.observe(seconds)
        for layer, count, nbytes in rows:
            table = self._tables.get((model, layer))
            if table is None:
                table = (self.rows.labels(model, str(layer)), self.bytes.labels(model, str(layer)))
                self._tables[model, layer] = table
            table[0].inc(count)
            table[1].inc(nbytes)

    @property
    def buckets_us(self) -> npt.NDArray[np.float64]:
        """The bounds of all buckets of times, in microseconds."""
        return np.round(np.array(_SECONDS) * 1e6)

    def times_of_direct(self, model: str) -> npt.NDArray[np.int64]:
        """Where compiled code counts a model's lookups over the direct lane: int64 [3, 2 + bounds].

        The time before work began, that for rows, and the total; each as of SharedTimes.
        """
        cells = self._direct_times.get(model)
        if cells is None:
            cells = self._direct_times[model] = np.zeros((3, 2 + len(_SECONDS)), np.int64)
            for metric, row in zip((self.queue, self.gather, self.lookup), cells, strict=True):
                metric.share(SharedTimes, row, model, "Direct")
        return cells

    def rows_of_direct(self, model: str, layer: int) -> npt.NDArray[np.int64]:
        """Where it counts rows and bytes of a table: int64 [2]."""
        cells = self._direct_rows.get((model, layer))
        if cells is None:
            cells = self._direct_rows[model, layer] = np.zeros(2, np.int64)
            self.rows.share(SharedCount, cells[:1], model, str(layer))
            self.bytes.share(SharedCount, cells[1:], model, str(layer))
        return cells

    def answers_of_direct(self) -> npt.NDArray[np.int64]:
        """Where it counts lookups that were answered: int64 [1]."""
        cells = np.zeros(1, np.int64)
        self.direct_lookups.share(SharedCount, cells, "OK")
        return cells

    def flush(self) -> None:
        """Have Prometheus see what was counted by now. From any thread."""
        for metric in self._counted:
            metric.flush()

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counted[Count]:
        metric = Counted(self.registry, Counter(name, text, labels, registry=None), Count)
        self._counted.append(metric)
        return metric

    def _seconds(self, name: str, text: str, labels: tuple[str, ...]) -> Counted[Times]:
        histogram = Histogram(name, text, labels, registry=None, buckets=_SECONDS)
        metric = Counted(self.registry, histogram, Times)
        self._counted.append(metric)
        return metric

    def _level(self, name: str, text: str) -> Level:
        gauge = Gauge(name, text, registry=None, multiprocess_mode="livesum")
        metric = Counted(self.registry, gauge, Level)
        self._counted.append(metric)
        return metric.labels()
