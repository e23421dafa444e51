"""What is asked for, checked: the rows of a batch of tokens, or rows by their ids; and tokens that may come next."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.forms import Entries, Hashing, IdWriter, KeyWriter
from engrampool_client.compute.layout import Keys, Layout
from engrampool_client.compute.served import ServedModel
from engrampool_proto import frames, wire
from engrampool_proto.errors import BatchError
from engrampool_proto.hashing import TokenBatch, exactly
from engrampool_proto.spec import ModelSpec, TableSpec

IntArray = npt.ArrayLike
# Tokens, boundaries, look-back and the flags of both: as a caller gives them, and as kernels take them.
Given = tuple[IntArray, IntArray | None, IntArray | None, npt.ArrayLike | None, npt.ArrayLike | None]
Batch = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
# Waits until what was given is there, a copy from a device, say.
Ready = Callable[[], Any]
_INT32 = np.dtype(np.int32)
_NDIM = 1, 1, 2  # of tokens, boundaries and look-back
_NO_FLAGS, _NO_LOOKBACK_FLAGS = np.empty(0, np.bool_), np.empty((0, 0), np.bool_)
# Ids of so many bytes are sent without waiting, on a connection that has nothing else to send; and no more rows than
# this are left in the system's hands until somebody comes for them.
_MOST_ID_BYTES, _MOST_BYTES = 48 << 10, 2 << 20


class Recorder(Protocol):
    """Whoever writes down what is asked for."""

    def tokens(self, batch: TokenBatch, layers: Sequence[int]) -> None:
        """The rows of every token."""

    def rows(self, rows: Mapping[int, Any]) -> None:
        """Rows by their ids."""

    def forked(self) -> None:
        """In the child of a fork: what is written down is the parent's."""


class Sizes:
    """What follows from layers and the shapes of their rows, worked out once: decoding asks for the same all the time.

    shapes: layer -> shape of its rows. nbytes: of all rows. what: model, version and layers, ascending. counts: int64,
    ids of each layer. id_bytes: of all ids, as a frame has them. small: whether that is no more than a small lookup may
    be. writer: of the layers' ids, where kernels make them. entries: of the layers, where there is a cache and kernels
    see to them. tokens: of each layer, if each has as many rows of as many tokens, else 0.
    """

    def __init__(
        self,
        shapes: Mapping[int, tuple[int, ...]],
        served: ServedModel,
        writer: IdWriter | None = None,
        entries: tuple[KeyWriter, Entries] | None = None,
    ) -> None:
        self.shapes, self.writer, self.entries = shapes, writer, entries
        tokens = {math.prod(shape[:-2]) if len(shape) > 2 else 0 for shape in shapes.values()}
        self.tokens = tokens.pop() if len(tokens) == 1 else 0
        self.nbytes = sum(map(math.prod, shapes.values()))
        self.what = served.spec.name, served.version, tuple(shapes)
        self.counts = np.array([math.prod(shape[:-1]) for shape in shapes.values()], np.int64)
        self._tables = [served.spec.table(layer) for layer in shapes]
        sizes = [
            (count, count * np.dtype(table.id_dtype).itemsize)
            for count, table in zip(self.counts.tolist(), self._tables, strict=True)
        ]
        self.id_bytes = sum(frames.padded(nbytes) for _, nbytes in sizes)
        self.small = (
            all(count for count, _ in sizes)
            and self.id_bytes <= _MOST_ID_BYTES
            and self.nbytes <= min(_MOST_BYTES, served.max_answer_bytes)
            and sum(count for count, _ in sizes) <= served.max_rows
        )

    def ids(self, memory: npt.NDArray[np.uint8]) -> dict[int, npt.NDArray[Any]]:
        """Layer -> its ids in what a frame has, in the shape that was asked for."""
        at, ids = 0, {}
        for table, count in zip(self._tables, self.counts.tolist(), strict=True):
            nbytes = count * np.dtype(table.id_dtype).itemsize
            ids[table.layer] = memory[at : at + nbytes].view(table.id_dtype).reshape(self.shapes[table.layer][:-1])
            at += frames.padded(nbytes)
        return ids


class TokenQuery:
    """The rows of every token of a batch: [T, heads, row_bytes] a layer.

    layers: ascending. num_tokens: T. key: the same for queries of the same sizes. ready: to be waited for before
    anything but these is asked for; None if nothing is.
    """

    holes: Mapping[int, npt.NDArray[np.bool_]] = {}

    def __init__(
        self, spec: ModelSpec, given: TokenBatch | Given, layers: Sequence[int], ready: Ready | None = None
    ) -> None:
        """given: a batch, or what a caller gave, which is looked at again until `own` is called.

        Raises BatchError, but for what `own` says of arrays that are as kernels take them, or that are not ready.
        """
        self._spec, self.layers, self._given, self.ready = spec, tuple(layers), given, ready
        self._batch: TokenBatch | None = None
        if ready is not None and not isinstance(given, TokenBatch):
            # Of other kinds of array with the same memory, and of the same dtype by another name.
            given = self._given = tuple(map(_as_int32, given))
        arrays = None if isinstance(given, TokenBatch) else _plain(*given)
        if arrays is None and ready is not None:
            raise BatchError("tokens that come later must be int32 arrays, without flags")
        self._arrays = self._of_batch() if arrays is None else arrays
        self.num_tokens = len(self._arrays[0])
        self.key: Hashable = self.num_tokens, self.layers

    @property
    def batch(self) -> TokenBatch:
        """Of tokens that are checked when they are hashed. Raises BatchError."""
        if self._batch is None:
            given = self._given
            self._batch = given if isinstance(given, TokenBatch) else token_batch(*given)
        return self._batch

    def own(self) -> None:
        """What was given is there, and from here on the caller may overwrite it. Raises BatchError."""
        self.ready = None
        self._arrays = self._of_batch()

    def _of_batch(self) -> Batch:
        batch = self.batch
        dead, before = batch.dead, batch.lookback_dead
        flags = _NO_FLAGS if dead is None else dead, _NO_LOOKBACK_FLAGS if before is None else before
        return batch.tokens, batch.query_start_loc, batch.lookback, *flags

    def shapes(self, layout: Layout) -> dict[int, tuple[int, ...]]:
        """Layer -> shape of its rows."""
        tables = map(self._spec.table, self.layers)
        return {table.layer: (self.num_tokens, layout.num_columns(table), table.row_bytes) for table in tables}

    def ids(self, layout: Layout, hashing: Hashing) -> dict[int, npt.NDArray[Any]]:
        """Layer -> row ids [T, heads]. Raises BatchError."""
        rows, heads = hashing.rows(self.batch, self.layers), layout.heads
        return rows if heads is None else {layer: ids[:, heads] for layer, ids in rows.items()}

    def put_ids(self, sizes: Sizes, to: npt.NDArray[np.uint8]) -> bool:
        """Write the row ids to what a frame has of them, zeros yet; False for a batch that cannot be."""
        assert sizes.writer is not None
        return sizes.writer.put(self._arrays, to)

    def put_keys(self, writer: KeyWriter, to: Keys, layout: Layout, hashing: Hashing) -> bool:
        """Write the key of each entry, token by token; False for a batch that cannot be.

        From there on the caller may overwrite what was given.
        """
        own = writer.put(self._arrays, to)
        if own is not None and self._batch is None and not isinstance(self._given, TokenBatch):
            self._given, self._arrays = (*own, None, None), (*own, *self._arrays[3:])
        return own is not None

    def keys(self, layout: Layout, hashing: Hashing) -> dict[int, list[Keys]]:
        """Layer -> int64 [groups, T] of each part. Raises BatchError."""
        found = hashing.keys(self.batch, self.layers)
        return {layer: [part.pick(keys) for part in layout.parts[layer]] for layer, keys in found.items()}

    def record(self, recorder: Recorder) -> None:
        """Write down what is asked for."""
        recorder.tokens(self.batch, self.layers)

    def request(self, served: ServedModel) -> wire.LookupRequest:
        """To have them hashed by the server. Raises BatchError."""
        spec = served.spec
        self.batch.check_tokens(spec.vocab_size, spec.lookback)
        return wire.LookupRequest(spec.name, served.version, (), self.batch, tuple(self.layers))


class RowQuery:
    """Rows by their ids: [*ids.shape, row_bytes] a layer.

    rows: layer -> what may be an array of ids, checked when they are asked for. layers: ascending. num_tokens: the most
    entries that one of them has. ready: as of `TokenQuery`. holes: layer -> bool [*ids.shape], rows that there are not,
    where there are some. Raises SpecError for an unknown layer.
    """

    def __init__(
        self, spec: ModelSpec, rows: Mapping[int, Any], ready: Ready | None = None, absent: bool = False
    ) -> None:
        """absent: whether -1 stands for no row."""
        self._spec, self._rows, self.ready, self._absent = spec, rows, ready, absent
        self.holes: dict[int, npt.NDArray[np.bool_]] = {}
        self.layers = tuple(sorted([spec.table(layer).layer for layer in rows]))
        if ready is None:
            self.own()
        arrays = [ids for ids in rows.values() if isinstance(ids, np.ndarray)]
        self.num_tokens = max((len(ids) for ids in arrays if ids.ndim), default=0)

    @property
    def key(self) -> Hashable:
        """As of `TokenQuery`."""
        return tuple([(layer, getattr(self._rows[layer], "shape", ())) for layer in self.layers])

    def shapes(self, _: Layout) -> dict[int, tuple[int, ...]]:
        """Layer -> shape of its rows, if it is an array."""
        shapes: dict[int, tuple[int, ...]] = {}
        for layer in self.layers:
            ids = self._rows[layer]
            shape = ids.shape if isinstance(ids, np.ndarray) else ()
            shapes[layer] = (*shape, self._spec.table(layer).row_bytes)
        return shapes

    def ids(self, _: Layout, hashing: Hashing) -> dict[int, npt.NDArray[Any]]:
        """Layer -> row ids, in the table's dtype. Raises BatchError."""
        return {layer: row_ids(self._spec.table(layer), self._rows[layer]) for layer in self.layers}

    def put_ids(self, sizes: Sizes, to: npt.NDArray[np.uint8]) -> bool:
        """As of `TokenQuery`."""
        if sizes.writer is not None and sizes.writer.put([self._rows[layer] for layer in self.layers], to):
            return True
        try:
            for layer, place in sizes.ids(to).items():
                place[...] = row_ids(self._spec.table(layer), self._rows[layer])
        except BatchError:  # which the step ends with, as whoever asks for them otherwise finds it out, too
            return False
        return True

    def put_keys(self, writer: KeyWriter, to: Keys, layout: Layout, hashing: Hashing) -> bool:
        """As of `TokenQuery`."""
        try:
            keys = self.keys(layout, hashing)
        except BatchError:  # as of `put_ids`
            return False
        if keys is None:
            return False
        at = 0
        for found in keys.values():
            by_token = np.concatenate(found).T
            to[at : at + by_token.size].reshape(by_token.shape)[...] = by_token
            at += by_token.size
        return True

    def own(self) -> None:
        """As of `TokenQuery`; who gives them copies them."""
        self.ready = None
        if self._absent:
            self._absent, self._rows = False, {layer: self._filled(layer, ids) for layer, ids in self._rows.items()}

    def _filled(self, layer: int, ids: Any) -> Any:
        """The ids with others in place of -1, of the same column, so that they are as hashing gives them."""
        if not isinstance(ids, np.ndarray) or ids.dtype.kind != "i":
            return ids
        holes = np.asarray(ids) == -1
        if not holes.any():
            return ids
        self.holes[layer] = holes
        columns = np.asarray(ids).reshape(-1, ids.shape[-1] if ids.ndim > 1 else 1)
        some = columns[np.argmax(columns != -1, axis=0), np.arange(columns.shape[1])]
        filled = np.where(columns == -1, np.maximum(some, 0), columns)
        return filled.reshape(ids.shape)

    def keys(self, layout: Layout, hashing: Hashing) -> dict[int, list[Keys]] | None:
        """Layer -> int64 [groups, T] of each part; None for ids that are not as hashing gives them, [..., heads].

        Raises BatchError.
        """
        keys: dict[int, list[Keys]] = {}
        for layer, ids in self.ids(layout, hashing).items():
            if ids.ndim < 2 or ids.shape[-1] != layout.num_columns(self._spec.table(layer)):
                return None
            by_token = ids.reshape(-1, ids.shape[-1])
            keys[layer] = []
            for part in layout.parts[layer]:
                found = part.keys_of(by_token)
                if found is None:
                    return None
                keys[layer].append(found)
        return keys

    def record(self, recorder: Recorder) -> None:
        """Write down what is asked for."""
        recorder.rows(self._rows)

    def request(self, _: ServedModel) -> wire.LookupRequest | None:
        """None, as there is nothing to be hashed."""
        return None


Query = TokenQuery | RowQuery


def token_batch(
    tokens: IntArray,
    query_start_loc: IntArray | None = None,
    lookback: IntArray | None = None,
    dead: npt.ArrayLike | None = None,
    lookback_dead: npt.ArrayLike | None = None,
) -> TokenBatch:
    """A batch of the caller's own arrays, copied so that they may be overwritten at once.

    Integers of any type that fit into the dtypes of `TokenBatch` are converted. Raises BatchError.
    """
    return TokenBatch.of(
        exactly("tokens", tokens, np.int32),
        None if query_start_loc is None else exactly("query_start_loc", query_start_loc, np.int32),
        None if lookback is None else exactly("lookback", lookback, np.int32),
        None if dead is None else exactly("dead", dead, np.bool_),
        None if lookback_dead is None else exactly("lookback_dead", lookback_dead, np.bool_),
    )


def _plain(
    tokens: IntArray,
    bounds: IntArray | None,
    lookback: IntArray | None,
    dead: npt.ArrayLike | None,
    lookback_dead: npt.ArrayLike | None,
) -> Batch | None:
    """What was given, as kernels take it, if it needs no change for that: neither copied, nor looked at."""
    if type(tokens) is not np.ndarray or dead is not None or lookback_dead is not None:
        return None
    if bounds is None:
        bounds = np.array([0, tokens.size], np.int32)
    if lookback is None and type(bounds) is np.ndarray:
        lookback = np.empty((max(0, bounds.size - 1), 0), np.int32)
    arrays: Any = tokens, bounds, lookback
    for array, ndim in zip(arrays, _NDIM, strict=True):
        if type(array) is not np.ndarray or array.dtype is not _INT32 or array.ndim != ndim:
            return None
    return *arrays, _NO_FLAGS, _NO_LOOKBACK_FLAGS


def _as_int32(array: Any) -> Any:
    """The same memory as a plain array of int32, if it can be; else what was given."""
    if not isinstance(array, np.ndarray) or array.dtype != _INT32:
        return array
    return np.asarray(array).view(np.int32)


def row_ids(table: TableSpec, ids: Any) -> npt.NDArray[Any]:
    """Ids of any integer type and byte order in the table's dtype, checked against its rows. Raises BatchError."""
    layer = table.layer
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        found = ids.dtype.name if isinstance(ids, np.ndarray) else type(ids).__name__
        raise BatchError(f"row ids of layer {layer} must be an integer array; they are {found}")
    plain: npt.NDArray[Any] = np.asarray(ids)  # of a masked array, min and max would leave out what is masked
    if plain.size and (int(plain.max()) >= table.num_rows or (plain.dtype.kind == "i" and int(plain.min()) < 0)):
        flat = plain.reshape(-1)
        at = int(np.argmax((flat < 0) | (flat >= table.num_rows)))
        raise BatchError(f"row id {flat[at]} at position {at} of layer {layer} is not in 0 .. {table.num_rows - 1}")
    return plain.astype(table.id_dtype, copy=False)


def candidates_batch(batch: TokenBatch, candidates: npt.ArrayLike, chain: bool, spec: ModelSpec) -> TokenBatch:
    """The tokens that may follow each request of `batch`, as a batch of their own.

    candidates: integers [R, K], -1 for none. Alternatives of the next token become a request each; with `chain` a row
    is one request, which ends at its first -1. Raises BatchError.
    """
    requests = len(batch.query_start_loc) - 1
    tokens = exactly("candidates", candidates, np.int32)
    if tokens.ndim != 2 or len(tokens) != requests:
        raise BatchError(f"candidates must be int32 [{requests}, *], a row a request; they are {list(tokens.shape)}")
    given = tokens >= 0
    if chain:
        given = np.logical_and.accumulate(given, axis=1)
    recent = _recent(batch, spec.lookback)
    if chain:
        bounds = np.concatenate(([0], np.cumsum(given.sum(axis=1))))
        lookback = recent
    else:
        bounds = np.arange(np.count_nonzero(given) + 1)
        lookback = np.repeat(recent, given.sum(axis=1), axis=0)
    guessed = TokenBatch(tokens[given], bounds.astype(np.int32), lookback)
    guessed.check_tokens(spec.vocab_size, spec.lookback)
    return guessed


def _recent(batch: TokenBatch, lookback: int) -> npt.NDArray[np.int32]:
    """The last tokens of each request, the newest first: int32 [R, lookback], -1 for a gap or before the start."""
    if not lookback:
        return np.empty((len(batch.query_start_loc) - 1, 0), np.int32)
    # One more token a request: what is before it are the last ones.
    requests = len(batch.query_start_loc) - 1
    ends = batch.query_start_loc[1:]
    tokens = np.insert(batch.tokens, ends, 0)
    dead = None if batch.dead is None else np.insert(batch.dead, ends, False)
    bounds = (batch.query_start_loc + np.arange(requests + 1)).astype(np.int32)
    one_more = TokenBatch(tokens, bounds, batch.lookback, dead, batch.lookback_dead)
    return one_more.windows(lookback).ids[1:, bounds[1:] - 1].T.astype(np.int32)
