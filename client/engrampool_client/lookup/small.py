"""Small lookups: by row ids, laid out as they are sent, and where their rows go; with a cache, which is asked first."""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.cache import HotRows
from engrampool_client.lookup.delivery import Blank, Delivery, Rows, Valid
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.landing import Landing, Out, read_only
from engrampool_client.lookup.query import Query, RowQuery, Sizes
from engrampool_client.tracing.record import Trace
from engrampool_proto import frames, wire
from engrampool_proto.errors import BatchError
from engrampool_proto.spec import ModelSpec

if TYPE_CHECKING:
    from engrampool_client.lookup.plan import Planner

_IN_ORDER: Mapping[int, npt.NDArray[np.int64]] = {}


class Small:
    """what: model, version, layers, ascending. counts: ids of each layer. ids: as the frame has them, little-endian.

    rows: layer -> where its rows belong, uint8 [N, row_bytes], C-contiguous. given: layer and what its caller gets of
    it. nbytes: of all rows that are asked for. places: layer -> int64 [count], where each of them belongs among its
    `rows`; a layer without any has all of its rows come, in order. trace: of its delivery.
    """

    __slots__ = ("counts", "given", "ids", "nbytes", "places", "rows", "trace", "what")

    def __init__(
        self,
        what: tuple[str, str, tuple[int, ...]],
        counts: npt.NDArray[np.int64],
        ids: npt.NDArray[np.uint8],
        rows: dict[int, Rows],
        given: Sequence[tuple[int, Rows]],
        nbytes: int,
        places: Mapping[int, npt.NDArray[np.int64]] = _IN_ORDER,
    ) -> None:
        self.what, self.counts, self.ids, self.nbytes = what, counts, ids, nbytes
        self.rows, self.given, self.places = rows, given, places
        self.trace: Trace | None = None

    @classmethod
    def of(cls, query: Query, out: Out | None, sizes: Sizes) -> "Small | None":
        """None where rows are written apart, or for a batch or row ids that cannot be."""
        arrays = _arrays(out, sizes)
        if arrays is None:
            return None
        rows, given = arrays
        ids = np.zeros(sizes.id_bytes, np.uint8)
        if not query.put_ids(sizes, ids):
            return None
        return cls(sizes.what, sizes.counts, ids, rows, given, sizes.nbytes)

    def tables(self, spec: ModelSpec) -> tuple[tuple[int, npt.NDArray[Any]], ...]:
        """Each layer and its ids [count]."""
        at, tables = 0, []
        for layer, count in zip(self.what[2], self.counts.tolist(), strict=True):
            dtype = np.dtype(spec.table(layer).id_dtype)
            tables.append((layer, self.ids[at : at + count * dtype.itemsize].view(dtype)))
            at += frames.padded(count * dtype.itemsize)
        return tuple(tables)


class Scratch:
    """Memory that fetched rows lie in until they are where they belong: fresh pages cost more than the copy does.

    most: buffers that are kept for the next lookups. Thread-safe.
    """

    def __init__(self, most: int) -> None:
        # Taken again where garbage is collected within it: what a lost lookup had is given back then.
        self._most, self._lock = most, threading.RLock()
        self._spare: list[Rows] = []  # the largest last

    def take(self, nbytes: int) -> Rows:
        """Uint8 [at least nbytes], to be given back."""
        with self._lock:
            if self._spare and self._spare[-1].size >= nbytes:
                return self._spare.pop()
        return np.empty(nbytes + nbytes // 4, np.uint8)  # the next one is seldom much larger

    def give_back(self, buffer: Rows) -> None:
        """Have it serve another lookup; nobody may refer to it any more."""
        with self._lock:
            self._spare.append(buffer)
            self._spare.sort(key=len)
            del self._spare[: -self._most]


class Cached:
    """A small lookup of a client with a cache, a plan as of `Lookup`. To be used by one thread at a time.

    Once `find` was called, what the cache has lies in its place, and the delivery has the layers that are whole by it.
    What comes of the others lies in memory of ours until it is put in its place; so what the cache is to have was never
    the caller's to write to.

    small: what is to be asked for; None if nothing is. sources: where else bytes of rows came from. blank: what stood
    in for rows that do not come, before there was this. exchange: what `otherwise` asks for.
    """

    __slots__ = (
        *("_cache", "_came", "_entries", "_given", "_memory", "_planner", "_rows", "_sizes", "_state", "_tokens"),
        *("blank", "exchange", "small", "sources"),
    )

    def __init__(self, planner: "Planner", cache: HotRows, query: Query, out: Out | None, sizes: Sizes) -> None:
        """Raises BatchError where rows are written apart, for a batch or ids that cannot be, and ids of no n-gram."""
        arrays = _arrays(out, sizes)
        assert sizes.entries is not None
        keys, entries = sizes.entries
        if arrays is None:
            raise BatchError("rows are written apart")
        self._rows, self._given = arrays
        self._planner, self._cache, self._sizes, self._entries = planner, cache, sizes, entries
        tokens = self._tokens = sizes.tokens
        self._state = entries.state(tokens, list(map(_address, self._rows.values())))
        if not query.put_keys(keys, self._state[: tokens * entries.each], planner.layout, planner.hashing):
            raise BatchError("its keys cannot be made")
        self._came: dict[int, Rows] | None = None  # by layer, what lies in its place by now
        self._memory: Rows | None = None
        self.small: Small | None = None
        self.sources: dict[str, int] = {}
        self.blank: Blank | None = None
        self.exchange: Exchange | None = None

    def find(self, delivery: Delivery) -> None:
        """Have what the cache has. Raises what the lookup was given up with."""
        cache, ids = self._cache, np.empty(self._sizes.id_bytes, np.uint8)
        if delivery.blank is not None:
            self.blank = delivery.blank
            delivery.stand_in(self._blank)
        # The lock is held until the rows are copied: until then nobody may put others in their place.
        with delivery.writing(), cache.held():
            missing, hit, same, end = cache.find_small(self._entries, self._tokens, self._state, ids)
        self.sources = {"cache": hit, "duplicate": same} if same else {"cache": hit}
        if not missing:
            delivery.arrived(dict(self._given))
            return
        self.small, whole = self._small(ids[:end])
        delivery.arrived(whole)

    def place(self, layer: int, came: Rows | None = None) -> None:
        """Put what came of a layer in its place; as often as wanted. Within `writing`.

        came: where it came, if not where `small` has it.
        """
        if came is None:
            assert self.small is not None
            came = self.small.rows[layer]
        if self._came is None:
            self._came = {}
        self._came[layer] = came  # before anybody has its address
        self._entries.place(self._sizes.what[2].index(layer), self._tokens, self._state, came)

    def otherwise(self, delivery: Delivery, sent: bool) -> "Cached":
        """Have what is missing asked for by `exchange`. sent: `small` was, and what comes of that is nobody's."""
        assert self.small is not None
        served, tables, shapes = self._planner.served, [], {}
        for layer, ids in self.small.tables(served.spec):
            if layer not in delivery.rows:
                tables.append((layer, ids))
                shapes[layer] = len(ids), self._sizes.shapes[layer][-1]
        asked = wire.LookupRequest(served.spec.name, served.version, tuple(tables))
        self.exchange = Exchange(served, asked, _CachedLanding(self, delivery, shapes))
        memory, self._memory = self._memory, None
        if memory is not None and not sent:
            self._planner.scratch.give_back(memory)
        return self

    def query(self) -> RowQuery:
        """The same lookup by row ids, whatever became of the caller's arrays."""
        planner, tokens, at, rows = self._planner, self._tokens, 0, {}
        for layer, shape in self._sizes.shapes.items():
            table, parts = planner.served.spec.table(layer), planner.layout.parts[layer]
            ids, groups = np.empty((tokens, shape[-2]), table.id_dtype), sum(len(part.groups) for part in parts)
            keys = iter(self._state[at : at + tokens * groups].reshape(tokens, groups).T.copy())
            at += tokens * groups
            for part in parts:
                for number, columns in enumerate(part.columns):
                    some = np.empty((tokens, part.width), table.id_dtype)
                    planner.hashing.rows_of(table, columns, next(keys), some)
                    first = part.first + number * part.width
                    ids[:, first : first + part.width] = some
            rows[layer] = ids.reshape(shape[:-1])
        return RowQuery(planner.served.spec, rows)

    def keep(self, hinted: bool = False) -> None:
        """Let the cache have what came."""
        if self._came is not None:
            with self._cache.held():
                self._cache.put_small(self._entries, self._tokens, self._state)

    def close(self, again: bool = True) -> None:
        """Let go of the memory that rows came to. again: other lookups may have it."""
        memory, self._memory = self._memory, None
        self._came = self.exchange = self.small = None
        if memory is not None and again:
            self._planner.scratch.give_back(memory)

    def given(self, layer: int) -> Rows:
        """What the caller gets of a layer."""
        return dict(self._given)[layer]

    def _small(self, ids: npt.NDArray[np.uint8]) -> tuple[Small, dict[int, Rows]]:
        """What is to be asked for; and the layers of which nothing is. ids: as a frame has them."""
        what, whole, given, counts, nbytes = self._sizes.what, {}, [], [], 0
        missing = self._entries.missing(self._state)
        for (layer, handed), count, rows in zip(self._given, missing, self._rows.values(), strict=True):
            if count:
                given.append((layer, handed))
                counts.append(count)
                nbytes += count * rows.shape[1]
            else:
                whole[layer] = handed
        memory, at, to = self._planner.scratch.take(nbytes), 0, {}
        self._memory = memory
        for (layer, _), count in zip(given, counts, strict=True):
            width = self._rows[layer].shape[1]
            to[layer] = memory[at : at + count * width].reshape(count, width)
            at += count * width
        return Small((what[0], what[1], tuple(to)), np.array(counts, np.int64), ids, to, given, nbytes), whole

    def _blank(self, layer: int) -> tuple[Rows, Valid]:
        """What there is of a layer whose rows did not come: tokens that the cache had whole, zeros elsewhere."""
        valid = self._entries.whole(self._sizes.what[2].index(layer), self._tokens, self._state)
        self._rows[layer].reshape(self._tokens, -1)[~valid] = 0
        return self.given(layer), valid.reshape(self._sizes.shapes[layer][:-2])


class _CachedLanding(Landing):
    """Rows that the cache lacked, which are put where they belong once a layer is complete."""

    def __init__(self, plan: Cached, delivery: Delivery, shapes: Mapping[int, tuple[int, ...]]) -> None:
        super().__init__(delivery, shapes)
        self._plan = plan

    def _rows(self, layer: int) -> Rows:
        with self.delivery.writing():
            self._plan.place(layer, self.array(layer).reshape(self.shapes[layer]))
        return self._plan.given(layer)


def _arrays(out: Out | None, sizes: Sizes) -> tuple[dict[int, Rows], list[tuple[int, Rows]]] | None:
    """Layer -> where its rows go, uint8 [N, row_bytes]; and what the caller gets. None where they are written apart."""
    rows, given = {}, []
    for layer, shape in sizes.shapes.items():
        own = None if out is None else out.get(layer)
        if own is None:
            own = np.empty(shape, np.uint8)
            given.append((layer, read_only(own)))
        elif isinstance(own, np.ndarray):
            given.append((layer, own))
        else:
            return None
        rows[layer] = own.reshape(-1, shape[-1])
    return rows, given


def _address(rows: Rows) -> int:
    return int(rows.__array_interface__["data"][0])
