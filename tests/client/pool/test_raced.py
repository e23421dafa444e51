"""A small request that several servers could answer: whom it listens to, and what becomes of the other."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any

import numpy as np
import pytest

from direct_peers import numbered, peer, rows_frame, whole_answer
from engrampool_client import DeadlineError
from engrampool_client.errors import StepCancelledError
from engrampool_client.lanes.native import NativeLane
from engrampool_client.lanes.small import SmallRequest
from engrampool_client.lookup.sent import Came
from engrampool_client.lookup.small import Small
from engrampool_client.pool.latency import Latency
from engrampool_client.pool.raced import Raced
from engrampool_client.pool.replicas import ReplicaSet
from engrampool_client.stats import Stats
from engrampool_proto import frames
from engrampool_proto.v1 import pool_pb2
from server_fixtures import LIMIT_S

pytestmark = pytest.mark.usefixtures("patient")
COUNT = 50  # rows of each layer
LAYERS = (2, 9)
NBYTES = 3 * COUNT * len(LAYERS)
# Of one row of each.
ONE_EACH = Small(("m", "v", LAYERS), np.ones(2, np.int64), np.zeros(16, np.uint8), {}, (), 6)


class Server:
    """What a set knows of a server with a lane to a peer. It notes what is said of it."""

    target, in_trouble = "a peer", None

    def __init__(self, lane: NativeLane, attached: bool = False) -> None:
        self.lane, self.attached = lane, attached
        self.latency, self.breaker = Latency(), self
        self.said: list[str] = []

    @property
    def sends(self) -> int | None:
        return 0 if self.lane.idle else None

    def send_direct(self, small: Small, deadline: float) -> SmallRequest | None:
        connection = self.lane.take()
        if connection is None:
            return None
        assert SmallRequest.send_now(connection, small, deadline - time.monotonic())
        return SmallRequest(self.lane, connection, small, lambda *_: self.said.append("answered"), self.failed)

    def doubt(self) -> None:
        self.said.append("doubted")

    def failed(self, error: Exception) -> None:
        self.said.append(type(error).__name__)


class Asked:
    """A request by a set of these servers, in this order, and what comes of it."""

    def __init__(self, *servers: Any, late_s: float | None = 1e-3, tokens: int = 1) -> None:
        """late_s: when an answer is known to be late; None if it is not."""
        self.set = ReplicaSet({}, set(), Stats(LAYERS))
        self.set.replicas, self.set.fits_bytes = servers, inf
        for _ in range(0 if late_s is None else 20):
            servers[-1].latency.began(NBYTES, late_s)
        for _ in range(20 * tokens):
            self.set.budget.earn()
        self.rows = {layer: np.zeros((COUNT, 3), np.uint8) for layer in LAYERS}
        ids = np.zeros(frames.padded(4 * COUNT) * len(LAYERS), np.uint8)
        self.small = Small(("m", "v", LAYERS), np.full(len(LAYERS), COUNT), ids, self.rows, (), NBYTES)
        request = self.set.send(self.small, time.monotonic() + LIMIT_S)
        assert isinstance(request, Raced)
        self.request = request

    def come(self, until: float | None = None) -> int | Came:
        until = time.monotonic() + 0.05 if until is None else until
        came = self.request.ready(until, 0.0)
        return self.request.take(until, 0.0) if came is None else came

    def to_the_end(self) -> Came:
        end = time.monotonic() + LIMIT_S
        while (came := self.come()) is Came.LATER or isinstance(came, int):
            assert time.monotonic() < end
        return came

    def check(self, wanted: dict[int, bytes]) -> None:
        assert self.to_the_end() is Came.ALL
        assert {layer: rows.tobytes() for layer, rows in self.rows.items()} == wanted
        self.request.let_go(None)

    @property
    def hedges(self) -> tuple[int, int]:
        return self.set.stats.hedges, self.set.stats.hedges_won


def silent(connection: socket.socket, _: int) -> None:
    """Say nothing until the client leaves."""
    with suppress(ConnectionError):
        assert connection.recv(1) == b""


def after(event: threading.Event, sent: bytes) -> Callable[[socket.socket, int], None]:
    def reply(connection: socket.socket, number: int) -> None:
        assert event.wait(LIMIT_S)
        connection.sendall(numbered(sent, number))

    return reply


@pytest.fixture(autouse=True)
def only_for_a_reason(monkeypatch):
    """No server is left for another one as this machine is slow."""
    monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S", LIMIT_S)


def test_the_second_answers_for_one_that_is_silent():
    wanted, sent = whole_answer(COUNT, set())
    with peer(silent) as one, peer(sent, sent) as other:
        first, second = Server(one), Server(other)
        Asked(first, second).check(wanted)
        assert (first.said, second.said) == (["doubted"], ["answered"])
        assert first.latency._whole[14]._last[-1] == inf
        assert not one.connections  # it can serve nobody else
        asked = Asked(second, second)  # on the same connection
        asked.check(wanted)
        assert asked.hedges == (0, 0)


def test_the_first_may_still_be_the_first_to_answer():
    wanted, sent = whole_answer(COUNT, set())
    second_asked = threading.Event()

    def second_reply(connection: socket.socket, number: int) -> None:
        second_asked.set()
        silent(connection, number)

    with peer(after(second_asked, sent)) as one, peer(second_reply) as other:
        first, second = Server(one), Server(other)
        asked = Asked(first, second)
        asked.check(wanted)
        assert asked.hedges == (1, 0)
        assert (first.said, second.said) == (["answered"], [])
        assert one.idle
        assert not other.connections


@pytest.mark.parametrize("how", ["refuses", "breaks"])
def test_a_second_that_refuses_or_breaks_does_not_cost_the_first_ones_answer(how):
    wanted, sent = whole_answer(COUNT, set())
    over = threading.Event()

    def second_reply(connection: socket.socket, number: int) -> None:
        if how == "refuses":
            refusal = pool_pb2.Refusal(code=8, reason="overloaded", text="too much").SerializeToString()
            connection.sendall(frames.frame(frames.REFUSED, refusal, number))
        else:
            connection.shutdown(socket.SHUT_RDWR)
        over.set()
        silent(connection, number)

    with peer(after(over, sent)) as one, peer(second_reply) as other:
        asked = Asked(Server(one), Server(other))
        asked.check(wanted)
        assert asked.hedges == (1, 0)


def test_one_that_breaks_in_mid_answer_is_not_asked_of_the_other():
    """Whoever has the lookup asks again, for what is missing."""
    wanted, sent = whole_answer(COUNT, set())
    layer_2 = rows_frame(2, 0, wanted[2])
    with peer(lambda connection, number: connection.sendall(numbered(layer_2, number))) as one, peer(sent) as other:
        asked = Asked(Server(one), Server(other), late_s=None)
        assert asked.to_the_end() is Came.NOTHING
        asked.request.let_go(None)
        assert not one.connections
        assert other.idle


@pytest.mark.parametrize(("late_s", "tokens"), [(None, 1), (1e-3, 0), (LIMIT_S, 1)])
def test_without_a_measure_or_a_budget_or_before_it_is_late_one_is_waited_for(late_s, tokens):
    wanted, sent = whole_answer(COUNT, set())
    looked = threading.Event()
    with peer(after(looked, sent)) as one, peer(silent) as other:
        asked = Asked(Server(one), Server(other), late_s=late_s, tokens=tokens)
        for _ in range(3):
            assert asked.come() is Came.LATER
        looked.set()
        asked.check(wanted)
        assert asked.hedges == (0, 0)
        assert other.idle


@pytest.mark.parametrize("tokens", [0, 1])
def test_what_none_begins_to_answer_in_time_comes_to_nothing(monkeypatch, tokens):
    monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S", 0.02)
    with peer(silent) as one, peer(silent) as other:
        first, second = Server(one), Server(other)
        asked = Asked(first, second, tokens=tokens)
        assert asked.to_the_end() is Came.NOTHING
        assert first.said == ["DeadlineError"]  # as of a lookup that any of them may answer
        assert first.latency._whole[14]._last[-1] == inf
        asked.request.let_go(None)
        assert not one.connections
        assert other.idle is (tokens == 0)


def test_the_time_that_nobody_came_for_it_is_not_counted_against_a_server(monkeypatch):
    """Its answer has come by then, and one that has not is waited for."""
    monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S", 0.05)
    wanted, sent = whole_answer(COUNT, set())
    with peer(sent) as one, peer(silent) as other:
        first = Server(one)
        asked = Asked(first, Server(other))
        asked.request._since -= 100.0
        asked.request._late_at -= 100.0
        connection = asked.request._request.connection
        while not connection.promises():  # it lies in the socket
            time.sleep(0)
        asked.check(wanted)
        assert asked.hedges == (0, 0)
        assert not first.latency._first  # nobody knows how long it took
        assert not first.latency._whole


def test_who_does_not_wait_asks_another_once_it_is_late():
    wanted, sent = whole_answer(COUNT, set())
    with peer(silent) as one, peer(sent) as other:
        asked = Asked(Server(one), Server(other))
        end = time.monotonic() + LIMIT_S
        while (came := asked.come(0.0)) is not Came.ALL:
            assert came is Came.LATER or isinstance(came, int)
            assert time.monotonic() < end
        asked.check(wanted)
        assert asked.hedges == (1, 1)


@pytest.mark.parametrize("error", [None, DeadlineError("late"), StepCancelledError("cancelled")])
def test_given_up_both_are_let_go_of(error):
    asked_both = threading.Event()

    def second_reply(connection: socket.socket, number: int) -> None:
        asked_both.set()
        silent(connection, number)

    with peer(silent) as one, peer(second_reply) as other:
        asked = Asked(Server(one), Server(other))
        found: list[object] = []
        waiter = threading.Thread(target=lambda: found.append(asked.come(time.monotonic() + 10 * LIMIT_S)))
        waiter.start()
        assert asked_both.wait(LIMIT_S)
        while asked.request._second is None:
            time.sleep(0)
        asked.request.shut()
        waiter.join(LIMIT_S)
        assert found == [Came.NOTHING]
        asked.request.let_go(error)
        assert not one.connections
        assert not other.connections


def test_attached_memory_is_read_and_a_set_that_cannot_send_sends_nothing():
    with peer(silent) as one, peer(silent) as other:
        made = ReplicaSet({}, set(), Stats(LAYERS))
        assert made.sends is None
        made.replicas = (Server(one), Server(other))  # type: ignore[assignment]
        assert made.sends == 0
        made.replicas = (Server(one), Server(other, attached=True))  # type: ignore[assignment]
        assert made.sends is None
        for lane in (one, other):
            taken = lane.take()
            assert taken is not None
            lane.drop(taken)
        made.replicas = (Server(one), Server(other))  # type: ignore[assignment]
        assert made.sends is None
        assert made.send(ONE_EACH, time.monotonic() + 1) is None


def test_what_is_over_the_limits_of_a_set_is_not_sent():
    with peer(silent) as one:
        made = ReplicaSet({}, set(), Stats(LAYERS))
        made.replicas, made.fits_bytes = (Server(one),), 5  # type: ignore[assignment]
        assert made.send(ONE_EACH, time.monotonic() + 1) is None
        assert one.idle
