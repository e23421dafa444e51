"""`engrampool serve`: loads the tables once, and keeps several processes answering from them on one port.

The supervisor is a plain process with one thread and no gRPC in it, so that it can fork at any time: a child inherits
the tables, which stay one copy because nobody writes to them. It starts

- the exporter, which answers Prometheus, and the lobby, which answers that tables are still loading;
- once they are loaded, the workers, in whose favour the lobby leaves.

With a registry, versions of models come and go while it runs. The registrar says which are wanted. A loader, one at a
time, fills the segments of the next, which are adopted here; then the workers are replaced, one after the other, as
each has what was there when it was forked. The registry is told that a version is held after that, and that it is not
before it goes.

A child that ended, or that fell silent and was killed (see children.py), is replaced.
"""

import gc
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from engrampool_proto import __version__
from engrampool_proto.errors import EngrampoolError
from engrampool_proto.registry.etcd import Held, Member, Published, require_etcd3gw
from engrampool_server import jit
from engrampool_server.answer.in_flight import InFlight, int64s
from engrampool_server.answer.known import Key, Known
from engrampool_server.answer.lane.entrance import Entrance
from engrampool_server.answer.shared import Shared, free_slot
from engrampool_server.config import ServerConfig
from engrampool_server.memory.load import Holdings, require_segments, show
from engrampool_server.memory.preflight import OTHER_PROCESSES, require_address_space
from engrampool_server.memory.tables import HeldModel
from engrampool_server.ports import listen_on, reserve
from engrampool_server.processes.children import MAX_DELAY_S, Child, Children
from engrampool_server.processes.link import Link, Report
from engrampool_server.processes.loader import LoadError, adopt, become_loader, discard
from engrampool_server.processes.registrar import Cache, register
from engrampool_server.processes.unix_gate import UnixGate
from engrampool_server.processes.versions_held import VersionsHeld
from engrampool_server.processes.worker import answer
from engrampool_server.setting_kinds import split_address
from engrampool_server.telemetry import log
from engrampool_server.telemetry.exporter import Processes, export, resident_memory
from engrampool_server.telemetry.metrics import Metrics
from engrampool_server.telemetry.metrics_files import SUPERVISOR, MetricsMemory, become

# Beyond drain_s, for a worker to end by itself.
_STOP_MARGIN_S = 5.0
_LOBBY_DRAIN_S = 1.0
# For the registry to be told that this server leaves, before it does.
_LEAVE_S = 2.5
# For the log to be taken, at the end.
_LAST_LINES_S = 1.0
# Of why a version could not be loaded, for the registry.
_REASON_CHARS = 500
# In place of a worker's number.
_EXPORTER, _REGISTRAR, _LOADER = -1, -2, -3
_T = TypeVar("_T")


class WorkerError(EngrampoolError):
    """A process of the server could not start, or ended before it was ready."""


def supervise(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain and stop. SIGHUP replaces every worker, one after the other.

    Raises ConfigError, ListenError, PreflightError, TableFileError, OutOfMemoryError, WorkerError, RegistryError;
    nothing is left running then.
    """
    log.event("starting", version=__version__, models=[str(path) for path in config.models])
    jit.require_compiler()
    require_address_space(config.max_in_flight_bytes)
    reason = jit.not_kept()
    if reason is not None:
        log.event("kernels-not-kept", level="warning", reason=reason)
    memory = MetricsMemory()
    try:
        memory.use(SUPERVISOR)
        _Supervisor(config, memory).run()
    finally:
        log.count_dropped(lambda lines: None)
        log.tend(_LAST_LINES_S)
        memory.close()


class _Supervisor:
    """Workers are known by number, from 0, whoever the process is at the time."""

    def __init__(self, config: ServerConfig, memory: MetricsMemory) -> None:
        self._config, self._memory = config, memory
        self._pid = os.getpid()
        slots = config.workers + OTHER_PROCESSES
        self._shared = Shared(Metrics(), InFlight(config.max_in_flight_bytes, slots))
        self._metrics = self._shared.metrics
        log.count_dropped(self._metrics.log_dropped.inc)
        self._pids, self._inherited = int64s(slots), int64s(slots)
        self._ready_now = int64s(1)  # whether somebody answers lookups: 0 or 1
        self._children = Children(
            config.worker_timeout_s,
            signalled=self._signalled,
            said=self._said,
            ended=self._ended,
            start=self._start,
            turned=self._point,
        )
        self._workers: dict[int, Child] = {}
        # Of a rolling restart: those still to be replaced, the one that is to take over next, the one that leaves.
        self._to_roll: deque[int] = deque()
        self._successor: Child | None = None
        self._leaving: Child | None = None
        self._rolling = self._roll_again = False
        self._roll_begun_s = self._stop_begun_s = 0.0
        # Another with every change of the models that the next worker will have.
        self._generation = 0
        self._versions = VersionsHeld()
        self._known: Known | None = None
        # Of each version that came by the registry, how long loading it took, and whether it is a patch.
        self._loads: dict[Key, tuple[float, bool]] = {}
        self._orders: socket.socket | None = None
        self._metrics_listener: socket.socket | None = None
        self._gate: UnixGate | None = None
        self._is_astray = False  # the gate leads to nobody, and the log says so
        self._serving = self._stopping = False

    def run(self) -> None:
        """The whole life."""
        try:
            with self._children:
                self._serve()
                self._children.turn_until(lambda: not self._children)
                log.event("stopped", drained_s=round(time.monotonic() - self._stop_begun_s, 3))
        finally:
            if self._shared.entrance is not None:
                self._shared.entrance.close()
            if self._gate is not None:
                self._gate.close()

    def _serve(self) -> None:
        """From the first look at the models until a signal to stop."""
        config = self._config
        others: tuple[Key, ...] | None = ()
        if config.registry != "off":
            require_etcd3gw(config.registry)
            require_segments(config.memory)
            if (cache := self._cache()) is not None:
                cache.check()
            others = None
        holdings = Holdings(config, self._metrics, config.workers, others)
        try:
            self._on_thread(lambda _: holdings.open())  # which may wait for a disk, or a store
            if self._stopping:
                return
            metrics = self._listen()
            lobby = self._fork("lobby", 0, lambda link: self._answer(link, serving=False))
            self._children.turn_until(lambda: self._stopping or lobby.ready_s is not None)
            if self._stopping:
                return
            log.event("listening", listen=self._config.listen, metrics=metrics)
            for model in self._on_thread(lambda cancel: list(holdings.load(cancel))) or ():
                self._shared.hold(model)
        finally:
            holdings.close()
        self._versions = VersionsHeld([_key(model) for model in self._shared.models])
        self._register()
        if config.registry != "off" and not self._stopping:
            self._start(_REGISTRAR)
            if not self._shared.models:  # else there is something to serve, whatever the registry says
                # What only has to be loaded is not to be refused as unknown.
                self._follow(lambda: bool(self._shared.models) and self._versions.is_settled(time.monotonic()))
        if self._stopping:
            return
        self._freeze()
        for index in range(config.workers):
            self._start(index)
        self._children.turn_until(lambda: self._stopping or self._ready_workers() == config.workers)
        self._stop(lobby, _LOBBY_DRAIN_S)
        self._children.turn_until(lambda: self._stopping or lobby not in self._children)
        if self._stopping:
            return
        self._serving = True
        self._show_serving()
        log.event("serving", listen=self._config.listen, metrics=metrics)
        self._register()
        self._follow(lambda: False)

    def _freeze(self) -> None:
        """Have collections in the children leave what they inherit alone, and so shared."""
        gc.collect()
        gc.freeze()

    def _listen(self) -> str:
        """Take all ports, and start the exporter. Returns the address of metrics."""
        for reason in ("died", "hung"):
            self._metrics.worker_restarts.labels(reason)
        # Kept, so that the port is ours for as long as we live.
        if self._config.listen.startswith("unix:"):
            self._gate = UnixGate(Path(self._config.listen.removeprefix("unix:")), len(self._pids))
            address = self._gate.address
        else:
            address, self._reserved = reserve(self._config.listen)
        self._config = replace(self._config, listen=address)
        self._shared.entrance = Entrance.open(self._config.direct, address)
        if self._config.metrics == "off":
            return "off"
        self._metrics_listener = listen_on(self._config.metrics, "metrics")
        self._start(_EXPORTER)
        return f"{split_address(self._config.metrics)[0]}:{self._metrics_listener.getsockname()[1]}"

    def _on_thread(self, work: Callable[[threading.Event], _T]) -> _T | None:
        """What `work` gives, while children and signals are looked after; None if the server is to stop.

        `work` is told so by the event. Raises what it raises.
        """
        # A roll forks.
        self._children.turn_until(lambda: self._stopping or not self._rolling)
        if self._stopping:
            return None
        try:
            return self._children.on_thread(work, lambda: self._stopping)
        finally:
            if self._roll_again and not self._stopping:
                self._roll_again = False
                self._roll()

    # --- children

    def _start(self, index: int) -> None:
        """Start a worker, the exporter or the registrar."""
        try:
            if index == _EXPORTER:
                self._fork("exporter", index, self._export)
            elif index == _REGISTRAR:
                self._start_registrar()
            else:
                self._workers[index] = self._fork("worker", index, lambda link: self._answer(link, serving=True))
        except OSError as error:
            if not self._serving:
                raise
            log.event("fork-failed", level="error", error=error.strerror)
            self._children.start_later(index)

    def _answer(self, link: Link, *, serving: bool) -> None:
        if self._metrics_listener is not None:
            self._metrics_listener.close()
        config = self._config
        if self._gate is not None:
            config = replace(config, listen=self._gate.own(self._shared.in_flight.slot))
        if not serving:
            config = replace(config, drain_s=min(config.drain_s, _LOBBY_DRAIN_S))
        answer(config, self._shared, link, serving=serving)

    def _export(self, link: Link) -> None:
        assert self._metrics_listener is not None
        processes = Processes(self._pid, self._pids, self._inherited)
        link.ready()
        export(
            self._metrics_listener, self._memory, processes, lambda: bool(self._ready_now[0]), link.beat, link.beat_s
        )

    def _cache(self) -> Cache | None:
        config = self._config
        return None if config.registry_cache == "off" else Cache(Path(config.registry_cache), config.registry)

    def _start_registrar(self) -> None:
        config, cache = self._config, self._cache()
        if self._orders is not None:
            self._orders.close()
        # Each message is taken as a whole, or not at all.
        self._orders, orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.setblocking(False)
        with orders:
            self._fork(
                "registrar",
                _REGISTRAR,
                lambda link: register(
                    config.registry, cache, self._address, orders, self._metrics, link, known=self._known
                ),
            )
        self._register()

    def _fork(self, role: str, index: int, work: Callable[[Link], None]) -> Child:
        slot = free_slot([child.slot for child in self._children])
        child = self._children.fork(role, index, slot, lambda link: self._live(role, index, slot, link, work))
        child.generation = self._generation
        self._inherited[slot] = resident_memory()[1]
        self._pids[slot] = child.pid
        return child

    def _live(self, role: str, index: int, slot: int, link: Link, work: Callable[[Link], None]) -> None:
        """What a child does."""
        become(str(slot))
        self._shared.in_flight.slot = slot
        if self._orders is not None:
            self._orders.close()
        if role == "worker":
            log.of_worker(index)
        else:
            # Nothing that is withdrawn may stay in memory because of a process that has no use for it.
            self._shared.models.clear()
        work(link)

    def _said(self, child: Child, report: Report) -> None:
        if report.ready and child.role == "worker":
            self._ready(child)
        if report.loaded is not None:
            # A counter goes on only.
            nbytes, of_bytes = max(report.loaded[0], child.loaded_bytes), report.loaded[1]
            self._metrics.loaded_bytes.inc(nbytes - child.loaded_bytes)
            self._metrics.to_load_bytes.inc(of_bytes - child.of_bytes)
            child.loaded_bytes, child.of_bytes = nbytes, of_bytes
        if report.known is not None:
            self._learn(report.known)

    def _ready(self, child: Child) -> None:
        log.event("worker-ready", worker=child.index, pid=child.pid)
        if child is self._successor:
            self._successor = None
            self._leaving = self._workers.get(child.index)
            self._workers[child.index] = child
            if self._leaving is not None:
                self._stop(self._leaving, self._config.drain_s)
            else:
                self._roll_next()
        self._show_workers()

    def _show_workers(self) -> None:
        self._metrics.workers.set(self._ready_workers())
        self._show_serving()

    def _show_serving(self) -> None:
        """Have Prometheus see whether health says SERVING: not where there is nothing to serve."""
        serving = self._serving and bool(self._shared.models)
        self._metrics.serving.set(serving)
        self._ready_now[0] = serving and self._ready_workers() > 0

    def _point(self) -> None:
        """Have callers of a Unix socket reach a worker that answers, or the lobby while there is none.

        Where that cannot be, as in a directory that is gone or full, it is tried again at every turn.
        """
        if self._gate is None:
            return
        workers = [child for _, child in sorted(self._workers.items())]
        lobbies = [child for child in self._children if child.role == "lobby"]
        for child in (*workers, *lobbies):
            if child.ready_s is not None and child.kill_s is None:
                try:
                    self._gate.point(child.slot)
                except OSError as error:
                    if not self._is_astray:
                        why = error.strerror or str(error)
                        log.event("not-reachable", level="error", listen=self._config.listen, error=why)
                    self._is_astray = True
                else:
                    if self._is_astray:
                        log.event("reachable", listen=self._config.listen)
                    self._is_astray = False
                return

    def _ready_workers(self) -> int:
        return sum(child.ready_s is not None for child in self._workers.values())

    def _stop(self, child: Child, drain_s: float) -> None:
        self._children.stop(child, drain_s + _STOP_MARGIN_S)

    def _signalled(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._roll()
        else:
            self._stop_all(number.name)

    def _stop_all(self, reason: str) -> None:
        log.event("stopping", reason=reason)
        if self._stopping:  # for the second time
            for child in self._children:
                self._children.kill(child)
            return
        self._stopping, self._serving, self._stop_begun_s = True, False, time.monotonic()
        self._show_serving()
        self._children.start_none()
        self._to_roll.clear()
        registrar = next((child for child in self._children if child.role == "registrar"), None)
        if registrar is None:
            self._drain()
        else:  # clients are to go elsewhere before they are refused
            self._children.stop(registrar, _LEAVE_S)

    def _drain(self) -> None:
        for child in self._children:
            if child.role != "exporter":
                self._stop(child, self._config.drain_s)
        self._let_exporter_go()

    def _let_exporter_go(self) -> None:
        """Once it is the last one: until then there is something to scrape."""
        if all(child.role == "exporter" for child in self._children):
            for child in self._children:
                self._children.kill(child)

    def _ended(self, child: Child) -> None:
        self._shared.in_flight.clear(child.slot)
        self._pids[child.slot] = 0
        self._memory.forget(str(child.slot))
        if current := self._workers.get(child.index) is child:
            del self._workers[child.index]
            self._show_workers()
        if child.role != "loader" and (child.kill_s is None or child.hung):
            log.event(
                "worker-died", level="error", worker=child.name, pid=child.pid, status=child.status, error=child.failure
            )
            if child.ready_s is None and not (self._serving or self._stopping):
                raise WorkerError(child.failure or f"{child.role} {child.pid} ended before it was ready: {child.why}")
        if self._stopping and child.role == "registrar":
            self._drain()
        elif self._stopping:
            self._let_exporter_go()
        elif child is self._leaving:
            self._leaving = None
            self._roll_next()
        elif child is self._successor:
            self._roll_failed(child)
        elif child.role in ("exporter", "registrar") or (current and not self._is_coming(child.index)):
            self._replace(child)

    def _is_coming(self, index: int) -> bool:
        return self._successor is not None and self._successor.index == index

    def _replace(self, child: Child) -> None:
        """Start another in place of one that ended."""
        if child.role == "worker":
            self._metrics.worker_restarts.labels("hung" if child.hung else "died").inc()
        self._children.start_again(child)

    # --- versions

    @property
    def _address(self) -> str:
        """Where clients reach this server."""
        return self._config.listen if self._config.advertise == "auto" else self._config.advertise

    def _learn(self, known: Known) -> None:
        """Take note of what is to be held now, and of what clients read, as the registrar has it."""
        before, self._known = self._known, known
        if self._versions.want(known.published.values()):
            log.event("published", versions=[f"{model} {version}" for model, version in known.published])
        elif before is not None and before.active == known.active:
            return
        self._shared.mark_active(known.active)
        self._register()

    def _follow(self, done: Callable[[], bool]) -> None:
        """Hold what is wanted, one step after the other, until `done` or a signal to stop."""
        versions = self._versions

        def has_step() -> bool:
            return bool(versions.to_drop()) or versions.to_load(time.monotonic()) is not None

        while not (self._stopping or done()):
            coming = versions.to_load(time.monotonic())
            if gone := versions.to_drop():
                self._withdraw(gone)
            elif coming is not None:
                self._add(coming)
            else:
                self._children.turn_until(lambda: self._stopping or done() or has_step(), versions.due_s())

    def _add(self, published: Published) -> None:
        """Hold a version, and tell of it once every worker does. If it cannot be held, everything else goes on."""
        key = (published.model, published.version)
        begin_s = time.monotonic()
        try:
            held = self._load(published)
        except WorkerError:
            raise
        except Exception as error:
            why = str(error) if isinstance(error, EngrampoolError) else repr(error)
            log.event("version-failed", level="error", model=key[0], version=key[1], error=why)
            self._versions.could_not_load(key, why, time.monotonic())
            held = None
            self._discard([])
        if held is not None:
            seconds = time.monotonic() - begin_s
            self._loads[key] = (seconds, published.base is not None)
            show(self._metrics, held, seconds, is_patch=published.base is not None)
            self._shared.hold(held)
            self._shared.mark_active(self._known.active if self._known else {})
            self._renew()
            self._versions.loaded(key)
            log.event("version-held", model=key[0], version=key[1], seconds=round(time.monotonic() - begin_s, 3))
        self._register()

    def _load(self, published: Published) -> HeldModel | None:
        """A version in memory; None if the server is to stop, or the version is wanted no more."""
        if published.base is not None:
            return self._on_thread(lambda cancel: self._adopt(published, cancel))
        others = {*self._versions.published, *map(_key, self._shared.models)}
        loader = self._fork("loader", _LOADER, lambda link: become_loader(published, self._config, others, link))

        def is_wanted() -> bool:
            return not self._stopping and self._versions.wants(published)

        try:
            self._children.turn_until(
                lambda: not is_wanted() or loader.ready_s is not None or loader not in self._children
            )
            if not is_wanted():
                return None
            if loader.ready_s is None:
                raise LoadError(loader.failure or f"its loader {loader.pid} ended: {loader.why}")
            return self._on_thread(lambda cancel: self._adopt(published, cancel))
        finally:
            if loader.ready_s is None:  # what it did not come to is not to be loaded any more
                self._metrics.to_load_bytes.dec(loader.of_bytes - loader.loaded_bytes)
            if loader in self._children:
                self._children.kill(loader)
            self._children.turn_until(lambda: loader not in self._children)

    def _adopt(self, published: Published, cancel: threading.Event) -> HeldModel:
        def progress(nbytes: int) -> None:
            self._metrics.to_load_bytes.inc(nbytes)
            self._metrics.loaded_bytes.inc(nbytes)

        return adopt(published, self._config, self._shared.models, cancel, progress)

    def _withdraw(self, gone: list[Key]) -> None:
        """Hold these versions no more: tell of it, have workers without them, and free their memory."""
        self._versions.dropped(gone)
        self._register()
        for model in self._shared.models:
            if _key(model) in gone:
                seconds, is_patch = self._loads.pop(_key(model))
                show(self._metrics, model, seconds, is_patch=is_patch, sign=-1)
        del model  # or its memory would stay
        self._shared.drop(gone)
        self._renew()
        self._discard(gone)
        log.event("version-withdrawn", versions=[f"{model} {version}" for model, version in gone])

    def _renew(self) -> None:
        """Replace every worker that was forked before the models changed, until none of them is left."""
        self._generation += 1
        self._show_serving()
        if self._serving and not self._shared.models:
            log.event("nothing-held", level="error")
        gc.unfreeze()  # what a model was held by that is held no more
        self._freeze()

        def is_done() -> bool:
            workers = (child for child in self._children if child.role == "worker")
            return self._stopping or all(child.generation == self._generation for child in workers)

        while not is_done():
            self._roll()
            self._children.turn_until(lambda: self._stopping or not self._rolling)
            self._children.turn_until(is_done, time.monotonic() + MAX_DELAY_S)

    def _discard(self, versions: list[Key]) -> None:
        """Free the segments of what is held no more, and of loads that came to nothing."""
        try:
            self._on_thread(lambda _: discard(self._config.memory, versions))
        except (EngrampoolError, OSError) as error:
            log.event("not-freed", level="warning", error=str(error))

    def _register(self) -> None:
        """Have metrics, and the registry once this server serves, say what is held."""
        versions = self._versions
        counts = {"published": versions.published, "held": versions.held, "failed": versions.failed}
        for state, of_state in counts.items():
            self._metrics.versions.labels(state).set(len(of_state))
        if self._orders is None or not self._serving:
            return
        held = tuple(
            Held(*_key(model), {layer: (table.row_start, table.row_stop) for layer, table in model.tables.items()})
            for model in self._shared.models
            if _key(model) in versions.held
        )
        failed = {version: why[:_REASON_CHARS] for (_, version), why in versions.failed.items()}
        try:
            active = self._known.active if self._known else {}
            self._orders.send(Member(self._address, held, failed, active).to_json())
        except ConnectionError:
            pass  # it ended, and the next one is told at its start
        except OSError as error:
            log.event("not-registered", level="error", error=error.strerror)

    # --- rolling restart

    def _roll(self) -> None:
        if not self._serving:
            log.event("roll-ignored", reason="stopping" if self._stopping else "not serving yet")
        elif self._rolling or self._children.has_thread:
            self._roll_again = True
            log.event("roll-queued")
        else:
            self._rolling, self._roll_begun_s = True, time.monotonic()
            self._to_roll.extend(sorted(self._workers))
            log.event("rolling", workers=len(self._to_roll))
            self._roll_next()

    def _roll_next(self) -> None:
        """Start the successor of the next worker; see `_ready` for what becomes of the two."""
        while self._to_roll:
            index = self._to_roll.popleft()
            if index in self._workers:  # else it ended meanwhile, and is replaced anyway
                try:
                    self._successor = self._fork("worker", index, lambda link: self._answer(link, serving=True))
                except OSError as error:
                    log.event("fork-failed", level="error", error=error.strerror)
                    break
                return
        else:
            log.event("rolled", seconds=round(time.monotonic() - self._roll_begun_s, 3))
        self._end_roll()

    def _roll_failed(self, successor: Child) -> None:
        """The successor ended before it was ready: whoever is left of the old ones goes on."""
        log.event("roll-failed", level="error", worker=successor.index)
        if successor.index not in self._workers:
            self._replace(successor)
        self._end_roll()

    def _end_roll(self) -> None:
        self._to_roll.clear()
        self._successor, self._rolling = None, False
        if self._roll_again:
            self._roll_again = False
            self._roll()


def _key(model: HeldModel) -> Key:
    return model.spec.name, model.version
