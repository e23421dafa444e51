"""`engrampool serve`: loads the tables once, and keeps several processes answering from them on one port.

The supervisor is a plain process with one thread and no gRPC in it, so that it can fork at any time: a child inherits
the tables, which stay one copy because nobody writes to them. It starts

- the exporter, which answers Prometheus, and the lobby, which answers that tables are still loading;
- once they are loaded, the workers, in whose favour the lobby leaves.

With a registry, versions of models come and go while it runs. The registrar says which are wanted. A loader, one at a
time, fills the segments of the next, which are adopted here; then the workers are replaced, one after the other, as
each has what was there when it was forked. The registry is told that a version is held after that, and that it is not
before it goes.

Each child has a pipe on which it gives signs of life. One that ended or fell silent is replaced.
"""

import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import NoReturn, TypeVar

from engrampool_proto import __version__
from engrampool_proto.errors import EngrampoolError
from engrampool_proto.registry import Held, Member, Published
from engrampool_server import jit, log
from engrampool_server.config import ServerConfig
from engrampool_server.entrance import Entrance
from engrampool_server.exporter import Processes, export, resident_memory
from engrampool_server.holdings import Holdings, require_segments, show
from engrampool_server.loader import LoadError, adopt, become_loader, discard
from engrampool_server.metrics import Metrics
from engrampool_server.metrics_files import MetricsDirectory, become
from engrampool_server.ports import listen_on, reserve
from engrampool_server.preflight import OTHER_PROCESSES
from engrampool_server.registrar import Cache, register, require_etcd3gw
from engrampool_server.setting_kinds import split_address
from engrampool_server.shared import InFlight, Shared, free_slot, int64s
from engrampool_server.tables import HeldModel
from engrampool_server.versions_held import Key, VersionsHeld
from engrampool_server.worker import Link, answer

_BEAT_S = 1.0
# Between a fork and the first answer.
_START_TIMEOUT_S = 60.0
# Beyond drain_s, for a worker to end by itself.
_STOP_MARGIN_S = 5.0
_LONGEST_WAIT_S = 3600.0
_LOBBY_DRAIN_S = 1.0
# For the registry to be told that this server leaves, before it does.
_LEAVE_S = 2.5
# Of why a version could not be loaded, for the registry.
_REASON_CHARS = 500
# A worker that ends soon after its start, again and again, is started less and less often.
_FIRST_DELAY_S, _MAX_DELAY_S = 0.1, 10.0
_SETTLED_S = 30.0
# In place of a worker's number.
_EXPORTER, _REGISTRAR, _LOADER = -1, -2, -3
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_LIBC = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


class WorkerError(EngrampoolError):
    """A process of the server could not start, or ended before it was ready."""


@dataclass(eq=False)
class _Child:
    """role: "worker", "lobby", "exporter", "registrar" or "loader". index: which worker. slot: see Shared.

    report: its pipe, to read. generation: of the models that it has.
    heard_s, ready_s: when it was last heard of (at first, forked), and ready. kill_s: once it was told to end, when
    waiting for that is over. hung: it was killed because it was silent. failure: why it ended, as it said itself.
    status: how it ended. loaded_bytes, of_bytes: of a loader, how far it is.
    """

    role: str
    index: int
    slot: int
    pid: int
    report: int
    generation: int
    heard_s: float
    ready_s: float | None = None
    kill_s: float | None = None
    hung: bool = False
    failure: str = ""
    status: str = ""
    loaded_bytes: int = 0
    of_bytes: int = 0
    unread: bytes = b""

    @property
    def name(self) -> int | str:
        """As the log has it."""
        return self.index if self.role == "worker" else self.role


def supervise(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain and stop. SIGHUP replaces every worker, one after the other.

    Raises ListenError, PreflightError, TableFileError, OutOfMemoryError, WorkerError, RegistryError; nothing is left
    running then.
    """
    log.event("starting", version=__version__, models=[str(path) for path in config.models])
    reason = jit.not_kept()
    if reason is not None:
        log.event("kernels-not-kept", level="warning", reason=reason)
    directory = MetricsDirectory()
    try:
        directory.use("supervisor")
        _Supervisor(config, directory).run()
    finally:
        directory.close()


class _Supervisor:
    """Children are known by process id; workers by number, from 0, whoever the process is at the time."""

    def __init__(self, config: ServerConfig, directory: MetricsDirectory) -> None:
        self._config, self._directory = config, directory
        self._pid = os.getpid()
        slots = config.workers + OTHER_PROCESSES
        self._shared = Shared(Metrics(), InFlight(config.max_in_flight_bytes, int64s(slots)))
        self._metrics = self._shared.metrics
        self._pids, self._inherited = int64s(slots), int64s(slots)
        self._children: dict[int, _Child] = {}
        self._workers: dict[int, _Child] = {}
        # By worker, exporter or registrar: when the next is started, and how long the last one had to wait for that.
        self._due_s: dict[int, float] = {}
        self._delay_s: dict[int, float] = {}
        # Of a rolling restart: those still to be replaced, the one that is to take over next, the one that leaves.
        self._to_roll: deque[int] = deque()
        self._successor: _Child | None = None
        self._leaving: _Child | None = None
        self._rolling = self._roll_again = False
        self._roll_begun_s = self._stop_begun_s = 0.0
        self._turned_s = time.monotonic()
        # Another with every change of the models that the next worker will have.
        self._generation = 0
        self._versions = VersionsHeld()
        # Of each version that came by the registry, how long loading it took, and whether it is a patch.
        self._loads: dict[Key, tuple[float, bool]] = {}
        self._orders: socket.socket | None = None
        self._metrics_listener: socket.socket | None = None
        self._loading = self._serving = self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._life_reader, self._life_writer = os.pipe()
        self._wake_reader, self._wake_writer = os.pipe()

    def run(self) -> None:
        """The whole life."""
        for end in (self._wake_reader, self._wake_writer):
            os.set_blocking(end, False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # the wake-up pipe has it
        try:
            self._serve()
            self._turn_until(lambda: not self._children)
            log.event("stopped", drained_s=round(time.monotonic() - self._stop_begun_s, 3))
        finally:
            for pid in self._children:
                os.kill(pid, signal.SIGKILL)
            for pid in self._children:
                os.waitpid(pid, 0)
            if self._shared.entrance is not None:
                self._shared.entrance.close()

    def _serve(self) -> None:
        """From the first look at the models until a signal to stop."""
        config = self._config
        others: tuple[Key, ...] | None = ()
        if config.registry != "off":
            require_etcd3gw(config.registry)
            require_segments(config.memory)
            others = None
        holdings = Holdings(config, self._metrics, config.workers, others)
        try:
            holdings.open()
            metrics = self._listen()
            lobby = self._fork("lobby", 0, lambda link: self._answer(link, serving=False))
            self._turn_until(lambda: self._stopping or lobby.ready_s is not None)
            if self._stopping:
                return
            log.event("listening", listen=self._config.listen, metrics=metrics)
            self._shared.models.extend(self._on_thread(lambda cancel: list(holdings.load(cancel))) or ())
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
        self._turn_until(lambda: self._stopping or self._ready_workers() == config.workers)
        self._stop(lobby, _LOBBY_DRAIN_S)
        self._turn_until(lambda: self._stopping or lobby.pid not in self._children)
        if self._stopping:
            return
        self._serving = True
        self._metrics.serving.set(1)
        log.event("serving", listen=self._config.listen, metrics=metrics)
        self._register()
        self._follow(lambda: False)

    def _freeze(self) -> None:
        """Have collections in the children leave what they inherit alone, and so shared."""
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def _listen(self) -> str:
        """Take all ports, and start the exporter. Returns the address of metrics."""
        for reason in ("died", "hung"):
            self._metrics.worker_restarts.labels(reason)
        # Kept, so that the port is ours for as long as we live.
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
        self._turn_until(lambda: self._stopping or not self._rolling)
        if self._stopping:
            return None
        cancel, finished = threading.Event(), threading.Event()
        results: list[_T] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work(cancel))
            except BaseException as error:
                failures.append(error)
            finally:
                finished.set()
                os.write(self._wake_writer, b"\0")

        thread = threading.Thread(target=run, name="load")
        self._loading = True
        thread.start()
        self._turn_until(lambda: self._stopping or finished.is_set())
        cancel.set()
        thread.join()
        self._loading = False
        if self._stopping:
            return None
        if self._roll_again:
            self._roll_again = False
            self._roll()
        if failures:
            # Taken out: see tables.py of what an error keeps in memory.
            raise failures.pop()
        return results.pop()

    # --- the loop

    def _turn_until(self, done: Callable[[], bool], until_s: float = inf) -> None:
        """Look after signals and children until `done`, which is asked again after each of them, or until a time."""
        while not done() and time.monotonic() < until_s:
            due_s = min(until_s, *self._deadlines())
            wait_s = max(0.0, min(due_s - time.monotonic(), _LONGEST_WAIT_S))
            for key, _ in self._selector.select(wait_s):
                if key.data is None:
                    self._take_signals()
                elif key.data.report >= 0:  # it may have ended just now
                    self._hear(key.data)
            now = time.monotonic()
            if now > max(due_s, self._turned_s) + _BEAT_S:
                # We stood still ourselves, as when a whole container is frozen: that others were silent says nothing.
                for child in self._children.values():
                    child.heard_s = now
            self._turned_s = now
            self._keep_deadlines(now)

    def _deadlines(self) -> Iterator[float]:
        for child in self._children.values():
            yield child.heard_s + self._patience_s(child) if child.kill_s is None else child.kill_s
        if not self._loading:
            yield from self._due_s.values()

    def _patience_s(self, child: _Child) -> float:
        return _START_TIMEOUT_S if child.ready_s is None else self._config.worker_timeout_s

    def _keep_deadlines(self, now: float) -> None:
        for child in list(self._children.values()):
            if child.kill_s is None and now >= child.heard_s + self._patience_s(child):
                log.event(
                    "worker-hung",
                    level="error",
                    worker=child.name,
                    pid=child.pid,
                    silent_s=round(now - child.heard_s, 1),
                )
                child.hung, child.kill_s = True, now
            if child.kill_s is not None and now >= child.kill_s:
                os.kill(child.pid, signal.SIGKILL)
                child.kill_s = inf
        if not self._loading:  # a fork beside threads may take their locks along
            for index in [index for index, due_s in self._due_s.items() if now >= due_s]:
                del self._due_s[index]
                self._start(index)

    def _take_signals(self) -> None:
        with suppress(BlockingIOError):
            for number in os.read(self._wake_reader, 4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._stop_all(signal.Signals(number).name)
                elif number == signal.SIGHUP:
                    self._roll()
        # More than one child may have ended for one SIGCHLD.
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                child = self._children.pop(ended[0], None)
                if child is not None:  # else an orphan of others, if we are the first process of a container
                    self._ended(child, os.waitstatus_to_exitcode(ended[1]))

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
            self._due_s[index] = time.monotonic() + _MAX_DELAY_S

    def _answer(self, link: Link, *, serving: bool) -> None:
        if self._metrics_listener is not None:
            self._metrics_listener.close()
        config = self._config
        if not serving:
            config = replace(config, drain_s=min(config.drain_s, _LOBBY_DRAIN_S))
        answer(config, self._shared, link, serving=serving)

    def _export(self, link: Link) -> None:
        assert self._metrics_listener is not None
        processes = Processes(self._pid, self._pids, self._inherited)
        link.ready()
        export(self._metrics_listener, self._directory.path, processes, link.beat, link.beat_s)

    def _start_registrar(self) -> None:
        config = self._config
        cache = None if config.registry_cache == "off" else Cache(Path(config.registry_cache), config.registry)
        is_first = not self._versions.is_known
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
                    config.registry, cache, self._address, orders, self._metrics, link, is_first=is_first
                ),
            )
        self._register()

    def _fork(self, role: str, index: int, work: Callable[[Link], None]) -> _Child:
        slot = free_slot([child.slot for child in self._children.values()])
        reader, writer = os.pipe()
        # No signal may reach the child before it has handlers of its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if not pid:
                os.close(reader)
                os.set_blocking(writer, False)
                link = Link(self._life_reader, writer, min(_BEAT_S, self._config.worker_timeout_s / 4))
                self._live(role, index, slot, link, work)
        except OSError:
            os.close(reader)
            raise
        finally:
            os.close(writer)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        now = time.monotonic()
        child = _Child(role, index, slot, pid, reader, self._generation, now)
        self._children[pid] = child
        self._inherited[slot] = resident_memory()[1]
        self._pids[slot] = pid
        self._selector.register(reader, selectors.EVENT_READ, child)
        return child

    def _live(self, role: str, index: int, slot: int, link: Link, work: Callable[[Link], None]) -> NoReturn:
        """A child's life, from fork to end."""
        code = 1
        try:
            # Die with the supervisor, even if it is killed; `life` is for what happened before this call.
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self._pid:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                # A terminal sends these two to all of us; what to do about them is the supervisor's to say.
                ignored = number in (signal.SIGINT, signal.SIGHUP)
                signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._selector.close()
            for end in (self._life_writer, self._wake_reader, self._wake_writer):
                os.close(end)
            for child in self._children.values():
                os.close(child.report)
            self._directory.leave()
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
            code = 0
        except EngrampoolError as error:
            link.failed(str(error))
        except BaseException as error:
            log.event(
                "worker-failed", level="error", worker=role if role != "worker" else index, error=traceback.format_exc()
            )
            link.failed(repr(error))
        finally:
            os._exit(code)

    def _hear(self, child: _Child) -> None:
        """Read what there is on a child's pipe, or close it at its end."""
        said = os.read(child.report, 65536)
        if not said:
            self._selector.unregister(child.report)
            os.close(child.report)
            child.report = -1
            if child.pid in self._children:  # it is ending, or can no longer be watched
                os.kill(child.pid, signal.SIGKILL)
            return
        child.heard_s = time.monotonic()
        *lines, child.unread = (child.unread + said).split(b"\n")
        for line in filter(None, lines):
            report = json.loads(line)
            child.failure = report.get("failed", "")
            if "ready" in report:
                self._ready(child)
            if "loaded" in report:
                self._metrics.loaded_bytes.inc(report["loaded"] - child.loaded_bytes)
                self._metrics.to_load_bytes.inc(report["of"] - child.of_bytes)
                child.loaded_bytes, child.of_bytes = report["loaded"], report["of"]
            if "published" in report:
                self._want(report["published"], report["revision"])

    def _ready(self, child: _Child) -> None:
        child.ready_s = time.monotonic()
        if child.role != "worker":
            return
        log.event("worker-ready", worker=child.index, pid=child.pid)
        if child is self._successor:
            self._successor = None
            self._leaving = self._workers.get(child.index)
            self._workers[child.index] = child
            if self._leaving is not None:
                self._stop(self._leaving, self._config.drain_s)
            else:
                self._roll_next()
        self._metrics.workers.set(self._ready_workers())

    def _ready_workers(self) -> int:
        return sum(child.ready_s is not None for child in self._workers.values())

    def _stop(self, child: _Child, drain_s: float) -> None:
        """Have a child end by itself, and see to it that it does."""
        if self._children.get(child.pid) is child and child.kill_s is None:
            child.kill_s = time.monotonic() + drain_s + _STOP_MARGIN_S
            os.kill(child.pid, signal.SIGTERM)

    def _stop_all(self, reason: str) -> None:
        log.event("stopping", reason=reason)
        now = time.monotonic()
        if self._stopping:  # for the second time
            for child in self._children.values():
                child.kill_s = now
            return
        self._stopping, self._serving, self._stop_begun_s = True, False, now
        self._metrics.serving.set(0)
        self._due_s.clear()
        self._to_roll.clear()
        registrar = next((child for child in self._children.values() if child.role == "registrar"), None)
        if registrar is None:
            self._drain()
        elif registrar.kill_s is None:  # clients are to go elsewhere before they are refused
            registrar.kill_s = now + _LEAVE_S
            os.kill(registrar.pid, signal.SIGTERM)

    def _drain(self) -> None:
        for child in self._children.values():
            if child.role != "exporter":
                self._stop(child, self._config.drain_s)
        self._let_exporter_go()

    def _let_exporter_go(self) -> None:
        """Once it is the last one: until then there is something to scrape."""
        if all(child.role == "exporter" for child in self._children.values()):
            for child in self._children.values():
                child.kill_s = time.monotonic()

    def _ended(self, child: _Child, code: int) -> None:
        while child.report >= 0:
            self._hear(child)
        self._shared.in_flight.clear(child.slot)
        self._pids[child.slot] = 0
        self._directory.forget(str(child.slot))
        if current := self._workers.get(child.index) is child:
            del self._workers[child.index]
            self._metrics.workers.set(self._ready_workers())
        child.status = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if child.role != "loader" and (child.kill_s is None or child.hung):
            log.event(
                "worker-died", level="error", worker=child.name, pid=child.pid, status=child.status, error=child.failure
            )
            if child.ready_s is None and not (self._serving or self._stopping):
                raise WorkerError(
                    child.failure or f"{child.role} {child.pid} ended before it was ready: {child.status}"
                )
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

    def _replace(self, child: _Child) -> None:
        """Start another in place of one that ended, at once unless that happens again and again."""
        now, index = time.monotonic(), child.index
        if child.role == "worker":
            self._metrics.worker_restarts.labels("hung" if child.hung else "died").inc()
        if index not in self._delay_s or (child.ready_s is not None and now - child.ready_s >= _SETTLED_S):
            self._delay_s[index] = 0.0
        else:
            self._delay_s[index] = min(max(2 * self._delay_s[index], _FIRST_DELAY_S), _MAX_DELAY_S)
        self._due_s[index] = now + self._delay_s[index]

    # --- versions

    @property
    def _address(self) -> str:
        """Where clients reach this server."""
        return self._config.listen if self._config.advertise == "auto" else self._config.advertise

    def _want(self, records: list[tuple[str, str, str]], revision: int) -> None:
        """Take note of what is published now, as the registrar has it."""
        published = [Published.from_json(model, version, raw.encode()) for model, version, raw in records]
        if self._versions.want(published, revision):
            log.event("published", versions=[f"{one.model} {one.version}" for one in published])
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
                self._turn_until(lambda: self._stopping or done() or has_step(), versions.due_s())

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
            self._shared.models.append(held)
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

        def is_alive() -> bool:
            return loader.pid in self._children

        def is_wanted() -> bool:
            return not self._stopping and self._versions.wants(published)

        try:
            self._turn_until(lambda: not is_wanted() or loader.ready_s is not None or not is_alive())
            if not is_wanted():
                return None
            if loader.ready_s is None:
                raise LoadError(loader.failure or f"its loader {loader.pid} ended: {loader.status}")
            return self._on_thread(lambda cancel: self._adopt(published, cancel))
        finally:
            if loader.ready_s is None:  # what it did not come to is not to be loaded any more
                self._metrics.to_load_bytes.dec(loader.of_bytes - loader.loaded_bytes)
            if is_alive():
                loader.kill_s = inf
                os.kill(loader.pid, signal.SIGKILL)
            self._turn_until(lambda: not is_alive())

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
        self._shared.models[:] = [model for model in self._shared.models if _key(model) not in gone]
        self._renew()
        self._discard(gone)
        log.event("version-withdrawn", versions=[f"{model} {version}" for model, version in gone])

    def _renew(self) -> None:
        """Replace every worker that was forked before the models changed, until none of them is left."""
        self._generation += 1
        self._freeze()

        def is_done() -> bool:
            workers = (child for child in self._children.values() if child.role == "worker")
            return self._stopping or all(child.generation == self._generation for child in workers)

        while not is_done():
            self._roll()
            self._turn_until(lambda: self._stopping or not self._rolling)
            self._turn_until(is_done, time.monotonic() + _MAX_DELAY_S)

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
            self._orders.send(Member(self._address, held, failed).to_json())
        except ConnectionError:
            pass  # it ended, and the next one is told at its start
        except OSError as error:
            log.event("not-registered", level="error", error=error.strerror)

    # --- rolling restart

    def _roll(self) -> None:
        if not self._serving:
            log.event("roll-ignored", reason="stopping" if self._stopping else "not serving yet")
        elif self._rolling or self._loading:
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

    def _roll_failed(self, successor: _Child) -> None:
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
