"""Small lookups of a client with a cache: what it has is copied to where it belongs, and what it lacks is asked for.

An entry is what one key decides: rows of one token that lie side by side. These calls keep the GIL, as `ask.py` has it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numba import carray, njit, types

from engrampool_proto import frames
from engrampool_proto.kernels import hot_rows
from engrampool_proto.kernels.gather import LINE, copy_row, prefetch
from engrampool_proto.kernels.hasher import Hasher, row_of
from engrampool_proto.kernels.jit import kernel, view
from engrampool_proto.kernels.sockets import bytes_at

_U = np.uint64
_Ints = npt.NDArray[np.int64]
# int64 [layers, LAYER_WORDS]: how many entries a token has, and the first of these in `groups`; columns that are asked
# for; bytes of a row and of an id; addresses of moduli (0 where keys are rows), inverses and offsets of all columns.
_GROUPS, _FIRST, _HEADS, _ROW_BYTES, _ID_BYTES, _COLUMNS, _MODULI, _INVERSES, _OFFSETS = range(9)
_LAYER_WORDS = 9
# int64 [groups, GROUP_WORDS]: the cache's number; the first column, of the table and of those that are asked for; and
# how many columns.
_NUMBER, _COLUMN, _PLACE, _WIDTH = range(4)
_GROUP_WORDS = 4
# What is known of a lookup lies in one array, int64: of each entry its key; of each entry where it is found, its row in
# the cache and 1; else 0, as it is asked for; else less the place of that one, which came before, and 1. Then of each
# layer how many rows are asked for, the address of its rows, and of those that came.
_WORDS_OF_ENTRY, _WORDS_OF_LAYER = 2, 3
# Bytes that are asked for before they are copied.
_AHEAD = np.int64(8192)


class Index(Protocol):
    """Of a cache; see `compute/index.py` of the client."""

    keys: _Ints
    groups: npt.NDArray[np.int16]
    rows: npt.NDArray[np.int32]
    ages: npt.NDArray[np.int8]
    unused: npt.NDArray[np.bool_]


@njit(inline="always")  # type: ignore[untyped-decorator]
def _to(layer: Any, group: Any, token: Any) -> Any:
    """Where an entry belongs among the rows of its layer, in bytes."""
    return (token * layer[_HEADS] + group[_PLACE]) * layer[_ROW_BYTES]


@njit  # type: ignore[untyped-decorator]
def _parts(state: Any, tokens: Any, layers: Any, groups: Any) -> Any:
    """Keys, found, and of each layer the rows that are asked for, the address of its rows, and of what came."""
    entries, count = tokens * groups.shape[0], layers.shape[0]
    rows = state[2 * entries :]
    return state[:entries], state[entries : 2 * entries], rows[:count], rows[count : 2 * count], rows[2 * count :]


@njit  # type: ignore[untyped-decorator]
def _numbers(tokens: Any, layers: Any, groups: Any, out: Any) -> None:
    """Write the cache's group of each entry."""
    at = 0
    for place in range(layers.shape[0]):
        layer = layers[place]
        for _ in range(tokens):
            for group in range(layer[_FIRST], layer[_FIRST] + layer[_GROUPS]):
                out[at] = groups[group, _NUMBER]
                at += 1


@njit  # type: ignore[untyped-decorator]
def _copy_found(tokens: Any, layers: Any, groups: Any, memory: Any, to: Any, found: Any) -> Any:
    """Copy what was found to its places, and count that in `found`; gives the bytes."""
    source, width = _U(memory.ctypes.data), _U(memory.shape[1])
    ahead, at = _AHEAD // np.int64(memory.shape[1]) + 1, 0
    copied = 0
    for place in range(layers.shape[0]):
        layer = layers[place]
        for token in range(tokens):
            for number in range(layer[_FIRST], layer[_FIRST] + layer[_GROUPS]):
                group = groups[number]
                if at + ahead < found.size and found[at + ahead] >= 0:
                    line = source + _U(found[at + ahead]) * width
                    end = line + width
                    while line < end:
                        prefetch(line)
                        line += LINE
                if found[at] >= 0:
                    nbytes = group[_WIDTH] * layer[_ROW_BYTES]
                    copy_row(_U(to[place] + _to(layer, group, token)), source + _U(found[at]) * width, _U(nbytes))
                    copied += nbytes
                found[at] += 1
                at += 1
    return copied


@njit  # type: ignore[untyped-decorator]
def _once(tokens: Any, layer: Any, groups: Any, first: Any, asked: Any, factor: Any, found: Any) -> Any:
    """Have each entry of a layer that is missing be asked for once; gives the rows, and the bytes of the others.

    first: the layer's first entry.
    """
    bits = 1
    while 1 << bits < 2 * tokens:
        bits += 1
    table = np.empty(1 << bits, np.int64)
    mask, shift = _U((1 << bits) - 1), _U(64 - bits)
    rows = same = 0
    for group in range(layer[_GROUPS]):
        width = groups[layer[_FIRST] + group, _WIDTH]
        table[:] = -1
        for token in range(tokens):
            at = first + token * layer[_GROUPS] + group
            if found[at] > 0:
                continue
            place = _U(asked[at]) * factor >> shift
            while table[place] >= 0 and asked[table[place]] != asked[at]:
                place = (place + _U(1)) & mask
            if table[place] < 0:
                table[place] = at
                rows += width
            else:
                found[at] = -1 - table[place]
                same += width * layer[_ROW_BYTES]
    return rows, same


@njit  # type: ignore[untyped-decorator]
def _words(address: Any, count: Any) -> Any:
    return carray(bytes_at(_U(address)), 8 * count).view(np.uint64)


@njit  # type: ignore[untyped-decorator]
def _put_ids(tokens: Any, layer: Any, groups: Any, first: Any, asked: Any, found: Any, out: Any) -> None:
    """Write the row ids of a layer's entries that are asked for; out: uint32 or uint64."""
    offsets, count = _words(layer[_OFFSETS], layer[_COLUMNS]), 0
    moduli, inverses = offsets, offsets
    if layer[_MODULI]:
        moduli, inverses = _words(layer[_MODULI], layer[_COLUMNS]), _words(layer[_INVERSES], layer[_COLUMNS])
    at = first
    for _ in range(tokens):
        for number in range(layer[_FIRST], layer[_FIRST] + layer[_GROUPS]):
            if not found[at]:
                group, key = groups[number], asked[at]
                for column in range(group[_COLUMN], group[_COLUMN] + group[_WIDTH]):
                    row = row_of(key, moduli[column], inverses[column]) if layer[_MODULI] else _U(key)
                    out[count] = offsets[column] + row
                    count += 1
            at += 1


@kernel(
    types.UniTuple(types.int64, 5)(
        view(types.int64),  # keys
        view(types.int16),  # key_groups
        view(types.int32),  # rows
        types.int8[::1],  # ages
        types.boolean[::1],  # unused
        view(types.uint8, 2),  # memory
        types.int64[:, ::1],  # layers
        types.int64[:, ::1],  # groups
        types.uint64,  # factor
        types.int64,  # tokens
        types.int64[::1],  # state
        types.uint8[::1],  # ids
    ),
    nogil=False,
)
def _find(
    keys: Any,
    key_groups: Any,
    rows: Any,
    ages: Any,
    unused: Any,
    memory: Any,
    layers: Any,
    groups: Any,
    factor: Any,
    tokens: Any,
    state: Any,
    ids: Any,
) -> tuple[int, int, int, int, int]:
    """`Entries.find`."""
    asked, found, missing, to, _ = _parts(state, tokens, layers, groups)
    numbers = np.empty(asked.size, np.uint8)
    _numbers(tokens, layers, groups, numbers)
    hits, used = hot_rows.find(keys, key_groups, rows, ages, unused, asked, numbers, found)
    copied = _copy_found(tokens, layers, groups, memory, to, found)
    same: Any = np.int64(0)
    end: Any = np.int64(0)
    if hits == asked.size:
        return hits, used, copied, same, end
    for place in range(layers.shape[0]):
        layer = layers[place]
        first = tokens * layer[_FIRST]
        missing[place], others = _once(tokens, layer, groups, first, asked, factor, found)
        same += others
        begin, end = end, end + missing[place] * layer[_ID_BYTES]
        if layer[_ID_BYTES] == 4:
            _put_ids(tokens, layer, groups, first, asked, found, ids[begin:end].view(np.uint32))
        else:
            _put_ids(tokens, layer, groups, first, asked, found, ids[begin:end].view(np.uint64))
        while end % frames.ALIGNMENT:
            ids[end] = 0
            end += 1
    return hits, used, copied, same, end


@kernel(
    types.void(
        types.int64[:, ::1],  # layers
        types.int64[:, ::1],  # groups
        types.int64,  # place
        types.int64,  # tokens
        types.int64[::1],  # state
        view(types.uint8, 2),  # fetched
    ),
    nogil=False,
)
def _place(layers: Any, groups: Any, place: Any, tokens: Any, state: Any, fetched: Any) -> None:
    """`Entries.place`."""
    _, found, _, addresses, came = _parts(state, tokens, layers, groups)
    layer, to = layers[place], addresses[place]
    at = first = tokens * layer[_FIRST]
    source = _U(fetched.ctypes.data)
    for token in range(tokens):
        for number in range(layer[_FIRST], layer[_FIRST] + layer[_GROUPS]):
            group = groups[number]
            here, nbytes = _U(to + _to(layer, group, token)), _U(group[_WIDTH] * layer[_ROW_BYTES])
            if not found[at]:
                copy_row(here, source, nbytes)
                source += nbytes
            elif found[at] < 0:
                other = (-1 - found[at] - first) // layer[_GROUPS]
                copy_row(here, _U(to + _to(layer, group, other)), nbytes)
            at += 1
    came[place] = np.int64(fetched.ctypes.data)


@kernel(
    types.UniTuple(types.int64, 4)(
        types.int64[::1],  # keys
        types.int16[::1],  # key_groups
        view(types.int32),  # rows
        types.int8[::1],  # ages
        types.boolean[::1],  # unused
        types.uint8[:, ::1],  # memory
        types.int64[:, ::1],  # layers
        types.int64[:, ::1],  # groups
        types.int64,  # tokens
        types.int64[::1],  # state
    ),
    nogil=False,
)
def _keep(
    keys: Any,
    key_groups: Any,
    rows: Any,
    ages: Any,
    unused: Any,
    memory: Any,
    layers: Any,
    groups: Any,
    tokens: Any,
    state: Any,
) -> tuple[int, int, int, int]:
    """`Entries.keep`."""
    asked, found, _, _, came = _parts(state, tokens, layers, groups)
    new, numbers = np.empty(found.size, np.int64), np.empty(found.size, np.uint8)
    sources, sizes = np.empty(found.size, np.uint64), np.empty(found.size, np.uint64)
    at, count = 0, 0
    for place in range(layers.shape[0]):
        layer, source = layers[place], _U(came[place])
        for _ in range(tokens):
            for number in range(layer[_FIRST], layer[_FIRST] + layer[_GROUPS]):
                if not found[at] and came[place]:
                    group = groups[number]
                    new[count], numbers[count] = asked[at], group[_NUMBER]
                    sources[count], sizes[count] = source, _U(group[_WIDTH] * layer[_ROW_BYTES])
                    source += sizes[count]
                    count += 1
                at += 1
    some = new[:count], numbers[:count], sources[:count], sizes[:count]
    return hot_rows.keep(keys, key_groups, rows, ages, unused, memory, *some, False)  # type: ignore[no-any-return]


class Entries:
    """The entries of small batches of one model, of some layers and columns: found, placed and kept.

    each: how many entries a token has.
    """

    def __init__(
        self,
        hasher: Hasher,
        groups: Mapping[int, Sequence[tuple[int, int, int, int]]],
        columns: int | None,
        factor: int,
    ) -> None:
        """groups: layer, ascending -> of each entry of a token its _NUMBER and so on.

        columns: how many are asked for; None for all. factor: as of `distinct`.
        """
        self._factor = np.uint64(factor)
        self._layers = np.zeros((len(groups), _LAYER_WORDS), np.int64)
        self._groups = np.array([group for some in groups.values() for group in some], np.int64).reshape(
            -1, _GROUP_WORDS
        )
        self.each = len(self._groups)
        self._kept: list[npt.NDArray[np.uint64]] = []  # what the layers have the address of
        first = 0
        for entry, (layer, some) in zip(self._layers, groups.items(), strict=True):
            table = hasher.spec.table(layer)
            heads = table.heads if columns is None else columns
            id_bytes = np.dtype(table.id_dtype).itemsize
            entry[:_MODULI] = len(some), first, heads, table.row_bytes, id_bytes, table.heads
            reduced = hasher.reduced(layer)
            offsets = np.ascontiguousarray(table.head_offsets, np.uint64)
            kept = [offsets] if reduced is None else [*map(np.ascontiguousarray, reduced), offsets]
            entry[_LAYER_WORDS - len(kept) :] = [array.__array_interface__["data"][0] for array in kept]
            self._kept += kept
            first += len(some)

    def state(self, tokens: int, to: Sequence[int]) -> _Ints:
        """What is known of a lookup: nothing yet. to: of each layer the address of its rows. Its keys come first."""
        layers, entries = len(to), tokens * self.each
        state = np.zeros(_WORDS_OF_ENTRY * entries + _WORDS_OF_LAYER * layers, np.int64)
        state[-2 * layers : -layers] = to
        return state

    def find(
        self, index: Index, memory: npt.NDArray[np.uint8], tokens: int, state: _Ints, ids: npt.NDArray[np.uint8]
    ) -> tuple[int, int, int, int, int]:
        """Copy what the cache has to where it belongs, and write the ids of what it lacks, each once.

        index, memory: the cache's. ids: as many bytes as those of all rows would take in a frame.
        Gives how many entries were found, and of how many the hint was taken; the bytes of what was found, and of
        entries that others are the same as; and how many bytes of ids there are, as they are in a frame.
        """
        arrays = index.keys, index.groups, index.rows, index.ages, index.unused
        return _find(*arrays, memory, self._layers, self._groups, self._factor, tokens, state, ids)

    def missing(self, state: _Ints) -> list[int]:
        """How many rows are asked for, of each layer."""
        layers = len(self._layers)
        rows: list[int] = state[-3 * layers : -2 * layers].tolist()
        return rows

    def place(self, layer: int, tokens: int, state: _Ints, fetched: npt.NDArray[np.uint8]) -> None:
        """Copy what came of a layer, by its place, in the order in which it was asked for, to all its places.

        fetched: to be kept alive until `keep`.
        """
        _place(self._layers, self._groups, layer, tokens, state, fetched)

    def keep(self, index: Index, memory: npt.NDArray[np.uint8], tokens: int, state: _Ints) -> tuple[int, int, int]:
        """Let the cache have what came of layers that were placed. Gives as `Index.put` does."""
        arrays = index.keys, index.groups, index.rows, index.ages, index.unused
        kept, came, wasted, _ = _keep(*arrays, memory, self._layers, self._groups, tokens, state)
        return came, kept - came, wasted

    def whole(self, layer: int, tokens: int, state: _Ints) -> npt.NDArray[np.bool_]:
        """Which tokens the cache had all of a layer of: bool [T]."""
        groups = int(self._layers[layer, _GROUPS])
        start = tokens * (self.each + int(self._layers[layer, _FIRST]))
        found = state[start : start + tokens * groups].reshape(tokens, groups)
        whole: npt.NDArray[np.bool_] = np.logical_and.reduce(found > 0, axis=1)
        return whole
