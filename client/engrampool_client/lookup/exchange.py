"""One lookup without its transport: the request's bytes, and the answer put together from its messages."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engrampool_client.errors import ProtocolError, RejectedError
from engrampool_client.lookup.served import ServedModel
from engrampool_proto import wire
from engrampool_proto.errors import BatchError, WireError
from engrampool_proto.hashing import TokenBatch, exactly
from engrampool_proto.spec import ModelSpec, TableSpec

Hashing = Literal["local", "server"]
IntArray = npt.ArrayLike
Rows = npt.NDArray[np.uint8]
Valid = npt.NDArray[np.bool_]
# Rows and which tokens have theirs, of a layer that did not come.
Blank = Callable[[int], tuple[Rows, Valid]]
Writing = Callable[[], AbstractContextManager[None]]
# By layer: an array for its rows, or one for each of some segments of them.
Out = Mapping[int, Rows | Mapping[str, Rows]]


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


class Exchange:
    """A request and its growing answer.

    answer_bytes: rows that will come back, in bytes. shapes: layer -> shape of its rows.
    owned: whether all arrays are its own: nobody minds what is written into them after the step ended.
    times: the server's, once the whole answer is there.
    Not thread-safe: one thread adds, and a layer's rows are read after `add` or `placed` said it is complete.

    out: layer -> uint8 array of the layer's shape, C-contiguous and writable, that its rows are written into; a layer
    without one gets an array of ours.
    deliver: makes of a layer's rows, once they are complete, what `rows` gives; by default the rows themselves.
    allocate: gives memory for a layer's rows, by bytes.
    Raises RejectedError for more than the server's limits.
    """

    def __init__(
        self,
        served: ServedModel,
        asked: wire.LookupRequest,
        shapes: Mapping[int, tuple[int, ...]],
        out: Mapping[int, Rows] | None = None,
        deliver: Callable[[int, Rows], Rows] | None = None,
        allocate: Callable[[int], Rows] | None = None,
    ) -> None:
        self._served, self._asked = served, asked
        self.shapes = dict(shapes)
        self.times: wire.ServerTimes | None = None
        self._out = dict(out or {})
        self._deliver, self._allocate = deliver, allocate
        self._sizes: dict[int, int] = {}
        self._rows: dict[int, Rows] = {}
        num_rows = 0
        for layer, shape in self.shapes.items():
            self._sizes[layer] = size = math.prod(shape)
            num_rows += math.prod(shape[:-1])
            if not size:
                self._rows[layer] = np.empty(0, np.uint8)
        for layer, array in self._out.items():
            self._rows[layer] = array.reshape(-1)
        self.answer_bytes = sum(self._sizes.values())
        if num_rows > served.max_rows or self.answer_bytes > served.max_answer_bytes:
            raise _over_limits(served, num_rows, self.answer_bytes)
        self._have = dict.fromkeys(self._sizes, 0)
        self._whole: _Whole | None = None
        self.owned = not self._out

    @cached_property
    def request(self) -> bytes:
        """The LookupRequest's bytes."""
        return wire.encode_request(self._asked)

    @property
    def asked_tables(self) -> tuple[tuple[int, wire.Ids], ...] | None:
        """(layer, row ids [N]) that are asked for; None if tokens are."""
        return self._asked.tables if self._asked.tokens is None else None

    @classmethod
    def of_tokens(
        cls,
        served: ServedModel,
        batch: TokenBatch,
        layers: Sequence[int],
        hashing: Hashing,
        out: Out | None = None,
        heads: slice | None = None,
        writing: Writing = nullcontext,
    ) -> "Exchange":
        """Every token's rows: [T, heads, row_bytes] a layer, ascending. heads: only these columns, hashed here.

        writing: within this, segments are written into the caller's arrays.
        Raises BatchError, SpecError, RejectedError.
        """
        spec = served.spec
        if hashing == "local":
            rows = spec.hash(batch, layers)
            if heads is not None:
                rows = {layer: ids[:, heads] for layer, ids in rows.items()}
            return cls._of_ids(served, rows, out, writing)
        tables = [spec.table(layer) for layer in layers]
        shapes = {table.layer: (batch.num_tokens, table.heads, table.row_bytes) for table in tables}
        batch.check_tokens(spec.vocab_size, spec.lookback)
        asked = wire.LookupRequest(spec.name, served.version, (), batch, tuple(layers))
        return cls._plain(served, asked, shapes, out, writing)

    @classmethod
    def of_rows(
        cls,
        served: ServedModel,
        rows: Mapping[int, npt.NDArray[Any]],
        out: Out | None = None,
        writing: Writing = nullcontext,
    ) -> "Exchange":
        """Ask for rows by id: [*ids.shape, row_bytes] a layer. Raises BatchError, SpecError, RejectedError."""
        spec = served.spec
        return cls._of_ids(
            served, {layer: row_ids(spec.table(layer), rows[layer]) for layer in sorted(rows)}, out, writing
        )

    @classmethod
    def _of_ids(
        cls, served: ServedModel, rows: Mapping[int, wire.Ids], out: Out | None, writing: Writing
    ) -> "Exchange":
        """rows: by layer, ascending; of the table's dtype, and in range."""
        tables, shapes = [], {}
        for layer, ids in rows.items():
            tables.append((layer, ids.reshape(-1)))
            shapes[layer] = (*ids.shape, served.spec.table(layer).row_bytes)
        asked = wire.LookupRequest(served.spec.name, served.version, tuple(tables))
        return cls._plain(served, asked, shapes, out, writing)

    @classmethod
    def _plain(
        cls,
        served: ServedModel,
        asked: wire.LookupRequest,
        shapes: Mapping[int, tuple[int, ...]],
        out: Out | None,
        writing: Writing,
    ) -> "Exchange":
        """What comes is what was asked for, in the caller's arrays where there are some."""
        if not out:
            return cls(served, asked, shapes, None, lambda _, rows: _read_only(rows))
        check_outs(served.spec, out, shapes)

        def deliver(layer: int, rows: Rows) -> Rows:
            given = out.get(layer)
            with writing() if isinstance(given, Mapping) else nullcontext():
                return hand_over(served.spec.table(layer), rows, given)

        whole = {layer: array for layer, array in out.items() if isinstance(array, np.ndarray)}
        return cls(served, asked, shapes, whole, deliver)

    def split(self, count: int) -> "list[Exchange]":
        """Cut into at most `count` lookups, each for a run of every layer's rows, all writing into this one's arrays.

        A lookup by tokens stays whole: where its rows could be cut, only the server knows. Of no use once rows came.
        """
        most = max((len(ids) for _, ids in self._asked.tables), default=0)
        if count == 1 or self._asked.tokens is not None or most < count:
            return [self]  # most < count covers a lookup of nothing
        parts = []
        for part in range(count):
            tables, shapes, out = [], {}, {}
            for layer, ids in self._asked.tables:
                cut = slice(len(ids) * part // count, len(ids) * (part + 1) // count)
                row_bytes = self.shapes[layer][-1]
                tables.append((layer, ids[cut]))
                shapes[layer] = (len(ids[cut]), row_bytes)
                out[layer] = self._array(layer).reshape(-1, row_bytes)[cut]
            asked = wire.LookupRequest(self._asked.model, self._asked.version, tuple(tables))
            parts.append(Exchange(self._served, asked, shapes, out))
        whole = _Whole(self, parts)
        for one in parts:
            one._whole = whole
        return parts

    def spread(self, routes: Mapping[int, "Route"], writing: Writing) -> "dict[int, Exchange]":
        """Cut into one lookup a shard, by the rows that each holds, all writing into this one's arrays.

        routes: by layer. writing: as for `of_tokens`. Returns lookups by the shard's number. Of no use once rows came.
        """
        asked: dict[int, list[tuple[int, wire.Ids, slice | npt.NDArray[np.int64]]]] = {}
        for layer, ids in self._asked.tables:
            for shard, where in routes[layer].of(ids):
                asked.setdefault(shard, []).append((layer, ids[where], where))
        if len(asked) <= 1:
            return dict.fromkeys(asked, self)
        parts = {shard: self._part_of(tables, writing) for shard, tables in asked.items()}
        whole = _Whole(self, list(parts.values()))
        for one in parts.values():
            one._whole = whole
        return parts

    def _part_of(
        self, tables: "Sequence[tuple[int, wire.Ids, slice | npt.NDArray[np.int64]]]", writing: Writing
    ) -> "Exchange":
        """tables: (layer, ids, where they stand among this one's)."""
        shapes, out, scattered = {}, {}, {}
        for layer, ids, where in tables:
            row_bytes = self.shapes[layer][-1]
            shapes[layer] = (len(ids), row_bytes)
            if isinstance(where, slice):
                out[layer] = self._array(layer).reshape(-1, row_bytes)[where]
            else:
                scattered[layer] = where

        def deliver(layer: int, rows: Rows) -> Rows:
            if layer in scattered:
                with writing():
                    self._array(layer).reshape(-1, rows.shape[1])[scattered[layer]] = rows
            return rows

        request = wire.LookupRequest(self._asked.model, self._asked.version, tuple(table[:2] for table in tables))
        return Exchange(self._served, request, shapes, out, deliver)

    def whole(self, complete: Sequence[int]) -> dict[int, Rows]:
        """Rows of the layers that are `complete` here, and so are in every part of what was split: once each."""
        rows = {}
        for layer in complete:
            rows[layer] = self.rows(layer)
        return rows if self._whole is None else self._whole.rows(complete)

    def empty_layers(self) -> list[int]:
        """Layers that no rows will come for (a batch of no tokens); they are complete from the start."""
        return [] if all(self._sizes.values()) else [layer for layer, size in self._sizes.items() if size == 0]

    def add(self, message: bytes) -> list[int]:
        """Take in one LookupResponse; returns the layers that are complete by it. Raises ProtocolError."""
        try:
            response = wire.parse_response(message)
        except WireError as error:
            raise ProtocolError(f"the answer cannot be read: {error}") from error
        complete = []
        for piece in response.tables:
            layer, nbytes = piece.layer, len(piece.rows)
            self._check_next(layer, piece.first, nbytes)
            data = np.frombuffer(piece.rows, np.uint8)
            if layer not in self._rows and nbytes == self._sizes[layer]:
                self._rows[layer] = data  # the whole table in one message: a view of it
            else:
                have = self._have[layer]
                self._array(layer)[have : have + nbytes] = data
            if self.placed(layer, nbytes):
                complete.append(layer)
        self.times = response.times or self.times
        return complete

    def missing(self) -> tuple[tuple[int, int], ...]:
        """(layer, bytes) of the layers that are not complete, in the order in which a server sends them."""
        sizes = self._sizes
        if self._have == sizes:
            return ()
        return tuple([(layer, sizes[layer]) for layer in sorted(sizes) if self._have[layer] != sizes[layer]])

    def due(self) -> tuple[int, int] | None:
        """(layer, row) that rows must come for next, in the order in which a server sends them; None once complete."""
        for layer in sorted(self._sizes):
            have = self._have[layer]
            if have != self._sizes[layer]:
                return layer, have // self.shapes[layer][-1]
        return None

    def place(self, layer: int, first: int, nbytes: int) -> memoryview:
        """Where the next `nbytes` of a layer belong, from its row `first` on; tell `placed` when they are there.

        Raises ProtocolError unless they were asked for and follow what came before.
        """
        self._check_next(layer, first, nbytes)
        have = self._have[layer]
        return self._array(layer)[have : have + nbytes].data

    def placed(self, layer: int, nbytes: int) -> bool:
        """Count `nbytes` as there; returns whether the layer is complete by them."""
        self._have[layer] += nbytes
        return nbytes > 0 and self._have[layer] == self._sizes[layer]

    def restart(self) -> None:
        """Ask again, for the layers that are not complete: those that are may be in use already."""
        missing = [layer for layer, size in self._sizes.items() if self._have[layer] != size]
        self._have.update(dict.fromkeys(missing, 0))
        self._asked = replace(
            self._asked,
            tables=tuple(table for table in self._asked.tables if table[0] in missing),
            layers=tuple(layer for layer in self._asked.layers if layer in missing),
        )
        self.answer_bytes = sum(self._sizes[layer] for layer in missing)
        self.__dict__.pop("request", None)  # it was encoded for what was missing before

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return self._have == self._sizes

    def finish(self) -> None:
        """Raise ProtocolError unless every row has come."""
        if self._have != self._sizes:
            short = next(layer for layer, size in self._sizes.items() if self._have[layer] != size)
            raise ProtocolError(f"the answer ended before the rows of layer {short} were complete")

    def rows(self, layer: int) -> Rows:
        """The layer's rows in their shape, or what `deliver` makes of them. Only once complete, and once."""
        rows = self._out.get(layer)
        if rows is None:
            rows = self._rows[layer].reshape(self.shapes[layer])
        return rows if self._deliver is None else self._deliver(layer, rows)

    def _array(self, layer: int) -> Rows:
        """The layer's bytes, uint8 [size]."""
        if layer not in self._rows:
            size = self._sizes[layer]
            self._rows[layer] = np.empty(size, np.uint8) if self._allocate is None else self._allocate(size)
        return self._rows[layer]

    def _check_next(self, layer: int, first: int, nbytes: int) -> None:
        size = self._sizes.get(layer)
        if size is None:
            raise ProtocolError(f"the answer has rows of layer {layer}, which was not asked for")
        have = self._have[layer]
        if first * self.shapes[layer][-1] != have or have + nbytes > size:
            raise ProtocolError(
                f"layer {layer}: {nbytes} bytes at row {first} do not follow the {have} bytes "
                f"that came before; {size} were asked for"
            )


class _Whole:
    """What a split lookup was, and how many of its parts still miss rows of each layer."""

    def __init__(self, exchange: Exchange, parts: Sequence[Exchange]) -> None:
        self._exchange, self._lock = exchange, threading.Lock()
        self._missing = {layer: sum(part._sizes.get(layer, 0) > 0 for part in parts) for layer in exchange.shapes}

    def rows(self, complete: Sequence[int]) -> dict[int, Rows]:
        with self._lock:
            for layer in complete:
                self._missing[layer] -= 1
            whole = [layer for layer in complete if not self._missing[layer]]
            for layer in whole:  # not to be asked for again, whatever becomes of the other layers
                self._exchange._have[layer] = self._exchange._sizes[layer]
            return self._exchange.whole(whole)


@dataclass(frozen=True, eq=False)
class Route:
    """Which shard holds which rows of a table. starts: uint64 [ranges], ascending from 0. shards: int64 [ranges]."""

    starts: npt.NDArray[np.uint64]
    shards: npt.NDArray[np.int64]

    def of(self, ids: wire.Ids) -> "list[tuple[int, slice | npt.NDArray[np.int64]]]":
        """Where the ids of each shard stand among `ids` [N]: a slice if they stand together, else their positions."""
        if not len(ids):
            return []
        if len(self.starts) == 1:
            return [(int(self.shards[0]), slice(0, len(ids)))]
        shards = self.shards[np.searchsorted(self.starts, ids, side="right") - 1]
        cuts = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(ids)]
        runs = [(int(shards[start]), slice(start, stop)) for start, stop in pairwise(cuts)]
        if len({shard for shard, _ in runs}) == len(runs):
            return list(runs)
        return [(int(shard), np.flatnonzero(shards == shard)) for shard in np.unique(shards)]


def slowest(parts: Sequence[Exchange]) -> wire.ServerTimes | None:
    """The servers' times of a lookup in parts that ran side by side."""
    times = [part.times for part in parts if part.times is not None]
    if not times:
        return None
    names = ("queue_us", "gather_us", "total_us")
    return wire.ServerTimes(*(max(getattr(one, name) for one in times) for name in names))


def by_layer(name: str, given: Any) -> Mapping[int, Any]:
    """What is given by layer. Raises BatchError for what is no mapping."""
    if not isinstance(given, Mapping):
        raise BatchError(f"{name} must be a dict of arrays by layer; it is {type(given).__name__}")
    return given


def check_outs(spec: ModelSpec, out: Out | None, shapes: Mapping[int, tuple[int, ...]]) -> None:
    """Raise BatchError for arrays that the rows of `shapes` cannot be written into, or that share memory."""
    if out is None:
        return
    arrays: list[tuple[int, int, str]] = []  # first and last byte, and whose
    for layer, given in by_layer("out", out).items():
        if layer not in shapes:
            raise BatchError(f"out has an array for layer {layer}, which is not asked for; {list(shapes)} are")
        shape = shapes[layer]
        if isinstance(given, Mapping):
            row_format = spec.table(layer).row_format
            for name, array in given.items():
                cut = row_format.slice_of(name)
                arrays += _check_out(f"{name} of layer {layer}", array, (*shape[:-1], cut.stop - cut.start))
        else:
            arrays += _check_out(f"layer {layer}", given, shape)
    for (_, last, one), (first, _, other) in pairwise(sorted(arrays)):
        if first <= last:
            raise BatchError(f"out of {one} and out of {other} share memory; give each an array of its own")


def _check_out(what: str, array: Any, shape: tuple[int, ...]) -> list[tuple[int, int, str]]:
    """Where it lies, unless it is empty. Raises BatchError."""
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise BatchError(f"out of {what} must be a uint8 array {list(shape)}; it is {found}")
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise BatchError(f"out of {what} must be C-contiguous and writable")
    first = array.__array_interface__["data"][0]
    return [(first, first + array.nbytes - 1, what)] if array.nbytes else []


def hand_over(table: TableSpec, rows: Rows, out: Rows | Mapping[str, Rows] | None) -> Rows:
    """What a caller who gave `out` for a layer gets of its rows: the array itself; else a view that is read-only.

    Where the caller wants segments apart, they are copied to their arrays.
    """
    if isinstance(out, np.ndarray):
        return rows
    if out is not None:
        for name, array in out.items():
            array[:] = rows[..., table.row_format.slice_of(name)]
    return _read_only(rows)


def _read_only(rows: Rows) -> Rows:
    handed = rows.view()  # what is ours stays writable: rows that come too late to be taken are masked
    handed.flags.writeable = False
    return handed


def zeros(shapes: Mapping[int, tuple[int, ...]], out: Out | None) -> Blank:
    """Zero rows of no token, in the caller's arrays where there are some. shapes: of each layer's rows."""

    def blank(layer: int) -> tuple[Rows, Valid]:
        shape, given = shapes[layer], (out or {}).get(layer)
        if isinstance(given, Mapping):
            for array in given.values():
                array[:] = 0
        elif given is not None:
            given[:] = 0
        rows = given if isinstance(given, np.ndarray) else np.zeros(shape, np.uint8)
        if rows is not given:
            rows.flags.writeable = False
        return rows, np.zeros(shape[:-2] if len(shape) > 2 else shape[:1], np.bool_)

    return blank


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


def _over_limits(served: ServedModel, num_rows: int, nbytes: int) -> RejectedError:
    return RejectedError(
        f"{num_rows} rows, {nbytes} bytes, are over the server's limits of {served.max_rows} rows and "
        f"{served.max_answer_bytes} bytes a request; split the batch",
        "too-many-rows",
    )
