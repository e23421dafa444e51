"""Callers of the direct lane in raw frames, which do what a test has them do."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

from engrampool_proto import frames, wire
from engrampool_proto.errors import EngrampoolError
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from engrampool_server.answer.lane import answers, connection
from engrampool_server.answer.lane.admission import Tickets
from server_fixtures import LIMIT_S, Running


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut nobody off, and let no ticket grow old, however long a machine that is busy lets a caller stand still."""
    monkeypatch.setattr(connection, "HELLO_S", 600.0)
    for module in (connection, answers):
        monkeypatch.setattr(module, "PATIENCE_S", 600.0)
    issue = Tickets.issue
    monkeypatch.setattr(Tickets, "issue", lambda tickets, _, *other: issue(tickets, 600.0, *other))


def way_in(server: Running) -> pool_pb2.OpenDirectResponse:
    with grpc.insecure_channel(server.address) as channel:
        return pool_pb2_grpc.PoolStub(channel).OpenDirect(pool_pb2.OpenDirectRequest(), timeout=LIMIT_S)


def greeted(where: pool_pb2.OpenDirectResponse) -> int:
    """The kind of frame that a hello with this ticket is answered with, on a connection that ends then."""
    with socket.create_connection(("127.0.0.1", where.port), LIMIT_S) as lane:
        lane.sendall(frames.frame(frames.HELLO, where.ticket))
        return int(frames.HEADER.unpack(lane.recv(frames.HEADER.size, socket.MSG_WAITALL))[0])


class Caller:
    """A connection in frames."""

    by_handle = False

    def __init__(self, where: pool_pb2.OpenDirectResponse, host: str = "127.0.0.1") -> None:
        """host: that it calls from, one of this machine's 127.0.0.0/8."""
        self.socket = socket.create_connection(("127.0.0.1", where.port), LIMIT_S, (host, 0))
        self.ticket = where.ticket
        self.number = 0  # of the last request

    def hello(self) -> "Caller":
        self.socket.sendall(frames.frame(frames.HELLO, self.ticket))
        assert self.receive() == (frames.READY, 0, 0, 0, b"")
        return self

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            got = self.socket.recv(count - len(data))
            if not got:
                raise EOFError
            data += got
        return data

    def receive(self) -> tuple[int, int, int, int, bytes]:
        """Kind, layer, number, first row, and body of a frame."""
        *header, nbytes = frames.HEADER.unpack(self.exactly(frames.HEADER.size))
        return (*header, self.exactly(nbytes))

    def ask(self, request: bytes, timeout_us: int = 0) -> None:
        """Ask for what a LookupRequest says: by a handle if `by_handle` is set and there can be one, else by itself."""
        if self.by_handle and (asked := _by_handle(request)) is not None:
            self.register(self.number % frames.MAX_HANDLES, asked.model, asked.version, *dict(asked.tables))
            self.look_up(self.number % frames.MAX_HANDLES, *dict(asked.tables).values(), timeout_us=timeout_us)
            return
        self.number += 1
        self.socket.sendall(frames.request_start(self.number, timeout_us, len(request)) + request)

    def register(self, handle: int, model: str, version: str, *layers: int) -> None:
        self.socket.sendall(frames.register(handle, model, version, layers))

    def look_up(self, handle: int, *ids: npt.NDArray[Any], timeout_us: int = 0) -> None:
        """Ask for rows by a handle."""
        self.number += 1
        self.socket.sendall(lookup_frame(handle, self.number, *ids, timeout_us=timeout_us))

    def answer(self) -> list[bytes]:
        """The frames of an answer, as messages of a stream."""
        messages = []
        while True:
            kind, layer, number, first, body = self.receive()
            assert number == self.number
            if kind == frames.END:
                # What a stream says in its last message, the lane says after it.
                messages[-1] += wire.times_response(wire.ServerTimes(*frames.TIMES.unpack(body)))
                return messages
            assert kind == frames.ROWS
            messages.append(wire.response_start(layer, first, len(body)) + body)

    def refusal(self) -> tuple[int, str, str]:
        kind, _, number, _, body = self.receive()
        assert kind == frames.REFUSED
        assert number in (0, self.number)
        refused = pool_pb2.Refusal.FromString(body)
        return refused.code, refused.reason, refused.text

    def peeks(self) -> bool:
        """Wait for the next byte, and leave it there; whether there is one."""
        return bool(self.socket.recv(1, socket.MSG_PEEK))

    def is_refused(self) -> bool:
        """Wait for the next frame, and leave it there; whether it is a refusal."""
        return self.socket.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL) == frames.REFUSED.to_bytes(4, "little")

    def ended(self) -> bool:
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def _by_handle(request: bytes) -> wire.LookupRequest | None:
    """A request for rows by id that can be asked for by a handle: its layers ascend, its ids are uint32."""
    try:
        asked = wire.parse_request(request)
    except EngrampoolError:
        return None
    layers = [layer for layer, _ in asked.tables]
    fits = layers and layers == sorted(set(layers)) and all(ids.dtype == np.uint32 for _, ids in asked.tables)
    return asked if fits else None


def lookup_frame(handle: int, number: int, *ids: npt.NDArray[Any], timeout_us: int = 0) -> bytes:
    """A LOOKUP. ids: of each layer of the handle, in its table's dtype."""
    parts = [one.tobytes().ljust(frames.padded(one.nbytes), b"\0") for one in ids]
    start = frames.lookup_start(handle, number, timeout_us, [one.size for one in ids], sum(map(len, parts)))
    return start + b"".join(parts)


@contextmanager
def caller(server: Running, host: str = "127.0.0.1") -> Iterator[Caller]:
    """One that was let in."""
    with Caller(way_in(server), host) as made:
        yield made.hello()
