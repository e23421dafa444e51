"""Bounds on connections: a peer that has too many stands in its own way only."""

import resource

import pytest

from engrampool_server.answer.lane import connection_limits
from engrampool_server.answer.lane.connection_limits import ConnectionLimits
from engrampool_server.answer.lookups import RefusedError


@pytest.fixture
def some(monkeypatch):
    monkeypatch.setattr(connection_limits, "MOST", 20)
    monkeypatch.setattr(connection_limits, "STRANGERS", 3)
    return ConnectionLimits()


def fill(some: ConnectionLimits, peer: str) -> int:
    """Have callers of `peer` come and be admitted until one is refused; gives how many."""
    for at in range(100):
        try:
            some.add((peer, at), peer)
        except RefusedError:
            return at
        some.admit((peer, at))
    raise AssertionError("there is no bound")


def test_a_peer_may_have_no_more_connections_than_it_leaves_free(some):
    assert [fill(some, peer) for peer in "abcd"] == [10, 5, 2, 1]
    assert len(some) == 18
    with pytest.raises(RefusedError, match="10 connections are open from a, and 18 in all, of 20") as refused:
        some.add("one more", "a")
    assert refused.value.reason == "too-many-connections"
    for at in range(10):
        some.remove(("a", at))
    assert fill(some, "e") > 0


def test_a_peer_with_many_strangers_gets_no_more_at_once_and_others_do(some):
    for at in range(3):
        assert some.add(at, "a") is None
    with pytest.raises(RefusedError, match="none has said hello"):
        some.add(3, "a")
    assert list(some) == [0, 1, 2]
    assert some.add(4, "b") is None
    some.admit(1)
    assert some.add(5, "a") is None


def test_a_stranger_who_had_time_goes_for_the_next_one_of_its_peer(some, monkeypatch):
    for at in range(3):
        some.add(at, "a")
    some.add("of another", "b")
    monkeypatch.setattr(connection_limits, "GRACE_S", 0.0)
    assert [some.add(at, "a") for at in (3, 4)] == [0, 1]
    assert list(some) == [2, "of another", 3, 4]
    some.remove(0)  # which it did before
    assert len(some) == 4


def test_descriptors_are_left_for_everything_else(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 4096))
    assert fill(ConnectionLimits(), "a") == 10
