"""Replicas: which of them is asked, when another is asked as well, and that rows come once and right at any rate."""

import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from direct_peers import exchange, numbered, peer, whole_answer
from engrampool_client import (
    Client,
    DeadlineError,
    OverloadedError,
    PoolError,
    ProtocolError,
    RejectedError,
    Step,
    StepCancelledError,
    UnavailableError,
    UnknownModelError,
    UnknownVersionError,
)
from engrampool_client.lanes.native import NativeLane
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.pool import latency as measured
from engrampool_client.pool.latency import HedgeBudget, Latency
from engrampool_client.pool.replicas import ReplicaSet
from engrampool_client.stats import Stats
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto import frames
from engrampool_proto.v1 import pool_pb2
from server_fixtures import LIMIT_S, Running, eventually, expected, lasting_address, pack, running, used

pytestmark = pytest.mark.usefixtures("patient")
COUNT = 50  # rows of each layer that peers are asked for
NBYTES = 2 * 3 * COUNT
LATE_S = 1e-3


@pytest.fixture(autouse=True)
def only_for_a_reason(monkeypatch, all_are_there):
    """No replica is left for another one as this machine is slow."""
    monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S", LIMIT_S)


class Replica:
    """What a set knows of a server. lane: to a peer, or None for one that is asked over gRPC and says `reply`."""

    def __init__(self, lane: NativeLane | None = None, reply: PoolError | None = None, attached: bool = False) -> None:
        self.lane, self.reply, self.attached = lane, reply, attached
        self.latency, self.breaker = Latency(), SimpleNamespace(doubt=lambda: setattr(self, "doubted", True))
        self.in_trouble, self.doubted = None, False
        self.asked: list[tuple[float, bool]] = []  # seconds that it was given, and whether that was early

    def ask(self, exchange: Any, deadline: float, spin_s: float = 0.0, send_by: float | None = None) -> "Asked":
        sent = None if self.lane is None else self.lane.ask(exchange, deadline, spin_s=spin_s, send_by=send_by)
        return Asked(self, exchange, deadline, sent)


class Asked:
    """What a set knows of a request."""

    def __init__(self, replica: Replica, exchange: Any, deadline: float, sent: Any) -> None:
        self._replica, self._exchange, self._deadline, self.sent = replica, exchange, deadline, sent

    def renew(self, deadline: float) -> None:
        self._deadline = deadline
        if self.sent is not None:
            self.sent.deadline = deadline

    def receive(self, *, patient: bool = True, early: bool = False) -> None:
        self._replica.asked.append((self._deadline - time.monotonic(), early))
        if self._replica.lane is not None:
            if self.sent is None or not self.sent.receive():
                raise UnavailableError("it broke")
        elif self._replica.reply is not None:
            raise self._replica.reply

    def abandon(self) -> None:
        if self.sent is not None:
            self.sent.abandon()


def within(seconds: float) -> Any:
    """A request that has so long."""
    return exchange(COUNT, delivery=Delivery([2, 9], time.monotonic() + seconds))


def set_of(*replicas: Replica, known: bool = True, tokens: int = 1, late_s: float = LATE_S) -> ReplicaSet:
    """A set that asks them in this order. known: when an answer is late (`late_s`); tokens: of the budget."""
    made = ReplicaSet({}, set(), Stats([2, 9]))
    made.replicas = replicas
    for _ in range(measured._FEWEST if known else 0):
        replicas[-1].latency.began(NBYTES, late_s)
        replicas[-1].latency.ended(NBYTES, late_s)
    for _ in range(20 * tokens):
        made.budget.earn()
    return made


def outcome(made: ReplicaSet) -> tuple[int, int]:
    return made.stats.hedges, made.stats.hedges_won


# --- the measure


@given(st.lists(st.sampled_from(["lookups", "spend"]), max_size=400), st.integers(1, 30))
def test_a_budget_is_never_overdrawn(wishes, lookups):
    budget, earned, spent = HedgeBudget(), 0, 0
    for wish in wishes:
        if wish == "lookups":
            earned += lookups
            for _ in range(lookups):
                budget.earn()
        before, spent = spent, spent + budget.ready
        if spent > before:
            budget.spend()
        assert spent <= 0.05 * earned + 1e-9
        assert budget._tokens <= measured._MOST_TOKENS
    for _ in range(20):  # whatever was before, one more may be had then
        budget.earn()
    assert budget.ready


def test_what_many_threads_spend_at_once_is_earned_later():
    budget = HedgeBudget()
    for _ in range(20):
        budget.earn()
    for _ in range(3):
        budget.spend()
    for needed in range(60):
        assert not budget.ready, needed
        budget.earn()


@given(st.lists(st.floats(0, 10) | st.just(inf), max_size=300))
def test_quantiles_are_those_of_the_last_answers(seconds):
    latency = Latency()
    for one in seconds:
        latency.began(NBYTES, one)
        latency.ended(NBYTES, one)
    last, recent = sorted(seconds[-256:]), sorted(seconds[-5:])
    wanted = last[int(0.98 * len(last))] if len(last) >= 20 else None
    assert latency.late_s(NBYTES, whole=True) == latency.late_s(NBYTES, whole=False) == wanted
    assert latency.recent_s(NBYTES) == (recent[len(recent) // 2] if len(recent) >= 3 else None)
    assert latency.recent_s(1 << 20) is latency.late_s(1 << 20, whole=True) is None


# --- the order


def first_asked(made: ReplicaSet, lookups: int) -> Counter[Replica]:
    return Counter(made.in_order(NBYTES)[0] for _ in range(lookups))


@pytest.fixture
def clock(monkeypatch):
    """A clock of the order's, to be turned by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("engrampool_client.pool.replicas.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_one_that_is_slow_is_only_tried_until_it_is_well_again(clock):
    well, also, slow = Replica(), Replica(), Replica()
    made = set_of(well, also, slow, known=False)
    assert first_asked(made, 300) == {well: 100, also: 100, slow: 100}  # nothing is known
    for _ in range(3):
        well.latency.ended(NBYTES, 1e-3)
        also.latency.ended(NBYTES, 2.9e-3)
        slow.latency.ended(NBYTES, 3.1e-3)
    # A second has not passed since it was first passed over.
    assert first_asked(made, 600)[slow] == 0
    assert all(made.in_order(NBYTES)[-1] is slow for _ in range(3))
    clock.now += 1
    assert first_asked(made, 600)[slow] == 1
    clock.now += 60
    assert first_asked(made, 600)[slow] == 1
    clock.now += 60
    assert first_asked(made, 1)[slow] == 1
    clock.now += 60
    assert first_asked(made, 199)[slow] == 0
    assert first_asked(made, 1)[slow] == 1
    for _ in range(2):
        slow.latency.ended(NBYTES, 1e-3)
    assert first_asked(made, 3)[slow] == 0
    slow.latency.ended(NBYTES, 1e-3)
    assert first_asked(made, 300) == {well: 100, also: 100, slow: 100}
    # A single answer that is late, or does not come, changes nothing.
    well.latency.ended(NBYTES, inf)
    also.latency.ended(NBYTES, 1.0)
    assert first_asked(made, 300) == {well: 100, also: 100, slow: 100}


def test_slow_ones_come_after_attached_ones_and_before_those_that_are_away(clock):
    attached, well, slow, away = Replica(attached=True), Replica(), Replica(), Replica()
    away.in_trouble = "it is away"
    made = set_of(away, slow, well, attached, known=False)
    for _ in range(5):
        well.latency.ended(NBYTES, 1e-3)
        slow.latency.ended(NBYTES, inf)
    for _ in range(10):
        assert made.in_order(NBYTES) == [attached, well, slow, away]
    assert set(made.in_order(1 << 20)[1:3]) == {well, slow}  # of this size nothing is known


def test_differences_of_microseconds_are_none(clock):
    fast, other = Replica(), Replica()
    made = set_of(fast, other, known=False)
    for _ in range(5):
        fast.latency.ended(NBYTES, 20e-6)
        other.latency.ended(NBYTES, 290e-6)
    assert first_asked(made, 20) == {fast: 10, other: 10}


# --- hedges on the direct lane


def lookup(made: ReplicaSet, wanted: dict[int, bytes], begun: bool = False, out: bool = False) -> None:
    step = Delivery([2, 9], time.monotonic() + LIMIT_S)
    made.ask(exchange(COUNT, out, step), 1e-4, prompt=begun).receive()
    assert {layer: step.rows[layer].tobytes() for layer in (2, 9)} == wanted


def silent(connection: socket.socket, _: int) -> None:
    """Say nothing until the client leaves."""
    with suppress(ConnectionError):
        assert connection.recv(1) == b""


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("out", [False, True])
def test_the_second_answers_for_one_that_is_silent(begun, out):
    wanted, sent = whole_answer(COUNT, {7})
    with peer(silent) as first, peer(sent, sent) as second:
        made = set_of(Replica(first), Replica(second))
        lookup(made, wanted, begun, out)
        assert outcome(made) == (1, 1)
        made.replicas = made.replicas[1:]
        lookup(made, wanted)  # on the same connection


def test_the_first_may_still_be_the_first_to_answer():
    wanted, sent = whole_answer(COUNT, set())
    second_asked = threading.Event()

    def first_reply(connection: socket.socket, number: int) -> None:
        assert second_asked.wait(LIMIT_S)
        connection.sendall(numbered(sent, number))

    def second_reply(connection: socket.socket, number: int) -> None:
        second_asked.set()
        silent(connection, number)

    with peer(first_reply, sent) as first, peer(second_reply) as second:
        made = set_of(Replica(first), Replica(second))
        lookup(made, wanted)
        assert outcome(made) == (1, 0)
        made.replicas = made.replicas[:1]
        lookup(made, wanted)


def refusing(code: int, asked: threading.Event | None = None) -> Callable[[socket.socket, int], None]:
    refusal = pool_pb2.Refusal(code=code, reason="overloaded", text="too much").SerializeToString()

    def reply(connection: socket.socket, number: int) -> None:
        connection.sendall(frames.frame(frames.REFUSED, refusal, number))
        if asked is not None:
            asked.set()
        silent(connection, number)

    return reply


@pytest.mark.parametrize("ends", [False, True])
def test_a_second_that_refuses_or_breaks_does_not_cost_the_first_ones_answer(ends):
    wanted, sent = whole_answer(COUNT, set())
    refused = threading.Event()

    def first_reply(connection: socket.socket, number: int) -> None:
        assert refused.wait(LIMIT_S)
        connection.sendall(numbered(sent, number))

    second_reply = (lambda *_: refused.set()) if ends else refusing(8, refused)
    with peer(first_reply) as first, peer(second_reply) as second:
        made = set_of(Replica(first), Replica(second))
        lookup(made, wanted)
        assert outcome(made) == (1, 0)


def test_a_second_that_breaks_in_mid_answer_leaves_nothing_of_incomplete_layers():
    wanted, sent = whole_answer(COUNT, {7})
    wrong = bytes(
        np.frombuffer(sent, np.uint8) ^ (np.arange(len(sent)) >= frames.HEADER.size)
    )  # its rows, as far as they come
    cut = frames.HEADER.size + 30
    with peer(silent) as first, peer(wrong[:cut]) as second, peer(sent) as third:
        made = set_of(Replica(first), Replica(second), Replica(third))
        lookup(made, wanted, out=True)
        assert outcome(made) == (1, 1)


@pytest.mark.parametrize(("known", "tokens"), [(False, 1), (True, 0)])
def test_without_a_measure_or_a_budget_one_is_waited_for(monkeypatch, known, tokens):
    wanted, sent = whole_answer(COUNT, set())
    with peer(silent) as first, peer(sent) as second:
        one, other = Replica(first), Replica(second)

        def patience(*_: object) -> float:  # for the silent one only
            return time.monotonic() + (LIMIT_S if one.asked else 0.02)

        monkeypatch.setattr("engrampool_client.pool.replicas._deadline", patience)
        made = set_of(one, other, known=known, tokens=tokens)
        lookup(made, wanted)
        assert outcome(made) == (0, 0)
        assert len(one.asked) == len(other.asked) == 1


def test_a_refusal_is_no_reason_to_ask_twice():
    wanted, sent = whole_answer(COUNT, set())
    with peer(refusing(8)) as first, peer(sent) as second:
        made = set_of(Replica(first), Replica(second), late_s=LIMIT_S)  # however slow this machine is now
        lookup(made, wanted)
        assert outcome(made) == (0, 0)
        assert made.budget.ready


def test_a_step_given_up_ends_both(monkeypatch):
    monkeypatch.setattr("engrampool_client.lanes.connection._SCRATCH_BYTES", 256)  # so that this answer is a long one
    monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S", 1000.0)
    asked = threading.Event()

    def reply(connection: socket.socket, number: int) -> None:
        asked.set()
        silent(connection, number)

    with peer(silent) as first, peer(reply) as second:
        made = set_of(Replica(first), Replica(second))
        step, raised = Delivery([2, 9], time.monotonic() + 2000), []

        def run() -> None:
            try:
                made.ask(exchange(COUNT, delivery=step), 0.0).receive()
            except PoolError as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert asked.wait(LIMIT_S)
        step.give_up(StepCancelledError("cancelled"))
        thread.join()
        assert raised


# --- where an answer cannot be seen to begin


def test_over_grpc_a_late_lookup_is_given_up_and_asked_for_elsewhere():
    late, other = Replica(reply=DeadlineError("late")), Replica()
    made = set_of(late, other)
    made.ask(within(LIMIT_S), 0.0).receive()
    ((seconds, early),) = late.asked
    assert early
    assert seconds < 2 * LATE_S
    assert not other.asked[0][1]
    assert outcome(made) == (1, 1)
    assert not made.budget.ready
    made.ask(within(LIMIT_S), 0.0).receive()
    made.ask(within(LIMIT_S), 0.0).receive()
    assert [early for _, early in late.asked] == [True, False]
    assert late.asked[1][0] > 50 * LATE_S


@pytest.mark.parametrize(
    "first",
    [
        Replica(reply=OverloadedError("busy", "overloaded")),
        Replica(reply=UnavailableError("gone")),
        Replica(reply=DeadlineError("late"), attached=True),
    ],
    ids=["refuses", "away", "attached"],
)
def test_what_is_not_late_spends_nothing(first):
    made = set_of(first, Replica())
    made.ask(within(LIMIT_S), 0.0).receive()
    assert outcome(made) == (0, 0)
    assert made.budget.ready


# --- refusals


@pytest.mark.parametrize("reason", ["too-many-rows", "bad-batch", None])
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_request_that_is_refused_is_sent_once(reason, replicas):
    all_of_them = [Replica(reply=RejectedError("no", reason)) for _ in range(replicas)]
    made = set_of(*all_of_them)
    with pytest.raises(RejectedError):
        made.ask(within(LIMIT_S), 0.0).receive()
    assert sum(len(one.asked) for one in all_of_them) == 1
    assert len(made._suspects) == 1  # its limits may be others by now


@pytest.mark.parametrize(
    "refusal",
    [
        OverloadedError("busy", "overloaded"),
        UnknownVersionError("gone", "unknown-version"),
        UnknownModelError("gone", "unknown-model"),
        RejectedError("elsewhere", "not-held"),
        ProtocolError("what is this"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_one_refuses_is_asked_of_each_other_one_once(refusal):
    refusing = [Replica(reply=refusal) for _ in range(3)]
    with pytest.raises(type(refusal)):
        set_of(*refusing).ask(within(LIMIT_S), 0.0).receive()
    assert [len(one.asked) for one in refusing] == [1, 1, 1]
    well = Replica()
    set_of(*refusing[:2], well).ask(within(LIMIT_S), 0.0).receive()
    assert [len(one.asked) for one in (*refusing, well)] == [2, 2, 1, 1]


@pytest.mark.parametrize("first", [UnavailableError("it broke"), DeadlineError("slow")], ids=["away", "slow"])
def test_who_could_not_answer_is_asked_again_and_who_refused_is_not(first):
    other, refusing = Replica(reply=first), Replica(reply=OverloadedError("busy", "overloaded"))
    made = set_of(other, refusing, known=False)
    with pytest.raises(type(first)):
        made.ask(within(LIMIT_S), 0.0).receive()
    assert (len(other.asked), len(refusing.asked)) == (2, 1)


def test_a_deadline_that_had_passed_makes_nobody_slow():
    late, other = Replica(reply=DeadlineError("too late", "not-asked")), Replica()
    set_of(late, other, known=False).ask(within(LIMIT_S), 0.0).receive()
    assert not late.latency._whole


# --- limits


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("replicas") / "small")


def refused(server: Running) -> float:
    return server.scrape().get('engrampool_refused_total{reason="too-many-rows"}', 0)


def rows_come(client: Client, ids: Any) -> bool:
    return client.lookup_rows({2: ids})[2].tobytes() == expected(2, ids)


@pytest.mark.parametrize("direct", ["off", "auto"])
def test_limits_of_replicas_are_the_least_of_them(models, direct):
    settings = {"direct": direct, "attach": "off"}
    with running(models, max_rows_per_request=900) as one, running(models, max_answer_bytes=400 * 264) as other:
        with Client([one.address, other.address], **settings) as client:
            assert (client.served.max_rows, client.served.max_answer_bytes) == (900, 400 * 264)
            for count in [401] * 4:
                with pytest.raises(RejectedError, match="limits of 900 rows and 105600 bytes"):
                    client.lookup_rows({2: np.arange(count)})
                assert rows_come(client, np.arange(400))
        assert refused(one) == refused(other) == 0


@pytest.mark.parametrize("direct", ["off", "auto"])
def test_a_part_over_the_limits_of_its_shard_is_asked_for_in_pieces(models, direct):
    with ExitStack() as stack:
        limits = [{"max_rows_per_request": 250}, {"max_answer_bytes": 1000 * 264}]
        servers = [stack.enter_context(running(models, shard=f"{at}/2", **limits[at])) for at in (0, 1)]
        client = stack.enter_context(Client([one.address for one in servers], direct=direct, attach="off"))
        least = client.served
        assert least.max_rows == 250 + servers[1].server.lookups.limits.max_rows_per_request
        for ids in (np.arange(1500), np.arange(6000, 4600, -1), np.arange(3000) * 2, np.arange(5)):
            assert rows_come(client, ids)
        both = {2: np.arange(800), 9: np.arange(900)}
        found = client.lookup_rows(both)
        assert {layer: rows.tobytes() for layer, rows in found.items()} == {n: expected(n, both[n]) for n in both}
        assert [refused(one) for one in servers] == [0, 0]


@pytest.mark.parametrize("direct", ["off", "auto"])
def test_replicas_take_turns_at_what_may_be_over_their_limits_and_is_not(models, direct):
    """900 narrow rows are fewer bytes than these wide ones, which are fewer rows."""
    with running(models, max_rows_per_request=900) as one, running(models, max_rows_per_request=900) as other:
        with Client([one.address, other.address], direct=direct, attach="off") as client:
            assert all(rows_come(client, np.arange(400)) for _ in range(8))
        eventually(lambda: min(rows_of_layer(one), rows_of_layer(other)) >= 2 * 400, "both were asked")


@pytest.mark.parametrize("direct", ["off", "auto"])
def test_a_replica_that_comes_later_is_asked_within_its_limits(models, direct, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_S", 0.01)
    monkeypatch.setattr("engrampool_client.pool.shards._GRACE_S", 0.25)  # one is not there yet
    listen, ids = lasting_address(), np.arange(1000)
    with running(models) as first, Client([first.address, listen], direct=direct, attach="off") as client:
        assert rows_come(client, ids)
        with running(models, listen=listen, max_rows_per_request=300) as second:
            eventually(lambda: listen in used(client), "it is found")
            eventually(lambda: rows_come(client, ids) and rows_of_layer(second) >= 1000, "it takes its turns")
            assert refused(second) == 0


def rows_of_layer(server: Running) -> float:
    return server.scrape().get('engrampool_lookup_rows_total{layer="2",model="small"}', 0)


def test_a_replica_that_came_back_with_less_room_costs_one_refusal(models, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_S", 0.01)
    ids = np.arange(1000)
    with (
        running(models) as first,
        running(models) as second,
        Client([first.address, second.address], direct="off", attach="off") as client,
    ):
        lookups = second.server.lookups
        lookups.limits = replace(lookups.limits, max_rows_per_request=300)  # as another server there would have
        with pytest.raises(RejectedError, match="at most 300 in one request"):
            eventually(lambda: not rows_come(client, ids), "its turn comes")
        eventually(lambda: 300 in [one["max_rows"] for one in client.status()["servers"]], "it is looked at")
        assert all(rows_come(client, ids) for _ in range(4))
        assert refused(second) == 1


# --- real servers


@pytest.fixture(scope="module")
def pair(packed) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    with serve_process(packed, workers=1) as one, serve_process(packed, workers=1) as other:
        yield one, other


@pytest.fixture(scope="module")
def shards(packed) -> Iterator[list[ServerProcess]]:
    """Two shards, each twice."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(serve_process(packed, shard=f"{at}/2", workers=1)) for at in (0, 1) for _ in range(2)
        ]


class Checked:
    """Lookups of a client, each of which is compared with the first. It knows when answers are late, and may hedge."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self._client, self._tokens = client, np.arange(24, dtype=np.int32)
        self._wanted = {layer: rows.copy() for layer, rows in client.lookup(self._tokens).items()}
        self.nbytes = sum(rows.nbytes for rows in self._wanted.values())
        self.right(100)
        for one in client._shards._sets:
            one.budget._tokens = measured._MOST_TOKENS
        # However slow this machine is now, nothing but a hedge is to help: neither that one is known to be in trouble,
        # nor that one that was slow is passed over.
        for endpoint in client._shards._open.values():
            monkeypatch.setattr(endpoint.breaker, "_probe", lambda: None)
        # Nor is one that answers left, with the one that is frozen, as it takes its time.
        monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S", LIMIT_S)
        monkeypatch.setattr("engrampool_client.pool.replicas._late_s", lambda *_, whole: 2e-3)
        monkeypatch.setattr(measured, "_TRY_ONE_IN", 1)
        monkeypatch.setattr(measured, "_TRY_EVERY_S", 0.0)

    def right(self, times: int = 1) -> bool:
        for _ in range(times):
            found = self._client.lookup(self._tokens, timeout_s=4 * LIMIT_S)
            assert all(np.array_equal(found[layer], rows) for layer, rows in self._wanted.items())
        return True

    def hedged_around(self, *servers: ServerProcess) -> None:
        """Freeze them until a hedge has won, and ten more lookups are right.

        Whoever has lost its connection is passed over, and not late: so a hedge wins at the first lookups or, where
        this machine paused just then, the next time.
        """
        endpoints = self._client._shards._open.values()
        lanes = [endpoint._native for endpoint in endpoints if endpoint._native is not None]

        def won() -> bool:
            eventually(lambda: all(lane.idle or lane._want_one() for lane in lanes), "each has a connection")
            with ExitStack() as stack:
                for server in servers:
                    stack.enter_context(server.frozen())
                before = self._client.stats.hedges_won
                return any(self.right() and self._client.stats.hedges_won > before for _ in range(10)) and self.right(
                    10
                )

        eventually(won, "a hedge won")


@pytest.mark.parametrize("direct", ["off", "auto"])
@pytest.mark.parametrize("connections", [1, 2])
def test_a_replica_that_stops_is_hedged_and_comes_back(pair, monkeypatch, direct, connections):
    how = {"direct": direct, "attach": "off", "connections": connections, "breaker_failures": 0}
    with Client([one.address for one in pair], **how) as client:
        lookups, endpoint = Checked(client, monkeypatch), client._shards._open[pair[0].address]
        size = measured._size_class(lookups.nbytes)
        lookups.hedged_around(pair[0])
        for one in client._shards._sets:  # however slow this machine is now, few lookups are asked for twice
            while one.budget.ready:
                one.budget.spend()
        eventually(lambda: lookups.right() and inf not in endpoint.latency._whole[size]._recent, "it takes turns again")


@pytest.mark.parametrize("direct", ["off", "auto"])
def test_hedges_where_there_are_shards(shards, monkeypatch, direct):
    with Client([one.address for one in shards], direct=direct, attach="off", breaker_failures=0) as client:
        lookups = Checked(client, monkeypatch)
        lookups.hedged_around(shards[1], shards[2])


class CuttingProxy:
    """Passes connections on to an address; once `armed`, each answers with so many bytes more and then falls silent."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._lock, self.armed = threading.Lock(), threading.Event()
        self._listeners: list[socket.socket] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def to(self, address: tuple[str, int]) -> int:
        """A port that leads there."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(listener)
        self._run(self._accept, listener, address)
        return listener.getsockname()[1]

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, address: tuple[str, int]) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(address)
                with self._lock:
                    self._sockets += [client, server]
                self._run(self._pass, client, server, False)
                self._run(self._pass, server, client, True)

    def _pass(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        left = self._nbytes
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self.armed.is_set():
                    data, left = data[:left], left - len(data)
                sink.sendall(data)
                if left <= 0:
                    return
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End all connections; there is nobody any more at its own addresses."""
        with self._lock:
            for one in [*self._listeners, *self._sockets]:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for thread in list(self._threads):
            thread.join()
        for one in [*self._listeners, *self._sockets]:
            one.close()


@pytest.mark.parametrize("direct", ["off", "auto"])
@pytest.mark.parametrize("given_out", [False, True])
def test_a_split_lookup_cut_between_layers_goes_on_with_what_is_missing(models, monkeypatch, direct, given_out):
    monkeypatch.setattr("engrampool_client.pool.endpoint.SPLIT_ABOVE_BYTES", 1 << 20)
    monkeypatch.setattr("engrampool_client.lanes.grpc.STREAM_ABOVE_BYTES", 0)
    ids = {2: np.arange(4000), 9: np.tile(np.arange(4000), 10)}
    wanted = {layer: expected(layer, some) for layer, some in ids.items()}
    out = {2: np.zeros((4000, 264), np.uint8), 9: np.zeros((40_000, 42), np.uint8)} if given_out else None
    with ExitStack() as stack:
        settings = {"stream_chunk_bytes": 64 << 10}
        one, other = (stack.enter_context(running(models, **settings)) for _ in range(2))
        proxy = CuttingProxy(len(wanted[2]) // 2 + (150 << 10))
        stack.callback(proxy.close)
        front = behind(proxy, one)
        client = stack.enter_context(Client([front, other.address], direct=direct, attach="off", connections=2))
        shards = client._shards._sets[0]
        shards.replicas = tuple(sorted(shards.replicas, key=lambda endpoint: endpoint.target != front))
        shards._turn = itertools.count()
        proxy.armed.set()
        step, came = client.prefetch_rows(ids, out=out, timeout_s=2 * LIMIT_S), []

        def changed(_: Step, layer: int) -> None:
            came.append(layer)
            if layer == 2:
                if out is not None:
                    out[2][:] = 7  # as who uses it may do
                proxy.cut()

        step.add_callback(changed)
        step.wait(LIMIT_S)
        assert came == [2, 9]
        assert step.rows(9).tobytes() == wanted[9]
        if out is None:
            assert step.rows(2).tobytes() == wanted[2]
        else:
            assert (out[2] == 7).all()
        assert client.stats.bytes["wire"] == len(wanted[9])  # of lookups that were answered whole


def behind(proxy: CuttingProxy, server: Running) -> str:
    """The server's address there, of both its lanes."""
    host, port = server.address.split(":")
    admission = server.server.shared.admission
    admission.port = proxy.to((host, admission.port))
    return f"127.0.0.1:{proxy.to((host, int(port)))}"


@pytest.mark.parametrize("direct", ["off", "auto"])
@pytest.mark.parametrize("connections", [1, 2])
def test_a_server_that_is_let_go_of_in_mid_lookup_fails_nothing(models, monkeypatch, direct, connections):
    monkeypatch.setattr("engrampool_client.pool.endpoint.SPLIT_ABOVE_BYTES", 1 << 20)
    ids = {2: np.arange(6500)}
    with running(models) as one, running(models) as other:
        addresses = [one.address, other.address]
        with Client(addresses, direct=direct, attach="off", connections=connections) as client:
            client._shards._open[one.address].close()  # as the watcher does beside lookups that chose it before
            for rows in [ids, {2: np.arange(9)}] * 4:
                assert client.lookup_rows(rows)[2].tobytes() == expected(2, rows[2])


def test_one_that_is_gone_leaves_the_others_their_share_of_the_time_that_is_left(monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S", 0.1)
    gone, busy = Replica(reply=DeadlineError("late")), Replica(reply=DeadlineError("late"))
    made = set_of(gone, busy, known=False, tokens=0)
    with pytest.raises(DeadlineError):
        made.ask(within(60), 0.0).receive()
    (first_s, _), (share_s, _) = gone.asked
    assert first_s < 1
    assert 1 < share_s <= 30
    assert 50 < busy.asked[1][0] <= 60
