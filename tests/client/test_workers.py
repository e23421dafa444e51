"""The client's threads: in which order jobs run, which place is kept free, and what closing means."""

import threading

import pytest

from engrampool_client.workers import Workers

LIMIT_S = 30


class Gate:
    """A job that holds its thread until it is opened. begun: set once it runs."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.open.wait(LIMIT_S)

    def submit(self, workers: Workers, **settings) -> "Gate":
        assert workers.submit(self, **settings)
        return self


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
        assert workers.submit(lambda number=number: ran.append(number), ahead=ahead)
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
    # Each waits for the one before, so there is an idle thread for it sooner or later, and never need of a fourth.
    for _ in range(20):
        assert workers.submit(job)
        assert done.acquire(timeout=LIMIT_S)
    workers.close()
    assert set(names) <= {"test-0", "test-1", "test-2"}
    assert len(workers._threads) <= 3


def test_no_more_jobs_run_at_once_than_there_are_places(ran):
    workers = Workers(2, "test")
    gates = [busy(workers) for _ in range(2)]
    third = Gate().submit(workers)
    assert not third.begun.is_set()
    assert len(workers._threads) == 2
    gates[0].open.set()
    assert third.begun.wait(LIMIT_S)
    for gate in (gates[1], third):
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
        assert workers.submit(lambda number=number: ran.append(number), ahead=number % 2 == 1)
    closer = threading.Thread(target=workers.close)
    closer.start()
    for gate in gates:
        gate.open.set()
    closer.join(LIMIT_S)
    assert not closer.is_alive()
    assert sorted(ran) == [0, 1, 2, 3]
    assert not workers.submit(lambda: ran.append("late"))
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

    assert workers.submit(fail, ahead=ahead)
    assert workers.submit(done.set, ahead=True)
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
            assert workers.submit(lambda number=number: job(number), ahead=number % 3 == 0)

    callers = [threading.Thread(target=submit, args=(250 * caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    workers.close()
    assert sorted(ran) == list(range(1000))
