"""The client's threads: in which order jobs run, which place is kept free, and what closing means."""

import threading

import pytest

from engrampool_client.errors import StepCancelledError
from engrampool_client.lookup import workers as module
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.workers import Job, Workers
from server_fixtures import eventually

LIMIT_S = 30


def job_of(ask, ahead: bool = False, hint: bool = False) -> Job:
    """A job that is planned at once, and then asks."""
    return Job(Delivery([1]), lambda: True, ask, ahead, hint)


class Gate:
    """A job that holds its thread until it is opened. begun: set once it runs."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.open.wait(LIMIT_S)

    def submit(self, workers: Workers, **settings) -> "Gate":
        self.job = job_of(self, **settings)
        assert workers.submit(self.job)
        return self


@pytest.fixture(autouse=True)
def patient(monkeypatch) -> None:
    """Closing leaves no thread behind that only stands still for a moment."""
    monkeypatch.setattr(module, "HELD_S", LIMIT_S)


@pytest.fixture
def ran() -> list:
    return []


def busy(workers: Workers, **settings) -> Gate:
    gate = Gate().submit(workers, **settings)
    assert gate.begun.wait(LIMIT_S)
    return gate


def test_jobs_run_in_their_order_and_those_ahead_after_all_others(ran):
    workers = Workers(1, "test")
    gate = busy(workers)
    for number, ahead in enumerate((True, False, True, False)):
        assert workers.submit(job_of(lambda number=number: ran.append(number), ahead=ahead))
    eventually(lambda: workers.waiting == 4, "all are planned")
    gate.open.set()
    workers.close()
    assert ran == [1, 3, 0, 2]


def test_threads_are_started_as_they_are_needed_and_used_again():
    workers, names, done = Workers(3, "test"), [], threading.Semaphore(0)

    def job() -> None:
        names.append(threading.current_thread().name)
        done.release()

    gates = [busy(workers) for _ in range(2)]
    assert len(workers._threads) == 2
    for gate in gates:
        gate.open.set()
    # Each waits for the one before, so there is an idle thread for it sooner or later, and never need of a fifth.
    for _ in range(20):
        assert workers.submit(job_of(job))
        assert done.acquire(timeout=LIMIT_S)
    workers.close()
    assert set(names) <= {f"test-{number}" for number in range(4)}  # one more than places, for planning


def test_no_more_jobs_run_at_once_than_there_are_places(ran):
    workers = Workers(2, "test")
    gates = [busy(workers) for _ in range(2)]
    third = Gate().submit(workers)
    assert not third.begun.is_set()
    gates[0].open.set()
    assert third.begun.wait(LIMIT_S)
    for gate in (gates[1], third):
        gate.open.set()
    workers.close()


def test_planning_waits_for_no_place():
    workers, planned = Workers(1, "test"), threading.Event()
    gate = busy(workers)

    def plan() -> bool:
        planned.set()
        return False

    assert workers.submit(Job(Delivery([1]), plan, lambda: pytest.fail("there is nothing to ask for"), ahead=True))
    assert planned.wait(LIMIT_S)
    gate.open.set()
    workers.close()


def test_a_job_that_is_given_up_leaves_its_place_at_once_and_only_so_many_threads_are_held(monkeypatch):
    monkeypatch.setattr(module, "_MOST_HELD", 1)
    workers = Workers(1, "test")
    stuck = [busy(workers)]
    second = Gate().submit(workers)
    assert not second.begun.is_set()
    stuck[0].job.delivery.give_up(StepCancelledError("cancelled"))
    assert second.begun.wait(LIMIT_S)
    # Another thread would be one too many: this one keeps its place.
    second.job.delivery.give_up(StepCancelledError("cancelled"))
    third = Gate().submit(workers)
    assert not third.begun.is_set()
    stuck[0].open.set()
    second.open.set()
    assert third.begun.wait(LIMIT_S)
    third.open.set()
    workers.close()
    # Threads that were held are not missed, nor too many, afterwards.
    assert (workers._held, workers._asking) == (0, [])


def test_a_job_that_is_given_up_while_it_waits_for_a_place_ends_without_one():
    workers = Workers(1, "test")
    gate = busy(workers)
    waiting = Gate().submit(workers)
    assert not waiting.begun.is_set()
    waiting.open.set()
    waiting.job.delivery.give_up(StepCancelledError("cancelled"))
    assert waiting.begun.wait(LIMIT_S)  # it lets go of what it was planned with
    gate.open.set()
    workers.close()


def test_a_hint_gives_its_place_to_who_finds_none():
    workers = Workers(1, "test")
    hint = busy(workers, ahead=True, hint=True)
    now = busy(workers)
    assert isinstance(hint.job.delivery.error, StepCancelledError)
    for gate in (hint, now):
        gate.open.set()
    workers.close()


def test_what_is_ahead_never_takes_the_last_place(ran):
    workers = Workers(2, "test")
    ahead = busy(workers, ahead=True)
    waiting = Gate().submit(workers, ahead=True)
    now = busy(workers)  # finds a place though jobs ahead wait
    assert not waiting.begun.is_set()
    now.open.set()
    again = busy(workers)
    assert not waiting.begun.is_set()
    ahead.open.set()
    assert waiting.begun.wait(LIMIT_S)  # the place of the other that was ahead
    for gate in (waiting, again):
        gate.open.set()
    workers.close()


def test_a_single_thread_does_both():
    workers = Workers(1, "test")
    gate = busy(workers, ahead=True)
    gate.open.set()
    gate = busy(workers)
    gate.open.set()
    workers.close()


def test_closing_runs_what_was_submitted_and_takes_no_more(ran):
    workers = Workers(2, "test")
    gates = [busy(workers), busy(workers)]
    for number in range(4):
        assert workers.submit(job_of(lambda number=number: ran.append(number), ahead=number % 2 == 1))
    closer = threading.Thread(target=workers.close)
    closer.start()
    for gate in gates:
        gate.open.set()
    closer.join(LIMIT_S)
    assert not closer.is_alive()
    assert sorted(ran) == [0, 1, 2, 3]
    assert not workers.submit(job_of(lambda: ran.append("late")))
    assert not any(thread.is_alive() for thread in workers._threads)
    workers.close()
    assert "late" not in ran


def test_closing_with_nobody_at_work_ends():
    Workers(2, "test").close()
    workers = Workers(2, "test")
    gate = busy(workers)
    gate.open.set()
    workers.close()
    assert not any(thread.is_alive() for thread in workers._threads)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_job_that_fails_is_logged_and_gives_its_place_back(ran, caplog, ahead):
    workers, done = Workers(1, "test"), threading.Event()

    def fail() -> None:
        raise ZeroDivisionError("of the job")

    assert workers.submit(job_of(fail, ahead=ahead))
    assert workers.submit(job_of(done.set, ahead=True))
    assert done.wait(LIMIT_S)
    workers.close()
    assert "ZeroDivisionError: of the job" in caplog.text


def test_many_threads_may_submit(ran):
    workers, lock = Workers(4, "test"), threading.Lock()

    def job(number: int) -> None:
        with lock:
            ran.append(number)

    def submit(start: int) -> None:
        for number in range(start, start + 250):
            assert workers.submit(job_of(lambda number=number: job(number), ahead=number % 3 == 0))

    callers = [threading.Thread(target=submit, args=(250 * caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    workers.close()
    assert sorted(ran) == list(range(1000))
