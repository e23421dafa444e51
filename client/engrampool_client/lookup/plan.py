"""From a batch to the rows that must be asked for, and back: deduplication, cached rows, and where each row belongs.

Rows are handled in entries: the rows of the columns that one key decides (`HashFamily.groups`), which lie side by side
in an answer. An entry is asked for once a lookup, and not at all if the cache has it.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.lookup.cache import HotRows
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange, Out, Rows, hand_over, row_ids
from engrampool_client.lookup.served import ServedModel
from engrampool_proto import wire
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec, TableSpec

Keys = npt.NDArray[np.int64]
# As many as the cache can tell apart.
_MAX_GROUPS = 256
# Put into the cache at once; other lookups find nothing meanwhile, so it is a millisecond's work or so.
_PUT_ENTRIES = 2048


@dataclass(frozen=True)
class Part:
    """Columns of one table whose groups are all of one width, side by side in the answer.

    columns: of the table, by group. first: the first column in the answer. number: of the first group, over all tables.
    """

    table: TableSpec
    groups: tuple[int, ...]
    columns: tuple[slice, ...]
    first: int
    number: int

    def pick(self, keys: Keys) -> Keys:
        """The keys of its groups, int64 [groups, T], of those of all groups of the family."""
        first, last = self.groups[0], self.groups[-1]
        # A group that is cut between shards stands in `groups` more than once.
        return keys[first : last + 1] if last - first + 1 == len(self.groups) else keys[list(self.groups)]

    @property
    def width(self) -> int:
        """Columns of one group."""
        return int(self.columns[0].stop - self.columns[0].start)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one group's rows of one token."""
        return self.width * self.table.row_bytes

    @property
    def stop(self) -> int:
        """One past the last column in the answer."""
        return self.first + len(self.groups) * self.width


class Layout:
    """How the rows of a client's columns are made of entries.

    heads: those asked for, of every table; None for all. cuts: layer -> rows at which another shard begins; where that
    is a head's first row, no entry is of two shards.
    """

    def __init__(self, spec: ModelSpec, heads: slice | None, cuts: Mapping[int, Sequence[int]] | None = None) -> None:
        self.heads = heads
        self.parts: dict[int, list[Part]] = {}
        number = 0
        for table in spec.tables:
            wanted = heads or slice(0, table.heads)
            cut = []
            rows = np.array((cuts or {}).get(table.layer, ()), np.uint64)
            edges = set(np.flatnonzero(np.isin(table.head_offsets, rows)).tolist())
            for group, columns in enumerate(table.hash.groups()):
                start, stop = max(columns.start, wanted.start), min(columns.stop, wanted.stop)
                if start < stop:
                    inside = [start, *sorted(edge for edge in edges if start < edge < stop), stop]
                    cut += [(group, slice(*two)) for two in pairwise(inside)]
            parts = self.parts[table.layer] = []
            for _, run in groupby(cut, lambda one: one[1].stop - one[1].start):
                groups, columns_of = zip(*run, strict=True)
                parts.append(Part(table, groups, columns_of, columns_of[0].start - wanted.start, number))
                number += len(groups)
        self.groups = number
        self.entry_bytes = max(part.entry_bytes for parts in self.parts.values() for part in parts)

    def columns(self, table: TableSpec) -> slice:
        """The columns of `table` that are asked for."""
        return self.heads or slice(0, table.heads)

    def to_json(self) -> dict[str, Any]:
        """What two caches must have in common for one to read the other's entries."""
        parts = [part for parts in self.parts.values() for part in parts]
        columns = [[part.table.layer, one.start, one.stop] for part in parts for one in part.columns]
        return {"columns": columns, "entry_bytes": self.entry_bytes}


class Planner:
    """Plans lookups. cache: rows of earlier lookups, None for none; warm: more of them, which never change.

    max_steps: lookups that are worked on at once.
    """

    def __init__(
        self, served: ServedModel, layout: Layout, cache: HotRows | None, warm: HotRows | None, max_steps: int
    ) -> None:
        if (cache or warm) and layout.groups > _MAX_GROUPS:
            raise ValueError(f"the model has {layout.groups} groups of columns; a cache can hold {_MAX_GROUPS}")
        self.served, self.layout, self.cache, self.warm = served, layout, cache, warm
        self.has_cache = cache is not None or warm is not None
        self.scratch = Scratch(max_steps * len(layout.parts))

    def of_tokens(
        self,
        delivery: Delivery,
        batch: TokenBatch,
        layers: Sequence[int],
        out: Out | None = None,
        *,
        wanted: bool = True,
    ) -> "Plan":
        """The rows of every token: [T, heads, row_bytes] a layer. wanted: else they are for the cache only.

        Raises BatchError, RejectedError, and what the step was given up with.
        """
        spec = self.served.spec
        batch.check_tokens(spec.vocab_size, spec.lookback)
        windows = batch.windows(spec.lookback, None if spec.token_map is None else spec.token_map.ids)
        keys = {}
        for layer in layers:
            found = spec.table(layer).hash.keys(windows)
            keys[layer] = [part.pick(found) for part in self.layout.parts[layer]]
        return Plan(self, delivery, keys, dict.fromkeys(layers, (batch.num_tokens,)), out if wanted else None, wanted)

    def of_rows(self, delivery: Delivery, rows: Mapping[int, Any], out: Out | None = None) -> "Plan | None":
        """The same by row ids, [..., heads] a layer; None for ids that are not as hashing gives them.

        Raises as `of_tokens` does.
        """
        keys, leading = {}, {}
        for layer in sorted(rows):
            table = self.served.spec.table(layer)
            ids, columns = row_ids(table, rows[layer]), self.layout.columns(table)
            if ids.ndim < 2 or ids.shape[-1] != columns.stop - columns.start:
                return None
            leading[layer] = ids.shape[:-1]
            found = [self._keys_of(part, ids.reshape(-1, ids.shape[-1])) for part in self.layout.parts[layer]]
            if any(one is None for one in found):
                return None
            keys[layer] = [one for one in found if one is not None]
        return Plan(self, delivery, keys, leading, out)

    @staticmethod
    def _keys_of(part: Part, ids: npt.NDArray[Any]) -> Keys | None:
        """Int64 [groups, T] of the layer's ids [T, heads]."""
        keys = []
        for at, columns in enumerate(part.columns):
            first = part.first + at * part.width
            found = part.table.hash.keys_of(columns, ids[:, first : first + part.width], part.table.head_offsets)
            if found is None:
                return None
            keys.append(found)
        return np.stack(keys)


class Scratch:
    """Memory that fetched rows lie in until they are where they belong: fresh pages cost more than the copy does.

    most: buffers that are kept for the next lookups. Thread-safe.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
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


class _Entries:
    """The entries of one part of one layer in one lookup: where they are, or what to ask for.

    keys: int64 [groups, T].
    """

    def __init__(self, part: Part, keys: Keys) -> None:
        self.part, self.keys = part, keys
        self.hit: npt.NDArray[np.bool_] | None = None  # [T * groups]; None while nothing was found
        self.found = 0  # of them
        # Of what is asked for, once it is; `fetched` once it has come.
        self.asked_keys: Keys
        self.asked_groups: npt.NDArray[np.uint8]
        self.ids: npt.NDArray[Any]
        self.fetched: Rows | None = None
        self._inverse: npt.NDArray[np.int64]

    @property
    def count(self) -> int:
        """Entries, every token's."""
        return self.keys.size

    def token_major(self) -> tuple[Keys, npt.NDArray[np.uint8]]:
        """Keys and groups [T * groups], as the entries lie in the answer."""
        groups, tokens = self.keys.shape
        return self.keys.T.reshape(-1), _numbers(self.part.number, groups, tokens)

    def ask(self) -> None:
        """Work out `ids`: the rows of each entry that is missing, once."""
        keys, groups = self.keys, len(self.part.groups)
        order = keys.argsort(axis=1)
        ascending = np.take_along_axis(keys, order, 1)
        first = np.ones(keys.shape, np.bool_)
        np.not_equal(ascending[:, 1:], ascending[:, :-1], out=first[:, 1:])
        if self.hit is not None:  # equal keys are all found, or none of them is
            first &= ~np.take_along_axis(self.hit.reshape(-1, groups).T, order, 1)
        inverse = np.empty(keys.shape, np.int64)
        np.put_along_axis(inverse, order, (first.cumsum() - 1).reshape(keys.shape), 1)
        self._inverse = inverse.T.reshape(-1)
        self.asked_keys = ascending[first]
        counts = first.sum(axis=1)
        self.asked_groups = np.repeat(np.arange(self.part.number, self.part.number + groups, dtype=np.uint8), counts)
        self.ids = np.empty((len(self.asked_keys), self.part.width), self.part.table.id_dtype)
        start = 0
        for columns, count in zip(self.part.columns, counts.tolist(), strict=True):
            span = slice(start, start + count)
            self.part.table.hash.rows_of(columns, self.asked_keys[span], self.part.table.head_offsets, self.ids[span])
            start += count

    def came(self, rows: Rows, start: int) -> int:
        """Find what was fetched among the layer's rows, uint8 [N, row_bytes], from `start` on; gives where it ends."""
        stop = start + self.ids.size
        self.fetched = rows[start:stop].reshape(-1, self.part.entry_bytes)
        return stop

    def put(self, to: Rows) -> None:
        """Write what was fetched to its places in `to`, [T * groups, entry_bytes]."""
        assert self.fetched is not None
        if self.hit is None:
            np.take(self.fetched, self._inverse, axis=0, out=to, mode="clip")
        else:
            missing = np.flatnonzero(~self.hit)
            to[missing] = self.fetched[self._inverse[missing]]


class Plan:
    """One lookup, between the caller's arrays and the exchange. To be used by one thread at a time.

    Once made, what the cache has lies in its place, and the delivery has the layers that are whole by that.

    keys: layer -> int64 [groups, T] of each part. leading: layer -> shape of its rows, up to heads and bytes.
    exchange: what is to be asked for; None if nothing is.
    """

    def __init__(
        self,
        planner: Planner,
        delivery: Delivery,
        keys: Mapping[int, Sequence[Keys]],
        leading: Mapping[int, tuple[int, ...]],
        out: Out | None = None,
        wanted: bool = True,
    ) -> None:
        served, layout = planner.served, planner.layout
        self._planner, self._delivery, self._out, self._wanted = planner, delivery, out or {}, wanted
        self.exchange: Exchange | None = None
        self._scratch: list[Rows] = []
        self.shapes: dict[int, tuple[int, ...]] = {}
        self._rows: dict[int, Rows] = {}
        self._entries: dict[int, list[_Entries]] = {}
        for layer, lengths in leading.items():
            table = served.spec.table(layer)
            columns = layout.columns(table)
            shape = self.shapes[layer] = (*lengths, columns.stop - columns.start, table.row_bytes)
            if wanted:
                given = self._out.get(layer)
                self._rows[layer] = given if isinstance(given, np.ndarray) else np.empty(shape, np.uint8)
            self._entries[layer] = list(map(_Entries, layout.parts[layer], keys[layer]))
        if wanted:
            delivery.stand_in(self._blank)
        self.sources = {
            name: self._take(cache)
            for name, cache in (("cache", planner.cache), ("warm", planner.warm))
            if cache is not None
        }
        self._ask()
        if wanted:
            total = sum(map(math.prod, self.shapes.values()))
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
                one.ask()
            ids = [one.ids.reshape(-1) for one in entries]
            tables.append((layer, ids[0] if len(ids) == 1 else np.concatenate(ids)))
            shapes[layer] = (len(tables[-1][1]), entries[0].part.table.row_bytes)
        if tables:
            served = self._planner.served
            asked = wire.LookupRequest(served.spec.name, served.version, tuple(tables))
            self.exchange = Exchange(served, asked, shapes, deliver=self._deliver, allocate=self._allocate)
        if whole and self._wanted:
            with self._delivery.writing():
                rows = {layer: self._finish(layer) for layer in whole}
            self._delivery.arrived(rows)

    def _blank(self, layer: int) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """What there is of a layer whose rows did not come: tokens that the cache had whole, zeros elsewhere.

        Gives the rows and bool [*leading], which tokens have theirs.
        """
        *leading, heads, row_bytes = self.shapes[layer]
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

    def _allocate(self, nbytes: int) -> Rows:
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
                    for start in range(0, len(fetched), _PUT_ENTRIES):
                        some = slice(start, start + _PUT_ENTRIES)
                        with cache.lock:
                            cache.put(one.asked_keys[some], one.asked_groups[some], fetched[some], hinted)

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
        with self._delivery.writing(), cache.lock:
            slots = cache.find(keys, groups)
            start = taken = 0
            for layer, parts in self._entries.items():
                for one in parts:
                    taken += self._copy(cache, layer, one, slots[start : start + one.count])
                    start += one.count
        return taken

    def _copy(self, cache: HotRows, layer: int, one: _Entries, slots: npt.NDArray[np.int64]) -> int:
        found = slots >= 0
        if one.hit is not None:
            found &= ~one.hit
        count = int(np.count_nonzero(found))
        if not count:
            return 0
        nbytes = one.part.entry_bytes
        if self._wanted:
            to, write_back = _entries_of(self._rows[layer], one.part)
            if one.hit is None and 2 * count > found.size and nbytes == cache.rows.shape[1]:
                # In one go, with some row or other where none was found.
                cache.rows.take(slots, 0, to, "clip")
            else:
                where = np.flatnonzero(found)
                to[where] = cache.rows[slots[where], :nbytes]
            write_back()
        one.hit = found if one.hit is None else one.hit | found
        one.found += count
        return count * nbytes

    def _deliver(self, layer: int, fetched: Rows) -> Rows:
        """Put fetched rows, uint8 [rows, row_bytes], where they belong; gives the layer's rows."""
        start = 0
        if not self._wanted:
            for one in self._entries[layer]:
                start = one.came(fetched, start)
            return fetched
        with self._delivery.writing():
            for one in self._entries[layer]:
                start = one.came(fetched, start)
                to, write_back = _entries_of(self._rows[layer], one.part, whole=one.hit is None)
                one.put(to)
                write_back()
            return self._finish(layer)

    def _finish(self, layer: int) -> Rows:
        """The layer's rows, as the caller gets them."""
        return hand_over(self._planner.served.spec.table(layer), self._rows[layer], self._out.get(layer))


def _entries_of(rows: Rows, part: Part, whole: bool = False) -> tuple[Rows, Callable[[], None]]:
    """The part's entries in a layer's rows, uint8 [T * groups, entry_bytes], and what to call when they are written.

    whole: all of them will be, so that it does not matter what they are now.
    """
    heads, row_bytes = rows.shape[-2:]
    if part.stop - part.first == heads:
        return rows.reshape(-1, part.entry_bytes), _nothing
    piece = rows.reshape(-1, heads, row_bytes)[:, part.first : part.stop]
    entries = np.empty_like(piece, order="C") if whole else np.ascontiguousarray(piece)
    return entries.reshape(-1, part.entry_bytes), lambda: np.copyto(piece, entries)


def _nothing() -> None:
    return


@lru_cache(maxsize=256)  # decode asks for the same few shapes over and over
def _numbers(first: int, groups: int, tokens: int) -> npt.NDArray[np.uint8]:
    return np.tile(np.arange(first, first + groups, dtype=np.uint8), tokens)
