"""From a query to the rows that must be asked for, and back: deduplication, cached rows, and where each row belongs.

Rows are handled in entries (layout.py). An entry is asked for once a lookup, and not at all if the cache has it. Where
that does not pay, rows are asked for as they are.
"""

import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.cache import HotRows
from engrampool_client.compute.forms import NUMPY, Form
from engrampool_client.compute.layout import Keys, Layout, Part
from engrampool_client.compute.served import ServedModel
from engrampool_client.config import Hashing
from engrampool_client.lookup.delivery import Delivery, Rows
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.landing import CallersLanding, Landing, Out, Places, hand_over
from engrampool_client.lookup.query import Query, Sizes, TokenQuery
from engrampool_client.lookup.small import Cached, Scratch, Small
from engrampool_proto import wire
from engrampool_proto.errors import BatchError

# As many as the cache can tell apart.
_MAX_GROUPS = 256
# Put into the cache at once; other lookups find nothing meanwhile, so it is a millisecond's work or so.
_PUT_ENTRIES = 2048
# Without a cache, smaller batches are asked for as they are: finding their few duplicates costs more than it saves.
_DEDUPE_TOKENS = 128
# Lookups of so many different sizes are known. Decoding has few, other lookups any.
_MOST_SIZES = 256


class Planner:
    """Plans lookups of one version.

    hashing: where tokens are hashed. dedupe: ask for an entry once a lookup. cache: rows of earlier lookups, None for
    none; warm: more of them, which never change. max_steps: lookups that are worked on at once. form: what computes.
    """

    def __init__(
        self,
        served: ServedModel,
        layout: Layout,
        hashing: Hashing,
        dedupe: bool,
        cache: HotRows | None,
        warm: HotRows | None,
        max_steps: int,
        form: Form = NUMPY,
    ) -> None:
        if (cache or warm) and layout.groups > _MAX_GROUPS:
            raise ValueError(f"the model has {layout.groups} groups of columns; a cache can hold {_MAX_GROUPS}")
        self.served, self.layout, self.cache, self.warm = served, layout, cache, warm
        self.form, self.hashing = form, form.hashing(served.spec)
        self._by_server = hashing == "server"
        has_cache = cache is not None or warm is not None
        self._least_tokens = 0 if has_cache else _DEDUPE_TOKENS if dedupe and not self._by_server else math.inf
        self._sends = form.id_writer is not None and not self._by_server and sys.byteorder == "little"
        self._sizes: dict[Hashable, Sizes] = {}
        self.scratch = Scratch(max_steps * len(layout.parts))

    def plan(self, delivery: Delivery, query: Query, out: Out | None, attached: bool) -> "Plan":
        """What a step needs. attached: whether rows are only read, so that to ask for one twice costs nothing.

        Raises BatchError, RejectedError, and what the step was given up with.
        """
        if not attached and query.num_tokens >= self._least_tokens:
            keys = query.keys(self.layout, self.hashing)
            if keys is not None:
                return EntriesPlan(self, delivery, keys, query.shapes(self.layout), out)
        return PlainPlan(self.exchange(delivery, query, out))

    def sizes(self, query: Query) -> Sizes:
        """What follows from its layers and shapes. Thread-safe."""
        sizes = self._sizes.get(query.key)
        if sizes is None:
            form, writer, entries = self.form, None, None
            if form.id_writer is not None and isinstance(query, TokenQuery):
                writer = form.id_writer(self.hashing, query.layers, self.layout.heads)
            elif form.given_writer is not None:
                writer = form.given_writer([self.served.spec.table(layer) for layer in query.layers])
            if form.small_entries is not None and self.cache is not None and query.num_tokens < _DEDUPE_TOKENS:
                entries = form.small_entries(self.hashing, query.layers, self.layout)
            sizes = Sizes(query.shapes(self.layout), self.served, writer, entries)
            if len(self._sizes) >= _MOST_SIZES:
                self._sizes.clear()
            self._sizes[query.key] = sizes
        return sizes

    def small(self, query: Query, out: Out | None, sizes: Sizes, attached: bool = False) -> Small | None:
        """What a small step needs, where nothing but its rows need be asked for; else None. attached: as of `plan`."""
        least_tokens = _DEDUPE_TOKENS if attached else self._least_tokens
        if not self._sends or not sizes.small or query.num_tokens >= least_tokens:
            return None
        return Small.of(query, out, sizes)

    def cached(self, query: Query, out: Out | None, sizes: Sizes) -> Cached | None:
        """What a small step of a client with a cache needs; else None."""
        if self.cache is None or self.warm is not None or not self._sends or not sizes.small:
            return None
        if sizes.entries is None or not 0 < sizes.tokens < _DEDUPE_TOKENS:
            return None
        try:
            return Cached(self, self.cache, query, out, sizes)
        except BatchError:  # which the step ends with, or whoever plans it otherwise knows better
            return None

    def plans_at_once(self, query: Query) -> bool:
        """Whether to plan it takes no longer than to wake a thread for it, and may be all that is to be done."""
        return self.form.compiled and self.cache is not None and query.num_tokens < _DEDUPE_TOKENS

    def plan_hint(self, delivery: Delivery, query: Query) -> "EntriesPlan":
        """What the cache lacks of rows that nobody has asked for. Raises as `plan` does."""
        keys = query.keys(self.layout, self.hashing)
        assert keys is not None
        return EntriesPlan(self, delivery, keys, query.shapes(self.layout), wanted=False)

    def exchange(self, delivery: Delivery, query: Query, out: Out | None = None) -> Exchange:
        """Ask for rows as they are. Raises BatchError, RejectedError."""
        served = self.served
        shapes = query.shapes(self.layout)
        landing = CallersLanding(delivery, shapes, served.spec, out) if out else Landing(delivery, shapes)
        asked = query.request(served) if self._by_server else None
        if asked is not None:
            return Exchange(served, asked, landing)
        return Exchange.of_ids(served, query.ids(self.layout, self.hashing), landing)


class PlainPlan:
    """Rows that are asked for as they are. sources: layer -> bytes that came from elsewhere: none."""

    sources: Mapping[str, int] = {}

    def __init__(self, exchange: Exchange) -> None:
        self.exchange: Exchange | None = exchange

    def keep(self, hinted: bool = False) -> None:
        """Nothing: there is no cache."""

    def close(self, again: bool = True) -> None:
        """Let go of the request."""
        self.exchange = None


class _Entries:
    """The entries of one part of one layer in one lookup: where they are, or what to ask for.

    keys: int64 [groups, T].
    """

    def __init__(self, part: Part, keys: Keys) -> None:
        self.part, self.keys = part, keys
        self.count = keys.size  # entries, every token's
        self.hit: npt.NDArray[np.bool_] | None = None  # [T * groups]; None while nothing was found
        self.found = 0  # of them
        # Of what is asked for, once it is; `fetched` once it has come.
        self.asked_keys: Keys
        self.ids: npt.NDArray[Any]
        self.fetched: Rows | None = None
        self._counts: list[int]
        self._inverse: npt.NDArray[np.int64]
        self._places: npt.NDArray[np.int64] | None = None

    def token_major(self) -> tuple[Keys, npt.NDArray[np.uint8]]:
        """Keys and groups [T * groups], as the entries lie in the answer."""
        groups, tokens = self.keys.shape
        # Those of fewer tokens are a part of it. So few lengths are kept, however many different ones are asked for.
        numbers = _numbers(self.part.number, groups, 1 << tokens.bit_length())
        return self.keys.T.reshape(-1), numbers[: self.count]

    def ask(self, planner: Planner) -> None:
        """Work out `ids`: the rows of each entry that is missing, once."""
        part = self.part
        self.asked_keys, self._counts, self._inverse = planner.form.distinct(self.keys, self.hit)
        self.ids = np.empty((len(self.asked_keys), part.width), part.table.id_dtype)
        start = 0
        for columns, count in zip(part.columns, self._counts, strict=True):
            span = slice(start, start + count)
            planner.hashing.rows_of(part.table, columns, self.asked_keys[span], self.ids[span])
            start += count

    @property
    def asked_groups(self) -> npt.NDArray[np.uint8]:
        """The group of each key that is asked for."""
        number = self.part.number
        return np.repeat(np.arange(number, number + len(self._counts), dtype=np.uint8), self._counts)

    def pick(self, rows: Rows, start: int) -> int:
        """Find what was fetched among the layer's rows, uint8 [N, row_bytes], from `start` on; gives where it ends."""
        stop = start + self.ids.size
        self.fetched = rows[start:stop].reshape(-1, self.part.entry_bytes)
        return stop

    def places(self, form: Form, heads: int) -> npt.NDArray[np.int64]:
        """Where each entry that is asked for belongs first: its first row's place among the layer's rows."""
        if self._places is None:
            self._places = form.first_places(self._inverse, len(self.ids), *self._columns(heads))
        return self._places

    def repeat(self, form: Form, rows: Rows) -> None:
        """Copy what came to its first places to all others, in the layer's rows."""
        heads, row_bytes = rows.shape[-2:]
        places = self.places(form, heads)
        form.repeat(rows.reshape(-1, row_bytes), places, self._inverse, *self._columns(heads))

    def _columns(self, heads: int) -> tuple[int, int, int, int]:
        return len(self.keys), heads, self.part.first, self.part.width

    def put(self, form: Form, rows: Rows) -> None:
        """Write what was fetched to its places in the layer's rows, uint8 [..., heads, row_bytes]."""
        assert self.fetched is not None
        form.place(self.fetched, self._inverse, self.hit, _part_of(rows, self.part))

    def copy_found(self, form: Form, cache: HotRows, slots: npt.NDArray[np.int64], rows: Rows | None) -> int:
        """Write what the cache has, in `slots`, to its places in the layer's rows, if any; gives the bytes."""
        to = None if rows is None else _part_of(rows, self.part)
        self.hit, count = form.copy_found(cache.rows, slots, self.part.entry_bytes, self.hit, to)
        self.found += count
        return count * self.part.entry_bytes


class EntriesPlan:
    """One lookup, between the caller's arrays and the exchange. To be used by one thread at a time.

    Once made, what the cache has lies in its place, and the delivery has the layers that are whole by that.

    keys: layer -> int64 [groups, T] of each part. shapes: layer -> shape of its rows, [..., heads, row_bytes].
    exchange: what is to be asked for; None if nothing is.
    """

    def __init__(
        self,
        planner: Planner,
        delivery: Delivery,
        keys: Mapping[int, Sequence[Keys]],
        shapes: Mapping[int, tuple[int, ...]],
        out: Out | None = None,
        wanted: bool = True,
    ) -> None:
        layout = planner.layout
        self._planner, self._delivery, self._out, self._wanted = planner, delivery, out or {}, wanted
        self.exchange: Exchange | None = None
        self._scratch: list[Rows] = []
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._rows: dict[int, Rows] = {}
        self._entries: dict[int, list[_Entries]] = {}
        for layer, found in keys.items():
            self._shapes[layer] = shape = shapes[layer]
            if wanted:
                given = self._out.get(layer)
                self._rows[layer] = given if isinstance(given, np.ndarray) else np.empty(shape, np.uint8)
            self._entries[layer] = list(map(_Entries, layout.parts[layer], found))
        if wanted:
            delivery.stand_in(self._blank)
        self.sources = {
            name: self._take(cache)
            for name, cache in (("cache", planner.cache), ("warm", planner.warm))
            if cache is not None
        }
        self._ask()
        if wanted:
            total = sum(map(math.prod, self._shapes.values()))
            asked = 0 if self.exchange is None else self.exchange.answer_bytes
            self.sources["duplicate"] = total - asked - sum(self.sources.values())

    def _ask(self) -> None:
        """Hand over the layers that are whole, and have the rest asked for."""
        whole, tables, shapes = [], [], {}
        for layer, entries in self._entries.items():
            if all(one.found == one.count for one in entries):
                whole.append(layer)
                continue
            for one in entries:
                one.ask(self._planner)
            ids = [one.ids.reshape(-1) for one in entries]
            tables.append((layer, ids[0] if len(ids) == 1 else np.concatenate(ids)))
            shapes[layer] = (len(tables[-1][1]), entries[0].part.table.row_bytes)
        if tables:
            served = self._planner.served
            asked = wire.LookupRequest(served.spec.name, served.version, tuple(tables))
            self.exchange = Exchange(served, asked, _FetchedLanding(self, self._delivery, shapes))
        if whole and self._wanted:
            with self._delivery.writing():
                rows = {layer: self._finish(layer) for layer in whole}
            self._delivery.arrived(rows)

    def _blank(self, layer: int) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """What there is of a layer whose rows did not come: tokens that the cache had whole, zeros elsewhere.

        Gives the rows and bool [*leading], which tokens have theirs.
        """
        *leading, heads, row_bytes = self._shapes[layer]
        valid = np.ones(math.prod(leading), np.bool_)
        for one in self._entries[layer]:
            hit = np.zeros(one.count, np.bool_) if one.hit is None else one.hit
            valid &= hit.reshape(len(valid), len(one.keys)).all(axis=1)
        self._rows[layer].reshape(len(valid), heads * row_bytes)[~valid] = 0
        return self._finish(layer), valid.reshape(leading)

    def close(self, again: bool = True) -> None:
        """Let go of the memory that rows were fetched into, once nobody asks for them any more.

        again: other lookups may have it.
        """
        for entries in self._entries.values():
            for one in entries:
                one.fetched = None
        self.exchange = None
        while self._scratch:
            buffer = self._scratch.pop()
            if again:
                self._planner.scratch.give_back(buffer)

    def allocate(self, nbytes: int) -> Rows:
        """Memory for rows that are fetched, which `close` gives back: uint8 [nbytes]."""
        self._scratch.append(self._planner.scratch.take(nbytes))
        return self._scratch[-1][:nbytes]

    def keep(self, hinted: bool = False) -> None:
        """Let the cache have what was fetched. hinted: it was asked for on suspicion."""
        cache = self._planner.cache
        if cache is None:
            return
        for entries in self._entries.values():
            for one in entries:
                fetched = one.fetched
                if fetched is not None:
                    if fetched.shape[1] < cache.rows.shape[1]:
                        fetched = np.pad(fetched, ((0, 0), (0, cache.rows.shape[1] - fetched.shape[1])))
                    groups = one.asked_groups
                    for start in range(0, len(fetched), _PUT_ENTRIES):
                        some = slice(start, start + _PUT_ENTRIES)
                        with cache.held():
                            cache.put(one.asked_keys[some], groups[some], fetched[some], hinted)

    def _take(self, cache: HotRows) -> int:
        """Copy what the cache has of what is missing to its place; gives the bytes."""
        entries = [one for parts in self._entries.values() for one in parts]
        if not any(one.count for one in entries):
            return 0
        majors = [one.token_major() for one in entries]
        keys = np.concatenate([major[0] for major in majors])
        groups = np.concatenate([major[1] for major in majors])
        # The lock is held until the rows are copied: until then nobody may put others in their place.
        # Within `writing`, not around it: who leaves that last settles the step, which calls the caller's own code.
        with self._delivery.writing(), cache.held():
            slots = cache.find(keys, groups)
            start = taken = 0
            for layer, parts in self._entries.items():
                for one in parts:
                    some = slots[start : start + one.count]
                    taken += one.copy_found(self._planner.form, cache, some, self._rows.get(layer))
                    start += one.count
        return taken

    def put_in_place(self, layer: int, fetched: Rows) -> Rows:
        """Put fetched rows, uint8 [rows, row_bytes], where they belong; gives the layer's rows."""
        start = 0
        if not self._wanted:
            for one in self._entries[layer]:
                start = one.pick(fetched, start)
            return fetched
        with self._delivery.writing():
            for one in self._entries[layer]:
                start = one.pick(fetched, start)
                one.put(self._planner.form, self._rows[layer])
            return self._finish(layer)

    def places(self, layer: int) -> Places | None:
        """Where rows may be received that are asked for: each entry where it belongs first.

        None where the cache is to have them, which reads them where they were fetched.
        """
        form, entries = self._planner.form, self._entries[layer]
        if not (self._wanted and form.compiled and self._planner.cache is None):
            return None
        *_, heads, row_bytes = self._shapes[layer]
        rows, first = self._rows[layer].reshape(-1, row_bytes), [one.places(form, heads) for one in entries]
        if len(entries) == 1:
            return Places(rows, first[0], entries[0].part.width)
        each = [
            (some[:, None] + np.arange(one.part.width)).reshape(-1) for some, one in zip(first, entries, strict=True)
        ]
        return Places(rows, np.concatenate(each), 1)

    def repeat(self, layer: int) -> Rows:
        """Put the rows that came by `places` everywhere else that they belong; gives the layer's rows."""
        with self._delivery.writing():
            for one in self._entries[layer]:
                one.repeat(self._planner.form, self._rows[layer])
            return self._finish(layer)

    def _finish(self, layer: int) -> Rows:
        """The layer's rows, as the caller gets them."""
        return hand_over(self._planner.served.spec.table(layer), self._rows[layer], self._out.get(layer))


class _FetchedLanding(Landing):
    """Rows of a plan's entries, which are put where they belong once a layer is complete."""

    def __init__(self, plan: EntriesPlan, delivery: Delivery, shapes: Mapping[int, tuple[int, ...]]) -> None:
        super().__init__(delivery, shapes)
        self._plan, self._places = plan, dict[int, Places | None]()

    def places(self, layer: int) -> Places | None:
        """As of `Landing`. Worked out when it is asked for: by then a server is at work."""
        if layer not in self._places:
            self._places[layer] = self._plan.places(layer)
        return self._places[layer]

    def _allocate(self, nbytes: int) -> Rows:
        return self._plan.allocate(nbytes)

    def _rows(self, layer: int) -> Rows:
        if layer in self.placed:
            return self._plan.repeat(layer)
        return self._plan.put_in_place(layer, self.array(layer).reshape(self.shapes[layer]))


Plan = PlainPlan | EntriesPlan | Cached


def _part_of(rows: Rows, part: Part) -> Rows:
    """The part's columns of a layer's rows, uint8 [T, bytes of these columns]."""
    heads, row_bytes = rows.shape[-2:]
    return rows.reshape(-1, heads * row_bytes)[:, part.first * row_bytes : part.stop * row_bytes]


@lru_cache(maxsize=256)  # decode asks for the same few shapes over and over
def _numbers(first: int, groups: int, tokens: int) -> npt.NDArray[np.uint8]:
    return np.tile(np.arange(first, first + groups, dtype=np.uint8), tokens)
