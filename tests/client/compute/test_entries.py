"""Each entry once, and every entry in its place: the compiled form against the one by numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client.compute.forms import NUMPY, choose

WIDTHS = st.sampled_from([1, 7, 31, 32, 33, 63, 64, 65, 264, 2112])


@pytest.fixture(scope="module")
def compiled():
    return choose("on")


@st.composite
def batches(draw) -> tuple[np.ndarray, np.ndarray | None]:
    """Keys [groups, T], and which entries are left out: of equal keys all or none."""
    groups, tokens = draw(st.integers(1, 4)), draw(st.integers(0, 70))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    pool = draw(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 40)), min_size=1, max_size=40))
    keys = random.choice(np.array(pool, np.int64), (groups, tokens))
    if draw(st.booleans()):
        return keys, None
    known = np.isin(keys, random.choice(np.array(pool, np.int64), len(pool) // 2))
    return keys, known.T.reshape(-1)


@given(batches())
def test_every_key_is_asked_for_once_and_every_entry_finds_its_own(compiled, batch):
    keys, hit = batch
    first, counts, inverse = compiled.distinct(keys, hit)
    wanted, wanted_counts, _ = NUMPY.distinct(keys, hit)
    assert counts == wanted_counts
    assert (first.dtype, inverse.dtype) == (np.int64, np.int64)
    start = 0
    for count in counts:
        assert sorted(first[start : start + count]) == wanted[start : start + count].tolist()
        start += count
    missing = np.arange(keys.size) if hit is None else np.flatnonzero(~hit)
    np.testing.assert_array_equal(first[inverse[missing]], keys.T.reshape(-1)[missing])
    # Of its own group.
    bounds = np.cumsum([0, *counts])
    group = missing % len(keys)
    assert ((bounds[group] <= inverse[missing]) & (inverse[missing] < bounds[group + 1])).all()


@given(batch=batches(), width=WIDTHS, columns=st.sampled_from([(0, 0), (3, 0), (0, 5), (2, 2)]))
def test_entries_are_placed_as_by_numpy_and_nothing_else_is_written(compiled, batch, width, columns):
    keys, hit = batch
    random = np.random.default_rng(width)
    before, behind = columns
    tokens, nbytes = keys.shape[1], len(keys) * width
    whole = random.integers(0, 256, (tokens, before + nbytes + behind), np.uint8)
    results = []
    for form in (NUMPY, compiled):
        first, _, inverse = form.distinct(keys, hit)
        # Of one key the same bytes, in whichever order it is asked for.
        fetched = (first[:, None] * 31 + np.arange(width)).astype(np.uint8)
        to = whole.copy()
        form.place(fetched, inverse, None if hit is None else hit.copy(), to[:, before : before + nbytes])
        results.append(to)
    np.testing.assert_array_equal(*results)


@given(batch=batches(), width=st.integers(1, 4), row_bytes=st.sampled_from([1, 33, 264]), more=st.integers(0, 3))
def test_entries_that_lie_in_their_first_places_are_repeated_in_all_others(compiled, batch, width, row_bytes, more):
    keys, hit = batch
    groups, tokens = keys.shape
    heads = groups * width + more
    columns = (groups, heads, more // 2, width)
    first, _, inverse = compiled.distinct(keys, hit)
    inverse[inverse < 0] = -1
    if hit is not None:
        assert (inverse[hit] < 0).all()
    places = compiled.first_places(inverse, len(first), *columns)
    np.testing.assert_array_equal(places, NUMPY.first_places(inverse, len(first), *columns))
    fetched = np.random.default_rng(width).integers(0, 256, (len(first), width * row_bytes), np.uint8)
    before = np.random.default_rng(row_bytes).integers(0, 256, (tokens * heads, row_bytes), np.uint8)
    wanted = before.copy()
    part = wanted.reshape(tokens, heads * row_bytes)[:, more // 2 * row_bytes :][:, : groups * width * row_bytes]
    compiled.place(fetched, inverse, hit, part)
    for form in (NUMPY, compiled):
        rows = before.copy()
        for place, entry in zip(places.tolist(), fetched, strict=True):
            rows[place : place + width] = entry.reshape(width, row_bytes)
        form.repeat(rows, places, inverse, *columns)
        np.testing.assert_array_equal(rows, wanted)


@given(data=st.data(), width=WIDTHS, spare=st.sampled_from([0, 9]), write=st.booleans())
def test_what_is_found_is_copied_as_by_numpy(compiled, data, width, spare, write):
    tokens, groups = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 3))
    seed, some = data.draw(st.integers(0, 10_000)), data.draw(st.sampled_from([None, 0.1, 0.9]))
    random = np.random.default_rng(seed)
    rows = random.integers(0, 256, (20, width + spare), np.uint8)
    slots = np.where(random.random(tokens * groups) < data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])), 1, 0)
    slots = np.where(slots == 1, random.integers(0, 20, slots.size), -1)
    hit = None if some is None else random.random(slots.size) < some
    before = random.integers(0, 256, (tokens, groups * width), np.uint8)
    results = []
    for form in (NUMPY, compiled):
        to = before.copy() if write else None
        found, count = form.copy_found(rows, slots, width, None if hit is None else hit.copy(), to)
        results.append((found, count, to))
    (wanted, wanted_count, wanted_to), (found, count, to) = results
    assert count == wanted_count
    assert (found is None) == (wanted is None)
    if found is not None:
        np.testing.assert_array_equal(found, wanted)
    if to is not None:
        # Where nothing was found numpy may have written some row or other: it is fetched later.
        there = np.repeat((slots >= 0) | (hit if hit is not None else False), width).reshape(to.shape)
        np.testing.assert_array_equal(to[there], wanted_to[there])
        if hit is not None:
            np.testing.assert_array_equal(to, wanted_to)


def test_keys_that_follow_each_other_take_no_long_time(compiled):
    """Lengths of the table's runs, by the work that it is: a million tokens in well under the time of a sort."""
    keys = np.arange(1_000_000, dtype=np.int64)[None]
    first, counts, inverse = compiled.distinct(keys, None)
    assert counts == [1_000_000]
    np.testing.assert_array_equal(first, keys[0])
    np.testing.assert_array_equal(inverse, keys[0])
