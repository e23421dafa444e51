"""Parts of a lookup in threads: every one has ended where the block ends, however it ends."""

import sys
import threading
import time

import numpy as np
import pytest

import sweep
from engrampool_client.errors import DeadlineError, StepCancelledError
from engrampool_client.lanes import split
from engrampool_client.lanes.split import SideBySide
from engrampool_client.lookup import workers
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.workers import Workers
from prefork import PREFORK

LIMIT_S = 30


@pytest.fixture
def threads(monkeypatch):
    for module in (split, workers):  # no part is left as its thread stands still for a moment
        monkeypatch.setattr(module, "HELD_S", LIMIT_S)
    threads = Workers(1, "test")
    yield threads
    threads.close()


def test_a_part_that_failed_is_raised_once_all_have_ended(threads):
    ended = []

    def fail() -> None:
        ended.append("first")
        raise ValueError("of a part")

    with pytest.raises(ValueError, match="of a part"), SideBySide(threads, Delivery([1])) as others:  # noqa: PT012
        others.begin(fail)
        others.begin(ended.append, "second")
    assert sorted(ended) == ["first", "second"]  # two threads run them, in any order


def test_an_error_of_the_block_waits_for_what_has_begun_and_drops_the_rest(threads, monkeypatch):
    begun, ended = threading.Event(), []

    def slow(told: threading.Event) -> None:
        begun.set()
        assert told.wait(LIMIT_S)
        ended.append("first")

    told = threading.Event()
    with pytest.raises(ZeroDivisionError), SideBySide(threads, Delivery([1])) as others:  # noqa: PT012
        others.begin(slow, told)
        assert begun.wait(LIMIT_S)
        others.begin(ended.append, "never")
        end = others._parts[0].end

        def end_in_time(drop: bool, until: float) -> bool:
            threading.Timer(0.05, told.set).start()  # not before: what is to be dropped would begin
            return end(drop, until)

        monkeypatch.setattr(others._parts[0], "end", end_in_time)
        raise ZeroDivisionError
    assert ended == ["first"]


@pytest.mark.parametrize("within", ["the block", "the wait"])
def test_ctrl_c_gives_the_lookup_up_and_nobody_is_at_it_afterwards(threads, within, monkeypatch):
    delivery, ended, told = Delivery([1]), [], threading.Event()
    delivery.on_cancel(told.set)

    def slow() -> None:
        assert told.wait(LIMIT_S)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt), SideBySide(threads, delivery) as others:  # noqa: PT012
        others.begin(slow)
        if within == "the block":
            while not others._parts[0].begun:
                pass
            raise KeyboardInterrupt
        end, calls = others._parts[0].end, []

        def interrupted(drop: bool, until: float) -> bool:
            calls.append(drop)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return end(drop, until)

        while not others._parts[0].begun:
            pass
        monkeypatch.setattr(others._parts[0], "end", interrupted)
    assert ended == [True]
    assert delivery.given_up


@pytest.mark.parametrize("how", ["deadline", "ctrl-c", "cancelled"])
def test_a_part_that_does_not_answer_is_left_and_writes_nothing_any_more(threads, how, monkeypatch):
    monkeypatch.setattr(split, "HELD_S", 0.05)
    delivery = Delivery([1], time.monotonic() + (0.3 if how == "deadline" else LIMIT_S * 10))
    begun, go, rows, refused = threading.Event(), threading.Event(), np.zeros(8, np.uint8), []

    def stuck() -> None:
        begun.set()
        assert go.wait(LIMIT_S)  # as at a lock that nobody lets go of; no cancelling helps
        try:
            with delivery.writing():
                rows[:] = 1
        except BaseException as error:
            refused.append(error)
            raise

    kind = {"deadline": DeadlineError, "ctrl-c": KeyboardInterrupt, "cancelled": StepCancelledError}[how]
    try:
        with pytest.raises(kind), SideBySide(threads, delivery) as others:  # noqa: PT012
            others.begin(stuck)
            assert begun.wait(LIMIT_S)
            if how == "ctrl-c":
                raise KeyboardInterrupt
            if how == "cancelled":
                delivery.give_up(StepCancelledError("by another thread"))
        assert delivery.ended
        # Its thread is held, and others go on.
        with SideBySide(threads, Delivery([1])) as others:
            others.begin(refused.clear)
    finally:
        go.set()
        threads.close()
    assert isinstance(refused[0], DeadlineError if how == "deadline" else StepCancelledError)
    assert not rows.any()


def test_a_storm_of_ctrl_c_leaves_a_client_of_shards_as_good_as_before():
    """In a process of its own, as Ctrl-C may leave locks of gRPC's taken that are the whole process's."""
    done = PREFORK.run([sys.executable, sweep.__file__, "--storms=40", "--seed=1"], timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("40 storms: ")
