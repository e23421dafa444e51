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


DEAD = 7
FORMS = pytest.mark.parametrize("compiled", [False, True], ids=["numpy", "compiled"])


def ints(*values):
    return np.array(values, np.int64)


def windows_of(truth, numbers, starts, counts, image):
    """What each token of the chunks sees, of the whole sequences."""
    found = []
    for number, start, count in zip(numbers, starts, counts, strict=True):
        tokens = np.array(truth[number], np.int32)
        whole = TokenBatch.of(tokens, dead=tokens == DEAD if image else None)
        found.append(whole.windows(DEPTH).ids[:, start : start + count])
    return np.concatenate(found, axis=1)


@FORMS
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), drafts=st.integers(0, 3), image=st.booleans(), told=st.booleans())
def test_a_batch_sees_what_whole_sequences_show(compiled, seed, drafts, image, told):
    """told: the engine says what it sampled; else it is learned with the next forward only."""
    histories, prompts = Histories(6, 200, DEPTH, DEAD if image else None, compiled), np.zeros(6, np.int64)
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
            sampled = ints(*(one for ids in moment.sampled for one in ids))
            histories.put(numbers[some], ends[some], took[some], sampled)


@FORMS
def test_put_says_whether_it_was_known_and_forgets_what_was_behind(compiled):
    histories = Histories(2, 10, DEPTH, compiled=compiled)
    histories.add(0, [1, 2, 3, 4])
    histories.add(1, [1, 2, 3, 4])
    held = histories.put(ints(0, 1), ints(1, 1), ints(2, 2), ints(2, 3, 2, 9))
    assert held.tolist() == [True, False]
    assert histories.lengths.tolist() == [3, 3]
    assert histories.put(ints(0), ints(3), ints(1), ints(4)).tolist() == [False], "it was forgotten"
    assert histories.batch(ints(1), ints(3), ints(0)).lookback.tolist() == [[9, 2, 1]]


@FORMS
def test_a_gap_and_what_is_not_known_are_errors_that_name_the_request(compiled):
    histories = Histories(3, 10, DEPTH, compiled=compiled)
    histories.add(2, [1, 2])
    with pytest.raises(BatchError, match="request 2 goes on at token 3, and 2 are known of it"):
        histories.put(ints(2), ints(3), ints(1), ints(5))
    with pytest.raises(BatchError, match="request 2 is read up to token 3, and 2 are known of it"):
        histories.batch(ints(2), ints(1), ints(2))


@FORMS
def test_what_is_beyond_the_longest_request_is_let_go(compiled):
    histories = Histories(2, 4, DEPTH, compiled=compiled)
    histories.add(0, [1, 2, 3])
    histories.add(1, [1, 2, 3, 4, 5])
    histories.put(ints(0, 1), ints(3, 4), ints(3, 1), ints(4, 5, 6, 9))
    assert histories.lengths.tolist() == [4, 4]
    assert histories.batch(ints(0, 1), ints(0, 3), ints(4, 1)).tokens.tolist() == [1, 2, 3, 4, 4]


@FORMS
def test_a_number_that_another_request_has_now_knows_nothing_of_the_last_one(compiled):
    histories = Histories(1, 10, DEPTH, compiled=compiled)
    histories.add(0, [1, 2, 3, 4])
    histories.add(0, [5])
    assert histories.lengths.tolist() == [1]
    assert histories.batch(ints(0), ints(0), ints(1)).lookback.tolist() == [[-1, -1, -1]]
    histories.remove(0)
    assert histories.lengths.tolist() == [0]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_both_forms_do_the_same_whatever_they_are_told(data):
    """Gaps, chunks that are not known, and of requests or positions that there are not, among what is well."""
    numpy, compiled = Histories(4, 8, DEPTH, DEAD), Histories(4, 8, DEPTH, DEAD, compiled=True)
    for number in range(4):
        prompt = data.draw(st.lists(st.integers(5, 8), max_size=9))
        for histories in (numpy, compiled):
            histories.add(number, prompt)
    for _ in range(6):
        numbers = ints(*data.draw(st.lists(st.integers(0, 4), unique=True, max_size=4)))
        some = st.lists(st.integers(0, 9), min_size=len(numbers), max_size=len(numbers))
        starts, counts = ints(*data.draw(some)), ints(*data.draw(some)) // 2
        total = int(counts.sum()) + data.draw(st.sampled_from([0, 0, 0, 1]))
        tokens = np.resize(np.array(data.draw(st.lists(st.integers(5, 8), min_size=1, max_size=9))), total)
        tokens = tokens.astype(data.draw(st.sampled_from([np.int32, np.int64])))
        for call in ("put", "batch"):
            given_to = (numbers, starts, counts, tokens) if call == "put" else (numbers, starts, counts)
            outcomes = [outcome(getattr(one, call), *given_to) for one in (numpy, compiled)]
            np.testing.assert_equal(*outcomes)
            if call == "batch" and isinstance(outcomes[0], tuple):
                assert [getattr(one, "dtype", None) for one in outcomes[0]] == [
                    getattr(one, "dtype", None) for one in outcomes[1]
                ]
        np.testing.assert_array_equal(numpy.lengths, compiled.lengths)
        np.testing.assert_array_equal(numpy._tokens, compiled._tokens)


def outcome(call, *arguments):
    """What it gives, or the type and text of what it raises."""
    try:
        return call(*arguments)
    except (BatchError, IndexError, ValueError) as error:
        return [type(error), str(error)]
