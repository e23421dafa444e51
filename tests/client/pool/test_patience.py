"""Replicas that do not answer in time: how long each is waited for, by a clock of the test's own."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from direct_peers import exchange
from engrampool_client import DeadlineError, PoolError, UnavailableError
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.pool.latency import Latency
from engrampool_client.pool.replicas import ReplicaSet
from engrampool_client.stats import Stats

TIMEOUT_S = 120.0


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("engrampool_client.pool.replicas.time", clock)
    return clock


class Replica:
    """One that takes so long for an answer. given: how long it was waited for. counted: silences that count."""

    attached, sent = False, None

    def __init__(self, clock: Clock, takes_s: float, error: PoolError | None = None) -> None:
        self._clock, self._takes_s, self._error = clock, takes_s, error
        self.latency, self.breaker = Latency(), SimpleNamespace(doubt=lambda: None)
        self.in_trouble: str | None = None
        self.given: list[float] = []
        self.counted = 0

    def ask(self, _: Any, deadline: float, spin_s: float = 0.0, send_by: float | None = None) -> "Replica":
        self._deadline = deadline
        return self

    def receive(self, *, patient: bool = True, early: bool = False) -> None:
        given_s = self._deadline - self._clock.now
        self.given.append(given_s)
        self._clock.now += min(given_s, self._takes_s)
        if self._error is not None:
            raise self._error
        if given_s < self._takes_s:
            self.counted += not early
            raise DeadlineError("late")


def asked(clock: Clock, *replicas: Replica) -> float:
    """The seconds that a lookup of them took. Raises PoolError."""
    made, begin = ReplicaSet({}, set(), Stats([2, 9])), clock.now
    made.replicas = replicas  # type: ignore[assignment]
    made.ask(exchange(50, delivery=Delivery([2, 9], begin + TIMEOUT_S)), 0.0).receive()
    return clock.now - begin


@pytest.mark.parametrize("frozen_first", [False, True])
@pytest.mark.parametrize("takes_s", [0.15, 1.0, 5.0, 20.0])
def test_one_that_is_frozen_costs_little_more_than_the_other_takes(clock, frozen_first, takes_s):
    frozen, busy = Replica(clock, 1e9), Replica(clock, takes_s)
    order = (frozen, busy) if frozen_first else (busy, frozen)
    assert asked(clock, *order) < 4 + 8 * takes_s
    assert busy.given[-1] >= takes_s


@pytest.mark.parametrize("others", [1, 3])
def test_a_round_is_twice_as_long_as_the_one_before_and_the_last_ends_with_the_lookups_time(clock, others):
    frozen = [Replica(clock, 1e9) for _ in range(1 + others)]
    with pytest.raises(DeadlineError):
        asked(clock, *frozen)
    assert clock.now == pytest.approx(Clock.now + TIMEOUT_S)
    for one in frozen:
        first, *rounds, last = one.given
        assert first < rounds[0]
        assert [b / a for a, b in pairwise(rounds)] == pytest.approx([2.0] * (len(rounds) - 1))
        assert last >= rounds[-1]
        # Not a silence for every round: one where each is asked for a moment, and one where time is up.
        assert one.counted <= 2
    assert len(frozen[0].given) <= 8


def test_one_that_is_known_to_be_in_trouble_comes_after_the_others(clock):
    frozen, busy = Replica(clock, 1e9), Replica(clock, 1.0)
    ask = busy.ask

    def found_out(*arguments: Any, **named: Any) -> Replica:
        frozen.in_trouble = "it does not answer"
        return ask(*arguments, **named)

    busy.ask = found_out  # type: ignore[method-assign]
    assert asked(clock, frozen, busy) < 2
    assert len(frozen.given) == 1


def test_those_that_cannot_be_reached_are_not_asked_round_after_round(clock):
    away = [Replica(clock, 0.0, UnavailableError("gone")) for _ in range(2)]
    with pytest.raises(UnavailableError):
        asked(clock, *away)
    assert [len(one.given) for one in away] == [2, 2]
