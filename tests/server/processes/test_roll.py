"""A rolling restart, step by step, with processes that do nothing."""

from types import SimpleNamespace
from typing import Any

import pytest

from engrampool_server.processes.roll import Roll


class Pool:
    """Workers by number, and what was asked of them."""

    def __init__(self, count: int) -> None:
        self.workers: dict[int, Any] = {index: SimpleNamespace(index=index) for index in range(count)}
        self.children: Any = SimpleNamespace(has_thread=False)
        self.why = ""
        self.forked: list[Any] = []
        self.stopped: list[Any] = []
        self.replaced: list[Any] = []
        self.roll = Roll(
            self.workers,
            self.children,
            hindered=lambda: self.why,
            fork=self._fork,
            stop=self.stopped.append,
            replace=self.replaced.append,
        )

    def _fork(self, index: int) -> Any:
        self.forked.append(SimpleNamespace(index=index))
        return self.forked[-1]

    def take_over(self) -> None:
        """The successor is ready, and the worker before it ends."""
        self.roll.ready(self.forked[-1])
        assert self.roll.ended(self.stopped[-1])


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr("engrampool_server.telemetry.log.event", lambda name, level="info", **_: said.append(name))
    return said


def test_each_worker_goes_once_its_successor_is_ready(events):
    pool = Pool(2)
    before = dict(pool.workers)
    pool.roll.request()
    assert [child.index for child in pool.forked] == [0]
    assert pool.roll.under_way
    assert pool.roll.is_coming(0)
    assert not pool.roll.is_coming(1)
    assert pool.stopped == []
    pool.take_over()
    assert pool.stopped == [before[0]]
    pool.take_over()
    assert pool.workers == dict(enumerate(pool.forked))
    assert not pool.roll.under_way
    assert events == ["rolling", "rolled"]


def test_one_that_is_asked_for_meanwhile_follows(events):
    pool = Pool(1)
    pool.roll.request()
    pool.roll.request()
    pool.roll.request()
    pool.take_over()
    assert len(pool.forked) == 2
    pool.take_over()
    assert events == ["rolling", "roll-queued", "roll-queued", "rolled", "rolling", "rolled"]


def test_one_that_is_asked_for_beside_a_thread_waits_for_its_end(events):
    pool = Pool(1)
    pool.children.has_thread = True
    pool.roll.request()
    assert not pool.roll.under_way
    pool.children.has_thread = False
    pool.roll.begin_queued()
    assert pool.roll.under_way
    pool.roll.begin_queued()
    assert events == ["roll-queued", "rolling"]


def test_what_hinders_it_is_said(events):
    pool = Pool(1)
    pool.why = "stopping"
    pool.roll.request()
    assert events == ["roll-ignored"]
    assert pool.forked == []


def test_a_successor_that_ends_ends_the_roll_and_the_old_ones_go_on(events):
    pool = Pool(2)
    pool.roll.request()
    assert pool.roll.ended(pool.forked[-1])
    assert (pool.stopped, pool.replaced, pool.roll.under_way) == ([], [], False)
    # Where the old one ended meanwhile, somebody has to come.
    pool.roll.request()
    del pool.workers[0]
    assert pool.roll.ended(pool.forked[-1])
    assert pool.replaced == [pool.forked[-1]]
    assert events == ["rolling", "roll-failed", "rolling", "roll-failed"]


def test_workers_that_ended_by_themselves_are_passed_over(events):
    pool = Pool(2)
    pool.roll.request()
    del pool.workers[1]
    assert not pool.roll.ended(SimpleNamespace(index=1))
    pool.take_over()
    assert len(pool.forked) == 1
    assert events == ["rolling", "rolled"]


def test_a_system_that_gives_no_process_ends_the_roll(events, monkeypatch):
    pool = Pool(1)

    def refuse(index: int) -> Any:
        raise OSError(11, "no more processes")

    monkeypatch.setattr(pool.roll, "_fork", refuse)
    pool.roll.request()
    assert not pool.roll.under_way
    assert events == ["rolling", "fork-failed"]


def test_of_a_roll_that_is_cancelled_only_the_one_under_way_is_replaced(events):
    pool = Pool(3)
    pool.roll.request()
    pool.roll.cancel()
    pool.take_over()
    assert len(pool.forked) == 1
    assert not pool.roll.under_way
