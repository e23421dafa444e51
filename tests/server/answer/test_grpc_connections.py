"""What a caller of gRPC begins and does not end: bounded by its connection, which the server ends by and by.

Spoken in HTTP/2 frames, since gRPC's own clients end what they begin, and read what comes.
"""

import os
import socket
import stat
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from certificates import Authority, write_callers
from direct_callers import Caller, be_patient, way_in
from engrampool_client.config import ClientConfig
from engrampool_client.lanes.credentials import Credentials
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_proto.v1 import pool_pb2
from engrampool_server.answer import grpc_server as server_module
from engrampool_server.answer import health, peers, pool_service
from engrampool_server.answer.lookups import Lookups
from server_fixtures import LIMIT_S, RawPool, Running, eventually, expected, pack, rows_of, running, version_of

MIB = 1 << 20
INITIAL_WINDOW_SIZE = 4
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, ACK = 0, 1, 3, 4, 6, 7, 1
END_HEADERS, END_STREAM = 4, 1
HEADER_FIELDS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/engrampool.v1.Pool/Lookup",
    ":authority": "pool",
    "te": "trailers",
    "content-type": "application/grpc",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("connections") / "small")


@pytest.fixture
def server(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """One whose connections live for a moment, in which what does end has time to end."""
    monkeypatch.setattr(server_module, "CONNECTION_AGE_S", 0.5)
    monkeypatch.setattr(server_module, "CONNECTION_GRACE_S", 5)
    with running(packed) as run:
        yield run


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def call(address: str, method: str = "Lookup", settings: bytes = b"") -> socket.socket:
    """A connection with one call, of which nothing but the headers was sent."""
    host, port = address.rsplit(":", 1)
    made = socket.create_connection((host, int(port)), LIMIT_S)
    block = b""
    for name, value in (HEADER_FIELDS | {":path": f"/engrampool.v1.Pool/{method}"}).items():  # literals, as they are
        block += b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings) + frame(SETTINGS, ACK, 0, b"")
    made.sendall(preface + frame(HEADERS, END_HEADERS, 1, block))
    return made


def message(request: bytes) -> bytes:
    return b"\0" + struct.pack(">I", len(request)) + request


def other_end(made: socket.socket) -> socket.socket:
    """The socket of this process that was accepted for another one of it."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it is closed by now, or not connected
            if stat.S_ISSOCK(entry.stat().st_mode):
                with socket.socket(fileno=os.dup(int(entry.name))) as found:
                    if found.getpeername() == made.getsockname():
                        return found.dup()
    raise AssertionError("it was not accepted")


def read_to_its_end(made: socket.socket) -> None:
    try:
        while made.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass


def test_a_request_that_does_not_end_ends_with_its_connection(server, packed):
    with call(server.address) as made, RawPool(server.address, version_of(packed)) as pool:
        made.sendall(frame(DATA, 0, 1, message(bytes(MIB))[:10_000]))
        assert rows_of(pool.lookup(pool.by_ids((2, [5])))) == {2: expected(2, [5])}
        read_to_its_end(made)


def test_an_answer_that_is_not_read_is_counted_until_its_connection_ends(server, packed, monkeypatch):
    counted, reserve = [], Lookups.reserve

    def seen(*about: Any) -> None:
        reserve(*about)
        counted.append(server.scrape()["engrampool_in_flight_bytes"])  # before the connection can have grown old

    monkeypatch.setattr(Lookups, "reserve", seen)
    with RawPool("127.0.0.1:1", version_of(packed)) as unused:
        request = unused.by_ids((2, np.arange(4000)))
    with call(server.address) as made:
        made.sendall(frame(DATA, END_STREAM, 1, message(request)))
        eventually(lambda: counted == [4000 * 264], "it is counted")
        eventually(lambda: server.scrape()["engrampool_in_flight_bytes"] == 0, "it is given back")
        read_to_its_end(made)


def test_a_specification_that_is_not_read_is_counted_too(server, monkeypatch):
    monkeypatch.setattr(pool_service, "SMALL_REQUEST_BYTES", 100)
    request = pool_pb2.DescribeRequest(include_spec=True).SerializeToString()
    nothing = struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)  # is taken of an answer
    with call(server.address, "Describe", nothing) as made:
        made.sendall(frame(DATA, END_STREAM, 1, message(request)))
        eventually(lambda: server.server.lookups.in_flight.total > 1000, "it is counted")
        eventually(lambda: server.server.lookups.in_flight.total == 0, "it is given back")
        read_to_its_end(made)


def test_a_specification_is_given_to_who_may_have_less_in_flight(packed, monkeypatch, tmp_path):
    monkeypatch.setattr(pool_service, "SMALL_REQUEST_BYTES", 100)
    callers = write_callers(tmp_path / "callers", {"name": "a", "token": "a", "max_in_flight_bytes": 1024})
    with running(packed, tokens=callers) as run:
        lane = GrpcLane(run.address, Credentials(ClientConfig(token="a")))
        try:
            assert len(lane.describe(LIMIT_S)) > 1024
            # Of a server that is busy, once it is not any more.
            in_flight = run.server.lookups.in_flight
            limit_bytes, in_flight.limit_bytes = in_flight.limit_bytes, 0
            with ThreadPoolExecutor(1) as threads:
                coming = threads.submit(lane.describe, LIMIT_S)
                eventually(lambda: run.scrape().get('engrampool_refused_total{reason="overloaded"}'), "it is refused")
                in_flight.limit_bytes = limit_bytes
                assert len(coming.result()) > 1024
        finally:
            lane.close()


def test_clients_notice_nothing_of_connections_that_grow_old(packed, monkeypatch):
    monkeypatch.setattr(server_module, "CONNECTION_AGE_S", 0.5)  # and a call that is under way has time to end
    seen = set()
    of_call = peers.of_call
    monkeypatch.setattr(peers, "of_call", lambda peer: seen.add(peer) or of_call(peer))
    with running(packed) as server, RawPool(server.address, version_of(packed)) as pool:
        while len(seen) < 4:  # each connection has a port of its own
            assert rows_of(pool.lookup(pool.by_ids((2, [5])), timeout=LIMIT_S)) == {2: expected(2, [5])}


@pytest.mark.parametrize("with_a_call", [False, True], ids=["idle", "with a call"])
def test_pings_of_other_languages_clients_are_answered_however_many(packed, with_a_call):
    """gRPC's own default is to cut callers off after three, unless minutes are between them."""
    with running(packed) as run, call(run.address) as made, made.makefile("rb") as stream:
        if not with_a_call:
            made.sendall(frame(RST_STREAM, 0, 1, struct.pack(">I", 8)))
        for number in range(20):
            payload = struct.pack(">Q", number)
            made.sendall(frame(PING, 0, 0, payload))
            while True:
                head = stream.read(9)
                body = stream.read(int.from_bytes(head[:3]))
                assert head[3] != GOAWAY, body
                if (head[3], head[4]) == (PING, ACK):
                    assert body == payload
                    break


def test_a_caller_that_answers_no_ping_while_a_call_is_under_way_is_cut_off(packed, monkeypatch):
    monkeypatch.setattr(server_module, "SIGN_OF_LIFE_S", 0.3)
    with running(packed) as run, call(run.address) as made:  # long before its connection is old
        read_to_its_end(made)


def test_the_system_looks_after_callers_of_the_direct_lane(packed, monkeypatch):
    be_patient(monkeypatch)
    with running(packed) as run, Caller(way_in(run)).hello() as caller, other_end(caller.socket) as taken:
        assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
        assert 0 < taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 60_000


@pytest.mark.parametrize("tls", [False, True])
def test_who_connects_and_says_nothing_is_cut_off(packed, tmp_path, monkeypatch, tls):
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 0.2)
    settings = Authority(tmp_path).of_server() if tls else {}
    with running(packed, **settings) as run:
        host, _, port = run.address.rpartition(":")
        with socket.create_connection((host, int(port)), LIMIT_S) as silent:
            while silent.recv(4096):  # what the server says first
                pass


def test_callers_that_leave_in_the_midst_of_an_answer_write_nothing_to_the_log(packed, caplog):
    ids = np.random.default_rng(0).integers(0, 1000, 200_000)
    with running(packed) as run:
        for _ in range(60):
            with RawPool(run.address, version_of(packed)) as raw:
                next(raw.stream(raw.by_ids((2, ids)), timeout=LIMIT_S))
        eventually(lambda: run.server.lookups.in_flight.total == 0)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("grpc")] == []


def test_watches_of_health_have_a_bound_and_give_their_place_back(packed, monkeypatch):
    monkeypatch.setattr(health, "MOST_WATCHES", 8)
    with running(packed) as run, grpc.insecure_channel(run.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        for _ in range(3):
            watches = [watch(health_pb2.HealthCheckRequest()) for _ in range(4)]
            assert all(_is_told(one) for one in watches)
            with pytest.raises(grpc.RpcError, match="a peer may have no more than are free"):
                next(watch(health_pb2.HealthCheckRequest()))
            for one in watches:
                one.cancel()
            eventually(lambda: not run.server._health._watches)


def _is_told(one: Any) -> bool:
    return next(one).status == health_pb2.HealthCheckResponse.SERVING
