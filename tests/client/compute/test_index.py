"""The compiled index of a cache against the one by numpy, which is its specification."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client.compute.cache import HotRows
from engrampool_client.compute.compiled import CompiledIndex
from engrampool_client.compute.forms import choose
from engrampool_client.compute.index import WAYS, Index

# Few enough that tiny caches are asked for the same key again, with the values that an empty slot might be taken for.
KEYS = st.sampled_from([0, -1, 1, 2**63 - 1, -(2**63), 255, *range(100, 160)])
NAMES = st.tuples(KEYS, st.sampled_from([0, 1, 2, 254, 255]))
STEPS = st.lists(st.tuples(st.sampled_from(["find", "put", "hint"]), st.lists(NAMES, max_size=60)), max_size=30)
WIDTHS = st.sampled_from([1, 7, 31, 32, 33, 64, 264, 2112])


def arrays(names):
    keys = np.array([key for key, _ in names], np.int64)
    return keys, np.array([group for _, group in names], np.uint8)


def assert_same(ours: Index, wanted: Index) -> None:
    for name in ("keys", "groups", "rows", "ages", "unused"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(wanted, name), name)


@given(sets=st.integers(1, 5), width=WIDTHS, steps=STEPS, seed=st.integers(0, 1000))
def test_any_sequence_leaves_both_alike(sets, width, steps, seed):
    random = np.random.default_rng(seed)
    kinds = (Index, CompiledIndex)
    indexes = [kind.empty(sets) for kind in kinds]
    memories = [np.zeros((sets * WAYS, width), np.uint8) for _ in kinds]
    for what, names in steps:
        if what == "find":
            keys, groups = arrays(names)
            (found, *counts), (wanted, *wanted_counts) = (index.find(keys, groups) for index in indexes)
            np.testing.assert_array_equal(found, wanted)
            assert (found.dtype, counts) == (np.int64, wanted_counts)
        else:
            keys, groups = arrays(dict.fromkeys(names))
            entries = random.integers(0, 256, (len(keys), width), np.uint8)
            first, second = (
                index.put(keys, groups, entries, memory, what == "hint")
                for index, memory in zip(indexes, memories, strict=True)
            )
            assert first == second
        assert_same(indexes[1], indexes[0])
        np.testing.assert_array_equal(memories[1], memories[0])


def test_many_keys_go_where_numpy_puts_them():
    random = np.random.default_rng(3)
    indexes, memories = [Index.empty(300), CompiledIndex.empty(300)], [np.zeros((2400, 40), np.uint8) for _ in range(2)]
    for _ in range(20):
        keys = np.unique(random.integers(-(2**40), 2**40, 2048) % 3000)
        groups = random.integers(0, 256, len(keys)).astype(np.uint8)
        entries = random.integers(0, 256, (len(keys), 40), np.uint8)
        for index, memory in zip(indexes, memories, strict=True):
            index.put(keys, groups, entries, memory, False)
        for index in indexes:
            index.find(keys[::2].copy(), groups[::2].copy())
        assert_same(*indexes)
        np.testing.assert_array_equal(*memories)


def test_an_index_that_is_only_read_ages_nothing():
    full, keys, groups = CompiledIndex.empty(4), np.arange(20), np.full(20, 3, np.uint8)
    full.put(keys, groups, np.zeros((20, 8), np.uint8), np.zeros((32, 8), np.uint8), False)
    packed = np.frombuffer(b"." + full.bytes(), np.uint8)[1:]  # at an odd address, and not to be written
    found, hits, used = CompiledIndex.of(packed).find(keys, groups)
    wanted, *counts = Index.of(packed).find(keys, groups)
    np.testing.assert_array_equal(found, wanted)
    assert [hits, used] == counts == [20, 0]


@pytest.mark.parametrize("setting", ["off", "on"])
def test_a_file_is_read_by_either_form(setting, tmp_path):
    cache = HotRows(64 * 8 * (24 + 16), 24, choose(setting))
    keys, groups = np.arange(100), np.full(100, 9, np.uint8)
    entries = np.arange(2400).astype(np.uint8).reshape(100, 24)
    cache.put(keys, groups, entries)
    cache.save(tmp_path / "cache", "v", {})
    for other in ("off", "on"):
        opened = HotRows.open(tmp_path / "cache", "v", {}, choose(other))
        rows = opened.find(keys, groups)
        there = rows >= 0
        assert np.count_nonzero(there) == opened.hits == cache.filled > 90
        np.testing.assert_array_equal(opened.rows[rows[there]], entries[there])
