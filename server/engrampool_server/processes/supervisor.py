"""The supervisor of `engrampool serve`: keeps several processes answering from one copy of the tables on one port.

It is a plain process with one thread and no gRPC in it, so that it can fork at any time: a child inherits the tables,
which stay one copy because nobody writes to them. (Files of credentials are looked at by another thread, see access.py,
which ends before a fork, or waits for a disk.) Which of them there are, and in which order they come, is serve.py's. A
child that ended, or that fell silent and was killed (see children.py), is replaced.
"""

import gc
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from engrampool_proto.errors import EngrampoolError
from engrampool_server.access.access import Access
from engrampool_server.answer.emulation import Emulation
from engrampool_server.answer.in_flight import InFlight, int64s
from engrampool_server.answer.lane.admission import Admission
from engrampool_server.answer.shared_state import SharedState, free_slot
from engrampool_server.config import ServerConfig
from engrampool_server.memory.preflight import OTHER_PROCESSES
from engrampool_server.ports import listen_on, reserve
from engrampool_server.processes.children import MAX_DELAY_S, Child, Children
from engrampool_server.processes.reports import Report, Reporter
from engrampool_server.processes.roll import Roll
from engrampool_server.processes.unix_path import UnixPath
from engrampool_server.processes.worker import answer
from engrampool_server.setting_kinds import split_address
from engrampool_server.telemetry import log
from engrampool_server.telemetry.exporter import Processes, Scrapes, export, resident_memory
from engrampool_server.telemetry.metrics import Metrics
from engrampool_server.telemetry.metrics_files import MetricsMemory, become

# Beyond drain_s, for a worker to end by itself.
_STOP_MARGIN_S = 5.0
LOBBY_DRAIN_S = 1.0
# For the registry to be told that this server leaves, before it does.
_LEAVE_S = 2.5
# In place of a worker's number.
EXPORTER, REGISTRAR, LOADER = -1, -2, -3
_T = TypeVar("_T")


class WorkerError(EngrampoolError):
    """A process of the server could not start, or ended before it was ready."""


class Supervisor:
    """Keeps processes. To be used as a context, in the main thread: at its end none is left.

    Workers are known by number, from 0, whoever the process is at the time.

    config: with the address that is listened on, once it is. shared: what each process has that is forked from now on.
    serving: whether all workers were ready once, and nobody said to stop. stopping: whether somebody did.
    kept: by number, in place of a worker's, what starts a process that is to be started again whenever it ends.
    said: called with a child and what it reports. not_inherited: sockets that children close.
    """

    def __init__(self, config: ServerConfig, memory: MetricsMemory) -> None:
        self.config, self._memory = config, memory
        self._pid = os.getpid()
        slots = config.workers + OTHER_PROCESSES
        self.metrics = Metrics()
        access = Access.of(config, self.metrics)
        emulation = Emulation.of(config.emulate)
        in_flight = InFlight(config.max_in_flight_bytes, slots)
        self.shared = SharedState(self.metrics, in_flight, access=access, emulation=emulation)
        self.metrics.emulated.labels(emulation.tier.name if emulation else "off").set(emulation is not None)
        if emulation is not None:
            tier = emulation.tier
            log.event("emulating", level="warning", tier=str(tier), sources=tier.sources, sure=tier.sure)
        log.count_dropped(self.metrics.log_dropped.inc)
        self._pids, self._inherited = int64s(slots), int64s(slots)
        self._processes = Processes(self._pid, self._pids, self._inherited)
        self.shared.metrics_of_all = lambda: chain(memory.collect(), self._processes.collect())
        self._ready_now = int64s(1)  # whether somebody answers lookups: 0 or 1
        self.children = Children(
            config.worker_timeout_s,
            signalled=self._signalled,
            said=self._heard,
            ended=self._ended,
            start=self.start,
            turned=self._turned,
        )
        self._workers: dict[int, Child] = {}
        self._roll = Roll(
            self._workers,
            self.children,
            hindered=lambda: "" if self.serving else "stopping" if self.stopping else "not serving yet",
            fork=self._fork_worker,
            stop=lambda child: self.stop(child, self.config.drain_s),
            replace=self._replace,
        )
        # Another with every change of the models that the next worker will have.
        self._generation = 0
        self._stop_begun_s = 0.0
        self._metrics_listener: socket.socket | None = None
        self._unix_path: UnixPath | None = None
        self._is_astray = False  # the path leads to nobody, and the log says so
        self.kept: dict[int, Callable[[], object]] = {}
        self.said: Callable[[Child, Report], None] = lambda child, report: None
        self.not_inherited: list[socket.socket] = []
        self.serving = self.stopping = False

    def __enter__(self) -> Self:
        self.children.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.children.__exit__(kind, error, trace)
        finally:
            if self.shared.admission is not None:
                self.shared.admission.close()
            if self._unix_path is not None:
                self._unix_path.close()

    # --- for whoever says which processes there are

    def listen(self) -> str:
        """Take all ports, and start the exporter. Gives the address of metrics. Raises ListenError."""
        for reason in ("died", "hung"):
            self.metrics.worker_restarts.labels(reason)
        # Kept, so that the port is ours for as long as we live.
        if self.config.listen.startswith("unix:"):
            self._unix_path = UnixPath(Path(self.config.listen.removeprefix("unix:")), len(self._pids))
            address = self._unix_path.address
        else:
            address, self._reserved = reserve(self.config.listen)
        self.config = replace(self.config, listen=address)
        self.shared.admission = Admission.open(self.config.lane, address)
        self._say_what_is_open()
        if self.config.metrics == "off":
            return "off"
        self._metrics_listener = listen_on(self.config.metrics, "metrics")
        self.kept[EXPORTER] = lambda: self.fork("exporter", EXPORTER, self._export)
        self.start(EXPORTER)
        return f"{split_address(self.config.metrics)[0]}:{self._metrics_listener.getsockname()[1]}"

    def start_lobby(self) -> Child:
        """Start the process that answers, in place of workers, that tables are still loading."""
        return self.fork("lobby", 0, lambda reporter: self._answer(reporter, serving=False))

    def start(self, index: int) -> None:
        """Start a worker, or one of those that are kept. Raises OSError before this server serves."""
        try:
            if index in self.kept:
                self.kept[index]()
            else:
                self._workers[index] = self._fork_worker(index)
        except OSError as error:
            if not self.serving:
                raise
            log.event("fork-failed", level="error", error=error.strerror)
            self.children.start_later(index)

    def fork(self, role: str, index: int, work: Callable[[Reporter], None]) -> Child:
        """Start a process that does `work`, and ends with it. Raises OSError."""
        slot = free_slot([child.slot for child in self.children])
        self.shared.access.settle()
        child = self.children.fork(role, index, slot, lambda reporter: self._live(role, index, slot, reporter, work))
        child.generation = self._generation
        self._inherited[slot] = resident_memory()[1]
        self._pids[slot] = child.pid
        return child

    def stop(self, child: Child, drain_s: float) -> None:
        """Have a process drain and end, and see to it that it does."""
        self.children.stop(child, drain_s + _STOP_MARGIN_S)

    def on_thread(self, work: Callable[[threading.Event], _T]) -> _T | None:
        """What `work` gives, while children and signals are looked after; None if the server is to stop.

        `work` is told so by the event. Raises what it raises.
        """
        # A roll forks.
        self.children.turn_until(lambda: self.stopping or not self._roll.under_way)
        if self.stopping:
            return None
        try:
            return self.children.on_thread(work, lambda: self.stopping)
        finally:
            if not self.stopping:
                self._roll.begin_queued()

    def freeze(self) -> None:
        """Have collections in the children leave what they inherit alone, and so shared."""
        gc.collect()
        gc.freeze()

    def ready_workers(self) -> int:
        """How many workers answer."""
        return sum(child.ready_s is not None for child in self._workers.values())

    def begin_serving(self) -> None:
        """Say from now on that lookups are answered, as they are."""
        self.serving = True
        self._show_serving()

    def renew(self) -> None:
        """Replace every worker that was forked before the models changed, until none of them is left."""
        self._generation += 1
        self._show_serving()
        if self.serving and not self.shared.models:
            log.event("nothing-held", level="error")
        gc.unfreeze()  # what a model was held by that is held no more
        self.freeze()

        def is_done() -> bool:
            workers = (child for child in self.children if child.role == "worker")
            return self.stopping or all(child.generation == self._generation for child in workers)

        while not is_done():
            self._roll.request()
            self.children.turn_until(lambda: self.stopping or not self._roll.under_way)
            self.children.turn_until(is_done, time.monotonic() + MAX_DELAY_S)

    def await_end(self) -> None:
        """Return once every process has ended, after a signal to stop."""
        self.children.turn_until(lambda: not self.children)
        log.event("stopped", drained_s=round(time.monotonic() - self._stop_begun_s, 3))

    # --- in children

    def _fork_worker(self, index: int) -> Child:
        return self.fork("worker", index, lambda reporter: self._answer(reporter, serving=True))

    def _live(self, role: str, index: int, slot: int, reporter: Reporter, work: Callable[[Reporter], None]) -> None:
        """What a child does."""
        become(str(slot))
        self.shared.in_flight.slot = slot
        self.shared.access.forked()
        for one in self.not_inherited:
            one.close()
        if role == "worker":
            log.of_worker(index)
        else:
            # Nothing that is withdrawn may stay in memory because of a process that has no use for it.
            self.shared.models.clear()
        work(reporter)

    def _answer(self, reporter: Reporter, *, serving: bool) -> None:
        if self._metrics_listener is not None:
            self._metrics_listener.close()
        config = self.config
        if self._unix_path is not None:
            config = replace(config, listen=self._unix_path.own(self.shared.in_flight.slot))
        if not serving:
            config = replace(config, drain_s=min(config.drain_s, LOBBY_DRAIN_S))
        answer(config, self.shared, reporter, serving=serving)

    def _export(self, reporter: Reporter) -> None:
        assert self._metrics_listener is not None
        reporter.ready()
        export(
            self._metrics_listener,
            self._memory,
            self._processes,
            lambda: bool(self._ready_now[0]),
            reporter.beat,
            reporter.beat_s,
            self._scrapes(),
        )

    def _scrapes(self) -> Scrapes:
        access, tls = self.shared.access, self.shared.access.metrics_tls

        def context() -> ssl.SSLContext | None:
            access.look()
            return None if tls is None else tls.value

        return Scrapes(context, access.may_scrape)

    # --- what children say, and what becomes of them

    def _heard(self, child: Child, report: Report) -> None:
        if report.ready and child.role == "worker":
            log.event("worker-ready", worker=child.index, pid=child.pid)
            self._roll.ready(child)
            self._show_workers()
        self.said(child, report)

    def _show_workers(self) -> None:
        self.metrics.workers.set(self.ready_workers())
        self._show_serving()

    def _show_serving(self) -> None:
        """Have Prometheus see whether health says SERVING: not where there is nothing to serve."""
        serving = self.serving and bool(self.shared.models)
        self.metrics.serving.set(serving)
        self._ready_now[0] = serving and self.ready_workers() > 0

    def _turned(self) -> None:
        # Also for those who are forked next: files may be damaged by then.
        self.shared.access.look_aside()
        self._point()

    def _say_what_is_open(self) -> None:
        """In the log: what a reader of the settings might take for protected, and is not."""
        config, access = self.config, self.shared.access
        over_tcp = self.shared.admission is not None and not self.shared.admission.unix_path
        if access.tls is not None and over_tcp and config.lane_tls == "off":
            text = "the direct lane is not encrypted: rows and row ids go over it in the clear (lane_tls = off)"
            log.event("in-the-clear", level="warning", what=text)
        if access.tls is None and access.callers is not None and not config.listen.startswith("unix:"):
            text = "tokens are asked for without TLS: whoever sees the network sees them (tls_cert, tls_key)"
            log.event("in-the-clear", level="warning", what=text)
        if access.tls is not None and config.direct == "auto" and config.lane == "off":
            log.event("no-direct-lane", why="there is none beside TLS by lane_tls = none; on has it inside TLS")

    def _point(self) -> None:
        """Have callers of a Unix socket reach a worker that answers, or the lobby while there is none.

        Where that cannot be, as in a directory that is gone or full, it is tried again at every turn.
        """
        if self._unix_path is None:
            return
        workers = [child for _, child in sorted(self._workers.items())]
        lobbies = [child for child in self.children if child.role == "lobby"]
        for child in (*workers, *lobbies):
            if child.ready_s is not None and child.kill_s is None:
                try:
                    self._unix_path.point(child.slot)
                except OSError as error:
                    if not self._is_astray:
                        why = error.strerror or str(error)
                        log.event("not-reachable", level="error", listen=self.config.listen, error=why)
                    self._is_astray = True
                else:
                    if self._is_astray:
                        log.event("reachable", listen=self.config.listen)
                    self._is_astray = False
                return

    def _ended(self, child: Child) -> None:
        self.shared.in_flight.clear(child.slot)
        self.shared.accounts.clear(child.slot)
        self._pids[child.slot] = 0
        self._memory.forget(str(child.slot))
        if current := self._workers.get(child.index) is child:
            del self._workers[child.index]
            self._show_workers()
        if child.role != "loader" and (child.kill_s is None or child.hung):
            log.event(
                "worker-died", level="error", worker=child.name, pid=child.pid, status=child.status, error=child.failure
            )
            if child.ready_s is None and not (self.serving or self.stopping):
                raise WorkerError(child.failure or f"{child.role} {child.pid} ended before it was ready: {child.why}")
        if self.stopping and child.role == "registrar":
            self._drain()
        elif self.stopping:
            self._let_exporter_go()
        elif not self._roll.ended(child) and (
            child.index in self.kept or (current and not self._roll.is_coming(child.index))
        ):
            self._replace(child)

    def _replace(self, child: Child) -> None:
        """Start another in place of one that ended."""
        if child.role == "worker":
            self.metrics.worker_restarts.labels("hung" if child.hung else "died").inc()
        self.children.start_again(child)

    # --- signals, and the end

    def _signalled(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._roll.request()
        else:
            self._stop_all(number.name)

    def _stop_all(self, reason: str) -> None:
        log.event("stopping", reason=reason)
        if self.stopping:  # for the second time
            for child in self.children:
                self.children.kill(child)
            return
        self.stopping, self.serving, self._stop_begun_s = True, False, time.monotonic()
        self._show_serving()
        self.children.start_none()
        self._roll.cancel()
        registrar = next((child for child in self.children if child.role == "registrar"), None)
        if registrar is None:
            self._drain()
        else:  # clients are to go elsewhere before they are refused
            self.children.stop(registrar, _LEAVE_S)

    def _drain(self) -> None:
        for child in self.children:
            if child.role != "exporter":
                self.stop(child, self.config.drain_s)
        self._let_exporter_go()

    def _let_exporter_go(self) -> None:
        """Once it is the last one: until then there is something to scrape."""
        if all(child.role == "exporter" for child in self.children):
            for child in self.children:
                self.children.kill(child)
