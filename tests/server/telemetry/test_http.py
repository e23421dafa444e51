"""The metrics port, and those who connect to it and do not go on: for so long, and of so many, no more."""

import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from prometheus_client import CollectorRegistry

from certificates import Authority
from engrampool_server.ports import listen_on
from engrampool_server.telemetry import exporter
from engrampool_server.telemetry.exporter import Http, Scrapes
from server_fixtures import LIMIT_S


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@contextmanager
def serving(authority: Authority | None) -> Iterator[tuple[str, int]]:
    """The address of a port. authority: over TLS, with a certificate of it."""
    scrapes = Scrapes()
    if authority is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.of_server().values())
        scrapes = Scrapes(lambda: context)
    listener = listen_on("127.0.0.1:0", "metrics")
    with Http(listener, CollectorRegistry(), lambda: True, scrapes=scrapes) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            http.shutdown()
            thread.join()


def is_ready(address: tuple[str, int], authority: Authority | None) -> bool:
    context = None if authority is None else ssl.create_default_context(cafile=str(authority.ca))
    url = f"http{'s' if authority else ''}://127.0.0.1:{address[1]}/readyz"
    with urllib.request.urlopen(url, timeout=LIMIT_S, context=context) as response:
        return response.status == 200


def silent(plain: socket.socket, authority: Authority) -> socket.socket:
    return plain


def half_a_request(plain: socket.socket, authority: Authority) -> socket.socket:
    plain.sendall(b"GET /met")
    return plain


def half_a_request_over_tls(plain: socket.socket, authority: Authority) -> socket.socket:
    context = ssl.create_default_context(cafile=str(authority.ca))
    secured = context.wrap_socket(plain, server_hostname="127.0.0.1")
    secured.sendall(b"GET /met")
    return secured


def half_a_handshake(plain: socket.socket, authority: Authority) -> socket.socket:
    plain.sendall(b"\x16\x03\x01\x02\x00")
    return plain


def ended(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1)
    except (ConnectionResetError, ssl.SSLEOFError):
        return True


WAYS = [
    (False, silent),
    (False, half_a_request),
    (True, silent),
    (True, half_a_handshake),
    (True, half_a_request_over_tls),
]


@pytest.mark.parametrize(("tls", "begin"), WAYS)
def test_who_does_not_go_on_is_cut_off(monkeypatch, capfd, authority, tls, begin: Callable[..., socket.socket]):
    of_port = authority if tls else None
    with (
        serving(of_port) as address,
        socket.create_connection(address, LIMIT_S) as plain,
        begin(plain, authority) as connection,
    ):
        assert is_ready(address, of_port)
        monkeypatch.setattr(exporter, "LONGEST_S", 0.0)
        assert ended(connection)
    assert capfd.readouterr().err == ""  # whoever connects could fill the log


@pytest.mark.parametrize(("tls", "begin"), WAYS)
def test_of_too_many_the_oldest_have_to_go(monkeypatch, authority, tls, begin):
    monkeypatch.setattr(exporter, "MOST_CONNECTIONS", 4)
    of_port = authority if tls else None
    with serving(of_port) as address, ExitStack() as opened:
        connections = []
        for _ in range(10):
            plain = opened.enter_context(socket.create_connection(address, LIMIT_S))
            connections.append(opened.enter_context(begin(plain, authority)))
        assert all(ended(one) for one in connections[:6])
        assert is_ready(address, of_port)
        monkeypatch.setattr(exporter, "LONGEST_S", 0.0)
        assert all(ended(one) for one in connections)


def test_of_a_request_no_more_is_read_than_one_has(monkeypatch):
    monkeypatch.setattr(exporter, "LONGEST_S", 600.0)
    with serving(None) as address, socket.create_connection(address, LIMIT_S) as connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\n")
        with suppress(OSError):  # it may be over before all of it is sent
            for number in range(64):  # of which Python reads 99, of 64 KiB each
                connection.sendall(b"X-%d: " % number + b"x" * 2000 + b"\r\n")
        with suppress(ConnectionResetError):
            while connection.recv(1 << 16):
                pass
    with serving(None) as address:
        assert is_ready(address, None)
