"""The client's side of the direct lane inside TLS: rows, what the network sees of them, and whom the client trusts."""

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from certificates import Authority, put, yesterday
from engrampool_client import Client
from engrampool_client.config import ClientConfig
from engrampool_client.lanes.credentials import Credentials
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.lanes.native import NativeLane
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.security import openssl
from engrampool_proto.v1 import pool_pb2
from server_fixtures import LIMIT_S, PATIENCE, SPEC, VOCAB, Running, eventually, expected, pack, running

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("tls") / "small")


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(packed, authority) -> Iterator[Running]:
    with running(packed, **authority.of_server()) as run:
        yield run


@contextmanager
def relay(port: int, seed: int) -> Iterator[tuple[int, bytearray]]:
    """A port that leads to another, in pieces of any size; and all that came from there."""
    sizes, seen, open_ones = random.Random(seed), bytearray(), []

    def carry(source: socket.socket, to: socket.socket, keep: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                if keep:
                    seen.extend(data)
                start = 0
                while start < len(data):
                    size = sizes.choice((1, 4, 5, 100, 5000, 16_384, 1 << 18))
                    to.sendall(data[start : start + size])
                    start += size
            to.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                caller, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                open_ones.extend((caller, server))
                for one in (caller, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for way in ((caller, server, False), (server, caller, True)):
                    threads.append(threading.Thread(target=carry, args=way))
                    threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield listener.getsockname()[1], seen
        finally:
            for one in (listener, *open_ones):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(LIMIT_S)
            for one in open_ones:
                one.close()


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("connections", [1, 2, 3, 4])
def test_rows_are_right_by_any_number_of_tokens_and_connections(server, authority, compiled, connections):
    settings = {"connections": connections, "compiled": compiled, "attach": "off", "tls_ca": authority.ca}
    with Client(server.address, **settings, **PATIENCE) as pool:
        for tokens in (1, 64, 4096, 64, 1):
            asked = np.random.default_rng(tokens).integers(0, VOCAB, tokens).astype(np.int32)
            eventually(lambda: pool.status()["lane"] == "direct", "the lane is there")
            rows = pool.lookup(asked)
            for layer, ids in SPEC.hash(TokenBatch.of(asked)).items():
                assert rows[layer].tobytes() == expected(layer, ids)
        assert {one["why_not_direct"] for one in pool.status()["servers"]} == {None}
        assert pool.stats.retries == 0


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("seed", range(2))
def test_records_may_come_in_any_pieces_and_nobody_on_the_way_sees_rows(server, authority, compiled, seed, monkeypatch):
    open_direct = GrpcLane.open_direct
    port = server.server.shared.admission.port
    with relay(port, seed) as (other, seen), pytest.MonkeyPatch.context() as patch:

        def through(lane, timeout_s):
            way_in = open_direct(lane, timeout_s)
            way_in.port = other
            return way_in

        patch.setattr(GrpcLane, "open_direct", through)
        with Client(server.address, tls_ca=authority.ca, compiled=compiled, attach="off", **PATIENCE) as pool:
            for count in (1, 24, 900, 6500, 1):
                ids = np.arange(count) % 4100
                rows = pool.lookup_rows({2: ids, 9: ids})
                assert {layer: rows[layer].tobytes() for layer in rows} == {
                    2: expected(2, ids),
                    9: expected(9, ids),
                }
            assert pool.stats.retries == 0
            assert pool.status()["lane"] == "direct"
    assert len(seen) > len(expected(2, np.arange(4100)))
    assert expected(2, [0])[:64] not in seen


# --- trust


def reached(server, settings, target=None) -> NativeLane:
    """A lane to the server for a client with these settings, whom gRPC let in as somebody else."""
    authority = settings.pop("authority")
    trusted = GrpcLane(server.address, Credentials(ClientConfig(tls_ca=str(authority.ca))))
    own = {name: str(file) for name, file in settings.items()}
    try:
        lane = NativeLane(
            trusted.open_direct, target or server.address, 1, secure=Credentials(ClientConfig(**own)).secure
        )
        lane.close()
        return lane
    finally:
        trusted.close()


def test_whom_the_client_does_not_trust_it_tells_nothing(server, packed, authority, tmp_path_factory):
    stranger = Authority(tmp_path_factory.mktemp("stranger"), "stranger")
    by_name = server.address.replace("127.0.0.1", "localhost")
    for settings, target, said in (
        ({"tls_ca": authority.ca}, None, ""),
        ({"tls_ca": authority.ca}, by_name, "hostname mismatch"),
        ({"tls_ca": authority.ca, "tls_name": "else.svc"}, None, "hostname mismatch"),
        ({"tls_ca": authority.ca, "tls_name": "127.0.0.1"}, by_name, ""),
        ({"tls_ca": stranger.ca}, None, "unable to get local issuer certificate"),
        ({}, None, "speaks TLS, and this client does not"),
    ):
        lane = reached(server, {"authority": authority, **settings}, target)
        assert (lane.opened, said in lane.reason) == (not said, True), lane.reason


def test_a_lane_that_does_not_speak_tls_is_not_entered(packed, authority):
    with running(packed) as plain, running(packed, **authority.of_server()) as run:
        way_in = pool_pb2.OpenDirectResponse(port=plain.server.shared.admission.port, ticket=b"t", tls=True)
        lane = NativeLane(
            lambda _: way_in, run.address, 1, secure=Credentials(ClientConfig(tls_ca=str(authority.ca))).secure
        )
        assert not lane.opened
        assert "no TLS with it" in lane.reason
        lane.close()


@pytest.mark.parametrize("valid", ["expired", "of a stranger"])
def test_a_server_that_is_trusted_no_more_is_asked_over_connections_that_there_are(
    packed, authority, tmp_path_factory, valid
):
    files = authority.of_server()
    other = Authority(tmp_path_factory.mktemp("stranger"), "stranger")
    wrong = authority.of_server(valid=yesterday()) if valid == "expired" else other.of_server()
    with (
        running(packed, **files) as run,
        Client(run.address, tls_ca=authority.ca, attach="off", max_steps=1, **PATIENCE) as pool,
    ):
        assert pool.lookup_rows({2: np.array([5])})[2].tobytes() == expected(2, [5])
        context = run.server.shared.access.lane_context()
        for name in files:
            put(files[name], wrong[name].read_bytes())
        eventually(lambda: run.server.shared.access.lane_context() is not context, "the server shows it")
        for connection in run.server.direct.connections:
            connection.abort()

        def why() -> str | None:
            assert pool.lookup_rows({2: np.array([5])})[2].tobytes() == expected(2, [5])
            return pool.status()["servers"][0]["why_not_direct"]

        said = "certificate has expired" if valid == "expired" else "unable to get local issuer"
        eventually(lambda: said in (why() or ""), "told why")
        assert pool.status()["lane"] == "grpc"


def test_without_openssl_a_server_begins_only_if_it_needs_none(packed, authority, tmp_path, monkeypatch):
    monkeypatch.setattr(openssl, "_CALLS", {"SSL_of_another_kind": (None,)})
    openssl.library.cache_clear()
    try:
        with pytest.raises(openssl.NoOpensslError, match="lane_tls = none"), running(packed, **authority.of_server()):
            pass
        for settings in ({"lane_tls": "none"}, {"lane_tls": "off"}, {"direct": f"unix:{tmp_path / 'lane'}"}):
            with running(packed, **authority.of_server(), **settings):
                pass
    finally:
        openssl.library.cache_clear()


def test_without_openssl_lookups_go_over_grpc_and_it_is_said(server, authority, monkeypatch):
    def none():
        raise openssl.NoOpensslError("TLS on the direct lane needs OpenSSL")

    real = openssl.library
    monkeypatch.setattr(openssl, "library", lambda: none() if threading.current_thread() is me else real())
    me = threading.current_thread()  # the server's is another
    with Client(server.address, tls_ca=authority.ca, attach="off", **PATIENCE) as pool:
        assert pool.lookup_rows({2: np.array([5])})[2].tobytes() == expected(2, [5])
        assert (pool.status()["lane"], pool.status()["servers"][0]["why_not_direct"]) == (
            "grpc",
            "TLS on the direct lane needs OpenSSL",
        )
