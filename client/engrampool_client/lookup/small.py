"""A small lookup by row ids, laid out as it is sent, and where its rows go."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.cache import HotRows
from engrampool_client.compute.forms import Hashing
from engrampool_client.compute.layout import Layout
from engrampool_client.lookup.delivery import Blank, Delivery, Rows, Valid
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.landing import Landing, Out, Scratch, read_only
from engrampool_client.lookup.query import Query, RowQuery, Sizes
from engrampool_client.lookup.served import ServedModel
from engrampool_proto import frames, wire
from engrampool_proto.spec import ModelSpec

_IN_ORDER: Mapping[int, npt.NDArray[np.int64]] = {}


class Small:
    """what: model, version, layers, ascending. counts: ids of each layer. ids: as the frame has them, little-endian.

    rows: layer -> where its rows belong, uint8 [N, row_bytes], C-contiguous. given: layer and what its caller gets of
    it. nbytes: of all rows that are asked for. places: layer -> int64 [count], where each of them belongs among its
    `rows`; a layer without any has all of its rows come, in order.
    """

    __slots__ = ("counts", "given", "ids", "nbytes", "places", "rows", "what")

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


class Cached:
    """A small lookup of a client with a cache, a plan as of `Lookup`. To be used by one thread at a time.

    Once `find` was called, what the cache has lies in its place, and the delivery has the layers that are whole by it.
    What comes of the others lies in memory of ours until it is put in its place; so what the cache is to have was never
    the caller's to write to.

    small: what is to be asked for; None if nothing is. sources: where else bytes of rows came from. blank: what stood
    in for rows that do not come, before there was this. exchange: what `otherwise` asks for.
    """

    def __init__(
        self,
        query: Query,
        sizes: Sizes,
        arrays: tuple[dict[int, Rows], list[tuple[int, Rows]]],
        served: ServedModel,
        layout: Layout,
        hashing: Hashing,
        cache: HotRows,
        scratch: Scratch,
    ) -> None:
        assert sizes.entries is not None
        self._entries = sizes.entries[1]
        self._sizes, self._served, self._layout, self._hashing = sizes, served, layout, hashing
        self._cache, self._scratch, self._tokens = cache, scratch, sizes.tokens
        self._rows, self._given = arrays[0], dict(arrays[1])
        self._to = np.array([_address(rows) for rows in self._rows.values()], np.int64)
        self._keys = np.empty(self._entries.count(sizes.tokens), np.int64)
        self._found = np.full(len(self._keys), -1, np.int64)
        # Layer -> what came of it, once it lies in its place.
        self._came: dict[int, Rows] = {}
        self._memory: Rows | None = None
        self.small: Small | None = None
        self.sources: dict[str, int] = {}
        self.blank: Blank | None = None
        self.exchange: Exchange | None = None

    @classmethod
    def of(
        cls,
        query: Query,
        out: Out | None,
        sizes: Sizes,
        served: ServedModel,
        layout: Layout,
        hashing: Hashing,
        cache: HotRows,
        scratch: Scratch,
    ) -> "Cached | None":
        """None where rows are written apart, for a batch or row ids that cannot be, and for ids that no n-gram has."""
        arrays = _arrays(out, sizes)
        if arrays is None:
            return None
        cached = cls(query, sizes, arrays, served, layout, hashing, cache, scratch)
        return cached if query.put_keys(sizes, cached._keys, layout, hashing) else None

    def find(self, delivery: Delivery) -> None:
        """Have what the cache has. Raises what the lookup was given up with."""
        sizes, cache, tokens = self._sizes, self._cache, self._tokens
        self.blank = delivery.blank
        delivery.stand_in(self._blank)
        ids = np.zeros(sizes.id_bytes, np.uint8)
        counts = np.zeros((len(sizes.shapes), 3), np.int64)
        rest = tokens, self._keys, self._to, self._found, counts, ids
        # The lock is held until the rows are copied: until then nobody may put others in their place.
        with delivery.writing(), cache.lock:
            cache.find_by(lambda index, memory: self._entries.find(index, memory, *rest), len(self._keys))
        asked, hit, same = counts.T.tolist()
        self.sources = {"cache": sum(hit), "duplicate": sum(same)}
        whole = {layer: self._given[layer] for layer, rows in zip(sizes.shapes, asked, strict=True) if not rows}
        if len(whole) < len(asked):
            self.small = self._small(dict(zip(sizes.shapes, asked, strict=True)), ids)
        delivery.arrived(whole)

    def place(self, layer: int) -> None:
        """Put what came of a layer, where it was to come, in its place; as often as wanted. Within `writing`."""
        assert self.small is not None
        self._place(layer, self.small.rows[layer])

    def otherwise(self, delivery: Delivery, sent: bool) -> "Cached":
        """Have what is missing asked for by `exchange`. sent: `small` was, and what comes of that is nobody's."""
        assert self.small is not None
        served, tables, shapes = self._served, [], {}
        for layer, ids in self.small.tables(served.spec):
            if layer not in delivery.rows:
                tables.append((layer, ids))
                shapes[layer] = len(ids), self._sizes.shapes[layer][-1]
        asked = wire.LookupRequest(served.spec.name, served.version, tuple(tables))
        self.exchange = Exchange(served, asked, _CachedLanding(self, delivery, shapes))
        memory, self._memory = self._memory, None
        if memory is not None and not sent:
            self._scratch.give_back(memory)
        return self

    def query(self) -> RowQuery:
        """The same lookup by row ids, whatever became of the caller's arrays."""
        at, rows = 0, {}
        for layer, shape in self._sizes.shapes.items():
            table, parts = self._served.spec.table(layer), self._layout.parts[layer]
            ids = np.empty((self._tokens, shape[-2]), table.id_dtype)
            groups = sum(len(part.groups) for part in parts)
            by_group = self._keys[at : at + self._tokens * groups].reshape(self._tokens, groups).T
            at, group = at + by_group.size, 0
            for part in parts:
                for number, columns in enumerate(part.columns):
                    first = part.first + number * part.width
                    some = np.empty((self._tokens, part.width), table.id_dtype)
                    self._hashing.rows_of(table, columns, np.ascontiguousarray(by_group[group]), some)
                    ids[:, first : first + part.width] = some
                    group += 1
            rows[layer] = ids.reshape(shape[:-1])
        return RowQuery(self._served.spec, rows)

    def keep(self, hinted: bool = False) -> None:
        """Let the cache have what came; all of it is there."""
        if self.small is None:
            return
        came = np.array([_address(self._came[layer]) if layer in self._came else 0 for layer in self._sizes.shapes])
        if all(layer in self._came for layer in self.small.rows):
            rest = self._tokens, self._keys, self._found, came
            with self._cache.lock:
                self._cache.put_by(lambda index, memory: self._entries.keep(index, memory, *rest))

    def close(self, again: bool = True) -> None:
        """Let go of the memory that rows came to. again: other lookups may have it."""
        memory, self._memory = self._memory, None
        self._came, self.exchange, self.small = {}, None, None
        if memory is not None and again:
            self._scratch.give_back(memory)

    def put_in_place(self, layer: int, came: Rows) -> Rows:
        """As `place`, of rows that came elsewhere; gives the layer's rows."""
        self._place(layer, came)
        return self._given[layer]

    def _place(self, layer: int, came: Rows) -> None:
        at = self._sizes.what[2].index(layer)
        self._entries.place(at, self._tokens, self._found, came, int(self._to[at]))
        self._came[layer] = came

    def _small(self, asked: dict[int, int], ids: npt.NDArray[np.uint8]) -> Small:
        """asked: layer -> rows. ids: of those, as a frame has them."""
        shapes, spec = self._sizes.shapes, self._served.spec
        layers = {layer: rows for layer, rows in asked.items() if rows}
        nbytes = sum(rows * shapes[layer][-1] for layer, rows in layers.items())
        self._memory = self._scratch.take(nbytes)
        at, begin, rows = 0, 0, {}
        for layer, count in layers.items():
            end = begin + count * shapes[layer][-1]
            rows[layer] = self._memory[begin:end].reshape(count, -1)
            begin = end
            at += frames.padded(count * np.dtype(spec.table(layer).id_dtype).itemsize)
        what = (*self._sizes.what[:2], tuple(layers))
        given = [(layer, self._given[layer]) for layer in layers]
        return Small(what, np.array(list(layers.values()), np.int64), ids[:at], rows, given, nbytes)

    def _blank(self, layer: int) -> tuple[Rows, Valid]:
        """What there is of a layer whose rows did not come: tokens that the cache had whole, zeros elsewhere."""
        valid = self._entries.whole(self._sizes.what[2].index(layer), self._tokens, self._found)
        self._rows[layer].reshape(self._tokens, -1)[~valid] = 0
        return self._given[layer], valid.reshape(self._sizes.shapes[layer][:-2])


class _CachedLanding(Landing):
    """Rows that the cache lacked, which are put where they belong once a layer is complete."""

    def __init__(self, plan: Cached, delivery: Delivery, shapes: Mapping[int, tuple[int, ...]]) -> None:
        super().__init__(delivery, shapes)
        self._plan = plan

    def _rows(self, layer: int) -> Rows:
        with self.delivery.writing():
            return self._plan.put_in_place(layer, self.array(layer).reshape(self.shapes[layer]))


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
