"""A step by itself, and what lanes hold of it: settled once, told once, at its deadline whatever happens."""

import gc
import itertools
import sys
import threading
import time

import numpy as np
import pytest

from engrampool_client import BatchError, DeadlineError, RejectedError, StepCancelledError, UnavailableError
from engrampool_client.lookup.deadlines import Deadlines
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.step import Step
from engrampool_client.stats import Stats

ROWS = {1: np.ones((2, 3, 4), np.uint8), 14: np.full((2, 3, 4), 2, np.uint8)}
LIMIT_S = 30


def blank(layer):
    return np.zeros((2, 3, 4), np.uint8), np.array([False, True])


def step_of(layers=(1, 14), deadline=float("inf"), **how) -> tuple[Step, Delivery]:
    delivery = Delivery(layers, deadline, **how)
    return Step(delivery), delivery


def test_layers_are_settled_one_by_one():
    step, delivery = step_of()
    told, late = [], []
    step.add_callback(lambda step, layer: told.append(layer))
    delivery.arrived({1: ROWS[1]})
    assert step.rows(1) is ROWS[1]
    assert step.valid(1).tolist() == [True, True]
    assert told == [1]
    assert not step.done()
    step.add_callback(lambda step, layer: late.append(layer))
    assert late == [1]
    delivery.arrived({14: ROWS[14]})
    delivery.end(None)
    assert (told, late) == ([1, 14], [1, 14])
    assert step.done()
    assert step.error is None
    assert 0 <= step.arrived_s[1] <= step.arrived_s[14] == step.elapsed_s
    with pytest.raises(BatchError, match="layer 2 was not asked for"):
        step.valid(2)


def test_a_failed_layer_raises_and_those_that_came_stay():
    step, delivery = step_of()
    told = []
    step.add_callback(lambda step, layer: told.append((layer, step.error)))
    delivery.arrived({1: ROWS[1]})
    error = UnavailableError("gone")
    delivery.end(error)
    assert told == [(1, None), (14, error)]
    assert step.rows(1) is ROWS[1]
    for ask in (lambda: step.rows(14), lambda: step.valid(14), step.wait):
        with pytest.raises(UnavailableError, match="gone"):
            ask()
    delivery.arrived({14: ROWS[14]})  # too late
    with pytest.raises(UnavailableError):
        step.rows(14)


def test_masked_layers_are_zero_and_say_so():
    step, delivery = step_of(blank=blank)
    told = []
    step.add_callback(lambda step, layer: told.append(layer))
    delivery.arrived({1: ROWS[1]})
    delivery.end(UnavailableError("gone"))
    assert told == [1, 14]
    step.wait()
    assert step.rows(1) is ROWS[1]
    assert step.valid(1).all()
    assert not step.rows(14).any()
    assert step.valid(14).tolist() == [False, True]
    assert not step.valid(14).flags.writeable
    assert str(step.error) == "gone"


@pytest.mark.parametrize("error", [BatchError("bad"), RejectedError("bad"), StepCancelledError("bad")])
def test_what_the_caller_did_is_not_masked(error):
    step, delivery = step_of([1], blank=blank)
    delivery.end(error)
    with pytest.raises(type(error), match="bad"):
        step.rows(1)


def test_a_layer_that_cannot_be_masked_is_settled_all_the_same(caplog):
    def refuse(layer):
        if layer == 1:
            raise ValueError("assignment destination is read-only")
        return blank(layer)

    ended = []
    step, delivery = step_of(blank=refuse, on_end=ended.append)
    told = []
    step.add_callback(lambda step, layer: told.append(layer))
    delivery.end(DeadlineError("late"))
    assert "the rows of layer 1 could not be masked" in caplog.text
    assert (step.done(), told, ended) == (True, [1, 14], [delivery])
    assert not step.rows(14).any()
    with pytest.raises(DeadlineError, match="late"):
        step.rows(1)


def test_an_error_that_comes_after_all_rows_takes_nothing_from_them():
    step, delivery = step_of()
    delivery.arrived(ROWS)
    delivery.end(UnavailableError("gone"))
    assert step.error is None
    assert step.rows(14) is ROWS[14]
    assert step.elapsed_s is not None


def test_the_deadline_settles_a_step_that_nobody_works_on():
    step, _ = step_of(deadline=time.monotonic() + 0.01)
    with pytest.raises(DeadlineError, match="by its deadline"):
        step.rows(1)
    assert step.done()
    masked, delivery = step_of(deadline=time.monotonic() + 0.01, blank=blank)
    assert not masked.rows(14).any()
    assert masked.done()
    assert isinstance(masked.error, DeadlineError)
    # What was settled stays so.
    delivery.arrived(ROWS)
    assert not masked.rows(1).any()


def test_deadlines_are_kept_where_nobody_waits():
    deadlines, told = Deadlines(), threading.Semaphore(0)
    settled = []
    kept = []
    for after_s in (0.05, 3600.0, 0.02, 0.0):  # a later one first, and one that is over already
        step, delivery = step_of([1], time.monotonic() + after_s, blank=blank, on_end=deadlines.forget)
        step.add_callback(lambda step, layer, after_s=after_s: (settled.append(after_s), told.release()))
        deadlines.watch(delivery)
        kept.append(step)
    for _ in range(3):
        assert told.acquire(timeout=LIMIT_S)
    assert sorted(settled) == [0.0, 0.02, 0.05]
    assert not kept[1].done()
    deadlines.give_up_all(StepCancelledError("closed"))
    assert kept[1].done()
    deadlines.close()


def test_one_that_is_stuck_while_it_writes_keeps_no_other_from_its_deadline():
    deadlines, settled, told = Deadlines(), [], threading.Semaphore(0)
    stuck, delivery = step_of([1], time.monotonic() + 0.01, blank=blank, on_end=deadlines.forget)
    with delivery.writing():
        deadlines.watch(delivery)
        for number in range(2):
            other, late = step_of([1], time.monotonic() + 0.02, blank=blank, on_end=deadlines.forget)
            other.add_callback(lambda step, layer, number=number: (settled.append(number), told.release()))
            deadlines.watch(late)
            assert told.acquire(timeout=LIMIT_S)
        assert delivery.given_up
        assert not stuck.done()
    assert stuck.done()  # whoever wrote last has settled it
    assert settled == [0, 1]
    deadlines.close()


def test_a_wait_of_its_own_settles_nothing():
    step, delivery = step_of([1], time.monotonic() + 60, blank=blank)
    with pytest.raises(DeadlineError, match=r"not there within 0\.001 s"):
        step.rows(1, timeout_s=0.001)
    with pytest.raises(ValueError, match="nan"):
        step.rows(1, timeout_s=float("nan"))
    assert not step.done()
    delivery.arrived({1: ROWS[1]})
    assert step.rows(1) is ROWS[1]


def test_a_deadline_waits_for_who_is_writing_and_lets_no_other_in():
    step, delivery = step_of([1], time.monotonic() + 0.01, blank=blank)
    writing, written, settled = threading.Event(), threading.Event(), threading.Event()

    def write():
        with delivery.writing():
            writing.set()
            written.wait()

    def read():
        step.rows(1)
        settled.set()

    writer, reader = threading.Thread(target=write), threading.Thread(target=read)
    writer.start()
    writing.wait()
    cancelled = threading.Event()
    delivery.on_cancel(cancelled.set)
    reader.start()
    assert cancelled.wait(LIMIT_S)  # the deadline has come, and told the call
    assert not settled.is_set()
    with pytest.raises(DeadlineError), delivery.writing():
        pass
    written.set()
    writer.join()
    reader.join()
    assert settled.is_set()


@pytest.mark.parametrize("how", ["cancelled", "dropped", "dropped in a cycle"])
def test_who_gives_a_step_up_returns_once_nobody_writes(how):
    step, delivery = step_of([1])
    writing, left = threading.Event(), []

    def write():
        told = threading.Event()
        delivery.on_cancel(told.set)
        with delivery.writing():
            writing.set()
            told.wait(LIMIT_S)
            left.append(True)

    writer = threading.Thread(target=write)
    writer.start()
    writing.wait()
    if how == "cancelled":
        step.cancel()
    elif how == "dropped":
        del step
    else:
        step.itself = step
        del step
        gc.collect()
    assert left
    writer.join()
    assert isinstance(delivery.error, StepCancelledError)


def test_who_is_at_work_is_told_even_if_the_last_writer_settles_first():
    step, delivery = step_of([1])
    inside, leave, told = threading.Event(), threading.Event(), []

    def write():
        with delivery.writing():
            inside.set()
            leave.wait(LIMIT_S)

    writer = threading.Thread(target=write)
    writer.start()
    inside.wait()
    delivery.on_cancel(lambda: told.append(True))
    tell = delivery._cancel

    def late():
        leave.set()
        writer.join()
        assert delivery.ended
        tell()

    delivery._cancel = late
    step.cancel()
    assert told == [True]


def test_what_a_step_took_is_free_once_it_was_given_up_though_another_settles_it():
    inside, told, go_on, ended = threading.Event(), threading.Event(), threading.Event(), []

    def on_end(_: Delivery) -> None:
        if threading.current_thread() is writer:
            assert go_on.wait(LIMIT_S)
        ended.append(threading.current_thread())

    def write() -> None:
        with delivery.writing():
            inside.set()
            assert told.wait(LIMIT_S)

    step, delivery = step_of([1], on_end=on_end)
    delivery.on_cancel(told.set)
    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(LIMIT_S)
    step.cancel()
    assert ended == [threading.current_thread()]
    go_on.set()
    writer.join()


def test_a_child_waits_for_no_end_of_a_step_that_has_its_rows():
    step, delivery = step_of([1], time.monotonic() + 3600)
    delivery.arrived({1: ROWS[1]})
    delivery.forked(StepCancelledError("forked"))
    step.wait(LIMIT_S)
    assert step.error is None


def test_a_step_that_somebody_is_to_be_told_of_is_not_dropped():
    step, delivery = step_of([1])
    told = []
    step.add_callback(lambda step, layer: told.append(step.rows(layer)))
    del step
    gc.collect()
    delivery.arrived({1: ROWS[1]})
    delivery.end(None)
    assert told[0] is ROWS[1]


def test_a_step_dropped_in_the_thread_that_writes_waits_for_nobody():
    step, delivery = step_of([1])
    with delivery.writing():
        del step
        assert not delivery.ended
    assert delivery.ended


def test_a_callback_that_fails_is_logged_and_harms_nobody(caplog):
    step, delivery = step_of([1])
    told = []
    step.add_callback(lambda step, layer: 1 / 0)
    step.add_callback(lambda step, layer: told.append(layer))
    delivery.on_cancel(lambda: 1 / 0)
    delivery.arrived({1: ROWS[1]})
    assert told == [1]
    assert "a callback of a step failed for layer 1" in caplog.text
    assert step.rows(1) is ROWS[1]


def test_valid_has_the_tokens_of_any_shape():
    for shape, tokens in (((5, 4), (5,)), ((5, 3, 4), (5,)), ((2, 5, 3, 4), (2, 5))):
        step, delivery = step_of([1])
        delivery.arrived({1: np.zeros(shape, np.uint8)})
        assert step.valid(1).shape == tokens


def test_ctrl_c_that_comes_as_a_wait_lets_go_of_its_lock_is_raised_as_such():
    step, delivery = step_of()
    assert not delivery.wait_for(lambda: False, 0.0)  # which makes the condition
    let_go = delivery._changed._release_save

    def interrupted():
        let_go()
        raise KeyboardInterrupt

    delivery._changed._release_save = interrupted
    with pytest.raises(KeyboardInterrupt):
        step.rows(1, LIMIT_S)
    delivery._changed._release_save = let_go
    delivery.arrived(ROWS)
    assert step.rows(1) is ROWS[1]


class _Interrupt:
    """Raises KeyboardInterrupt at the n-th line that this thread runs in delivery.py or stats.py, once."""

    def __init__(self, at: int) -> None:
        self.left, self.raised = at, False

    def __enter__(self) -> "_Interrupt":
        gc.disable()  # or the end of a step that is garbage may be what is interrupted
        sys.settrace(self._call)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(None)
        gc.enable()

    def _call(self, frame, event, arg):
        name = frame.f_code.co_filename
        return self._line if name.endswith(("/delivery.py", "/stats.py")) else None

    def _line(self, frame, event, arg):
        if event == "line" and not self.raised:
            self.left -= 1
            if self.left < 0:
                self.raised = True
                raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize("how", ["end", "give_up", "expire"])
def test_a_step_that_is_settled_is_never_left_half_way_wherever_it_is_interrupted(how):
    """Ctrl-C at every line of it in turn: who comes next, here the step's own end, brings it to its end."""
    gc.collect()  # or a step that an earlier test left is what is interrupted
    for at in itertools.count():
        stats, told = Stats([1, 14]), []
        step, delivery = step_of(blank=blank, on_end=lambda d, s=stats: s.ended(d, d.error, True))
        stats.began(delivery, 100)
        step.add_callback(lambda step, layer, told=told: told.append(layer))
        delivery.arrived({1: ROWS[1]})
        interrupt = _Interrupt(at)
        try:
            with interrupt:
                error = UnavailableError("gone")
                delivery.expire() if how == "expire" else getattr(delivery, how)(error)
        except KeyboardInterrupt:
            delivery.end(StepCancelledError("interrupted"))
        assert delivery.ended
        assert stats.pending_bytes == 0
        assert step.rows(1) is ROWS[1]
        assert told in ([1, 14], [1])  # a call that was interrupted is not made again
        if isinstance(step.error, StepCancelledError):
            with pytest.raises(StepCancelledError):
                step.rows(14)
        else:
            assert not step.rows(14).any()
        if not interrupt.raised:
            break
    assert at > 10
