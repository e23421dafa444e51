"""Peers on the direct lane that are no servers of ours: they say what a test has them say."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import numpy as np

from certificates import Authority
from engrampool_client.compute.served import ServedModel
from engrampool_client.config import ClientConfig
from engrampool_client.lanes.connection import Connection
from engrampool_client.lanes.credentials import Credentials
from engrampool_client.lanes.native import NativeLane
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_proto import frames, wire
from engrampool_proto.hashing import Identity
from engrampool_proto.security.openssl import Context
from engrampool_proto.security.pem import PemFiles
from engrampool_proto.security.tls_socket import TlsSocket
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.v1 import pool_pb2
from exchanges import exchange_of
from server_fixtures import LIMIT_S

ROWS = RowFormat((Segment("values", "uint8", 3),))
SPEC = ModelSpec("m", 50, tuple(TableSpec(layer, 50, ROWS, Identity(50)) for layer in (2, 9)))
SERVED = ServedModel(SPEC, "v", max_rows=10**6, max_answer_bytes=10**8, server_version="", direct=True)
TIMES = wire.ServerTimes(1, 2, 3)
# Stands for the number of the request in frames that are made before it.
NUMBER = 0xFEDC_BA98_7654_3210
Frame = tuple[int, int, int, int, bytes]  # kind, which, number, first, body


class Tls:
    """What a peer and its callers speak TLS by. settings: of a server of ours that shows the same."""

    def __init__(self, authority: Authority) -> None:
        self.ca, self.settings = authority.ca, authority.of_server()
        self.server = Context(PemFiles(None, self.settings["tls_cert"], self.settings["tls_key"]).read(), server=True)
        self.secure = Credentials(ClientConfig(tls_ca=str(self.ca))).secure


@contextmanager
def peer(
    *replies: bytes | Callable[[socket.socket, int], None],
    came: list[Frame] | None = None,
    kind: type[Connection] = Connection,
    tls: Tls | None = None,
) -> Iterator[NativeLane]:
    """A lane to a peer that admits a connection and answers the requests of it in turn with these bytes.

    replies: frames of request NUMBER, or what is called with the connection and the request's number. came: gets all
    frames that the peer was sent. kind: of connections that the lane has. tls: what it is inside.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            listener.close()
            if tls is not None:
                connection = TlsSocket(connection, tls.server)
                connection.handshake(time.monotonic() + LIMIT_S)
            with connection, suppress(ConnectionError):  # a caller may have heard enough
                connection.recv(100)
                connection.sendall(frames.frame(frames.READY))
                for reply in replies:
                    kind = frames.REGISTER
                    while kind == frames.REGISTER:
                        header = connection.recv(frames.HEADER.size, socket.MSG_WAITALL)
                        if len(header) < frames.HEADER.size:
                            return
                        kind, which, number, first, nbytes = frames.HEADER.unpack(header)
                        body = connection.recv(nbytes, socket.MSG_WAITALL)
                        if came is not None:
                            came.append((kind, which, number, first, body))
                    if callable(reply):
                        reply(connection, number)
                    else:
                        connection.sendall(numbered(reply, number))

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        way_in = pool_pb2.OpenDirectResponse(port=port, ticket=b"t", tls=tls is not None)
        secure = None if tls is None else tls.secure
        made = NativeLane(lambda _: way_in, f"127.0.0.1:{port}", 1, kind=kind, secure=secure)
        try:
            yield made
        finally:
            made.close()
            thread.join()


def exchange(count: int, out: bool = False, delivery: Delivery | None = None) -> Exchange:
    ids = {layer: np.zeros(count, np.uint32) for layer in (2, 9)}
    arrays = {layer: np.zeros((count, 3), np.uint8) for layer in ids} if out else None
    return exchange_of(SERVED, ids, arrays, delivery)


def numbered(sent: bytes, number: int) -> bytes:
    """Frames of request NUMBER as such of another request."""
    return sent.replace(NUMBER.to_bytes(8, "little"), number.to_bytes(8, "little"))


def rows_frame(layer: int, first: int, rows: bytes) -> bytes:
    return frames.rows_start(NUMBER, layer, first, len(rows)) + rows


def whole_answer(count: int, cuts: set[int]) -> tuple[dict[int, bytes], bytes]:
    wanted = {layer: np.random.default_rng(layer).bytes(3 * count) for layer in (2, 9)}
    sent = b""
    for layer, rows in wanted.items():
        bounds = sorted({0, count} | {cut for cut in cuts if cut < count})
        for start, stop in pairwise(bounds):
            sent += rows_frame(layer, start, rows[3 * start : 3 * stop])
    return wanted, sent + frames.end(NUMBER, TIMES)
