"""Synthetic rows against the documented function, one word at a time, and as the numbers that they stand for."""

import hash_reference
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.hashing import Identity
from engrampool_proto.spec import DTYPE_BYTES, MAX_LAYER, RowFormat, Segment, TableSpec
from engrampool_proto.synthetic import synthetic_rows

V41_ROW = (Segment("values", "float8_e4m3fn", 256), Segment("scales", "float8_e8m0fnu", 8))
# Of the last byte of an element: the bits that are cleared, and those that are set.
LAST_BYTE = {
    "float8_e4m3fn": (0x40, 0),
    "float8_e5m2": (0x40, 0),
    "float8_e8m0fnu": (0x80, 0x70),
    "bfloat16": (0x40, 0),
    "float16": (0x40, 0),
    "float32": (0x40, 0),
}
NUMPY = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
}


def table_of(layer: int, segments: tuple[Segment, ...]) -> TableSpec:
    return TableSpec(layer, 2**62, RowFormat(segments), Identity(1))


def reference_row(table: TableSpec, row: int) -> bytes:
    words = (table.row_bytes + 7) // 8
    states = [(table.layer * 2**48 + row * words + j) % 2**64 for j in range(words)]
    data = bytearray(b"".join(hash_reference.splitmix64(x).to_bytes(8, "little") for x in states)[: table.row_bytes])
    at = 0
    for segment in table.row_format.segments:
        width = DTYPE_BYTES[segment.dtype]
        clear, put = LAST_BYTE.get(segment.dtype, (0, 0))
        for _ in range(segment.length):
            at += width
            data[at - 1] = data[at - 1] & ~clear | put
    return bytes(data)


DTYPES = st.sampled_from(list(DTYPE_BYTES))
SEGMENTS = st.lists(st.tuples(DTYPES, st.integers(1, 20)), min_size=1, max_size=3).map(
    lambda parts: tuple(Segment(f"s{i}", dtype, length) for i, (dtype, length) in enumerate(parts))
)


@given(
    layer=st.one_of(st.integers(0, 99), st.integers(0, MAX_LAYER)),
    segments=SEGMENTS,
    rows=st.lists(st.one_of(st.integers(0, 99), st.integers(0, 2**62 - 1)), max_size=4),
)
def test_rows_equal_the_documented_function(layer, segments, rows):
    table = table_of(layer, segments)
    found = synthetic_rows(table, np.array(rows, np.uint64))
    assert found.dtype == np.uint8
    assert [row.tobytes() for row in found] == [reference_row(table, row) for row in rows]


def test_a_row_is_what_it_was():
    # A literal, since docs/FORMAT.md promises the function to other programs.
    (row,) = synthetic_rows(table_of(1, V41_ROW), np.array([2], np.uint64))
    assert row[:8].tobytes().hex() == "2c8334110a05ad00"
    assert row[-8:].tobytes().hex() == "7b76787b7b757d7a"


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.uint8])
def test_ids_of_any_shape_and_width(dtype):
    table = table_of(14, V41_ROW)
    ids = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    rows = synthetic_rows(table, ids)
    assert rows.shape == (2, 3, 4, 264)
    assert rows.flags.c_contiguous
    assert np.array_equal(rows.reshape(24, 264), synthetic_rows(table, np.arange(24, dtype=np.uint64)))
    assert synthetic_rows(table, np.empty((0, 3), dtype)).shape == (0, 3, 264)


@pytest.mark.parametrize("name", NUMPY)
def test_every_value_is_finite_and_small(name):
    table = table_of(3, (Segment("before", "uint8", 3), Segment("values", name, 301)))
    rows = synthetic_rows(table, np.arange(300, dtype=np.uint32))
    values = rows[:, table.row_format.slice_of("values")].copy().view(NUMPY[name]).astype(np.float64)
    assert values.shape == (300, 301)
    assert np.isfinite(values).all()
    assert (np.abs(values) < 2).all()
    assert len(np.unique(values)) >= 16
    if name == "float8_e8m0fnu":
        assert values.min() == 2.0**-15
        assert values.max() == 1.0
    else:
        assert values.min() < -1
        assert values.max() > 1


def test_rows_and_layers_differ():
    rows = [synthetic_rows(table_of(layer, V41_ROW), np.arange(50, dtype=np.uint32)) for layer in (0, 1, 14)]
    assert len({row.tobytes() for table in rows for row in table}) == 150
