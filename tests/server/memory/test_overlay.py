"""Gathering from a table with changed rows over it, against numpy."""

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.errors import BatchError
from engrampool_proto.kernels.gather import gather
from engrampool_server.memory.overlay import Overlay
from engrampool_server.memory.tables import LoadedTable
from server_fixtures import SPEC

TABLE = SPEC.table(9)
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 264, 1000]))
STARTS = st.sampled_from([0, 1, 63, 64, 999, 2**32 - 60, 2**40])
DTYPES = st.sampled_from([np.uint32, np.uint64])
GUARD = 40


@given(
    width=WIDTHS,
    num_rows=st.integers(1, 300),
    start=STARTS,
    dtype=DTYPES,
    dense=st.booleans(),
    out_by=st.integers(0, 65),
    data=st.data(),
)
def test_changed_rows_stand_in_the_place_of_the_others(width, num_rows, start, dtype, dense, out_by, data):
    random = np.random.default_rng(width)
    rows = random.integers(0, 256, (num_rows, width), np.uint8)
    places = st.integers(0, num_rows - 1)
    changed = np.array(sorted(data.draw(st.sets(places, min_size=1, max_size=num_rows))), np.int64)
    if dense:
        changed = np.setdiff1d(np.arange(num_rows), changed[1:])
    over = Overlay.of(
        changed.astype(np.uint64) + np.uint64(start),
        random.integers(0, 256, (len(changed), width), np.uint8),
        range(start, start + num_rows),
    )
    expected = rows.copy()
    expected[changed] = over.rows
    asked = [place for place in data.draw(st.lists(places, max_size=150)) if start + place <= np.iinfo(dtype).max]
    ids = np.array([start + place for place in asked], dtype)
    space = np.full(out_by + len(ids) * width + GUARD, 0xAA, np.uint8)
    out = space[out_by : out_by + len(ids) * width]
    assert gather(rows, ids, start, out) == -1
    over.copy(ids, start, out)
    assert out.tobytes() == expected[asked].tobytes()
    assert (space[:out_by] == 0xAA).all()
    assert (space[out_by + out.size :] == 0xAA).all()


@given(start=STARTS, dtype=DTYPES, data=st.data())
def test_an_id_that_is_not_held_is_named_and_ends_the_copy(start, dtype, data):
    rows = np.random.default_rng(1).integers(0, 256, (90, 42), np.uint8)
    over = Overlay.of(np.array([start, start + 70], np.uint64), np.full((2, 42), 7, np.uint8), range(start, start + 90))
    top = int(np.iinfo(dtype).max)
    near = [value for value in (0, start - 1, start, start + 89, start + 90, top) if 0 <= value <= top]
    held = [value for value in near if start <= value < start + 90]
    ids = data.draw(st.lists(st.sampled_from(held * 8 + near), max_size=80))
    bad = [at for at, value in enumerate(ids) if not start <= value < start + 90]
    table = LoadedTable(TABLE, rows, start, overlay=over)
    array, out = np.array(ids, dtype), np.zeros(len(ids) * 42, np.uint8)
    if bad:
        with pytest.raises(BatchError, match=f"row id {ids[bad[0]]} at position {bad[0]} of layer 9"):
            table.gather(array, out)
        assert not out[bad[0] * 42 :].any()
    else:
        table.gather(array, out)
        assert out.tobytes() == b"".join(bytes([7] * 42) if i == start else rows[i - start].tobytes() for i in ids)


def test_nothing_is_read_outside_index_and_changed_rows():
    # Each fills pages that may be read, up to the last byte; one byte beyond is a SIGSEGV.
    libc = ctypes.CDLL(None, use_errno=True)

    def at_the_end(array: np.ndarray) -> np.ndarray:
        size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        space = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
        assert not libc.mprotect(ctypes.c_void_p(space.ctypes.data + size), ctypes.c_size_t(mmap.PAGESIZE), 0)
        out = space[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
        out[...] = array
        return out

    over = Overlay.of(np.array([0, 129], np.uint64), np.zeros((2, 33), np.uint8), range(130))
    over = Overlay(*(at_the_end(array) for array in (over.rows, over.words, over.ranks)))
    out = np.full(4 * 33, 9, np.uint8)
    over.copy(np.array([129, 0, 128, 129], np.uint32), 0, out)
    assert out.tobytes() == bytes(66) + bytes([9] * 33) + bytes(33)


def test_the_index_cannot_be_written():
    over = Overlay.of(np.array([3], np.uint64), np.zeros((1, 2), np.uint8), range(5))
    for array in (over.words, over.ranks):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
