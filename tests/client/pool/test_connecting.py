"""Connecting: what a newcomer gets wrong is said as such, and no proxy of the environment is on the way."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from engrampool_client import AsyncClient, Client, ProtocolError, UnavailableError
from engrampool_client.lanes.native import NativeLane
from server_fixtures import LIMIT_S, eventually, lasting_address, running, serve_thread

pytestmark = pytest.mark.usefixtures("patient")


@contextmanager
def listening(say: bytes | None) -> Iterator[str]:
    """The address of something that takes connections, and says that, or nothing if None, to whoever asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                taken.append(connection)
                if say is not None:
                    connection.recv(1000)
                    connection.sendall(say)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for connection in taken:
                connection.close()


@pytest.mark.parametrize(
    "target",
    [
        *("localhost", "10.0.0.1", "node:", "node:http", "node:0", "node:65536", ":50051"),
        *("::1", "[::1]", "fe80::1:50051", "ipv6:[::1]", "ipv4:10.0.0.1:1,10.0.0.2"),
        *("dns:node", "dns:///node", "dns://8.8.8.8/node"),
    ],
)
def test_a_target_without_a_port_is_refused_at_once(target):
    with pytest.raises(ValueError, match=r"has no port") as told:
        Client(target, connect_timeout_s=3600)
    assert repr(target) in str(told.value)


@pytest.mark.parametrize(
    "target",
    ["localhost:1", "[::1]:1", "dns:localhost:1", "dns:///localhost:1", "ipv4:127.0.0.1:1", "unix:/no/such/socket"],
)
def test_other_names_that_grpc_knows_are_taken(target):
    with pytest.raises(UnavailableError):
        Client(target, connect_timeout_s=0.3)


@pytest.fixture
def one_try(monkeypatch) -> None:
    """Who does not answer is asked once, for as long as that takes."""
    monkeypatch.setattr("engrampool_client.lanes.grpc._RETRY_LOADING_S", LIMIT_S)


def test_a_closed_port_is_said_to_refuse(one_try):
    target = lasting_address()
    with pytest.raises(UnavailableError, match="refused, as nothing listens there") as told:
        Client(target, connect_timeout_s=LIMIT_S)
    assert target in str(told.value)
    assert "Deadline" not in str(told.value)


def test_an_unknown_host_is_said_to_be_unknown(one_try):
    with pytest.raises(UnavailableError, match="the host's name is not known"):
        Client("no-such-host.invalid:50051", connect_timeout_s=LIMIT_S)


def test_the_metrics_port_is_said_to_be_no_grpc_at_once(packed):
    with running(packed, metrics="127.0.0.1:0") as run:
        address = run.metrics_address
        with pytest.raises(ProtocolError, match="its metrics port") as told:
            Client(address, connect_timeout_s=3600)
    assert address in str(told.value)


@pytest.mark.parametrize("say", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9\r\n"])
def test_so_is_what_else_is_no_grpc(say):
    with listening(say) as target, pytest.raises(ProtocolError, match="is no engrampool server, nor any other of gRPC"):
        Client(target, connect_timeout_s=3600)


def test_what_closes_the_connection_at_once_is_said_to(one_try):
    alert = b"\x15\x03\x01\0\x02\x02\x46"  # of TLS
    with listening(alert) as target, pytest.raises(UnavailableError, match="closes the connection at once"):
        Client(target, connect_timeout_s=LIMIT_S)


def test_a_server_that_says_nothing_is_said_to_hang():
    with listening(None) as target, pytest.raises(UnavailableError, match="nothing there answers; it may hang"):
        Client(target, connect_timeout_s=1)


def test_why_one_of_several_is_away_is_said(server):
    away = lasting_address()
    with Client([server, away], attach="off") as client:
        client.lookup([1, 2])
        # It was not asked yet; or was, and there was no time to find out.
        eventually(lambda: client.lookup([1, 2]) and "refused" in client.servers_in_trouble.get(away, ""))
        assert list(client.servers_in_trouble) == [away]


def test_a_server_that_starts_later_is_waited_for(packed):
    target, made = lasting_address(), []
    with listening(None):
        thread = threading.Thread(target=lambda: made.append(Client(target, attach="off", connect_timeout_s=LIMIT_S)))
        thread.start()
        with serve_thread(packed, listen=target):
            thread.join(LIMIT_S)
            with made[0] as client:
                assert client.lookup([1])[1].shape == (1, 24, 264)


@pytest.fixture
def company_proxy(monkeypatch) -> Iterator[list[bytes]]:
    """The environment names a proxy, which is silent; gives what came to it."""
    came: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                came.append(connection.recv(100))

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, url)
        for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield came
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("settings", [{"attach": "off", "direct": "off"}, {"attach": "off"}, {}], ids=str)
def test_a_proxy_that_the_environment_names_is_not_asked(packed, company_proxy, settings):
    with (
        serve_thread(packed, memory="shm") as server,
        Client(server, connect_timeout_s=LIMIT_S, **settings) as client,
    ):
        assert client.attached == (not settings)
        assert client.direct == ("direct" not in settings)
        client.lookup([1, 2, 3])
    assert not company_proxy


def test_nor_by_the_asyncio_client(server, company_proxy):
    async def look_up() -> None:
        async with await AsyncClient.connect(server, attach="off") as client:
            await client.lookup([1, 2, 3])

    asyncio.run(look_up())
    assert not company_proxy


def test_nor_by_the_commands(server, company_proxy, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(5, dtype=np.int32))
    command = [sys.executable, "-m", "engrampool_proto", "lookup", "--server", server, "--timeout-s", "20"]
    command += ["--tokens", str(tmp_path / "tokens.npy"), "--out", str(tmp_path / "rows.npz")]
    subprocess.run(command, check=True, env=os.environ)
    assert (tmp_path / "rows.npz").exists()
    assert not company_proxy


def test_a_client_that_closes_while_its_lanes_open_logs_nothing(server, monkeypatch, caplog):
    """Its connection ends first, which an opening lane finds out in whatever it is doing."""
    opening, closing = threading.Event(), threading.Event()
    connect = NativeLane._connect

    def slowly(lane: NativeLane) -> None:
        if threading.current_thread().name == "engrampool-direct":
            opening.set()
            assert closing.wait(LIMIT_S)
        connect(lane)

    monkeypatch.setattr(NativeLane, "_connect", slowly)
    with caplog.at_level(logging.WARNING, "engrampool"):
        client = Client(server, attach="off")
        endpoint = client._shards._sets[0].replicas[0]
        endpoint._native._want_one()
        assert opening.wait(LIMIT_S)
        endpoint.stop()
        closing.set()
        endpoint._native._opener.join(LIMIT_S)
        client.close()
    assert not caplog.records


def test_a_lane_that_begins_to_open_as_its_client_closes_logs_nothing(server, monkeypatch, caplog):
    """Its endpoint does not know it yet, and so cannot tell it."""
    stopped = threading.Event()

    def late(lane: NativeLane) -> None:
        endpoint = lane._open_direct.args and lane._open_direct.func.__self__
        endpoint.stop()
        stopped.set()
        connect(lane)

    connect = NativeLane._connect
    monkeypatch.setattr(NativeLane, "_connect", late)
    with caplog.at_level(logging.WARNING, "engrampool"):
        Client(server, attach="off").close()
    assert stopped.is_set()
    assert not caplog.records
