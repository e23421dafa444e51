"""The index of a client's cache: which row holds which key, looked up, and made room in.

The client's `compute/index.py` is the specification, and says what the arrays are: sets of eight slots, and of each
slot the key, its group, its row, its age, and whether it was hinted at and not found so far.
"""

from typing import Any

import numpy as np
from numba import njit, types

from engrampool_proto.kernels.gather import LINE, copy_row, prefetch
from engrampool_proto.kernels.jit import kernel, view

_U = np.uint64
WAYS = 8
OLDEST, NEW, EMPTY = 31, 30, 127
NOBODY = -1
_FACTOR, _SALT = np.uint64(0xD6E8FEB86659FD93), np.uint64(0x9E3779B97F4A7C15)
_HALF, _KEYS_BYTES, _GROUPS_BYTES = np.uint64(32), np.uint64(8 * WAYS), np.uint64(2 * WAYS)
_LAST_KEY = np.uint64(8 * (WAYS - 1))
# Set while one lookup goes on, of what was found in it: it ages once, however often it is asked for.
_FOUND = 64
# Sets that are asked for before they are looked through.
_AHEAD = 16
# Rows whose memory is asked for before they are written.
_ROWS_AHEAD = 4


@njit(inline="always")  # type: ignore[untyped-decorator]
def _set_of(key: Any, group: Any, sets: Any) -> Any:
    """The set of a key, as `Index.sets` has it."""
    mixed = _U(key) ^ (_U(group) + _U(1)) * _SALT
    mixed ^= mixed >> _HALF
    mixed *= _FACTOR
    mixed ^= mixed >> _HALF
    mixed *= _FACTOR
    return (mixed >> _HALF) * _U(sets) >> _HALF


@njit(inline="always")  # type: ignore[untyped-decorator]
def _ask_for_set(keys: Any, groups: Any, number: Any) -> None:
    """Have a set come into the caches."""
    at = _U(keys.ctypes.data) + number * _KEYS_BYTES
    prefetch(at)
    prefetch(at + _LAST_KEY)
    prefetch(_U(groups.ctypes.data) + number * _GROUPS_BYTES)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _slot_of(keys: Any, groups: Any, number: Any, key: Any, group: Any) -> Any:
    """The slot of a key in its set, -1 if it is not there."""
    base = np.int64(number) * WAYS
    found: Any = np.int64(-1)
    for slot in range(base, base + WAYS):
        if keys[slot] == key and groups[slot] == group:
            found = slot
    return found


@kernel(
    types.UniTuple(types.int64, 2)(
        view(types.int64),  # keys
        view(types.int16),  # groups
        view(types.int32),  # rows
        types.int8[::1],  # ages
        types.boolean[::1],  # unused
        view(types.int64),  # asked
        view(types.uint8),  # asked_groups
        types.int64[::1],  # found
    ),
    counted=5,
)
def find(
    keys: Any, groups: Any, rows: Any, ages: Any, unused: Any, asked: Any, asked_groups: Any, found: Any
) -> tuple[int, int]:
    """Write the row of each key asked for to `found`, -1 for what is not there. What is found gets younger.

    ages, unused: empty for an index that is only read. Gives how many were found, and of how many the hint was taken.
    """
    sets = keys.size // WAYS
    count = asked.size
    hits = used = 0
    for step in range(count + _AHEAD):
        if step < count:
            number = _set_of(asked[step], asked_groups[step], sets)
            _ask_for_set(keys, groups, number)
            found[step] = np.int64(number)
        if step >= _AHEAD:
            at = step - _AHEAD
            slot = _slot_of(keys, groups, found[at], asked[at], np.int16(asked_groups[at]))
            found[at] = slot
            if slot >= 0:
                hits += 1
                if ages.size and ages[slot] < _FOUND:
                    ages[slot] = np.int8(ages[slot] >> 1 | _FOUND)
    for at in range(count):
        slot = found[at]
        if slot >= 0:
            found[at] = rows[slot]
            if ages.size:
                ages[slot] = np.int8(ages[slot] & ~_FOUND)
                if unused[slot]:
                    unused[slot] = False
                    used += 1
    return hits, used


@njit(inline="always")  # type: ignore[untyped-decorator]
def _oldest_first(ages: Any, base: Any, order: Any) -> None:
    """Write the slots of the set at `base` to `order`, of equal ages the first first."""
    for way in range(WAYS):
        slot = base + way
        at = way
        while at > 0 and ages[order[at - 1]] < ages[slot]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = slot


@njit  # type: ignore[untyped-decorator]
def keep(
    keys: Any,
    groups: Any,
    rows: Any,
    ages: Any,
    unused: Any,
    memory: Any,
    new: Any,
    new_groups: Any,
    sources: Any,
    sizes: Any,
    hinted: Any,
) -> Any:
    """`put` of entries that lie anywhere. sources, sizes: uint64 [M], where each is, and its bytes; zeros follow."""
    count, sets, width = new.size, keys.size // WAYS, _U(memory.shape[1])
    target = _U(memory.ctypes.data)
    # New keys by set: a table of sets, and of each of them a chain of its keys in the order given.
    bits = 1
    while 1 << bits < 2 * count:
        bits += 1
    table = np.full(1 << bits, -1, np.int32)
    mask, shift = _U((1 << bits) - 1), _U(64 - bits)
    touched, counts = np.empty(count, np.int64), np.zeros(count, np.int32)
    first, last, after = np.empty(count, np.int32), np.empty(count, np.int32), np.empty(count, np.int32)
    numbers = np.empty(count, np.uint64)
    chains = 0
    for step in range(count + _AHEAD):
        if step < count:
            numbers[step] = _set_of(new[step], new_groups[step], sets)
            _ask_for_set(keys, groups, numbers[step])
            first_slot = numbers[step] * _U(WAYS)
            prefetch(_U(ages.ctypes.data) + first_slot)
            prefetch(_U(unused.ctypes.data) + first_slot)
            prefetch(_U(rows.ctypes.data) + first_slot * _U(4))
        if step < _AHEAD:
            continue
        at = step - _AHEAD
        if _slot_of(keys, groups, numbers[at], new[at], np.int16(new_groups[at])) >= 0:
            continue
        number = np.int64(numbers[at])
        place = numbers[at] * _FACTOR >> shift
        while table[place] >= 0 and touched[table[place]] != number:
            place = (place + _U(1)) & mask
        chain = table[place]
        if chain < 0:
            table[place] = chain = chains
            touched[chain] = number
            first[chain] = at
            chains += 1
        else:
            after[last[chain]] = at
        last[chain] = at
        counts[chain] += 1
    kept = came = wasted = 0
    order, kept_at, kept_rows = np.empty(WAYS, np.int64), np.empty(count, np.int32), np.empty(count, np.int32)
    for chain in range(chains):
        base = touched[chain] * WAYS
        _oldest_first(ages, base, order)
        room = min(counts[chain], WAYS)
        # As if they had come one after the other: the last that had to go was the oldest by then.
        ageing = max(0, OLDEST - ages[order[room - 1]])
        for slot in range(base, base + WAYS):
            if ages[slot] != EMPTY:
                ages[slot] += np.int8(ageing)
        at = first[chain]
        for rank in range(room):
            slot = order[rank]
            ages[slot] = NEW
            came += groups[slot] == NOBODY
            wasted += unused[slot]
            unused[slot] = hinted
            kept_at[kept], kept_rows[kept] = at, rows[slot]
            kept += 1
            keys[slot] = new[at]
            groups[slot] = np.int16(new_groups[at])
            if rank + 1 < room:
                at = after[at]
    for one in range(kept):
        if one + _ROWS_AHEAD < kept:
            line = target + _U(kept_rows[one + _ROWS_AHEAD]) * width
            end = line + width
            while line < end:
                prefetch(line)
                line += LINE
        at, row = kept_at[one], kept_rows[one]
        copy_row(target + _U(row) * width, sources[at], sizes[at])
        for byte in range(sizes[at], width):
            memory[row, byte] = 0
    return kept, came, wasted, count - kept


@kernel(
    types.UniTuple(types.int64, 4)(
        types.int64[::1],  # keys
        types.int16[::1],  # groups
        view(types.int32),  # rows
        types.int8[::1],  # ages
        types.boolean[::1],  # unused
        types.uint8[:, ::1],  # memory
        view(types.int64),  # new
        view(types.uint8),  # new_groups
        view(types.uint8, 2),  # entries
        types.boolean,  # hinted
    ),
    counted=6,
)
def put(
    keys: Any,
    groups: Any,
    rows: Any,
    ages: Any,
    unused: Any,
    memory: Any,
    new: Any,
    new_groups: Any,
    entries: Any,
    hinted: Any,
) -> tuple[int, int, int, int]:
    """Keep `entries` [M, entry_bytes] under the keys `new` [M], in `memory` [rows, entry_bytes]; see `Index.put`.

    Gives how many were kept, how many slots of these were empty, of how many others the hint was never taken, and how
    many were not kept, being there already or too many for their set.
    """
    count, width, source = new.size, _U(memory.shape[1]), _U(entries.ctypes.data)
    sources, sizes = np.empty(count, np.uint64), np.empty(count, np.uint64)
    for at in range(count):
        sources[at], sizes[at] = source + _U(at) * width, width
    return keep(keys, groups, rows, ages, unused, memory, new, new_groups, sources, sizes, hinted)  # type: ignore[no-any-return]
