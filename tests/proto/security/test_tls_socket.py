"""A socket inside TLS is one: to Python as a blocking one with the system's timeouts, to kernels by its `line`."""

import select
import socket
import struct
import threading
import time

import numpy as np
import pytest
from numba import njit

from certificates import Authority
from engrampool_proto.kernels.sockets import ENDED, LATE, SCRATCH_WORDS, receive_into, receive_some, send_from
from engrampool_proto.security.openssl import Context
from engrampool_proto.security.pem import Pem, PemError, PemFiles
from engrampool_proto.security.tls_socket import TlsSocket, line_of

LIMIT_S = 60.0
# Others go on meanwhile.
receive_without_gil = njit(nogil=True)(receive_some.py_func)


@pytest.fixture(scope="module")
def contexts(tmp_path_factory) -> tuple[Context, Context]:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    cert, key = authority.sign("server", ["server.svc"])
    pem = PemFiles(None, cert, key).read()
    return Context(pem, server=True), Context(Pem(ca=authority.ca.read_bytes()), server=False)


@pytest.fixture
def pair(contexts) -> tuple[TlsSocket, TlsSocket]:
    """A server's and a client's, which have agreed."""
    one, other = socket.socketpair()
    server, client = TlsSocket(one, contexts[0]), TlsSocket(other, contexts[1], "server.svc")
    with server, client:
        thread = threading.Thread(target=server.handshake, args=(time.monotonic() + LIMIT_S,))
        thread.start()
        client.handshake(time.monotonic() + LIMIT_S)
        thread.join()
        yield server, client


def scratch() -> np.ndarray:
    return np.zeros(SCRATCH_WORDS, np.int64)


def timeout(one: socket.socket, option: int, seconds: float) -> None:
    one.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6)))


def test_bytes_come_as_they_were_sent(pair):
    server, client = pair
    data = np.random.default_rng(0).bytes(300_000)
    thread = threading.Thread(target=server.sendall, args=(data,))
    thread.start()
    first, rest = bytearray(100_000), bytearray(150_000)
    assert client.recvmsg_into([first, rest], 0, socket.MSG_WAITALL)[0] == 250_000
    last = np.empty(50_000, np.uint8)
    assert receive_into(line_of(client), last, 0, 50_000, -1, scratch()) == 50_000
    thread.join()
    assert bytes(first + rest) + last.tobytes() == data
    assert send_from(line_of(client), np.frombuffer(b"words", np.uint8), -1, 10**9, scratch()) == 5
    assert server.recv(100) == b"words"
    assert client.sendmsg([b"a", memoryview(b"bc")]) == 3
    assert server.recv(2, socket.MSG_PEEK) == b"ab"
    assert server.recv(100) == b"abc"


def test_a_wait_ends_by_its_timeout_or_at_once(pair):
    server, client = pair
    with pytest.raises(BlockingIOError):
        client.recv_into(bytearray(1), 0, socket.MSG_DONTWAIT)
    with pytest.raises(BlockingIOError):
        client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    timeout(client, socket.SO_RCVTIMEO, 0.01)
    with pytest.raises(BlockingIOError):
        client.recv(1)
    server.sendall(b"ab")
    place = bytearray(3)
    assert client.recv_into(place, 0, socket.MSG_WAITALL) == 2  # in time
    timeout(server, socket.SO_SNDTIMEO, 0.01)
    with pytest.raises(TimeoutError):
        server.sendall(bytes(10 << 20))
    state = scratch()
    assert send_from(line_of(server), np.zeros(16 << 10, np.uint8), -1, 10**7, state) == LATE


def test_the_end_is_the_end_for_both(pair):
    server, client = pair
    server.sendall(b"last")
    server.shutdown(socket.SHUT_WR)
    assert (client.recv(10), client.recv(10)) == (b"last", b"")
    assert receive_into(line_of(client), np.empty(4, np.uint8), 0, 4, -1, scratch()) == 0
    client.sendall(b"but I say")
    assert server.recv(100) == b"but I say"
    client.close()
    assert server.recv(1) == b""


def test_of_one_that_is_closed_nothing_can_be_had(pair):
    server, client = pair
    server.sendall(b"there")
    line = line_of(client)
    client.close()
    assert client.fileno() == -1
    assert receive_into(line, np.empty(4, np.uint8), 0, 4, -1, scratch()) == 0
    assert send_from(line, np.zeros(4, np.uint8), time.monotonic_ns() + 10**7, 10**7, scratch()) in (ENDED, LATE)
    for use in (lambda: client.recv(1), lambda: client.sendall(b"x")):
        with pytest.raises(OSError, match="closed"):
            use()


def test_what_is_no_record_ends_the_connection(pair):
    server, client = pair
    socket.socket.send(server, b"\x17\x03\x03\x00\x20" + bytes(32))  # beside TLS, and not as the keys would have it
    with pytest.raises(ConnectionError, match=r"bad record mac|decryption failed"):
        client.recv(10)
    assert receive_into(line_of(client), np.empty(4, np.uint8), 0, 4, -1, scratch()) == 0


def test_who_waits_for_many_bytes_does_not_wait_for_those_that_openssl_has(contexts):
    one, here = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:  # what many bytes are waited for on
        there, (other, _) = socket.create_connection(listener.getsockname()), listener.accept()
    until = time.monotonic() + LIMIT_S
    with here, there, TlsSocket(one, contexts[0]) as server, TlsSocket(other, contexts[1], "server.svc") as client:
        sides = [threading.Thread(target=side.handshake, args=(until,)) for side in (server, client)]
        for thread in sides:
            thread.start()
        for source, to in ((there, here), (here, there), (there, here)):  # hello, hello, and that it is well
            to.sendall(source.recv(1 << 16))
        for thread in sides:
            thread.join()
        server.sendall(bytes(16_000))
        sent = here.recv(1 << 16, socket.MSG_WAITALL | socket.MSG_DONTWAIT)
        there.sendall(sent[:-10])
        data, state, got = np.ones(16_000, np.uint8), scratch(), []

        def receive() -> None:
            at, until_ns = np.uint64(data.ctypes.data), int(until * 1e9)
            got.append(receive_without_gil(line_of(client), at, 16_000, 16_000, until_ns, 0, state))

        waits = threading.Thread(target=receive)
        waits.start()
        while select.select([client], [], [], 0)[0]:
            time.sleep(0.001)  # until what came is with OpenSSL
        there.sendall(sent[-10:])
        waits.join()
        assert got == [16_000]
        assert not data.any()
        assert time.monotonic() < until


@pytest.mark.parametrize("size", [1, 5, 6, 20])
def test_a_record_that_came_in_part_is_something(pair, size):
    server, client = pair
    socket.socket.send(server, (b"\x17\x03\x03\x00\x20" + bytes(32))[:size])
    for _ in range(2):
        assert client.recv(8, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"\0"


def test_a_handshake_ends_by_its_time_and_says_what_is_wrong(contexts):
    one, other = socket.socketpair()
    with one, TlsSocket(other, contexts[1], "server.svc") as client:
        with pytest.raises(TimeoutError, match="takes too long"):
            client.handshake(time.monotonic() + 0.01)
        one.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(ConnectionError, match="no TLS with it"):
            client.handshake(time.monotonic() + LIMIT_S)
    one, other = socket.socketpair()
    with TlsSocket(other, contexts[0]) as server:
        one.close()
        with pytest.raises(ConnectionAbortedError, match="closed the connection"):
            server.handshake(time.monotonic() + LIMIT_S)


def test_a_certificate_that_is_none_is_refused():
    with pytest.raises(PemError, match="does not take"):
        Context(Pem(cert=b"junk", key=b"junk"), server=True)
