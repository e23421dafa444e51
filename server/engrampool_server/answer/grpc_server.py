"""One process that answers: binds, holds models, serves, drains, stops. supervisor.py runs several on one port."""

import asyncio
import logging
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engrampool_proto.security.pem import Pem
from engrampool_proto.security.reread import Reread
from engrampool_proto.wire import SERVICE
from engrampool_server.answer.emulation import Alarms
from engrampool_server.answer.gate import Gate
from engrampool_server.answer.health import SERVING, Health
from engrampool_server.answer.lane.direct import DirectLane
from engrampool_server.answer.lane.resources import Resources
from engrampool_server.answer.lookups import Limits, Lookups
from engrampool_server.answer.pool_service import PoolService
from engrampool_server.answer.shared_state import SharedState
from engrampool_server.answer.statistics import Statistics
from engrampool_server.config import ServerConfig
from engrampool_server.memory.tables import LoadedModel
from engrampool_server.ports import ListenError
from engrampool_server.telemetry.calls import CallMetrics
from engrampool_server.telemetry.metrics import FLUSH_S

# Ids are at most 8 bytes; the rest of a request is small beside them.
_REQUEST_MARGIN_BYTES = 1 << 20
# gRPC keeps the bound on messages in a C int.
_INT32_MAX = 2**31 - 1
# gRPC gives its handlers no way to end a call whose request never ends, or whose answer nobody reads. A connection of
# this age takes no new calls, for which clients make another one by themselves, and is closed after the grace.
CONNECTION_AGE_S, CONNECTION_GRACE_S = 600, 60
# How long who connects may take for the handshakes of TLS and HTTP/2.
HANDSHAKE_S = 10
# Calls at one time on one connection; more of them wait at the client.
_CONNECTION_CALLS = 1024
# How often callers are asked for a sign of life while a call of theirs is under way, and how long that may take.
SIGN_OF_LIFE_S = 10
# gRPC tells the log, with a traceback, of each caller that left while it was sent something: readers could fill it.
_LEFT = "ExecuteBatchError raised in core by servicer method"
# How often to look, while draining, whether there is anything left to wait for.
_IDLE_S = 0.1


class GrpcServer:
    """Answers on `config.listen`, which other processes may share, on the event loop that it is started on.

    shared: with other processes. lookups: what is answered, whichever way it is asked.
    direct: the direct lane once started, None without one.
    """

    def __init__(self, config: ServerConfig, shared: SharedState) -> None:
        self._config, self.shared = config, shared
        limits = Limits(config.max_rows_per_request, config.max_answer_bytes, config.stream_chunk_bytes)
        slow_s, emulation = config.slow_lookup_s, shared.emulation
        self.lookups = Lookups(
            limits, shared.in_flight, shared.metrics, config.gather_threads, slow_s, emulation=emulation
        )
        self._calls = CallMetrics(shared.metrics)
        self._health = Health("", SERVICE)
        self._grpc: grpc.aio.Server | None = None
        self.direct: DirectLane | None = None
        self._flushing: asyncio.TimerHandle | None = None
        self._alarms: Alarms | None = None
        self._end_watch: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Listen. Health says NOT_SERVING, lookups UNAVAILABLE. Raises ListenError."""
        config = self._config
        max_request_bytes = min(config.max_rows_per_request * 8 + _REQUEST_MARGIN_BYTES, _INT32_MAX)
        if self.shared.admission is not None:
            resources = Resources(self.lookups, self.shared.metrics, max_request_bytes, config.direct_spin_s)
            self.direct = DirectLane(resources, self.shared)
        options = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_concurrent_streams", _CONNECTION_CALLS),
            ("grpc.max_connection_age_ms", round(CONNECTION_AGE_S * 1e3)),
            ("grpc.max_connection_age_grace_ms", round(CONNECTION_GRACE_S * 1e3)),
            # A caller that was lost on the way without a word takes no place for longer than that.
            ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_S * 1e3)),
            ("grpc.keepalive_time_ms", round(SIGN_OF_LIFE_S * 1e3)),
            ("grpc.keepalive_timeout_ms", round(SIGN_OF_LIFE_S * 1e3)),
            ("grpc.http2.ping_timeout_ms", round(SIGN_OF_LIFE_S * 1e3)),  # which is what gRPC 1.85 goes by
            # gRPC would cut off callers that ask for signs of life themselves, as many languages' do every few seconds.
            ("grpc.http2.max_ping_strikes", 0),
        ]
        if self.shared.emulation is not None:
            self._alarms = Alarms()
        # Who maps tables reads them at the speed of what they really lie in.
        may_attach = config.attach != "off" and self.shared.emulation is None
        access = self.shared.access
        self._grpc = grpc.aio.server(interceptors=[Gate(access, self.lookups), self._calls], options=options)
        service = PoolService(
            self.lookups,
            self.direct,
            may_attach,
            Statistics(self.shared.read_metrics, self.lookups.threads),
            self.shared.is_active,
            self.shared.accounts,
            self._alarms,
        )
        handlers = grpc.method_handlers_generic_handler(SERVICE, service.handlers())
        self._grpc.add_generic_rpc_handlers((handlers,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        try:
            if access.tls is None:
                self._grpc.add_insecure_port(config.listen)
            else:
                self._grpc.add_secure_port(config.listen, _credentials(access.tls))
        except RuntimeError as error:
            raise ListenError(f"cannot listen on {config.listen}: in use, or not an address of this machine") from error
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
        await self._grpc.start()
        self._end_watch = access.watch(lambda: None if self.direct is None else self.direct.revoke())
        self._flush()

    def _flush(self) -> None:
        """Have Prometheus see what was counted, from now on again and again."""
        self._flushing = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)
        self.shared.metrics.flush()

    def hold(self, models: list[LoadedModel]) -> None:
        """Answer lookups in `models` from now on; health says SERVING, if there are any."""
        for model in models:
            self.lookups.add(model)
        self.lookups.ready = True
        if self.direct is not None:
            self.direct.start()
        if models:
            self._health.set(SERVING)

    async def stop(self) -> None:
        """NOT_SERVING, no new calls, let those in flight finish for up to drain_s, stop. Twice is once."""
        if self._grpc is not None:
            self._health.end()
            direct = [] if self.direct is None else [self.direct.stop(self._config.drain_s)]
            await asyncio.gather(self._drain(self._grpc), *direct)
            self._grpc = None
        if self._flushing is not None:
            self._flushing.cancel()
        if self._alarms is not None:
            self._alarms.close()
            self._alarms = None
        self._end_watch()
        self.lookups.close()

    async def _drain(self, server: grpc.aio.Server) -> None:
        """Let calls under way finish for up to drain_s.

        grpc.aio loses a call that arrives in the very moment of `stop`: no handler ever runs, its caller waits for an
        answer, and `stop` for its end. So once none of our handlers has anything left to do, for long enough that a
        call on its way to one would have begun, the connections are cut; such a caller is told so and can ask again.
        """
        stopping = asyncio.ensure_future(server.stop(self._config.drain_s))
        idle = False
        while not (await asyncio.wait({stopping}, timeout=_IDLE_S))[0]:
            if idle and not self._calls.open:
                await server.stop(None)
            idle = not self._calls.open
        await stopping


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LEFT)


def _credentials(tls: Reread[Pem]) -> grpc.ServerCredentials:
    """Of the files as they are at each handshake, which looks at no disk."""
    given: Pem | None = None

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        pem = tls.value
        if pem is given:
            return None
        given = pem
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)

    return grpc.dynamic_ssl_server_credentials(changed(), changed, tls.value.ca is not None)
