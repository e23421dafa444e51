"""The compiled form. Only `choose` imports it: numba takes longer to import than a command takes."""

import secrets
from collections.abc import Sequence

import numpy as np

from engrampool_client.compute.forms import Flags, Form, Hashing
from engrampool_client.compute.index import Bytes, Groups, Index, Keys
from engrampool_client.compute.layout import Layout
from engrampool_proto.kernels import cached, entries, hot_rows, receive, spread  # noqa: F401 - the last two, if kept, too
from engrampool_proto.kernels.ask import BatchKeys, GivenIds, Ids
from engrampool_proto.kernels.gather import first_outside, gather, gather_few
from engrampool_proto.kernels.hasher import Hasher
from engrampool_proto.spec import ModelSpec, RowIds

# Nobody can choose tokens whose keys lie close to each other in the table.
_FACTOR = np.uint64(secrets.randbits(64) | 1)
# Copying so many takes less than anybody waits for the GIL once it was let go of.
_FEW_BYTES = 1 << 20
_NO_FLAGS = np.empty(0, np.bool_)


class CompiledIndex(Index):
    """`Index` by kernels."""

    def find(self, keys: Keys, groups: Groups) -> tuple[Keys, int, int]:
        """As of `Index`."""
        found = np.empty(len(keys), np.int64)
        hits, used = hot_rows.find(self.keys, self.groups, self.rows, self.ages, self.unused, keys, groups, found)
        return found, hits, used

    def put(self, keys: Keys, groups: Groups, entries: Bytes, memory: Bytes, hinted: bool) -> tuple[int, int, int]:
        """As of `Index`."""
        kept, came, wasted, not_kept = hot_rows.put(
            self.keys, self.groups, self.rows, self.ages, self.unused, memory, keys, groups, entries, hinted
        )
        return came, kept - came, wasted + not_kept if hinted else wasted


def _small_entries(hasher: Hasher, layers: Sequence[int], layout: Layout) -> tuple[BatchKeys, cached.Entries]:
    groups, picks = {}, {}
    for layer in layers:
        parts = layout.parts[layer]
        picks[layer] = [group for part in parts for group in part.groups]
        groups[layer] = [
            (part.number + at, columns.start, part.first + at * part.width, part.width)
            for part in parts
            for at, columns in enumerate(part.columns)
        ]
    heads = None if layout.heads is None else layout.heads.stop - layout.heads.start
    return BatchKeys(hasher, picks), cached.Entries(hasher, groups, heads, int(_FACTOR))


class CompiledForm(Form):
    """`Form` by kernels, which run without the GIL."""

    compiled = True
    index = CompiledIndex
    id_writer = Ids
    given_writer = GivenIds
    small_entries = staticmethod(_small_entries)

    def hashing(self, spec: ModelSpec) -> Hashing:
        """As of `Form`."""
        return Hasher(spec)

    def distinct(self, keys: Keys, hit: Flags | None) -> tuple[Keys, list[int], Keys]:
        """As of `Form`."""
        first, inverse = np.empty(keys.size, np.int64), np.empty(keys.size, np.int64)
        counts = np.empty(len(keys), np.int64)
        count = entries.distinct(keys, _NO_FLAGS if hit is None else hit, _FACTOR, first, counts, inverse)
        return first[:count], counts.tolist(), inverse

    def holds(self, ids: RowIds, start: int, stop: int) -> bool:
        """As of `Form`."""
        return first_outside(ids, start, stop) < 0

    def gather(self, rows: Bytes, ids: RowIds, row_start: int, out: Bytes) -> None:
        """As of `Form`."""
        gather(rows, ids, row_start, out.reshape(-1))

    def gather_held(self, rows: Bytes, ids: RowIds, row_start: int, out: Bytes) -> bool:
        """As of `Form`."""
        kernel = gather_few if out.nbytes <= _FEW_BYTES else gather
        return kernel(rows, ids, row_start, out.reshape(-1)) < 0

    def place(self, fetched: Bytes, inverse: Keys, hit: Flags | None, to: Bytes) -> None:
        """As of `Form`."""
        done = np.zeros(len(inverse), np.bool_) if hit is None else hit.copy()
        entries.place(fetched, inverse, fetched.shape[1], to, done)

    def first_places(self, inverse: Keys, count: int, groups: int, heads: int, first: int, width: int) -> Keys:
        """As of `Form`."""
        places = np.empty(count, np.int64)
        entries.first_places(inverse, groups, heads, first, width, places)
        return places

    def repeat(self, rows: Bytes, places: Keys, inverse: Keys, groups: int, heads: int, first: int, width: int) -> None:
        """As of `Form`."""
        entries.repeat(rows, places, inverse, groups, heads, first, width)

    def copy_found(
        self, rows: Bytes, slots: Keys, nbytes: int, hit: Flags | None, to: Bytes | None
    ) -> tuple[Flags | None, int]:
        """As of `Form`."""
        done = np.zeros(len(slots), np.bool_) if hit is None else hit
        count = entries.place(rows, slots, nbytes, _nowhere(len(slots)) if to is None else to, done)
        return (done, count) if count else (hit, 0)


def _nowhere(tokens: int) -> Bytes:
    return np.empty((tokens, 0), np.uint8)
