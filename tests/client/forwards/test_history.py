"""Batches that are made of requests' histories, against the whole sequences that they are parts of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_schedule import schedule
from engrampool_client import BatchError
from engrampool_client.integrations.forwards.history import Histories
from engrampool_proto.hashing import TokenBatch

DEPTH = 3


def dead(ids):
    return ids == 7


def windows_of(truth, numbers, starts, counts, image):
    """What each token of the chunks sees, of the whole sequences."""
    found = []
    for number, start, count in zip(numbers, starts, counts, strict=True):
        tokens = np.array(truth[number], np.int32)
        whole = TokenBatch.of(tokens, dead=dead(tokens) if image else None)
        found.append(whole.windows(DEPTH).ids[:, start : start + count])
    return np.concatenate(found, axis=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(0, 3), st.booleans(), st.booleans())
def test_a_batch_sees_what_whole_sequences_show(seed, drafts, image, told):
    """told: the engine says what it sampled; else it is learned with the next forward only."""
    histories, prompts = Histories(6, 200, DEPTH, dead if image else None), np.zeros(6, np.int64)
    for moment, truth in schedule(seed, 1000, drafts=drafts):
        for number in moment.removed:
            histories.remove(number)
        for number, tokens, _ in moment.added:
            histories.add(number, tokens)
            prompts[number] = len(tokens)
        numbers, starts, counts = moment.arrays
        if told and not drafts:
            assert (starts + counts <= histories.lengths[numbers]).all()
        late = starts + counts > prompts[numbers]
        given = np.array([token for _, _, tokens, _ in moment.chunks for token in tokens])
        histories.put(numbers[late], starts[late], counts[late], given[late.repeat(counts)])
        batch = TokenBatch.of(*histories.batch(numbers, starts, counts))
        np.testing.assert_array_equal(batch.tokens, given)
        np.testing.assert_array_equal(batch.windows(DEPTH).ids, windows_of(truth, numbers, starts, counts, image))
        if told:
            ends = np.array([start + len(tokens) - tried for _, start, tokens, tried in moment.chunks])
            took = np.array([len(ids) for ids in moment.sampled])
            some = took > 0
            histories.put(
                numbers[some], ends[some], took[some], np.array([one for ids in moment.sampled for one in ids])
            )


def ints(*values):
    return np.array(values, np.int64)


def test_put_says_whether_it_was_known_and_forgets_what_was_behind():
    histories = Histories(2, 10, DEPTH)
    histories.add(0, [1, 2, 3, 4])
    histories.add(1, [1, 2, 3, 4])
    held = histories.put(ints(0, 1), ints(1, 1), ints(2, 2), ints(2, 3, 2, 9))
    assert held.tolist() == [True, False]
    assert histories.lengths.tolist() == [3, 3]
    assert histories.put(ints(0), ints(3), ints(1), ints(4)).tolist() == [False], "it was forgotten"
    assert histories.batch(ints(1), ints(3), ints(0)).lookback.tolist() == [[9, 2, 1]]


def test_a_gap_and_what_is_not_known_are_errors_that_name_the_request():
    histories = Histories(3, 10, DEPTH)
    histories.add(2, [1, 2])
    with pytest.raises(BatchError, match="request 2 goes on at token 3, and 2 are known of it"):
        histories.put(ints(2), ints(3), ints(1), ints(5))
    with pytest.raises(BatchError, match="request 2 is read up to token 3, and 2 are known of it"):
        histories.batch(ints(2), ints(1), ints(2))


def test_what_is_beyond_the_longest_request_is_let_go():
    histories = Histories(2, 4, DEPTH)
    histories.add(0, [1, 2, 3])
    histories.add(1, [1, 2, 3, 4, 5])
    histories.put(ints(0, 1), ints(3, 4), ints(3, 1), ints(4, 5, 6, 9))
    assert histories.lengths.tolist() == [4, 4]
    assert histories.batch(ints(0, 1), ints(0, 3), ints(4, 1)).tokens.tolist() == [1, 2, 3, 4, 4]


def test_a_number_that_another_request_has_now_knows_nothing_of_the_last_one():
    histories = Histories(1, 10, DEPTH)
    histories.add(0, [1, 2, 3, 4])
    histories.add(0, [5])
    assert histories.lengths.tolist() == [1]
    assert histories.batch(ints(0), ints(0), ints(1)).lookback.tolist() == [[-1, -1, -1]]
    histories.remove(0)
    assert histories.lengths.tolist() == [0]
