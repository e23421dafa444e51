"""The way into the direct lane: tickets that admit once, and where it listens."""

import hmac
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from engrampool_server.answer.lane import admission
from engrampool_server.answer.lane.admission import Admission, Tickets
from engrampool_server.ports import ListenError
from server_fixtures import LIMIT_S


@pytest.fixture
def tickets():
    made = Tickets()
    yield made
    made.close()


def test_a_ticket_is_good_once(tickets):
    first, second = tickets.issue(10, "a"), tickets.issue(10, "a")
    assert first != second
    assert [bool(tickets.take(ticket)) for ticket in (second, first, first, second)] == [True, True, False, False]


def test_a_ticket_is_bound_to_the_credential_that_it_was_asked_with(tickets):
    mine, others = (tickets.issue(10, "a", key) for key in (b"m" * 32, b"o" * 32))
    assert [tickets.take(others), tickets.take(mine)] == [b"o" * 32, b"m" * 32]
    assert tickets.take(tickets.issue(10, "a")) == bytes(32)


def test_a_ticket_is_good_once_for_threads_that_come_at_one_time(tickets, monkeypatch):
    looking, go_on, came = threading.Event(), threading.Event(), []
    compare = hmac.compare_digest

    def stop_the_first(*secrets: bytes) -> bool:
        if not looking.is_set():
            looking.set()
            assert go_on.wait(LIMIT_S)
        return compare(*secrets)

    monkeypatch.setattr(hmac, "compare_digest", stop_the_first)
    ticket = tickets.issue(10, "a")
    threads = [threading.Thread(target=lambda: came.append(bool(tickets.take(ticket)))) for _ in range(2)]
    threads[0].start()
    assert looking.wait(LIMIT_S)
    threads[1].start()
    threads[1].join(0.2)  # it has its time to come in between
    go_on.set()
    for thread in threads:
        thread.join(LIMIT_S)
    assert sorted(came) == [False, True]  # whichever comes to say so first


def test_what_was_never_issued_is_no_ticket(tickets):
    ticket = tickets.issue(10, "a")
    last = bytes([ticket[-1] ^ 1])
    others = [b"", ticket[:-1], ticket + b"\0", ticket[:-1] + last, bytes(36), b"\xff" * 36, b"\1\0\0\0" + ticket[4:]]
    assert not any(map(tickets.take, others))
    assert tickets.take(ticket)


def test_a_ticket_grows_old(tickets, monkeypatch):
    ticket = tickets.issue(10, "a")
    now = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: now + 10_100_000_000)
    assert not tickets.take(ticket)


def test_a_peer_that_asks_for_many_loses_its_own_oldest_ones(tickets):
    other = tickets.issue(10, "another")
    issued = [tickets.issue(10, "greedy") for _ in range(admission._SLOTS + 100)]
    assert None not in issued
    assert tickets.take(other)
    good = [bool(tickets.take(ticket)) for ticket in issued]
    assert good == [False] * (len(issued) - admission._OF_PEER) + [True] * admission._OF_PEER


def test_where_no_slot_is_free_whoever_has_most_loses_its_oldest(tickets):
    # Expiry is what tells the oldest, and two of one moment are equally old.
    few = [tickets.issue(10 + at, "few") for at in range(3)]
    many = [[tickets.issue(10 + at, f"peer {n}") for at in range(admission._OF_PEER)] for n in range(15)]
    most = [tickets.issue(10 + at, "more") for at in range(admission._SLOTS - 3 - 15 * admission._OF_PEER)]
    fresh = [tickets.issue(100, "newcomer"), tickets.issue(100, "few")]
    assert all(map(tickets.take, [*fresh, *few, *most]))
    assert sum(not tickets.take(of_peer[0]) for of_peer in many) == 2
    assert all(tickets.take(ticket) for of_peer in many for ticket in of_peer[1:])


# In a process of its own: in one with many tests behind it, handlers of forks end a child by a signal now and then.
FORKS = """
import hmac, os, signal, traceback
from engrampool_server.answer.lane import admission
from engrampool_server.answer.lane.admission import Tickets

tickets = Tickets()

def fork(work):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.alarm(60)  # it hangs by then
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid

def status(pid, how=0):
    return os.waitpid(pid, how)[1]
"""

# A process stops in the midst of taking a ticket.
STOPPED = """
ticket = tickets.issue(10, "a")

def take():
    hmac.compare_digest = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    tickets.take(ticket)

def go_on():
    others = [tickets.issue(10, "a") for _ in range(2 * admission._SLOTS)]
    assert None not in others
    assert tickets.take(others[-1])
    assert not tickets.take(others[-1])
    assert not tickets.take(ticket)  # somebody is taking it

stopped = fork(take)
try:
    assert os.WIFSTOPPED(status(stopped, os.WUNTRACED))
    assert status(fork(go_on)) == 0, "it waits for the process that is stopped"
finally:
    os.kill(stopped, signal.SIGKILL)
    status(stopped)
assert tickets.take(tickets.issue(10, "a"))
"""

# Three take the same tickets at once.
MANY = """
issued = [tickets.issue(60, f"peer {at % 4}") for at in range(200)]
reader, writer = os.pipe()
taking = [
    fork(lambda: os.write(writer, bytes(bool(tickets.take(ticket)) for ticket in issued)))
    for _ in range(3)
]
assert [status(pid) for pid in taking] == [0] * 3
taken = [os.read(reader, 200) for _ in taking]
assert [sum(by) for by in zip(*taken, strict=True)] == [1] * 200
"""


@pytest.mark.parametrize("code", [STOPPED, MANY], ids=["one is stopped", "of many one is let in"])
def test_processes_that_take_tickets_at_once(code):
    done = subprocess.run([sys.executable, "-c", FORKS + code], capture_output=True, text=True, timeout=2 * LIMIT_S)
    assert done.returncode == 0, done.stderr


def test_a_slot_that_changes_while_a_ticket_is_to_take_it_is_left_alone(tickets, monkeypatch):
    ticket = tickets.issue(10, "a")
    index = int.from_bytes(ticket[:4], "little")
    candidates = tickets._candidates
    # As another process would have seen it before that ticket was issued.
    monkeypatch.setattr(tickets, "_candidates", lambda *about: [(index, 0), *candidates(*about)])
    assert tickets.issue(10, "b") != ticket
    assert tickets.take(ticket)


def test_where_clients_are_told_to_go():
    for direct, host in [("auto", ""), ("127.0.0.1:0", ""), ("0.0.0.0:0", ""), ("127.0.0.2:0", "127.0.0.2")]:
        made = Admission.open(direct, "127.0.0.1:50051")
        assert (made.host, made.port) == (host, made.listener.getsockname()[1])
        assert made.unix_path == ""
        made.close()
    assert Admission.open("off", "127.0.0.1:50051") is None


def test_a_port_that_is_taken_is_said_so():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ListenError, match=f"cannot listen on {address} for the direct lane: in use"):
            Admission.open(address, "127.0.0.1:1")


def test_a_unix_socket_comes_and_goes(tmp_path):
    path = tmp_path / "lane"
    made = Admission.open(f"unix:{path}", "127.0.0.1:1")
    assert (made.host, made.port, made.unix_path) == ("", 0, str(path))
    with pytest.raises(ListenError, match="in use"):
        Admission.open(f"unix:{path}", "127.0.0.1:1")
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
    Admission.open(f"unix:{path}", "127.0.0.1:1").close()
    path.write_text("somebody's")
    with pytest.raises(ListenError, match="in use"):
        Admission.open(f"unix:{path}", "127.0.0.1:1")
    assert path.read_text() == "somebody's"
    with pytest.raises(ListenError, match="too long"):
        Admission.open(f"unix:{tmp_path / ('x' * 200)}", "127.0.0.1:1")
