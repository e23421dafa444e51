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
# What `found` has of an entry: its row in the cache; that it is asked for; else it is that one, which came before, less
# `_SAME`.
_ASKED, _SAME = -1, -2
# int64 [layers, RESULT_WORDS]: rows that are asked for, bytes that the cache had, and those that are others' as well.
ROWS, HIT_BYTES, SAME_BYTES = range(3)
RESULT_WORDS = 3
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
def _copy_found(tokens: Any, layers: Any, groups: Any, memory: Any, to: Any, found: Any, results: Any) -> None:
    """Copy what was found to its places."""
    source, width = _U(memory.ctypes.data), _U(memory.shape[1])
    ahead, at = _AHEAD // np.int64(memory.shape[1]) + 1, 0
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
                    results[place, HIT_BYTES] += nbytes
                at += 1


@njit  # type: ignore[untyped-decorator]
def _once(tokens: Any, layer: Any, groups: Any, first: Any, asked: Any, factor: Any, found: Any, result: Any) -> None:
    """Have each entry of a layer that is missing be asked for once. first: the layer's first entry."""
    bits = 1
    while 1 << bits < 2 * tokens:
        bits += 1
    table = np.empty(1 << bits, np.int64)
    mask, shift = _U((1 << bits) - 1), _U(64 - bits)
    for group in range(layer[_GROUPS]):
        nbytes = groups[layer[_FIRST] + group, _WIDTH] * layer[_ROW_BYTES]
        table[:] = -1
        for token in range(tokens):
            at = first + token * layer[_GROUPS] + group
            if found[at] >= 0:
                continue
            place = _U(asked[at]) * factor >> shift
            while table[place] >= 0 and asked[table[place]] != asked[at]:
                place = (place + _U(1)) & mask
            if table[place] < 0:
                table[place] = at
                found[at] = _ASKED
                result[ROWS] += groups[layer[_FIRST] + group, _WIDTH]
            else:
                found[at] = _SAME - table[place]
                result[SAME_BYTES] += nbytes


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
            if found[at] == _ASKED:
                group, key = groups[number], asked[at]
                for column in range(group[_COLUMN], group[_COLUMN] + group[_WIDTH]):
                    row = row_of(key, moduli[column], inverses[column]) if layer[_MODULI] else _U(key)
                    out[count] = offsets[column] + row
                    count += 1
            at += 1


@kernel(
    types.UniTuple(types.int64, 2)(
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
        types.int64[::1],  # asked
        types.int64[::1],  # to
        types.int64[::1],  # found
        types.int64[:, ::1],  # results
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
    asked: Any,
    to: Any,
    found: Any,
    results: Any,
    ids: Any,
) -> tuple[int, int]:
    """`Entries.find`."""
    numbers = np.empty(asked.size, np.uint8)
    _numbers(tokens, layers, groups, numbers)
    hits, used = hot_rows.find(keys, key_groups, rows, ages, unused, asked, numbers, found)
    _copy_found(tokens, layers, groups, memory, to, found, results)
    if hits == asked.size:
        return hits, used
    begin = 0
    for place in range(layers.shape[0]):
        layer, result = layers[place], results[place]
        first = tokens * layer[_FIRST]
        _once(tokens, layer, groups, first, asked, factor, found, result)
        nbytes = result[ROWS] * layer[_ID_BYTES]
        if layer[_ID_BYTES] == 4:
            _put_ids(tokens, layer, groups, first, asked, found, ids[begin : begin + nbytes].view(np.uint32))
        else:
            _put_ids(tokens, layer, groups, first, asked, found, ids[begin : begin + nbytes].view(np.uint64))
        begin += (nbytes + frames.ALIGNMENT - 1) // frames.ALIGNMENT * frames.ALIGNMENT
    return hits, used


@kernel(
    types.void(
        types.int64[:, ::1],  # layers
        types.int64[:, ::1],  # groups
        types.int64,  # place
        types.int64,  # tokens
        types.int64[::1],  # found
        view(types.uint8, 2),  # fetched
        types.int64,  # to
    ),
    nogil=False,
)
def _place(layers: Any, groups: Any, place: Any, tokens: Any, found: Any, fetched: Any, to: Any) -> None:
    """`Entries.place`."""
    layer = layers[place]
    at = first = tokens * layer[_FIRST]
    source = _U(fetched.ctypes.data)
    for token in range(tokens):
        for number in range(layer[_FIRST], layer[_FIRST] + layer[_GROUPS]):
            group = groups[number]
            here, nbytes = _U(to + _to(layer, group, token)), _U(group[_WIDTH] * layer[_ROW_BYTES])
            if found[at] == _ASKED:
                copy_row(here, source, nbytes)
                source += nbytes
            elif found[at] <= _SAME:
                other = (_SAME - found[at] - first) // layer[_GROUPS]
                copy_row(here, _U(to + _to(layer, group, other)), nbytes)
            at += 1


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
        types.int64[::1],  # asked
        types.int64[::1],  # found
        types.int64[::1],  # fetched
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
    asked: Any,
    found: Any,
    fetched: Any,
) -> tuple[int, int, int, int]:
    """`Entries.keep`. fetched: of each layer the address of what came of it."""
    count = 0
    for at in range(found.size):
        count += found[at] == _ASKED
    new, numbers = np.empty(count, np.int64), np.empty(count, np.uint8)
    sources, sizes = np.empty(count, np.uint64), np.empty(count, np.uint64)
    at, one = 0, 0
    for place in range(layers.shape[0]):
        layer, source = layers[place], _U(fetched[place])
        for _ in range(tokens):
            for number in range(layer[_FIRST], layer[_FIRST] + layer[_GROUPS]):
                if found[at] == _ASKED:
                    group = groups[number]
                    new[one], numbers[one] = asked[at], group[_NUMBER]
                    sources[one], sizes[one] = source, _U(group[_WIDTH] * layer[_ROW_BYTES])
                    source += sizes[one]
                    one += 1
                at += 1
    return hot_rows.keep(keys, key_groups, rows, ages, unused, memory, new, numbers, sources, sizes, False)  # type: ignore[no-any-return]


class Entries:
    """The entries of small batches of one model, of some layers and columns: found, placed and kept."""

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

    def count(self, tokens: int) -> int:
        """How many entries so many tokens have."""
        return tokens * len(self._groups)

    def find(
        self,
        index: Index,
        memory: npt.NDArray[np.uint8],
        tokens: int,
        asked: _Ints,
        to: _Ints,
        found: _Ints,
        results: _Ints,
        ids: npt.NDArray[np.uint8],
    ) -> tuple[int, int]:
        """Copy what the cache has to where it belongs, and write the ids of what it lacks, each once.

        index, memory: the cache's. asked: the key of each entry, layer by layer, token by token. to: of each layer the
        address of its rows. found: of each entry, written for `place`, `keep` and `whole`. results: zeros. ids: zeros,
        as many bytes as all rows would take; the layers' follow each other as in a frame.
        Gives how many entries were found, and of how many the hint was taken.
        """
        arrays = index.keys, index.groups, index.rows, index.ages, index.unused
        sizes = self._layers, self._groups, self._factor, tokens
        hits, used = _find(*arrays, memory, *sizes, asked, to, found, results, ids)
        return hits, used

    def place(self, layer: int, tokens: int, found: _Ints, fetched: npt.NDArray[np.uint8], to: int) -> None:
        """Copy what came of a layer, by its place, in the order in which it was asked for, to all its places."""
        _place(self._layers, self._groups, layer, tokens, found, fetched, to)

    def keep(
        self, index: Index, memory: npt.NDArray[np.uint8], tokens: int, asked: _Ints, found: _Ints, fetched: _Ints
    ) -> tuple[int, int, int]:
        """Let the cache have what came. fetched: of each layer the address of it.

        Gives as `Index.put` does.
        """
        arrays = index.keys, index.groups, index.rows, index.ages, index.unused
        kept, came, wasted, _ = _keep(*arrays, memory, self._layers, self._groups, tokens, asked, found, fetched)
        return came, kept - came, wasted

    def whole(self, layer: int, tokens: int, found: _Ints) -> npt.NDArray[np.bool_]:
        """Which tokens the cache had all of a layer of: bool [T]."""
        start = tokens * int(self._layers[layer, _FIRST])
        of_layer = found[start : start + tokens * int(self._layers[layer, _GROUPS])]
        whole: npt.NDArray[np.bool_] = np.logical_and.reduce(of_layer.reshape(tokens, -1) >= 0, axis=1)
        return whole
