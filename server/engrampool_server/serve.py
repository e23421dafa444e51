"""The life of `engrampool serve`, from the first look at the models to the end: which processes there are, and when.

- The exporter answers Prometheus, and the lobby answers that tables are still loading.
- Once they are loaded, the workers take over from the lobby.
- With a registry, versions of models come and go meanwhile: the registrar says which are wanted, and a loader, one at a
  time, brings the next into memory.
"""

from engrampool_proto import __version__
from engrampool_proto.kernels import jit
from engrampool_proto.registry.etcd import require_etcd3gw
from engrampool_proto.registry.records import VersionKey
from engrampool_server.config import ServerConfig
from engrampool_server.memory import numa
from engrampool_server.memory.load import ModelLoader, require_segments
from engrampool_server.memory.preflight import require_address_space
from engrampool_server.processes.supervisor import LOBBY_DRAIN_S, Supervisor
from engrampool_server.processes.version_steps import VersionSteps, cache_of
from engrampool_server.telemetry import log
from engrampool_server.telemetry.metrics_files import SUPERVISOR, MetricsMemory

# For the log to be taken, at the end.
_LAST_LINES_S = 1.0


def serve(config: ServerConfig) -> None:
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
        with Supervisor(config, memory) as supervisor:
            _serve(supervisor)
            supervisor.await_end()
    finally:
        log.count_dropped(lambda lines: None)
        log.tend(_LAST_LINES_S)
        memory.close()


def _serve(supervisor: Supervisor) -> None:
    """From the first look at the models until a signal to stop."""
    config, shared, children = supervisor.config, supervisor.shared, supervisor.children
    others: tuple[VersionKey, ...] | None = ()
    if config.registry != "off":
        require_etcd3gw(config.registry)
        require_segments(config.memory)
        if (cache := cache_of(config)) is not None:
            cache.check()
        others = None
    numa.place(config.numa)  # in the thread that starts all others
    versions = VersionSteps(supervisor)
    loader = ModelLoader(config, supervisor.metrics, config.workers, others)
    try:
        supervisor.on_thread(lambda _: loader.open())  # which may wait for a disk, or a store
        if supervisor.stopping:
            return
        metrics = supervisor.listen()
        lobby = supervisor.start_lobby()
        children.turn_until(lambda: supervisor.stopping or lobby.ready_s is not None)
        if supervisor.stopping:
            return
        log.event("listening", listen=supervisor.config.listen, metrics=metrics)
        for model in supervisor.on_thread(lambda cancel: list(loader.load(cancel))) or ():
            shared.hold(model)
    finally:
        loader.close()
    versions.hold_fixed()
    if config.registry != "off" and not supervisor.stopping:
        versions.start_registrar()
    if supervisor.stopping:
        return
    supervisor.freeze()
    for index in range(config.workers):
        supervisor.start(index)
    children.turn_until(lambda: supervisor.stopping or supervisor.ready_workers() == config.workers)
    supervisor.stop(lobby, LOBBY_DRAIN_S)
    children.turn_until(lambda: supervisor.stopping or lobby not in children)
    if supervisor.stopping:
        return
    supervisor.begin_serving()
    log.event("serving", listen=supervisor.config.listen, metrics=metrics)
    versions.register()
    versions.follow(lambda: False)
