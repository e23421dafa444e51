"""The direct lane: lookups over plain sockets, for callers that gRPC let in. docs/PROTOCOL.md has its frames.

What may be asked, what is refused and what is counted is lookups.py's, as it is for gRPC. Connections come here, to the
event loop; each is then a thread's of its own (connection.py).
"""

import asyncio
import socket
import threading
from contextlib import suppress

import grpc

from engrampool_proto.security.pem import PemError
from engrampool_proto.security.tls_socket import TlsSocket
from engrampool_proto.v1 import pool_pb2
from engrampool_server.access.callers import READ, Caller
from engrampool_server.answer import peers
from engrampool_server.answer.lane.connection import Connection
from engrampool_server.answer.lane.connection_limits import ConnectionLimits
from engrampool_server.answer.lane.resources import Resources
from engrampool_server.answer.lookups import RefusedError
from engrampool_server.answer.shared_state import SharedState
from engrampool_server.telemetry import log

_TICKET_VALID_S = 10.0
_ACCEPT_AGAIN_S = 1.0
# A caller that vanished without a word is noticed after so long: one that is idle by the system's questions, the first
# of them after _KEEP_IDLE_S, and one that was sent something as that is not acknowledged.
_KEEP_IDLE_S, _KEEP_EVERY_S, _UNACKNOWLEDGED_S = 30, 10, 60


class DirectLane:
    """Takes connections from the listener that all processes share, on the event loop that it is made on.

    A ticket, and the connection that it admitted, is good for as long as the credential that it was asked for with.
    connections: those that are open.
    """

    def __init__(self, resources: Resources, shared: SharedState) -> None:
        self._resources = resources
        self._loop = asyncio.get_running_loop()
        assert shared.admission is not None
        self._metrics, self._admission, self._access = resources.metrics, shared.admission, shared.access
        self._accounts, self._slot = shared.accounts, shared.in_flight.slot
        self._listening = False
        self.connections: ConnectionLimits[Connection] = ConnectionLimits()
        self._limiting = threading.Lock()  # of the connections, which come and go in threads
        self._empty = asyncio.Event()

    @property
    def tls(self) -> bool:
        """Whether frames go inside TLS."""
        return self._access.lane_context() is not None

    def start(self) -> None:
        """Take connections."""
        self._listening = True
        self._loop.add_reader(self._admission.listener.fileno(), self._accept)

    def admit_one(self, peer: str, key: bytes = b"") -> pool_pb2.OpenDirectResponse:
        """Let a caller of that peer in, once. key: of the credential that it came with. Raises RefusedError."""
        ticket = self._admission.tickets.issue(_TICKET_VALID_S, peer, key)
        if ticket is None:
            text = "too many tickets are asked for at this moment; try again later"
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded", text)
        return pool_pb2.OpenDirectResponse(
            host=self._admission.host.strip("[]"),
            port=self._admission.port,
            unix_path=self._admission.unix_path,
            ticket=ticket,
            valid_ms=round(_TICKET_VALID_S * 1e3),
            tls=self.tls,
        )

    def revoke(self) -> None:
        """Cut off connections of callers that may not read any more, and hold others to their limits. Any thread."""
        for connection in self._open():
            if connection.key is not None and not self._may_stay(connection, connection.key):
                connection.cut("revoked")

    def _may_stay(self, connection: Connection, key: bytes) -> bool:
        """Whether its credential is still that of the same caller, who may read; it has that caller's limits then."""
        who = self._caller(key)
        # What it has is counted for the caller that it was admitted for, and given back there.
        if who is None or connection.account is None or who.name != connection.account.name:
            return False
        connection.may(self._accounts.of(who))
        return True

    def _caller(self, key: bytes) -> Caller | None:
        """Who has the credential of this key, and may read."""
        assert self._access.callers is not None
        found = self._access.callers.value.of_key(key)
        return found if found is not None and READ in found.roles else None

    async def stop(self, drain_s: float) -> None:
        """Take no more connections, let answers under way end for up to `drain_s`, close."""
        if not self._listening:
            return
        self._listening = False
        self._loop.remove_reader(self._admission.listener.fileno())
        for connection in self._open():
            connection.leave()
        try:
            await asyncio.wait_for(self._gone(), drain_s)
        except TimeoutError:
            for connection in self._open():
                connection.abort()
            await self._gone()

    async def _gone(self) -> None:
        while True:
            self._empty.clear()
            if not self._open():
                return
            await self._empty.wait()

    def _open(self) -> list[Connection]:
        with self._limiting:
            return list(self.connections)

    def _accept(self) -> None:
        """Take one connection: where there are more, other workers may be idle."""
        try:
            accepted, _ = self._admission.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no more descriptors, say
            log.event("direct-accept-failed", level="warning", error=error.strerror)
            self._loop.remove_reader(self._admission.listener.fileno())
            self._loop.call_later(_ACCEPT_AGAIN_S, self._accept_again)
            return
        try:
            keep_alive(accepted)
            context = self._access.lane_context()
            if context is not None:
                accepted = TlsSocket(accepted, context)
            connection = Connection(self._resources, accepted, peers.of_connection(accepted), self._admit, self._left)
            with self._limiting:
                displaced = self.connections.add(connection, connection.peer)
                self._count()
        except (OSError, PemError):  # it left already, or there is no TLS for it
            accepted.close()
            return
        except RefusedError as error:
            with accepted, suppress(OSError):
                accepted.send(self._resources.refusal(error))
            return
        if displaced is not None:
            displaced.cut("stranger")
        try:
            connection.start()
        except (RuntimeError, MemoryError) as error:
            log.event("direct-accept-failed", level="warning", error=str(error))
            accepted.close()
            self._left(connection)

    def _accept_again(self) -> None:
        if self._listening:
            self._loop.add_reader(self._admission.listener.fileno(), self._accept)

    def _count(self) -> None:
        """Say how many there are; to be called by whoever changed that, while nobody else does."""
        self._metrics.direct_connections.set(len(self.connections))

    # --- for connections, from their threads

    def _admit(self, connection: Connection, ticket: bytes) -> bool:
        """Whether the ticket lets the connection in. Raises RefusedError."""
        key = self._admission.tickets.take(ticket)
        if key is None:
            return False
        if not self._access.is_open:
            who = self._caller(key)
            if who is None:
                return False
            account = self._accounts.of(who)
            with self._limiting:
                self._accounts.connected(account, self._slot, 1)
            connection.is_of(key, account)
            if not self._may_stay(connection, key):  # just now; whoever is revoked from here on is cut off
                return False
        with self._limiting:
            # Perhaps it had to go for another one meanwhile.
            return self.connections.admit(connection)

    def _left(self, connection: Connection) -> None:
        """Forget a connection."""
        with self._limiting:
            self.connections.remove(connection)
            if connection.account is not None:
                self._accounts.connected(connection.account, self._slot, -1)
            self._count()
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._empty.set)


def keep_alive(accepted: socket.socket) -> None:
    """Have the system look after a connection. Raises OSError."""
    accepted.setblocking(True)
    if accepted.family != socket.AF_UNIX:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_IDLE_S)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEP_EVERY_S)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_S * 1000)
