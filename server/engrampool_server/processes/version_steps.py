"""What becomes of a version that a registry names: it is loaded, held, told of, and given up, one step at a time.

version_plan.py says which step is next. A loader fills the segments of a version, which are adopted here; then the
workers are replaced, as each has what was there when it was forked. The registry is told that a version is held after
that, and that it is not before it goes.
"""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.registry.etcd import Held, Member, Published
from engrampool_proto.registry.records import VersionKey
from engrampool_server.config import ServerConfig
from engrampool_server.memory.load import show
from engrampool_server.memory.tables import LoadedModel
from engrampool_server.processes.children import Child
from engrampool_server.processes.loader import LoadError, adopt, become_loader, discard
from engrampool_server.processes.pool_view import PoolView
from engrampool_server.processes.registrar import Cache, register
from engrampool_server.processes.reports import Report
from engrampool_server.processes.supervisor import LOADER, REGISTRAR, Supervisor, WorkerError
from engrampool_server.processes.version_plan import VersionPlan
from engrampool_server.telemetry import log

# Of why a version could not be loaded, for the registry.
_REASON_CHARS = 500


class VersionSteps:
    """The versions of one server, whose processes `supervisor` keeps."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor, self._children = supervisor, supervisor.children
        self._shared, self._metrics = supervisor.shared, supervisor.metrics
        self._versions = VersionPlan()
        self._known: PoolView | None = None
        # Of each version that came by the registry, how long loading it took, and whether it is a patch.
        self._loads: dict[VersionKey, tuple[float, bool]] = {}
        self._orders: socket.socket | None = None
        supervisor.said = self._said

    def hold_fixed(self) -> None:
        """Take what was loaded at the start as held for ever."""
        self._versions = VersionPlan([model.key for model in self._shared.models])
        self.register()

    def start_registrar(self) -> None:
        """Start the process that keeps in touch with the registry; hold something, if the registry names anything."""
        self._supervisor.kept[REGISTRAR] = self._start_registrar
        self._supervisor.start(REGISTRAR)
        if not self._shared.models:  # else there is something to serve, whatever the registry says
            # What only has to be loaded is not to be refused as unknown.
            self.follow(lambda: bool(self._shared.models) and self._versions.is_settled(time.monotonic()))

    def follow(self, done: Callable[[], bool]) -> None:
        """Hold what is wanted, one step after the other, until `done` or a signal to stop."""
        versions, supervisor = self._versions, self._supervisor

        def has_step() -> bool:
            return bool(versions.to_drop()) or versions.to_load(time.monotonic()) is not None

        while not (supervisor.stopping or done()):
            coming = versions.to_load(time.monotonic())
            if gone := versions.to_drop():
                self._withdraw(gone)
            elif coming is not None:
                self._add(coming)
            else:
                self._children.turn_until(lambda: supervisor.stopping or done() or has_step(), versions.due_s())

    def register(self) -> None:
        """Have metrics, and the registry once this server serves, say what is held."""
        versions = self._versions
        counts = {"published": versions.published, "held": versions.held, "failed": versions.failed}
        for state, of_state in counts.items():
            self._metrics.versions.labels(state).set(len(of_state))
        if self._orders is None or not self._supervisor.serving:
            return
        held = tuple(
            Held(*model.key, {layer: (table.row_start, table.row_stop) for layer, table in model.tables.items()})
            for model in self._shared.models
            if model.key in versions.held
        )
        failed = {version: why[:_REASON_CHARS] for (_, version), why in versions.failed.items()}
        try:
            active = self._known.active if self._known else {}
            self._orders.send(Member(_address(self._supervisor.config), held, failed, active).to_json())
        except ConnectionError:
            pass  # it ended, and the next one is told at its start
        except OSError as error:
            log.event("not-registered", level="error", error=error.strerror)

    # --- what the registry says

    def _start_registrar(self) -> None:
        config = self._supervisor.config
        cache = cache_of(config)
        if self._orders is not None:
            self._orders.close()
        # Each message is taken as a whole, or not at all.
        self._orders, orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.setblocking(False)
        self._supervisor.not_inherited[:] = [self._orders]
        with orders:
            self._supervisor.fork(
                "registrar",
                REGISTRAR,
                lambda reporter: register(
                    config.registry, cache, _address(config), orders, self._metrics, reporter, known=self._known
                ),
            )
        self.register()

    def _said(self, child: Child, report: Report) -> None:
        if report.loaded is not None:
            # A counter goes on only.
            nbytes, of_bytes = max(report.loaded[0], child.loaded_bytes), report.loaded[1]
            self._metrics.loaded_bytes.inc(nbytes - child.loaded_bytes)
            self._metrics.to_load_bytes.inc(of_bytes - child.of_bytes)
            child.loaded_bytes, child.of_bytes = nbytes, of_bytes
        if report.known is not None:
            self._learn(report.known)

    def _learn(self, known: PoolView) -> None:
        """Take note of what is to be held now, and of what clients read, as the registrar has it."""
        before, self._known = self._known, known
        if self._versions.want(known.published.values()):
            log.event("published", versions=[f"{model} {version}" for model, version in known.published])
        elif before is not None and before.active == known.active:
            return
        self._shared.mark_active(known.active)
        self.register()

    # --- steps

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
            shard = self._supervisor.config.shard
            show(self._metrics, held, seconds, shard, is_patch=published.base is not None)
            self._shared.hold(held)
            self._shared.mark_active(self._known.active if self._known else {})
            self._supervisor.renew()
            self._versions.loaded(key)
            log.event("version-held", model=key[0], version=key[1], seconds=round(time.monotonic() - begin_s, 3))
        self.register()

    def _load(self, published: Published) -> LoadedModel | None:
        """A version in memory; None if the server is to stop, or the version is wanted no more."""
        supervisor, config = self._supervisor, self._supervisor.config
        if published.base is not None:
            return supervisor.on_thread(lambda cancel: self._adopt(published, cancel))
        others = {*self._versions.published, *(model.key for model in self._shared.models)}
        loader = supervisor.fork("loader", LOADER, lambda reporter: become_loader(published, config, others, reporter))

        def is_wanted() -> bool:
            return not supervisor.stopping and self._versions.wants(published)

        try:
            self._children.turn_until(
                lambda: not is_wanted() or loader.ready_s is not None or loader not in self._children
            )
            if not is_wanted():
                return None
            if loader.ready_s is None:
                raise LoadError(loader.failure or f"its loader {loader.pid} ended: {loader.why}")
            return supervisor.on_thread(lambda cancel: self._adopt(published, cancel))
        finally:
            if loader.ready_s is None:  # what it did not come to is not to be loaded any more
                self._metrics.to_load_bytes.dec(loader.of_bytes - loader.loaded_bytes)
            if loader in self._children:
                self._children.kill(loader)
            self._children.turn_until(lambda: loader not in self._children)

    def _adopt(self, published: Published, cancel: threading.Event) -> LoadedModel:
        def progress(nbytes: int) -> None:
            self._metrics.to_load_bytes.inc(nbytes)
            self._metrics.loaded_bytes.inc(nbytes)

        return adopt(published, self._supervisor.config, self._shared.models, cancel, progress)

    def _withdraw(self, gone: list[VersionKey]) -> None:
        """Hold these versions no more: tell of it, have workers without them, and free their memory."""
        self._versions.dropped(gone)
        self.register()
        for model in self._shared.models:
            if model.key in gone:
                seconds, is_patch = self._loads.pop(model.key)
                shard = self._supervisor.config.shard
                show(self._metrics, model, seconds, shard, is_patch=is_patch, sign=-1)
        del model  # or its memory would stay
        self._shared.drop(gone)
        self._supervisor.renew()
        self._discard(gone)
        log.event("version-withdrawn", versions=[f"{model} {version}" for model, version in gone])

    def _discard(self, versions: list[VersionKey]) -> None:
        """Free the segments of what is held no more, and of loads that came to nothing."""
        try:
            self._supervisor.on_thread(lambda _: discard(self._supervisor.config.memory, versions))
        except (EngrampoolError, OSError) as error:
            log.event("not-freed", level="warning", error=str(error))


def cache_of(config: ServerConfig) -> Cache | None:
    """The file that keeps what the registry said last, if there is to be one."""
    return None if config.registry_cache == "off" else Cache(Path(config.registry_cache), config.registry)


def _address(config: ServerConfig) -> str:
    """Where clients reach this server."""
    return config.listen if config.advertise == "auto" else config.advertise
