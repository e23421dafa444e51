"""The client's counters, one by one and from many threads."""

import threading
import time

import pytest

from engrampool_client import (
    DeadlineError,
    ForbiddenError,
    PoolError,
    StepCancelledError,
    TlsError,
    UnauthenticatedError,
    UnavailableError,
)
from engrampool_client import stats as stats_module
from engrampool_client.stats import HOPS, OUTCOMES, SOURCES, WAIT_BOUNDS_S, Stats
from engrampool_proto.wire import ServerTimes


@pytest.fixture
def stats() -> Stats:
    return Stats([3, 7])


def test_bounds_ascend_and_every_outcome_and_source_is_there_from_the_start(stats):
    assert list(WAIT_BOUNDS_S) == sorted(set(WAIT_BOUNDS_S))
    assert WAIT_BOUNDS_S[0] == 0
    assert dict(stats.steps) == dict.fromkeys(OUTCOMES, 0)
    assert dict(stats.bytes) == dict.fromkeys(SOURCES, 0)
    assert stats.in_flight == 0


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [(0.0, 0.0), (9e-6, 0.0), (10e-6, 25e-6), (25e-6, 25e-6), (26e-6, 50e-6), (1e-3, 1e-3), (0.9, 1.0), (1.0, 1.0)],
)
def test_a_wait_lands_in_the_bucket_whose_bound_it_does_not_exceed(stats, seconds, bound):
    stats.waited(7, seconds)
    expected = [0] * (len(WAIT_BOUNDS_S) + 1)
    expected[WAIT_BOUNDS_S.index(bound)] = 1
    assert (stats.waits[7].counts, stats.waits[7].sum_s) == (expected, seconds)
    assert sum(stats.waits[3].counts) == 0


def test_a_wait_beyond_the_bounds_is_counted(stats):
    stats.waited(3, 1.5)
    assert stats.waits[3].counts[-1] == sum(stats.waits[3].counts) == 1


@pytest.mark.parametrize(
    ("error", "complete", "outcome"),
    [
        (None, True, "ok"),
        (DeadlineError("late"), True, "masked"),
        (DeadlineError("late"), False, "failed"),
        (StepCancelledError("gone"), False, "cancelled"),
    ],
)
def test_a_step_ends_once_and_its_rows_are_pending_until_then(stats, error, complete, outcome):
    assert stats.began("step", 100)
    assert (stats.in_flight, stats.pending_bytes) == (1, 100)
    for _ in range(2):
        stats.ended("step", error, complete, {3: 5})
    assert stats.masked_tokens[3] == 5
    assert dict(stats.steps) == {**dict.fromkeys(OUTCOMES, 0), outcome: 1}
    assert (stats.in_flight, stats.pending_bytes) == (0, 0)


def test_a_round_trip_is_cut_into_hops_of_the_server_that_answered(stats):
    slow, fast = stats.server("a:1"), stats.server("b:1")
    assert stats.server("a:1") is slow
    stats.answered(slow, 10, ServerTimes(1000, 200, 1500), 0.0037, 1)
    # It lay there; rounding makes a part larger than the whole.
    stats.answered(slow, 10, ServerTimes(0, 200, 100), None, 2)
    stats.answered(fast, 10, ServerTimes(0, 300, 800), 0.0001, 3)  # likewise
    stats.answered(fast, 10, None, 0.1, 4)  # only the end was lost
    assert stats.bytes["wire"] == 40
    assert slow.counts == {"network": 1, "queue": 2, "gather": 2, "send": 2}
    assert slow.sums_s == pytest.approx({"network": 0.0025, "queue": 0.001, "gather": 0.0004, "send": 0.0003})
    assert fast.sums_s == pytest.approx({"network": 0, "queue": 0, "gather": 0.0003, "send": 0.0005})
    assert {hop: sum(stats.hops[hop].counts) for hop in HOPS} == {
        "client": 0,
        "network": 2,
        "queue": 3,
        "gather": 3,
        "send": 3,
    }


def test_a_slow_answer_is_told_of_with_its_number_and_hop_and_others_soon_after_only_counted(caplog):
    stats = Stats([3], slow_s=0.5)
    server = stats.server("a:1")
    stats.answered(server, 10, ServerTimes(100, 200, 400_000), 0.001, 1)
    assert not caplog.records
    stats.answered(server, 10, ServerTimes(100, 700_000, 800_000), 0.8, 0xABC)
    stats.answered(server, 10, ServerTimes(100, 200, 400), 0.9, 2)
    stats.asked(time.perf_counter() - 2)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "slow lookup 0000000000000abc" in record.getMessage()
    hops = "most of it gather (queue 0.000, gather 0.700, send 0.100, network 0.100)"
    assert f"at a:1 for 10 bytes, {hops}" in record.getMessage()
    assert stats.slow == {"client": 1, "network": 1, "queue": 0, "gather": 1, "send": 0}


def test_a_wait_in_the_client_is_told_of(caplog):
    stats = Stats([3], slow_s=0.5)
    stats.asked(time.perf_counter() - 2)
    assert "before any server was asked" in caplog.text
    caplog.clear()
    Stats([3]).asked(time.perf_counter() - 2)  # nothing is slow where nobody said what is
    assert not caplog.records


def test_pending_bytes_have_a_limit_which_one_step_alone_may_exceed(stats):
    assert stats.began(1, 100, limit_bytes=50)
    assert not stats.began(2, 1, limit_bytes=50)
    assert (stats.begun, stats.pending_bytes) == (1, 100)
    assert stats.began(3, 1)  # not among those that are bounded
    stats.ended(1, None, True)
    assert stats.began(4, 49, limit_bytes=50)
    assert not stats.began(5, 1, limit_bytes=50)


def test_hints_have_a_limit_of_their_own(stats):
    assert stats.hint_began(1, 30, 50)
    assert not stats.hint_began(2, 21, 50)
    assert stats.hint_began(3, 20, 50)
    assert (stats.pending_hint_bytes, stats.pending_bytes, stats.in_flight) == (50, 0, 0)
    for _ in range(2):
        stats.hint_ended(1, 12, good=True)
    stats.hint_ended(3, 5, good=False)
    assert dict(stats.hint_bytes) == {"asked": 12, "dropped": 21, "failed": 5}
    assert stats.pending_hint_bytes == 0


def test_no_count_is_lost_between_threads(stats):
    threads, times = 4, 2000
    together = threading.Barrier(threads)

    def count() -> None:
        together.wait(30)
        for _ in range(times):
            step = object()
            stats.began(step, 2)
            stats.count_bytes("wire", 3)
            stats.waited(7, 0.0)
            stats.retried()
            stats.opened()
            stats.ended(step, None, True, {3: 5})

    workers = [threading.Thread(target=count) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    total = threads * times
    assert (stats.begun, stats.steps["ok"], stats.in_flight, stats.pending_bytes) == (total, total, 0, 0)
    assert (stats.bytes["wire"], stats.masked_tokens[3]) == (3 * total, 5 * total)
    assert (stats.waits[7].counts[0], stats.retries, stats.breaker_opened) == (total, total, total)


def test_steps_masked_for_want_of_trust_are_told_of_once_a_minute_and_others_once_a_second(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stats_module.time, "monotonic", lambda: now[0])
    stats = Stats([3])

    def masked(error: PoolError, complete: bool = True) -> str:
        caplog.clear()
        stats.began(error, 1)
        stats.ended(error, error, complete)
        return caplog.text

    assert "masked, as its rows did not come: away" in masked(UnavailableError("away"))
    assert masked(UnavailableError("away")) == ""  # within a second
    assert masked(UnauthenticatedError("revoked"), complete=False) == ""  # raised where its rows are wanted
    assert "credentials are mended: revoked" in masked(UnauthenticatedError("revoked"))
    assert masked(ForbiddenError("no role")) == ""
    now[0] += 61.0
    assert "credentials are mended: no role" in masked(ForbiddenError("no role"))
    now[0] += 61.0
    assert "credentials are mended: expired" in masked(TlsError("expired"))
