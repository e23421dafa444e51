"""The client's side of a small lookup: from a batch of tokens to its keys, or to the frame that asks for its rows.

Few calls from Python, of few arguments each: a decode step makes them once in many milliseconds, and finds nothing of
them in the processor's caches. They keep the GIL, as they wait for nothing: small batches take them microseconds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, njit, types

from engrampool_proto import frames
from engrampool_proto.kernels.hasher import (
    BATCH,
    FAMILIES,
    Hasher,
    all_in_vocabulary,
    identity,
    identity_keys,
    polynomial,
    polynomial_keys,
    xor_mix,
    xor_mix_keys,
)
from engrampool_proto.kernels.jit import kernel, view
from engrampool_proto.kernels.sockets import MESSAGE_WORDS, bytes_at, random_word, send_at_once
from engrampool_proto.spec import TableSpec

# int64 [ENTRY_WORDS], one a layer: by which kernel its ids are made, and their bytes; how many columns the table has,
# and which of them are asked for. Then each constant of the kernel: an array's address and bytes, or a number.
_FAMILY, _ID_BYTES, _HEADS, _START, _STOP = range(5)
# Of keys: the kernel, how many groups the family has, and how many are asked for.
_GROUPS, _PICKED = 1, 2
_CONSTANTS, _MOST_CONSTANTS = 5, 8
_ENTRY_WORDS = _CONSTANTS + 2 * _MOST_CONSTANTS
_XOR_MIX, _POLYNOMIAL, _IDENTITY = (FAMILIES.index(one) for one in (xor_mix, polynomial, identity))

_HEAD_WORDS = frames.HEADER.size // 8
_U = np.uint64


@njit  # type: ignore[untyped-decorator]
def _number(entry: Any, place: Any) -> Any:
    return entry[_CONSTANTS + 2 * place]


@njit  # type: ignore[untyped-decorator]
def _ints(entry: Any, place: Any) -> Any:
    at = _CONSTANTS + 2 * place
    return carray(bytes_at(_U(entry[at])), entry[at + 1]).view(np.int64)


@njit  # type: ignore[untyped-decorator]
def _words(entry: Any, place: Any) -> Any:
    at = _CONSTANTS + 2 * place
    return carray(bytes_at(_U(entry[at])), entry[at + 1]).view(np.uint64)


@njit  # type: ignore[untyped-decorator]
def _hash(entry: Any, tokens: Any, bounds: Any, lookback: Any, dead: Any, lookback_dead: Any, out: Any) -> None:
    """Have the kernel of the table's family write the ids of all columns: uint64 [T, heads]."""
    if entry[_FAMILY] == _XOR_MIX:
        token_map = carray(bytes_at(_U(entry[_CONSTANTS])), entry[_CONSTANTS + 1]).view(np.int32)
        of_ids = _ints(entry, 1), _ints(entry, 2), _words(entry, 3), _words(entry, 4), _words(entry, 5)
        fill, stop = _number(entry, 6), _number(entry, 7)
        xor_mix(tokens, bounds, lookback, dead, lookback_dead, token_map, *of_ids, fill, stop, out)
    elif entry[_FAMILY] == _POLYNOMIAL:
        flat, orders = _words(entry, 0), _ints(entry, 1)
        weights = flat.reshape((orders.size, flat.size // orders.size))
        reduce = orders, _words(entry, 2), _words(entry, 3)
        polynomial(
            tokens, bounds, lookback, dead, lookback_dead, weights, *reduce, _words(entry, 4), _number(entry, 5), out
        )
    else:
        identity(tokens, bounds, lookback, dead, lookback_dead, _number(entry, 0), _U(_number(entry, 1)), out)


@njit  # type: ignore[untyped-decorator]
def _hash_keys(entry: Any, tokens: Any, bounds: Any, lookback: Any, dead: Any, lookback_dead: Any, out: Any) -> None:
    """The same of keys: int64 [groups, T]."""
    if entry[_FAMILY] == _XOR_MIX:
        token_map = carray(bytes_at(_U(entry[_CONSTANTS])), entry[_CONSTANTS + 1]).view(np.int32)
        fill, stop = _number(entry, 2), _number(entry, 3)
        xor_mix_keys(tokens, bounds, lookback, dead, lookback_dead, token_map, _ints(entry, 1), fill, stop, out)
    elif entry[_FAMILY] == _POLYNOMIAL:
        flat, orders = _words(entry, 0), _ints(entry, 1)
        weights = flat.reshape((orders.size, flat.size // orders.size))
        reduce = orders, _words(entry, 2), _words(entry, 3)
        polynomial_keys(tokens, bounds, lookback, dead, lookback_dead, weights, *reduce, _number(entry, 4), out)
    else:
        identity_keys(tokens, bounds, lookback, dead, lookback_dead, _number(entry, 0), out)


@njit  # type: ignore[untyped-decorator]
def _own(
    tokens: Any, bounds: Any, lookback: Any, dead: Any, lookback_dead: Any, vocab_size: Any, most: Any, own: Any
) -> Any:
    """Copy a batch to `own`, one array after the other; whether it can be. `most`: columns of look-back.

    It is looked at in the copy: whoever changes it meanwhile has other rows, and no more.
    """
    count, requests, width = tokens.size, lookback.shape[0], lookback.shape[1]
    if bounds.size != requests + 1 or width > most or own.size != count + requests + 1 + requests * width:
        return False
    own_bounds, own_lookback = own[count : count + requests + 1], own[count + requests + 1 :]
    for at in range(count):
        own[at] = tokens[at]
    for request in range(requests + 1):
        own_bounds[request] = bounds[request]
    for request in range(requests):
        for back in range(width):
            own_lookback[request * width + back] = lookback[request, back]
    if own_bounds[0] != 0 or own_bounds[requests] != count:
        return False
    for request in range(requests):
        if own_bounds[request + 1] < own_bounds[request]:
            return False
    before = own_lookback.reshape((requests, width))
    return all_in_vocabulary(own[:count], own_bounds, before, dead, lookback_dead, vocab_size)


@njit  # type: ignore[untyped-decorator]
def _parts(own: Any, count: Any, requests: Any) -> Any:
    """The arrays in `own`."""
    before = own[count + requests + 1 :]
    width = before.size // requests if requests else 0
    return own[:count], own[count : count + requests + 1], before.reshape((requests, width))


@kernel(types.boolean(*BATCH, types.int64[:, ::1], types.int64, types.int64, types.uint8[::1]), nogil=False)
def _put_ids(
    tokens: Any,
    bounds: Any,
    lookback: Any,
    dead: Any,
    lookback_dead: Any,
    entries: Any,
    vocab_size: Any,
    most_lookback: Any,
    out: Any,
) -> bool:
    """`Ids.put`."""
    count, requests = tokens.size, lookback.shape[0]
    own = np.empty(count + requests + 1 + lookback.size, np.int32)
    if not _own(tokens, bounds, lookback, dead, lookback_dead, vocab_size, most_lookback, own):
        return False
    own_tokens, own_bounds, own_lookback = _parts(own, count, requests)
    begin = 0
    for table in range(entries.shape[0]):
        entry = entries[table]
        first, columns = entry[_START], entry[_STOP] - entry[_START]
        whole = np.empty((count, entry[_HEADS]), np.uint64)
        _hash(entry, own_tokens, own_bounds, own_lookback, dead, lookback_dead, whole)
        if entry[_ID_BYTES] == 4:
            nbytes = 4 * count * columns
            narrow = out[begin : begin + nbytes].view(np.uint32).reshape((count, columns))
            for at in range(count):
                for column in range(columns):
                    narrow[at, column] = whole[at, first + column]
        else:
            nbytes = 8 * count * columns
            wide = out[begin : begin + nbytes].view(np.uint64).reshape((count, columns))
            for at in range(count):
                for column in range(columns):
                    wide[at, column] = whole[at, first + column]
        begin += (nbytes + frames.ALIGNMENT - 1) // frames.ALIGNMENT * frames.ALIGNMENT
    return True


@kernel(
    types.boolean(
        *BATCH, types.int64[:, ::1], types.int64[::1], types.int64, types.int64, types.int32[::1], types.int64[::1]
    ),
    nogil=False,
)
def _put_keys(
    tokens: Any,
    bounds: Any,
    lookback: Any,
    dead: Any,
    lookback_dead: Any,
    entries: Any,
    picks: Any,
    vocab_size: Any,
    most_lookback: Any,
    own: Any,
    out: Any,
) -> bool:
    """`BatchKeys.put`."""
    count = tokens.size
    if not _own(tokens, bounds, lookback, dead, lookback_dead, vocab_size, most_lookback, own):
        return False
    own_tokens, own_bounds, own_lookback = _parts(own, count, lookback.shape[0])
    at, first = 0, 0
    for table in range(entries.shape[0]):
        entry = entries[table]
        groups = entry[_PICKED]
        whole = np.empty((entry[_GROUPS], count), np.int64)
        _hash_keys(entry, own_tokens, own_bounds, own_lookback, dead, lookback_dead, whole)
        for token in range(count):
            for group in range(groups):
                out[at] = whole[picks[first + group], token]
                at += 1
        first += groups
    return True


def _lay_constants(entry: npt.NDArray[np.int64], constants: Sequence[Any]) -> list[npt.NDArray[Any]]:
    """Write what a kernel takes besides the batch to its entry; gives the arrays that it has the address of."""
    kept = []
    for place, constant in enumerate(constants):
        at = _CONSTANTS + 2 * place
        if isinstance(constant, np.ndarray):
            kept.append(constant := np.ascontiguousarray(constant))
            entry[at : at + 2] = constant.__array_interface__["data"][0], constant.nbytes
        else:
            entry[at] = np.int64(constant)
    return kept


class BatchKeys:
    """The keys of batches of one model, of some groups of some layers: one for each entry, token by token."""

    def __init__(self, hasher: Hasher, groups: Mapping[int, Sequence[int]]) -> None:
        """groups: layer, ascending -> which of the family's groups, one of the entries of a token after the other."""
        spec = hasher.spec
        self._limits = spec.vocab_size, spec.lookback
        self._entries = np.zeros((len(groups), _ENTRY_WORDS), np.int64)
        self._picks = np.array([group for picked in groups.values() for group in picked], np.int64)
        self._kept: list[npt.NDArray[Any]] = []
        for entry, (layer, picked) in zip(self._entries, groups.items(), strict=True):
            family, constants, count = hasher.key_constants(layer)
            entry[[_FAMILY, _GROUPS, _PICKED]] = family, count, len(picked)
            self._kept += _lay_constants(entry, constants)

    def put(
        self, batch: Sequence[npt.NDArray[Any]], out: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]] | None:
        """Write the keys of a batch to `out`, layer by layer; None for a batch that cannot be, as of `Ids.put`.

        Gives tokens, boundaries and look-back as they were, in memory of their own.
        """
        tokens, bounds, lookback, dead, lookback_dead = batch
        count, requests = len(tokens), len(lookback)
        own, (vocab_size, most) = np.empty(count + requests + 1 + lookback.size, np.int32), self._limits
        arrays = tokens, bounds, lookback, dead, lookback_dead
        if not _put_keys(*arrays, self._entries, self._picks, vocab_size, most, own, out):
            return None
        return own[:count], own[count : count + requests + 1], own[count + requests + 1 :].reshape(lookback.shape)


class Ids:
    """The row ids of batches of one model, of some layers and columns, written as they go into a frame."""

    def __init__(self, hasher: Hasher, layers: Sequence[int], heads: slice | None) -> None:
        """layers: ascending. heads: the columns of every table; None for all."""
        spec = hasher.spec
        self._limits = spec.vocab_size, spec.lookback
        self._entries = np.zeros((len(layers), _ENTRY_WORDS), np.int64)
        self._kept: list[npt.NDArray[Any]] = []
        for entry, layer in zip(self._entries, layers, strict=True):
            table, (family, constants) = spec.table(layer), hasher.constants(layer)
            wanted, id_bytes = heads or slice(0, table.heads), np.dtype(table.id_dtype).itemsize
            entry[:_CONSTANTS] = family, id_bytes, table.heads, wanted.start, wanted.stop
            self._kept += _lay_constants(entry, constants)

    def put(self, batch: Sequence[npt.NDArray[Any]], out: npt.NDArray[np.uint8]) -> bool:
        """Write the ids of a batch to `out`, layer by layer, each padded; False for a batch that cannot be.

        batch: tokens, boundaries and look-back as `TokenBatch` has them, of such dtypes and dimensions, unchecked; and
        its flags, checked, or none.
        """
        tokens, bounds, lookback, dead, lookback_dead = batch
        vocab_size, most_lookback = self._limits
        return _put_ids(tokens, bounds, lookback, dead, lookback_dead, self._entries, vocab_size, most_lookback, out)


@kernel(
    *(
        types.boolean(view(ids), types.int64, types.int64, types.uint8[::1])
        for ids in (types.uint32, types.uint64, types.int64)
    ),
    nogil=False,
)
def _put_given(ids: Any, num_rows: Any, id_bytes: Any, out: Any) -> bool:
    """Write row ids as they go into a frame; False if one of them is none of the table's."""
    held = _U(num_rows)
    if id_bytes == 4:
        narrow = out[: 4 * ids.size].view(np.uint32)
        for at in range(ids.size):
            row = _U(ids[at])  # a negative one is large
            if row >= held:
                return False
            narrow[at] = row
    else:
        wide = out[: 8 * ids.size].view(np.uint64)
        for at in range(ids.size):
            row = _U(ids[at])
            if row >= held:
                return False
            wide[at] = row
    return True


class GivenIds:
    """As `Ids`, of row ids that are known."""

    _DTYPES = tuple(map(np.dtype, (np.uint32, np.uint64, np.int64)))

    def __init__(self, tables: Sequence[TableSpec]) -> None:
        self._tables = [(table.num_rows, np.dtype(table.id_dtype).itemsize) for table in tables]

    def put(self, batch: Sequence[npt.NDArray[Any]], out: npt.NDArray[np.uint8]) -> bool:
        """As of `Ids`; False also for what numpy can put there. batch: the ids of each layer."""
        begin = 0
        for ids, (num_rows, id_bytes) in zip(batch, self._tables, strict=True):
            if type(ids) is not np.ndarray or ids.dtype not in self._DTYPES:
                return False
            if not _put_given(ids.reshape(-1), num_rows, id_bytes, out[begin:]):
                return False
            begin += frames.padded(ids.size * id_bytes)
        return True


@kernel(types.uint64(types.int64, types.int64, types.int64, types.int64[::1], types.uint8[::1]), nogil=False)
def send_lookup(fd: Any, handle: Any, timeout_us: Any, counts: Any, ids: Any) -> Any:
    """Send a LOOKUP on a socket, all of it at once, and give its number; 0 if that cannot be.

    counts: ids of each layer. ids: as the frame has them.
    """
    scratch, head = np.empty(MESSAGE_WORDS, np.int64), np.empty(_HEAD_WORDS + counts.size, np.int64)
    number = random_word(scratch)
    head[0], head[1] = frames.LOOKUP | handle << 32, np.int64(number)
    head[2], head[3] = timeout_us, 8 * counts.size + ids.size
    for place in range(counts.size):
        head[_HEAD_WORDS + place] = counts[place]
    return number if number and send_at_once(fd, head, ids, scratch) else _U(0)
