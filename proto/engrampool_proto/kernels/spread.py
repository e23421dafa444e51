"""Cutting a small lookup by who holds its rows: one LOOKUP's ids a shard, and where the rows of each belong."""

from typing import Any

import numpy as np
from numba import njit, types

from engrampool_proto import frames
from engrampool_proto.kernels.jit import kernel, view

# int64 [layers, ENTRY_WORDS]: where its ids begin in `ids`; how many there are; bytes of one; where its ranges begin
# among all, and how many there are.
AT, COUNT, ID_BYTES, RANGES_AT, RANGES = range(5)
ENTRY_WORDS = 5
# int64 [shards, layers, PART_WORDS]: how many rows; where its ids begin in `out`, and its places in `places`.
ROWS, IDS_AT, PLACES_AT = range(3)
PART_WORDS = 3


@njit  # type: ignore[untyped-decorator]
def _shard_of(entry: Any, starts: Any, shards: Any, row: Any) -> Any:
    """Who holds a row: of the last range that begins at it or before."""
    low, high = entry[RANGES_AT], entry[RANGES_AT] + entry[RANGES]
    while high - low > 1:
        middle = (low + high) // 2
        if starts[middle] <= row:
            low = middle
        else:
            high = middle
    return shards[low]


@njit  # type: ignore[untyped-decorator]
def _row(entry: Any, ids: Any, one: Any) -> Any:
    at = entry[AT] + one * entry[ID_BYTES]
    row = np.uint64(0)
    for byte in range(entry[ID_BYTES]):
        row |= np.uint64(ids[at + byte]) << np.uint64(8 * byte)
    return row


@kernel(
    types.void(
        view(types.uint8),
        types.int64[:, ::1],
        view(types.uint64),
        view(types.int64),
        types.uint8[::1],
        types.int64[::1],
        types.int64[:, :, ::1],
    ),
    nogil=False,
)
def spread(ids: Any, layers: Any, starts: Any, shards: Any, out: Any, places: Any, parts: Any) -> None:
    """Write the ids of each shard to `out`, as they follow each other in a LOOKUP of its layers that it has rows of.

    ids: little-endian. layers: ENTRY_WORDS of each. starts, shards: of all ranges, those of a layer ascending from row
    0. out: zeros, the bytes of `ids` and 8 for each shard and layer. places: int64 [ids]: of each part, where its rows
    stand among the layer's. parts: zeros; written for each shard and layer.
    """
    for layer in range(len(layers)):
        entry = layers[layer]
        for one in range(entry[COUNT]):
            parts[_shard_of(entry, starts, shards, _row(entry, ids, one)), layer, ROWS] += 1
    at, place = 0, 0
    for shard in range(parts.shape[0]):
        for layer in range(len(layers)):
            part = parts[shard, layer]
            part[IDS_AT], part[PLACES_AT] = at, place
            nbytes = part[ROWS] * layers[layer, ID_BYTES]
            at += (nbytes + frames.ALIGNMENT - 1) // frames.ALIGNMENT * frames.ALIGNMENT
            place += part[ROWS]
            part[ROWS] = 0  # counted once more, as they are written
    for layer in range(len(layers)):
        entry = layers[layer]
        for one in range(entry[COUNT]):
            row = _row(entry, ids, one)
            part = parts[_shard_of(entry, starts, shards, row), layer]
            to = part[IDS_AT] + part[ROWS] * entry[ID_BYTES]
            for byte in range(entry[ID_BYTES]):
                out[to + byte] = np.uint8((row >> np.uint64(8 * byte)) & np.uint64(255))
            places[part[PLACES_AT] + part[ROWS]] = one
            part[ROWS] += 1
