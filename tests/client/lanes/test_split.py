"""Parts of a lookup in threads: every one has ended where the block ends, however it ends."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engrampool_client.lanes.split import SideBySide
from engrampool_client.lookup.delivery import Delivery

LIMIT_S = 30


@pytest.fixture
def threads():
    with ThreadPoolExecutor(1) as threads:
        yield threads


def test_a_part_that_failed_is_raised_once_all_have_ended(threads):
    ended = []

    def fail() -> None:
        ended.append("first")
        raise ValueError("of a part")

    with pytest.raises(ValueError, match="of a part"), SideBySide(threads, Delivery([1])) as others:  # noqa: PT012
        others.begin(fail)
        others.begin(ended.append, "second")
    assert ended == ["first", "second"]


def test_an_error_of_the_block_waits_for_what_has_begun_and_drops_the_rest(threads, monkeypatch):
    begun, ended = threading.Event(), []

    def slow(told: threading.Event) -> None:
        begun.set()
        assert told.wait(LIMIT_S)
        ended.append("first")

    told = threading.Event()
    with pytest.raises(ZeroDivisionError), SideBySide(threads, Delivery([1])) as others:  # noqa: PT012
        others.begin(slow, told)
        others.begin(ended.append, "never")
        assert begun.wait(LIMIT_S)
        end = others._parts[0].end

        def end_in_time(drop: bool) -> None:
            threading.Timer(0.05, told.set).start()  # not before: what is to be dropped would begin
            end(drop)

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
            while not others._parts[0]._begun:
                pass
            raise KeyboardInterrupt
        end, calls = others._parts[0].end, []

        def interrupted(drop: bool) -> None:
            calls.append(drop)
            if len(calls) == 1:
                raise KeyboardInterrupt
            end(drop)

        while not others._parts[0]._begun:
            pass
        monkeypatch.setattr(others._parts[0], "end", interrupted)
    assert ended == [True]
    assert delivery.given_up
