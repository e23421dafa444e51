"""The direct lane inside TLS, asked by Python's own: who agrees on no keys is cut off, and others notice nothing."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest

from certificates import Authority, yesterday
from direct_callers import Caller, be_patient
from engrampool_proto import frames
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from engrampool_server.answer.lane import answers, connection
from server_fixtures import LIMIT_S, RawPool, Running, eventually, expected, joined, pack, running, version_of

MIB = 1 << 20
MANY = np.tile(np.arange(6500), 9)  # 14.7 MiB: more than the system keeps on the way
PATIENCE_S = 0.2


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("tls") / "small")


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(packed, authority) -> Iterator[Running]:
    with running(packed, **authority.of_server(), stream_chunk_bytes=64 << 10) as run:
        yield run


@pytest.fixture(scope="module")
def pool(packed) -> RawPool:
    return RawPool("127.0.0.1:1", version_of(packed))  # which only makes messages


@pytest.fixture(autouse=True, params=[False, True], ids=["message", "handle"])
def by_handle(request, monkeypatch) -> None:
    """Whether callers ask for rows by handles, which a loop without Python answers, or by messages."""
    be_patient(monkeypatch)
    monkeypatch.setattr(Caller, "by_handle", request.param)


@pytest.fixture(autouse=True)
def nothing_left(server) -> Iterator[None]:
    """Whatever the test did: afterwards no bytes are in flight and no connection is open."""
    yield
    eventually(lambda: server.scrape()["engrampool_in_flight_bytes"] == 0, "nothing in flight")
    eventually(lambda: server.scrape()["engrampool_direct_connections"] == 0, "no connection")


def way_in(server, authority, tls=True, mine=(None, None)) -> pool_pb2.OpenDirectResponse:
    cert, key = (one and one.read_bytes() for one in mine)
    credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes(), key, cert)
    with grpc.secure_channel(server.address, credentials) as channel:
        return pool_pb2_grpc.PoolStub(channel).OpenDirect(pool_pb2.OpenDirectRequest(tls=tls), timeout=LIMIT_S)


class Inside(Caller):
    """A caller that has agreed on keys."""

    def __init__(self, where, authority, mine=None) -> None:
        super().__init__(where)
        context = ssl.create_default_context(cafile=authority.ca)
        if mine is not None:
            context.load_cert_chain(*mine)
        self.socket = context.wrap_socket(self.socket, server_hostname="127.0.0.1")


def inside(server, authority) -> Inside:
    return Inside(way_in(server, authority), authority).hello()


def cut(server, reason: str) -> float:
    return server.scrape()[f'engrampool_direct_cut_total{{reason="{reason}"}}']


def still_good(lane: Caller, pool: RawPool) -> None:
    lane.ask(pool.by_ids((2, [5])))
    assert joined(lane.answer()) == {2: expected(2, [5])}


@pytest.mark.parametrize("count", [0, 1, 300, 60_000])
def test_rows_are_right_however_many(server, authority, pool, count):
    ids = np.arange(count) % 4100
    with inside(server, authority) as lane:
        assert lane.socket.version() == "TLSv1.3"
        for _ in range(2):
            lane.ask(pool.by_ids((2, ids), (9, ids)))
            assert joined(lane.answer()) == {2: expected(2, ids), 9: expected(9, ids)}


@pytest.mark.parametrize("size", [1, 7, 20_000])
def test_a_request_may_come_in_records_of_any_size(server, authority, pool, size):
    ids = np.arange(40 if size < 100 else 30_000) % 6500
    request = pool.by_ids((2, ids))
    with inside(server, authority) as lane:
        sent = frames.request_start(1, 0, len(request)) + request
        for start in range(0, len(sent), size):
            lane.socket.sendall(sent[start : start + size])
        lane.number = 1
        assert joined(lane.answer()) == {2: expected(2, ids)}
        still_good(lane, pool)


def test_who_does_not_say_that_he_can_is_told_so(server, authority):
    with pytest.raises(grpc.RpcError, match="its direct lane speaks TLS") as caught:
        way_in(server, authority, tls=False)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert ("engrampool-reason", "lane-tls") in caught.value.trailing_metadata()
    assert way_in(server, authority).tls


def test_over_a_unix_socket_nothing_is_inside_tls(packed, authority, tmp_path):
    with running(packed, **authority.of_server(), direct=f"unix:{tmp_path / 'lane'}") as run:
        assert not way_in(run, authority, tls=False).tls


@pytest.mark.parametrize(
    "sent", [frames.frame(frames.HELLO, bytes(36)), b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\0\x05junk!"]
)
def test_whoever_does_not_speak_tls_is_cut_off(server, authority, pool, monkeypatch, sent):
    monkeypatch.setattr(connection, "_LINGER_S", PATIENCE_S)
    before = cut(server, "handshake")
    with inside(server, authority) as other, Caller(way_in(server, authority)) as lane:
        lane.socket.sendall(sent)
        with suppress(ConnectionResetError):
            while lane.socket.recv(4096):  # what TLS has to say to that, and the end
                pass
        eventually(lambda: cut(server, "handshake") == before + 1, "counted")
        still_good(other, pool)


def test_who_is_silent_or_ends_half_way_is_cut_off_as_without_tls(server, authority, pool, monkeypatch):
    before = cut(server, "no-hello")
    with inside(server, authority) as other:
        monkeypatch.setattr(connection, "HELLO_S", PATIENCE_S)
        where = way_in(server, authority)
        with Caller(where) as silent, Caller(where) as half, Inside(where, authority) as agreed:
            half.socket.sendall(b"\x16\x03\x01\x02\x00\x01")  # a ClientHello that ends early
            assert silent.ended()
            assert half.ended()
            assert agreed.ended()  # and says nothing
            still_good(other, pool)
    assert cut(server, "no-hello") == before + 3


def test_who_leaves_before_is_not_counted(server, authority):
    before = server.scrape()
    with Caller(way_in(server, authority)):
        pass
    eventually(lambda: server.scrape()["engrampool_direct_connections"] == 0, "closed")
    for reason in ("handshake", "no-hello", "failed"):
        assert cut(server, reason) == before[f'engrampool_direct_cut_total{{reason="{reason}"}}']


def test_who_sends_no_more_gets_his_answer(server, authority, pool):
    with inside(server, authority) as lane:
        lane.ask(pool.by_ids((2, MANY[:6500])))
        socket.socket.shutdown(lane.socket, socket.SHUT_WR)  # of SSLSocket's own it is the end
        assert joined(lane.answer()) == {2: expected(2, MANY[:6500])}


def test_who_reads_nothing_is_cut_off(server, authority, pool, monkeypatch):
    for module in (connection, answers):
        monkeypatch.setattr(module, "PATIENCE_S", PATIENCE_S)
    before = cut(server, "unread-answer")
    with inside(server, authority) as lane:
        lane.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lane.ask(pool.by_ids((2, MANY)))
        eventually(lambda: cut(server, "unread-answer") == before + 1, "cut off")


def test_a_caller_needs_a_certificate_where_grpc_asks_for_one(packed, authority, pool):
    good, old = authority.sign("worker"), authority.sign("worker", valid=yesterday())
    with running(packed, **authority.of_server(), tls_client_ca=authority.ca) as run:
        before = cut(run, "handshake")
        with Inside(way_in(run, authority, mine=good), authority, good) as lane:
            still_good(lane.hello(), pool)
        for mine, said in ((None, "CERTIFICATE_REQUIRED"), (old, "CERTIFICATE_EXPIRED")):
            where = way_in(run, authority, mine=good)
            with Inside(where, authority, mine) as lane, pytest.raises(ssl.SSLError, match=said):
                lane.hello()
        eventually(lambda: cut(run, "handshake") == before + 2, "counted")


def test_a_certificate_that_is_replaced_is_shown_to_who_comes_next(packed, authority, tmp_path):
    files = authority.of_server()
    with running(packed, **files) as run:
        with inside(run, authority) as lane:
            first = lane.socket.getpeercert(binary_form=True)
        for name, other in authority.of_server().items():
            files[name].write_bytes(other.read_bytes())

        def shown() -> bytes:
            with inside(run, authority) as lane:
                return lane.socket.getpeercert(binary_form=True)

        eventually(lambda: shown() != first, "another certificate")
