"""When lookups are tried again, when they fail at once, and what ends that. No test waits for time to pass."""

import threading
from types import SimpleNamespace

import pytest

from engrampool_client import DeadlineError, OverloadedError, PoolError, RejectedError, UnavailableError
from engrampool_client.pool import breaker
from engrampool_client.pool.breaker import Breaker

LIMIT_S = 30
BROKEN = UnavailableError("the connection broke")


class Probe:
    """A server that answers once it is let: each probe waits for one word."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self._words: list[Exception | None] = []
        self._said = threading.Semaphore(0)

    def __call__(self) -> None:
        self.asked.release()
        assert self._said.acquire(timeout=LIMIT_S)
        word = self._words.pop(0)
        if word is not None:
            raise word

    def say(self, word: Exception | None) -> None:
        self._words.append(word)
        self._said.release()


class Watched(Breaker):
    """Says when it has probed for the last time."""

    def _watch(self) -> None:
        super()._watch()
        self.watched.set()


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Nobody waits between two probes, and no probe is left as its thread stands still for a moment."""
    monkeypatch.setattr(breaker, "_STUCK_S", 1000.0)
    monkeypatch.setattr(breaker, "_CLOSE_S", LIMIT_S)
    monkeypatch.setattr(breaker, "_FIRST_PROBE_S", 1e-4)
    monkeypatch.setattr(breaker, "_LONGEST_PROBE_S", 2e-4)


def made(probe, failures=3, retry_s=1.0, opened=None) -> Watched:
    one = Watched(retry_s, failures, probe, opened or (lambda: None), "node:1")
    one.watched = threading.Event()
    return one


def test_it_opens_after_so_many_failures_in_a_row(probe):
    opened = []
    one = made(probe, opened=lambda: opened.append(one.is_open))
    for error in (BROKEN, DeadlineError("silent")):
        one.failed(error)
        one.check()
        assert not one.is_open
    one.failed(BROKEN)
    assert opened == [True]
    assert one.is_open
    with pytest.raises(
        UnavailableError, match="node:1 failed 3 lookups in a row, the last with: the connection"
    ) as told:
        one.check()
    assert told.value.reason == "breaker-open"
    one.failed(BROKEN)
    assert opened == [True]
    probe.say(None)
    one.close()


def test_each_caller_gets_an_error_of_its_own(probe):
    one = made(probe, failures=1)
    one.failed(BROKEN)
    errors = []
    for _ in range(2):
        with pytest.raises(UnavailableError) as told:
            one.check()
        errors.append(told.value)
    assert errors[0] is not errors[1]
    probe.say(None)
    one.close()


def test_a_success_between_sets_the_count_back(probe):
    one = made(probe, failures=2)
    for _ in range(5):
        one.failed(BROKEN)
        one.succeeded()
    assert not one.is_open
    one.failed(BROKEN)
    one.failed(BROKEN)
    assert one.is_open
    probe.say(None)
    one.close()


def test_what_a_server_that_answers_says_does_not_count(probe):
    one = made(probe, failures=1)
    for error in (
        OverloadedError("full", "over"),
        RejectedError("bad"),
        UnavailableError("it is open", "breaker-open"),
        PoolError("else"),
    ):
        one.failed(error)
        assert not one.is_open
    one.failed(UnavailableError("still loading", "loading"))
    assert one.is_open
    probe.say(None)
    one.close()


def test_with_zero_failures_it_never_opens(probe):
    one = made(probe, failures=0)
    for _ in range(10):
        one.failed(BROKEN)
        one.check()
    assert probe.asked.acquire(timeout=LIMIT_S)
    probe.say(DeadlineError("silent"))
    assert probe.asked.acquire(timeout=LIMIT_S)
    assert not one.is_open
    assert one.trouble == "silent"  # but it is known to be away, until a probe is answered
    probe.say(None)
    assert one.watched.wait(LIMIT_S)
    assert one.trouble is None
    one.close()


def test_a_doubt_has_the_server_probed_and_opens_nothing(probe):
    one = made(probe, failures=1)
    one.doubt()
    for word in (DeadlineError("silent"), BROKEN):
        assert probe.asked.acquire(timeout=LIMIT_S)
        probe.say(word)
    assert probe.asked.acquire(timeout=LIMIT_S)
    assert one.trouble == str(BROKEN)
    assert not one.is_open
    one.doubt()  # which begins no second prober
    probe.say(None)
    assert one.watched.wait(LIMIT_S)
    assert one.trouble is None
    one.close()


def test_silence_opens_it_at_once_where_a_probe_was_not_answered_either(probe):
    one = made(probe, failures=2)
    one.failed(DeadlineError("silent"))
    assert probe.asked.acquire(timeout=LIMIT_S)
    probe.say(DeadlineError("silent"))
    assert probe.asked.acquire(timeout=LIMIT_S)
    assert not one.is_open
    one.failed(DeadlineError("silent"))
    assert one.is_open
    probe.say(None)
    one.close()


def test_a_probe_that_is_answered_closes_it(probe):
    one = made(probe, failures=2)
    one.failed(BROKEN)
    one.failed(BROKEN)
    for word in (BROKEN, DeadlineError("silent"), BROKEN):
        assert probe.asked.acquire(timeout=LIMIT_S)
        assert one.is_open
        probe.say(word)
    assert probe.asked.acquire(timeout=LIMIT_S)
    probe.say(None)
    assert one.watched.wait(LIMIT_S)
    assert not one.is_open
    one.check()
    # And it begins to count anew: one failure is not two.
    one.failed(BROKEN)
    assert not one.is_open
    one.failed(BROKEN)
    assert one.is_open
    assert probe.asked.acquire(timeout=LIMIT_S)
    probe.say(None)
    one.close()


def test_pauses_grow_up_to_a_bound_and_end_with_the_time_for_them(probe, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(breaker, "time", SimpleNamespace(monotonic=lambda: now[0]))  # of nobody else
    one = made(probe, retry_s=1.0)
    pauses = [one.pause_s(BROKEN, attempt) for attempt in range(7)]
    assert pauses == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.2, 0.2])
    now[0] += 0.85  # what is left would end with the pause
    assert one.pause_s(BROKEN, 6) is None
    assert one.pause_s(BROKEN, 0) == pytest.approx(0.01)
    now[0] += 0.15
    assert one.pause_s(BROKEN, 0) is None
    # Since the first failure, whichever lookup it was; a success begins anew.
    one.succeeded()
    assert one.pause_s(BROKEN, 0) == pytest.approx(0.01)
    one.close()


@pytest.mark.parametrize(
    "error", [DeadlineError("late"), RejectedError("bad"), UnavailableError("loading", "loading"), ValueError("other")]
)
def test_what_is_no_broken_connection_is_not_tried_again(probe, error):
    assert made(probe).pause_s(error, 0) is None


def test_without_time_to_retry_nothing_is_tried_twice(probe):
    assert made(probe, retry_s=0).pause_s(BROKEN, 0) is None


def test_closing_ends_the_probing(probe):
    one = made(probe, failures=1)
    one.failed(BROKEN)
    assert probe.asked.acquire(timeout=LIMIT_S)
    closer = threading.Thread(target=one.close)
    closer.start()
    assert one._closing.wait(LIMIT_S)  # else it might be probed once more
    probe.say(BROKEN)
    closer.join(LIMIT_S)
    assert not closer.is_alive()
    assert not one._prober.is_alive()


def test_once_closed_it_opens_no_more(probe):
    one = made(probe, failures=1)
    one.close()
    one.failed(BROKEN)
    assert not one.is_open
    assert one._prober is None


def test_silence_opens_it_once_a_probe_with_time_enough_is_not_answered_either(probe):
    opened = threading.Event()
    one = made(probe, failures=2, opened=opened.set)
    for _ in range(4):  # more than enough; and who probes is not started twice
        one.failed(DeadlineError("silent"))
    assert probe.asked.acquire(timeout=LIMIT_S)
    assert not one.is_open
    one.check()
    probe.say(DeadlineError("silent for a second"))
    assert opened.wait(LIMIT_S)
    with pytest.raises(UnavailableError, match="failed 4 lookups in a row, the last with: silent for a second"):
        one.check()
    probe.say(None)
    assert one.watched.wait(LIMIT_S)
    assert not one.is_open
    one.close()


def test_deadlines_say_nothing_of_a_server_that_answers_a_probe(probe, monkeypatch):
    monkeypatch.setattr(breaker, "_VOUCHED_S", 1000.0)
    opened = []
    one = made(probe, failures=1, opened=lambda: opened.append(True))
    one.failed(DeadlineError("too short"))
    probe.say(None)
    assert one.watched.wait(LIMIT_S)
    one._prober.join(LIMIT_S)
    for _ in range(5):
        one.failed(DeadlineError("too short"))
    assert not one._prober.is_alive()
    assert not opened
    one.check()
    one.failed(BROKEN)
    assert opened
    probe.say(None)
    one.close()


@pytest.mark.parametrize("reason", ["deadline", "not-asked"])
def test_a_deadline_that_has_a_reason_is_no_silence(probe, reason):
    one = made(probe, failures=1)
    one.failed(DeadlineError("too late", reason))
    assert one._prober is None
    one.close()


def test_a_failure_beside_silence_that_is_looked_into_opens_it_at_once(probe):
    one = made(probe, failures=1)
    one.failed(DeadlineError("silent"))
    assert probe.asked.acquire(timeout=LIMIT_S)
    one.failed(BROKEN)
    assert one.is_open
    probe.say(BROKEN)
    probe.say(None)
    assert one.watched.wait(LIMIT_S)
    assert not one.is_open
    one.close()


def test_probing_goes_on_after_what_nobody_thought_of(probe, caplog):
    one = made(probe, failures=1)
    one.failed(BROKEN)
    for _ in range(3):
        probe.say(ValueError("what is this"))
    probe.say(None)
    assert one.watched.wait(LIMIT_S)
    assert not one.is_open
    assert [line.getMessage() for line in caplog.records] == ["probing node:1 failed"]
    one.close()


def test_a_probe_that_is_refused_is_answered(probe):
    one = made(probe, failures=1)
    one.failed(BROKEN)
    probe.say(OverloadedError("full", "overloaded"))
    assert one.watched.wait(LIMIT_S)
    assert not one.is_open
    one.close()


def test_it_does_not_open_where_nobody_would_close_it(probe, monkeypatch):
    one = made(probe, failures=1)

    def refuse() -> None:
        raise RuntimeError("no more threads")

    with monkeypatch.context() as patch:  # of nobody else
        patch.setattr(breaker, "threading", SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=refuse)))
        one.failed(BROKEN)
    assert not one.is_open
    one.failed(BROKEN)
    assert one.is_open
    probe.say(None)
    one.close()


def test_a_probe_that_does_not_end_is_replaced_and_holds_nobody_who_closes(probe, monkeypatch):
    # Ctrl-C in another thread may leave a lock of gRPC's taken, and whoever waits for it waits for ever.
    monkeypatch.setattr(breaker, "_STUCK_S", 0.0)
    monkeypatch.setattr(breaker, "_CLOSE_S", 0.01)
    one = made(probe, failures=1)
    one.failed(BROKEN)
    assert probe.asked.acquire(timeout=LIMIT_S)
    stuck = one._prober
    while one._prober is stuck:
        with pytest.raises(UnavailableError):
            one.check()
    assert probe.asked.acquire(timeout=LIMIT_S)
    one.close()
    assert one._prober.is_alive()
    for _ in range(2):
        probe.say(None)
    for prober in (stuck, one._prober):
        prober.join(LIMIT_S)
        assert not prober.is_alive()
    assert not one.is_open
