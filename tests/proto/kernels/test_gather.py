"""The gather kernels against numpy: every width, any address, ids of both types, ids that are not there."""

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.kernels.gather import first_outside, gather, gather_few

WIDTHS = st.one_of(
    st.integers(1, 70), st.sampled_from([42, 63, 64, 65, 128, 255, 264, 512, 1000, 8191]), st.integers(1, 700)
)
DTYPES = st.sampled_from([np.uint32, np.uint64])
GUARD = 40


def displaced(values: np.ndarray, by: int) -> np.ndarray:
    """A read-only copy that lies `by` bytes beyond an aligned address, as a view of a message does."""
    space = np.zeros(values.nbytes + by, np.uint8)
    space[by:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    out = np.frombuffer(space.data, values.dtype, values.size, by).reshape(values.shape)
    out.flags.writeable = False
    return out


@given(
    width=WIDTHS,
    num_rows=st.integers(1, 60),
    start=st.sampled_from([0, 1, 999, 2**32 - 60, 2**32, 2**62]),
    dtype=DTYPES,
    table_by=st.integers(0, 65),
    ids_by=st.integers(0, 9),
    out_by=st.integers(0, 65),
    data=st.data(),
)
def test_rows_are_copied_as_numpy_takes_them(width, num_rows, start, dtype, table_by, ids_by, out_by, data):
    rows = displaced(np.random.default_rng(width).integers(0, 256, (num_rows, width), np.uint8), table_by)
    places = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=70))
    places = [place for place in places if start + place <= np.iinfo(dtype).max]
    ids = displaced(np.array([start + place for place in places], dtype), ids_by)
    space = np.full(out_by + len(ids) * width + GUARD, 0xAA, np.uint8)
    out = space[out_by : out_by + len(ids) * width]
    for kernel in (gather, gather_few):
        out[:] = 0
        assert kernel(rows, ids, start, out) == -1
        assert out.tobytes() == np.take(rows, np.array(places, np.int64), axis=0).tobytes()
    assert (space[:out_by] == 0xAA).all()
    assert (space[out_by + out.size :] == 0xAA).all()


@pytest.mark.parametrize("width", [1, 31, 32, 33, 264])
def test_nothing_is_read_outside_the_table(width):
    # The table fills the pages that may be read, up to both ends: one byte beyond them would be a SIGSEGV.
    page = mmap.PAGESIZE
    size = width * page
    space = mmap.mmap(-1, size + 2 * page)
    base = np.frombuffer(space, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for at in (0, page + size):
        assert libc.mprotect(ctypes.c_void_p(base.ctypes.data + at), ctypes.c_size_t(page), 0) == 0
    rows = base[page : page + size].reshape(page, width)
    rows[:] = np.random.default_rng(0).integers(0, 256, rows.shape, np.uint8)
    ids = np.array([0, page - 1, 0, page // 2, page - 1], np.uint32)
    out = np.empty(len(ids) * width, np.uint8)
    assert gather(rows, ids, 0, out) == -1
    assert out.tobytes() == rows[ids].tobytes()


@given(
    num_rows=st.integers(0, 50),
    start=st.sampled_from([0, 7, 2**32 - 25, 2**40, 2**62]),
    dtype=DTYPES,
    ids_by=st.integers(0, 9),
    data=st.data(),
)
def test_the_first_id_outside_is_found_by_both_kernels(num_rows, start, dtype, ids_by, data):
    top = int(np.iinfo(dtype).max)
    near = [value for value in (0, start - 1, start, start + num_rows - 1, start + num_rows, top) if 0 <= value <= top]
    held = [value for value in near if start <= value < start + num_rows]
    # Mostly good ones, so that the bad one lies anywhere.
    ids = data.draw(st.lists(st.sampled_from(held * 8 + near), max_size=80))
    bad = [at for at, value in enumerate(ids) if not start <= value < start + num_rows]
    array = displaced(np.array(ids, dtype), ids_by)
    rows = np.random.default_rng(1).integers(0, 256, (num_rows, 42), np.uint8)
    out = np.zeros(len(ids) * 42, np.uint8)
    at = bad[0] if bad else -1
    assert first_outside(array, start, start + num_rows) == at
    assert gather(rows, array, start, out) == at
    assert gather_few(rows, array, start, out) == at
    good = ids[:at] if bad else ids
    assert out[: len(good) * 42].tobytes() == rows[[value - start for value in good]].tobytes()
    assert not out[len(good) * 42 :].any()


def test_the_gil_is_free_while_rows_are_copied():
    rows = np.full((1 << 14, 1024), 7, np.uint8)
    ids = np.random.default_rng(1).integers(0, len(rows), 1 << 17).astype(np.uint32)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(10):
            out = np.zeros(len(ids) * 1024, np.uint8)
            copying = pool.submit(gather, rows, ids, 0, out)
            while not out[0]:
                assert not copying.done() or out[0]
            if not out[-1]:
                break  # this thread saw the copy half done
            copying.result()
        else:
            pytest.fail("no other thread ran during any of ten copies")
        assert copying.result() == -1
