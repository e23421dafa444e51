"""A step by itself: settled once, told once, at its deadline whatever happens."""

import threading
import time

import numpy as np
import pytest

from engrampool_client import BatchError, DeadlineError, RejectedError, StepCancelledError, UnavailableError
from engrampool_client.stats import Stats
from engrampool_client.step import Step

ROWS = {1: np.ones((2, 3, 4), np.uint8), 14: np.full((2, 3, 4), 2, np.uint8)}


def blank(layer):
    return np.zeros((2, 3, 4), np.uint8), np.array([False, True])


def test_layers_are_settled_one_by_one():
    step, told = Step([1, 14]), []
    step.add_callback(lambda step, layer: told.append(layer))
    step._arrived({1: ROWS[1]})
    assert step.rows(1) is ROWS[1]
    assert step.valid(1).tolist() == [True, True]
    assert told == [1]
    assert not step.done()
    late = []
    step.add_callback(lambda step, layer: late.append(layer))
    assert late == [1]
    step._arrived({14: ROWS[14]})
    step._end(None)
    assert (told, late) == ([1, 14], [1, 14])
    assert step.done()
    assert step.error is None
    assert 0 <= step.arrived_s[1] <= step.arrived_s[14] == step.elapsed_s
    with pytest.raises(BatchError, match="layer 2 was not asked for"):
        step.valid(2)


def test_a_failed_layer_raises_and_those_that_came_stay():
    step, told = Step([1, 14]), []
    step.add_callback(lambda step, layer: told.append((layer, step.error)))
    step._arrived({1: ROWS[1]})
    error = UnavailableError("gone")
    step._end(error)
    assert told == [(1, None), (14, error)]
    assert step.rows(1) is ROWS[1]
    for ask in (lambda: step.rows(14), lambda: step.valid(14), step.wait):
        with pytest.raises(UnavailableError, match="gone"):
            ask()
    step._arrived({14: ROWS[14]})  # too late
    with pytest.raises(UnavailableError):
        step.rows(14)


def test_masked_layers_are_zero_and_say_so():
    stats = Stats([1, 14])
    assert stats.began(100)
    step, told = Step([1, 14], blank=blank, stats=stats, nbytes=100), []
    step.add_callback(lambda step, layer: told.append(layer))
    step._arrived({1: ROWS[1]})
    step._end(UnavailableError("gone"))
    assert told == [1, 14]
    step.wait()
    assert step.rows(1) is ROWS[1]
    assert step.valid(1).all()
    assert not step.rows(14).any()
    assert step.valid(14).tolist() == [False, True]
    assert not step.valid(14).flags.writeable
    assert str(step.error) == "gone"
    assert stats.masked_tokens == {1: 0, 14: 1}
    assert stats.steps["masked"] == 1
    assert stats.pending_bytes == 0


@pytest.mark.parametrize("error", [BatchError("bad"), RejectedError("bad"), StepCancelledError("bad")])
def test_what_the_caller_did_is_not_masked(error):
    step = Step([1], blank=blank)
    step._end(error)
    with pytest.raises(type(error), match="bad"):
        step.rows(1)


def test_the_deadline_settles_a_step_that_nobody_works_on():
    step = Step([1, 14], time.monotonic() + 0.01)
    with pytest.raises(DeadlineError, match="by its deadline"):
        step.rows(1)
    assert step.done()
    masked = Step([1, 14], time.monotonic() + 0.01, blank)
    assert not masked.rows(14).any()
    assert masked.done()
    assert isinstance(masked.error, DeadlineError)
    # What was settled stays so.
    masked._arrived(ROWS)
    assert not masked.rows(1).any()


def test_a_wait_of_its_own_settles_nothing():
    step = Step([1], time.monotonic() + 60, blank)
    with pytest.raises(DeadlineError, match=r"not there within 0\.001 s"):
        step.rows(1, timeout_s=0.001)
    assert not step.done()
    step._arrived({1: ROWS[1]})
    assert step.rows(1) is ROWS[1]


def test_a_deadline_waits_for_who_is_writing_and_lets_no_other_in():
    step = Step([1], time.monotonic() + 0.01, blank)
    writing, written, settled = threading.Event(), threading.Event(), threading.Event()

    def write():
        with step._writing():
            writing.set()
            written.wait()

    def read():
        step.rows(1)
        settled.set()

    writer, reader = threading.Thread(target=write), threading.Thread(target=read)
    writer.start()
    writing.wait()
    cancelled = threading.Event()
    step._on_cancel(cancelled.set)
    reader.start()
    assert cancelled.wait(10)  # the deadline has come, and told the call
    assert not settled.is_set()
    with pytest.raises(DeadlineError), step._writing():
        pass
    written.set()
    writer.join()
    reader.join()
    assert settled.is_set()


def test_a_callback_that_fails_is_logged_and_harms_nobody(caplog):
    step, told = Step([1]), []
    step.add_callback(lambda step, layer: 1 / 0)
    step.add_callback(lambda step, layer: told.append(layer))
    step._arrived({1: ROWS[1]})
    assert told == [1]
    assert "a callback of a step failed for layer 1" in caplog.text
    assert step.rows(1) is ROWS[1]


def test_valid_has_the_tokens_of_any_shape():
    for shape, tokens in (((5, 4), (5,)), ((5, 3, 4), (5,)), ((2, 5, 3, 4), (2, 5))):
        step = Step([1])
        step._arrived({1: np.zeros(shape, np.uint8)})
        assert step.valid(1).shape == tokens
