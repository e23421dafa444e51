"""Row bytes that are a function of (layer, row), so that an answer can be checked without the table it came from.

The function, also in docs/FORMAT.md: with W = ceil(row_bytes / 8), word j of row r of layer L is
splitmix64(L * 2**48 + r * W + j) in wrapping uint64, where splitmix64(x) adds 0x9E3779B97F4A7C15 to x and applies the
output function of Steele, Lea and Flood (2014). The words, little-endian, cut to row_bytes, are the row, except that in
every element of a segment some bits are cleared or set so that each value is a finite number below 2 in magnitude:

    float8_e4m3fn, float8_e5m2   bit 6 cleared            bfloat16, float16   bit 14 cleared
    float8_e8m0fnu               bit 7 cleared, bits 4-6 set (2**-15 .. 2**0)      float32   bit 30 cleared
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_proto.spec import TableSpec

_AND_OR = {
    "float8_e4m3fn": (b"\xbf", b"\x00"),
    "float8_e5m2": (b"\xbf", b"\x00"),
    "float8_e8m0fnu": (b"\x7f", b"\x70"),
    "bfloat16": (b"\xff\xbf", b"\x00\x00"),
    "float16": (b"\xff\xbf", b"\x00\x00"),
    "float32": (b"\xff\xff\xff\xbf", b"\x00\x00\x00\x00"),
}


def synthetic_rows(table: TableSpec, rows: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.uint8]:
    """The bytes of `rows` (any shape): uint8 [*rows.shape, row_bytes]."""
    words = -(-table.row_bytes // 8)
    x = np.empty((rows.size, words), np.uint64)
    x[:] = rows.reshape(-1, 1)
    x *= np.uint64(words)
    x += np.arange(words, dtype=np.uint64)
    x += np.uint64(table.layer * 2**48 % 2**64)
    x += np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    data = np.ascontiguousarray(x.astype("<u8", copy=False).view(np.uint8)[:, : table.row_bytes])
    keep, put = np.full(table.row_bytes, 0xFF, np.uint8), np.zeros(table.row_bytes, np.uint8)
    for segment in table.row_format.segments:
        where = table.row_format.slice_of(segment.name)
        if segment.dtype in _AND_OR:
            mask, bits = _AND_OR[segment.dtype]
            keep[where] = np.tile(np.frombuffer(mask, np.uint8), segment.length)
            put[where] = np.tile(np.frombuffer(bits, np.uint8), segment.length)
    data &= keep
    data |= put
    return data.reshape(*rows.shape, table.row_bytes)
