"""Ports are taken before anything else, by one server only, and for as long as it holds on to them."""

import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from engrampool_server import ports
from engrampool_server.ports import ListenError, listen_on, reserve
from server_fixtures import lasting_address


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(ports, "PATIENCE_S", 0.1)


@pytest.fixture
def held():
    with ExitStack() as stack:

        def hold(listen: str) -> str:
            address, sockets = reserve(listen)
            for one in sockets:
                stack.enter_context(one)
            return address

        yield hold


def listener(address: str, *options: int) -> socket.socket:
    taken = socket.socket()
    for option in (socket.SO_REUSEADDR, *options):
        taken.setsockopt(socket.SOL_SOCKET, option, 1)
    host, port = address.split(":")
    try:
        taken.bind((host, int(port)))
        taken.listen()
    except OSError:
        taken.close()
        raise
    return taken


def test_a_reserved_port_is_for_several_listeners_of_ours_and_for_no_other_server(held):
    address = held("127.0.0.1:0")
    assert address.startswith("127.0.0.1:")
    for _ in range(2):  # with nobody listening yet, and with two workers
        with pytest.raises(ListenError, match=rf"cannot listen on {address}: in use"):
            reserve(address)
        with pytest.raises(OSError, match="in use"):
            listener(address)
        workers = [listener(address, socket.SO_REUSEPORT) for _ in range(2)]
        with socket.create_connection(address.split(":")):
            pass
        with pytest.raises(ListenError, match="in use"):
            reserve(address)
        for worker in workers:
            worker.close()


@pytest.mark.parametrize("other", ["0.0.0.0", "[::]"])
def test_a_port_taken_for_one_address_is_not_to_be_had_for_all(held, other):
    port = held("127.0.0.1:0").split(":")[1]
    with pytest.raises(ListenError, match="in use"):
        reserve(f"{other}:{port}")


def test_a_port_is_free_again_at_once_whatever_connections_it_had(held):
    address, sockets = reserve(lasting_address())
    worker = listener(address, socket.SO_REUSEPORT)
    with socket.create_connection(address.split(":")) as client:
        accepted, _ = worker.accept()
        accepted.close()  # first, so that it is this side that has to remember the connection
        assert client.recv(1) == b""
    for one in (worker, *sockets):
        one.close()
    assert held(address) == address


def test_it_waits_for_a_server_that_was_just_killed(monkeypatch, held):
    monkeypatch.setattr(ports, "PATIENCE_S", 30)
    command = (
        "import socket, sys\n"
        "taken = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "print(flush=True)\n"
        "sys.stdin.read()"  # until the other end is closed
    )
    address = lasting_address()  # nobody else's in between
    started = [sys.executable, "-c", command, address.split(":")[1]]
    with subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        asked = []

        def sleep(seconds: float) -> None:
            asked.append(seconds)
            other.stdin.close()
            other.wait()

        monkeypatch.setattr(ports.time, "sleep", sleep)
        assert held(address) == address
        assert len(asked) == 1


def test_localhost_is_all_its_addresses_on_one_port(held):
    address = held("localhost:0")
    host, port = address.split(":")
    assert host == "localhost"
    for *_, where in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM):
        with pytest.raises(ListenError, match="in use"):
            reserve(f"[{where[0]}]:{port}" if ":" in where[0] else f"{where[0]}:{port}")


@pytest.mark.parametrize("take", [reserve, listen_on])
@pytest.mark.parametrize("listen", ["192.0.2.1:5", "no-such-host.invalid:5"])
def test_what_is_no_address_of_this_machine_is_told(take, listen):
    with pytest.raises(ListenError, match=f"cannot listen on {listen}"):
        take(listen)


def test_a_listening_socket_is_one_for_all_and_says_what_it_was_for():
    with listen_on("127.0.0.1:0") as one:
        address = f"127.0.0.1:{one.getsockname()[1]}"
        with socket.create_connection(address.split(":")):
            pass
        with pytest.raises(ListenError, match=rf"cannot listen on {address} for metrics: in use"):
            listen_on(address, "metrics")
