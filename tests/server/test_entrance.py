"""The way into the direct lane: tickets that admit once, and where it listens."""

import multiprocessing
import os
import socket
import time

import pytest

from engrampool_server import entrance
from engrampool_server.entrance import Entrance, Tickets
from engrampool_server.ports import ListenError


@pytest.fixture
def tickets():
    made = Tickets()
    yield made
    made.close()


def test_a_ticket_is_good_once(tickets):
    first, second = tickets.issue(10), tickets.issue(10)
    assert first != second
    assert [tickets.take(ticket) for ticket in (second, first, first, second)] == [True, True, False, False]


def test_what_was_never_issued_is_no_ticket(tickets):
    ticket = tickets.issue(10)
    last = bytes([ticket[-1] ^ 1])
    others = [b"", ticket[:-1], ticket + b"\0", ticket[:-1] + last, bytes(36), b"\xff" * 36, b"\1\0\0\0" + ticket[4:]]
    assert not any(map(tickets.take, others))
    assert tickets.take(ticket)


def test_a_ticket_grows_old(tickets, monkeypatch):
    ticket = tickets.issue(10)
    now = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: now + 10_100_000_000)
    assert not tickets.take(ticket)


def test_tickets_that_are_still_good_are_never_given_up_for_new_ones(tickets, monkeypatch):
    issued = [tickets.issue(10) for _ in range(entrance._SLOTS)]
    assert tickets.issue(10) is None
    assert tickets.take(issued[0])
    assert tickets.issue(10) is not None
    now = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: now + 10_100_000_000)
    assert tickets.issue(10) is not None


def test_of_many_processes_one_is_let_in(tickets):
    issued = [tickets.issue(60) for _ in range(200)]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def take() -> None:
        results.put([tickets.take(ticket) for ticket in issued])

    processes = [context.Process(target=take) for _ in range(3)]
    for process in processes:
        process.start()
    taken = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert [sum(by) for by in zip(*taken, strict=True)] == [1] * 200


def test_where_clients_are_told_to_go():
    for direct, host in [("auto", ""), ("127.0.0.1:0", ""), ("0.0.0.0:0", ""), ("127.0.0.2:0", "127.0.0.2")]:
        made = Entrance.open(direct, "127.0.0.1:50051")
        assert (made.host, made.port) == (host, made.listener.getsockname()[1])
        assert made.unix_path == ""
        made.close()
    assert Entrance.open("off", "127.0.0.1:50051") is None


def test_a_port_that_is_taken_is_said_so():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ListenError, match=f"cannot listen on {address} for the direct lane: in use"):
            Entrance.open(address, "127.0.0.1:1")


def test_a_unix_socket_comes_and_goes(tmp_path):
    path = tmp_path / "lane"
    made = Entrance.open(f"unix:{path}", "127.0.0.1:1")
    assert (made.host, made.port, made.unix_path) == ("", 0, str(path))
    with pytest.raises(ListenError, match="in use"):
        Entrance.open(f"unix:{path}", "127.0.0.1:1")
    pid = os.fork()
    if not pid:  # a worker that ends leaves the path to the others
        made.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert path.exists()
    made.close()
    assert not path.exists()


def test_what_a_killed_server_left_is_replaced_and_nothing_else_is(tmp_path):
    path = tmp_path / "lane"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    Entrance.open(f"unix:{path}", "127.0.0.1:1").close()
    path.write_text("somebody's")
    with pytest.raises(ListenError, match="in use"):
        Entrance.open(f"unix:{path}", "127.0.0.1:1")
    assert path.read_text() == "somebody's"
    with pytest.raises(ListenError, match="too long"):
        Entrance.open(f"unix:{tmp_path / ('x' * 200)}", "127.0.0.1:1")
