"""Entries of a large lookup: each asked for once, and copied from where it lies to every place that it belongs.

An entry is what one key decides, all its bytes side by side: see the client's `lookup/layout.py`.
"""

from typing import Any

import numpy as np
from numba import njit, types

from engrampool_proto.kernels.gather import LINE, copy_row, prefetch
from engrampool_proto.kernels.jit import kernel, view

_U = np.uint64
# Bytes that are asked for before they are copied: so much is on its way from memory at one time.
_AHEAD = np.uint64(4096)


@kernel(
    types.int64(
        view(types.int64, 2),  # keys
        view(types.boolean),  # hit
        types.uint64,  # factor
        types.int64[::1],  # first
        types.int64[::1],  # counts
        types.int64[::1],  # inverse
    ),
    counted=0,
)
def distinct(keys: Any, hit: Any, factor: Any, first: Any, counts: Any, inverse: Any) -> int:
    """Write each key of a group to `first`, once, in the order in which they come, one group after the other.

    keys: [groups, T]. hit: [T * groups], entries that are left out, token by token; empty for none. factor: odd, and
    best one that no caller knows: keys that are close to each other in the table cost time. first: [groups * T], at
    least. counts: [groups], of each group's keys. inverse: [T * groups]: where each entry's key is in `first`, -1 for
    what is left out.
    Gives how many there are.
    """
    groups, tokens = keys.shape
    bits = 1
    while 1 << bits < 2 * tokens:
        bits += 1
    table = np.empty(1 << bits, np.int32)
    mask, shift = _U((1 << bits) - 1), _U(64 - bits)
    start = 0
    for group in range(groups):
        table[:] = -1
        count = 0
        for token in range(tokens):
            at = token * groups + group
            if hit.size and hit[at]:
                inverse[at] = -1
                continue
            key = keys[group, token]
            place = _U(key) * factor >> shift
            while table[place] >= 0 and first[start + table[place]] != key:
                place = (place + _U(1)) & mask
            if table[place] < 0:
                table[place] = count
                first[start + count] = key
                count += 1
            inverse[at] = start + table[place]
        counts[group] = count
        start += count
    return start


@njit(inline="always")  # type: ignore[untyped-decorator]
def _ask_for(address: Any, nbytes: Any) -> None:
    """Have these bytes come into the caches."""
    line = address & ~(LINE - _U(1))
    while line < address + nbytes:
        prefetch(line)
        line += LINE


@kernel(types.void(view(types.int64), types.int64, types.int64, types.int64, types.int64, types.int64[::1]), counted=0)
def first_places(inverse: Any, groups: Any, heads: Any, first: Any, width: Any, places: Any) -> None:
    """Write to `places` where each entry that `distinct` gave belongs first, among rows [T, heads].

    inverse: of `distinct`. groups: of so many columns, `width`, side by side from column `first` on.
    """
    for token in range(inverse.size // groups - 1, -1, -1):
        for group in range(groups):
            found = inverse[token * groups + group]
            if found >= 0:
                places[found] = token * heads + first + group * width


@kernel(
    types.int64(
        types.uint8[:, ::1],  # rows
        view(types.int64),  # places
        view(types.int64),  # inverse
        types.int64,  # groups
        types.int64,  # heads
        types.int64,  # first
        types.int64,  # width
    ),
    counted=2,
)
def repeat(rows: Any, places: Any, inverse: Any, groups: Any, heads: Any, first: Any, width: Any) -> int:
    """Copy entries from their first places to all others that they belong to; gives how many were copied.

    rows: uint8 [T * heads, row_bytes]. The others: as of `first_places`.
    """
    row_bytes = _U(rows.shape[1])
    at, nbytes = _U(rows.ctypes.data), _U(width) * row_bytes
    ahead = int(_AHEAD // nbytes) + 1
    copied = 0
    for one in range(inverse.size):
        if one + ahead < inverse.size and inverse[one + ahead] >= 0:
            later = one + ahead
            place = later // groups * heads + first + later % groups * width
            if places[inverse[later]] != place:
                _ask_for(at + _U(places[inverse[later]]) * row_bytes, nbytes)
        if inverse[one] >= 0:
            place = one // groups * heads + first + one % groups * width
            source = places[inverse[one]]
            if source != place:
                copy_row(at + _U(place) * row_bytes, at + _U(source) * row_bytes, nbytes)
                copied += 1
    return copied


@kernel(
    types.int64(
        view(types.uint8, 2),  # entries
        view(types.int64),  # places
        types.int64,  # nbytes
        types.Array(types.uint8, 2, "A", aligned=False),  # to
        types.boolean[::1],  # done
    ),
    counted=1,
)
def place(entries: Any, places: Any, nbytes: Any, to: Any, done: Any) -> int:
    """Copy entries to where they belong: entry `places[at]` to the `at`th place of `to`, token by token. Marks these.

    entries: [N, at least nbytes]. places: [T * groups]; where it is negative, and where `done` is set, nothing is done.
    to: [T, groups * nbytes], each row's bytes side by side; [T, 0] to mark only. done: [T * groups].
    Gives how many were marked. No place is looked at for being within `entries`: that is the caller's to know.
    """
    tokens = to.shape[0]
    if not tokens:
        return 0
    groups = places.size // tokens
    width, copies = _U(nbytes), to.shape[1] > 0
    source, source_step = _U(entries.ctypes.data), _U(entries.strides[0])
    target, target_step = _U(to.ctypes.data), _U(to.strides[0])
    ahead = int(_AHEAD // width) + 1
    marked = 0
    for token in range(tokens):
        for group in range(groups):
            at = token * groups + group
            if copies and at + ahead < places.size and places[at + ahead] >= 0 and not done[at + ahead]:
                _ask_for(source + _U(places[at + ahead]) * source_step, width)
            if places[at] >= 0 and not done[at]:
                if copies:
                    copy_row(
                        target + _U(token) * target_step + _U(group) * width,
                        source + _U(places[at]) * source_step,
                        width,
                    )
                done[at] = True
                marked += 1
    return marked
