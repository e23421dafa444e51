"""Who receives a small step's rows, and what becomes of what it holds, where requests say what a test has them say."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from engrampool_client import Client, DeadlineError, ForkedError, StepCancelledError
from engrampool_client.errors import EngrampoolError
from engrampool_client.lookup import run
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.sent import Came, Sent
from engrampool_client.lookup.workers import Job, Workers
from engrampool_client.testing import serve_process
from engrampool_proto import wire
from forks import FEW, expected
from server_fixtures import LIMIT_S, eventually

LAYERS = (2, 9)
ROWS = [(layer, np.full((1, 3), layer, np.uint8)) for layer in LAYERS]


class Says:
    """A request that says these things, one after the other, and after the last of them that more is to come."""

    timed = True

    def __init__(self, *says: int | Came | Callable[[], int | Came], small: bool = False) -> None:
        self.times: wire.ServerTimes | None = wire.ServerTimes(1, 2, 3)
        self.small = small
        self._says = list(says)
        self.untils: list[float] = []
        self.ended: list[str] = []
        self.shuts, self.passed, self.go_on = 0, threading.Event(), threading.Event()

    def ready(self, until: float, spin_s: float) -> Came | None:
        self.untils.append(until)
        return None

    def take(self, until: float, spin_s: float) -> int | Came:
        if not self._says:
            return Came.LATER
        said = self._says.pop(0)
        return said() if callable(said) else said

    def shut(self) -> None:
        self.shuts += 1

    def let_go(self, error: BaseException | None) -> None:
        self.ended.append(f"let go, {type(error).__name__}")

    def late(self, error: DeadlineError) -> None:
        self.ended.append("late")

    def pass_over(self, until: float, error: EngrampoolError) -> None:
        self.ended.append("passed over")
        self.passed.set()
        assert self.go_on.wait(LIMIT_S)


class Step:
    """A delivery whose rows such a request brings; left: how often the version was left. asked: to have it anew."""

    def __init__(self, request: Says, workers: Workers, again: Callable[[], None] = lambda: None) -> None:
        self.left = 0
        self.delivery = Delivery(LAYERS, time.monotonic() + LIMIT_S, on_end=self._ended)
        self.sent = Sent(self.delivery, request, ROWS, workers, 0.0, again, self._leave)
        self.delivery.receiver = self.sent
        self.delivery.on_cancel(self.sent.give_up)

    def _leave(self) -> None:
        self.left += 1

    def _ended(self, delivery: Delivery) -> None:
        self.sent.end()
        delivery.receiver = None

    def rows(self, layer: int, timeout_s: float | None = None) -> Any:
        self.delivery.wait_for(lambda: self.delivery.settled(layer), timeout_s)
        return self.delivery.rows.get(layer)


@pytest.fixture
def workers() -> Iterator[Workers]:
    """One place."""
    made = Workers(1, "engrampool")
    yield made
    made.close()


def interrupt() -> int:
    raise KeyboardInterrupt


def test_a_thread_that_waits_leaves_its_place_to_what_is_asked_for_instead(workers):
    def again() -> None:
        def ask() -> None:
            step.delivery.arrived(dict(ROWS))
            step.delivery.end(None)

        workers.submit(Job(step.delivery, lambda: True, ask))

    step = Step(Says(Came.NOTHING), workers, again)
    begin = time.monotonic()
    step.delivery.attend()
    eventually(lambda: step.delivery.ended, "it was asked for")
    assert time.monotonic() - begin < LIMIT_S / 2
    assert step.delivery.error is None


def test_what_is_passed_over_takes_no_place(workers):
    request = Says(small=True)
    step = Step(request, workers)
    step.delivery.give_up(StepCancelledError("it was cancelled"))
    assert request.passed.wait(LIMIT_S)
    done = threading.Event()
    workers.submit(Job(Delivery(LAYERS), lambda: True, done.set))
    assert done.wait(LIMIT_S / 2)
    request.go_on.set()
    assert (request.ended, step.left) == (["passed over"], 1)


def test_where_only_the_end_was_lost_nothing_is_asked_for_again(workers):
    asked: list[int] = []
    step = Step(Says(0, 1, Came.NOTHING), workers, lambda: asked.append(1))
    step.delivery.wait_for(lambda: step.delivery.ended, None)
    assert not asked
    assert step.delivery.error is None
    assert step.left == 1


def test_rows_that_came_as_somebody_was_interrupted_are_handed_over_at_the_end(workers, monkeypatch):
    step = Step(Says(0, 1, Came.LATER, Came.ALL), workers)
    arrived = step.delivery.arrived
    monkeypatch.setattr(step.delivery, "arrived", lambda rows: interrupt() if 2 in rows else arrived(rows))
    with pytest.raises(KeyboardInterrupt):
        step.rows(2)
    monkeypatch.undo()
    assert step.rows(9).tobytes() == ROWS[1][1].tobytes()
    assert step.rows(2).tobytes() == ROWS[0][1].tobytes()
    assert step.delivery.error is None
    assert step.left == 1


def test_whoever_has_no_time_to_wait_takes_what_is_there(workers):
    request = Says(0)
    step = Step(request, workers)
    assert step.rows(2, 0.0) is not None
    assert step.rows(9, 0.0) is None
    assert step.rows(9, -1e9) is None
    assert min(request.untils) >= 0.0  # less than that would be no limit


@pytest.mark.parametrize("line", [0, 1, 2, 3, 4, 5, 7])  # the 6th is the end of `with`, and no call
def test_ctrl_c_at_any_line_of_taking_the_claim_leaves_it_to_others(workers, line):
    """The next one who comes receives, and the end lets go of everything."""
    step, left = Step(Says(0, 1, Came.ALL), workers), line

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code is not Sent.receive.__code__:
            return trace if frame.f_code.co_name in ("rows", "wait_for", "_come") else None
        if event == "line":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    with suppress(KeyboardInterrupt):
        sys.settrace(trace)
        try:
            step.rows(2)
        finally:
            sys.settrace(None)
    assert step.sent.free or step.delivery.ended
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(step.rows(9)))
    thread.start()
    thread.join(LIMIT_S)
    assert found[0].tobytes() == ROWS[1][1].tobytes()
    step.delivery.end(None)
    assert step.left == 1


def test_who_is_interrupted_as_a_step_ends_is_followed_by_another(workers):
    request = Says()
    step = Step(request, workers)
    let_go, calls = request.let_go, []

    def interrupted(error: BaseException | None) -> None:
        calls.append(error)
        if len(calls) == 1:
            raise KeyboardInterrupt
        let_go(error)

    request.let_go = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        step.delivery.end(None)
    step.delivery.end(None)
    assert step.left == 1


def test_a_version_is_left_once_however_early_a_step_ends(packed, monkeypatch):
    class Early(Delivery):
        """Ends as soon as somebody receives, by another thread."""

        @property
        def receiver(self) -> Any:
            return self.__dict__.get("_receiver")

        @receiver.setter
        def receiver(self, receiver: Any) -> None:
            self.__dict__["_receiver"] = receiver
            if receiver is not None:
                ending = threading.Thread(target=self.give_up, args=(StepCancelledError("it was closed"),))
                ending.start()
                ending.join(LIMIT_S)

    with serve_process(packed, workers=1) as server, Client(server.address, attach="off") as client:
        client.prefetch(FEW).wait()
        eventually(lambda: client.direct, "the lane is there")
        with monkeypatch.context() as patch:
            patch.setattr(run, "Delivery", Early)
            step = client.prefetch(FEW)
            with pytest.raises(StepCancelledError):
                step.rows(1)
        eventually(lambda: client._versions.current.uses == 0, "the version was left, once")
        wanted = expected(client.spec, FEW)
        step = client.prefetch(FEW)
        assert all(np.array_equal(step.rows(layer), wanted[layer]) for layer in step.layers)
        step.wait()
        eventually(lambda: client._versions.current.uses == 0, "and is left again")


def test_a_lock_that_another_thread_had_at_a_fork_is_not_waited_for(workers):
    """In a callback of a step that its thread receives, say."""
    step = Step(Says(0, 1, Came.ALL), workers)
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with step.sent._lock:
            held.set()
            assert go_on.wait(LIMIT_S)

    holding = threading.Thread(target=hold)
    fork: list[int] = []

    def forks(layer: int) -> None:
        if not fork:
            holding.start()
            assert held.wait(LIMIT_S)
            step.delivery.forked(ForkedError("it is the parent's"))  # as the child does
            fork.append(layer)

    with step.delivery._lock:
        step.delivery._callbacks.append(forks)
    over = threading.Thread(target=step.rows, args=(2,), daemon=True)
    over.start()
    over.join(LIMIT_S / 4)
    alive = over.is_alive()
    go_on.set()
    holding.join()
    assert not alive
    assert fork == [2]
