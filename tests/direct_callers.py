"""Callers of the direct lane in raw frames, which do what a test has them do."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from engrampool_proto import frames, wire
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from server_fixtures import LIMIT_S, Running


def way_in(server: Running) -> pool_pb2.OpenDirectResponse:
    with grpc.insecure_channel(server.address) as channel:
        return pool_pb2_grpc.PoolStub(channel).OpenDirect(pool_pb2.OpenDirectRequest(), timeout=LIMIT_S)


class Caller:
    """A connection in frames."""

    def __init__(self, where: pool_pb2.OpenDirectResponse, host: str = "127.0.0.1") -> None:
        """host: that it calls from, one of this machine's 127.0.0.0/8."""
        self.socket = socket.create_connection(("127.0.0.1", where.port), LIMIT_S, (host, 0))
        self.ticket = where.ticket

    def hello(self) -> "Caller":
        self.socket.sendall(frames.frame(frames.HELLO, self.ticket))
        assert self.receive() == (frames.READY, b"", b"")
        return self

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            got = self.socket.recv(count - len(data))
            if not got:
                raise EOFError
            data += got
        return data

    def receive(self) -> tuple[int, bytes, bytes]:
        length, head, kind = frames.HEADER.unpack(self.exactly(12))
        data = self.exactly(length)
        return kind, data[:head], data[head:]

    def ask(self, request: bytes, timeout_us: int = 0) -> None:
        self.socket.sendall(frames.request_start(timeout_us, len(request)) + request)

    def answer(self) -> list[bytes]:
        """The frames of an answer, as messages of a stream."""
        messages = []
        while True:
            kind, head, body = self.receive()
            if kind == frames.END:
                # What a stream says in its last message, the lane says after it.
                messages[-1] += head
                return messages
            assert kind == frames.ROWS
            layer, first = frames.parse_rows_head(head, len(body))
            (run,) = wire.parse_response(head + body).tables
            assert (run.layer, run.first, run.rows) == (layer, first, body)
            messages.append(head + body)

    def refusal(self) -> tuple[int, str, str]:
        kind, head, body = self.receive()
        assert (kind, body) == (frames.REFUSED, b"")
        refused = pool_pb2.Refusal.FromString(head)
        return refused.code, refused.reason, refused.text

    def ended(self) -> bool:
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@contextmanager
def caller(server: Running, host: str = "127.0.0.1") -> Iterator[Caller]:
    """One that was let in."""
    with Caller(way_in(server), host) as made:
        yield made.hello()
