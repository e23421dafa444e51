"""What caches of several sizes would save of a stream of lookups: its keys are run through each, without a server."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.cache import HotRows
from engrampool_client.compute.forms import NUMPY, Form, form_of
from engrampool_client.compute.layout import Keys, Layout, Part
from engrampool_client.doctor.replay import Forward
from engrampool_client.lookup.query import RowQuery, TokenQuery
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec

Ids = npt.NDArray[Any]
CAPACITIES = tuple(1 << bits for bits in (24, 26, 28, 30, 32))
# Of the bytes that deduplication leaves; below, a cache is not worth its memory and is not tried.
WORTH = 0.1
# The cache that is tried is the smallest that saves so much of what the largest does.
_NEARLY = 0.9


@dataclass(frozen=True)
class CacheSize:
    """What a cache of that many bytes would do. hits: share of n-grams that it has, of those that differ in a lookup.

    saved: phase -> share of the bytes that deduplication leaves to ask for. evicted: n-grams that had to make room.
    """

    nbytes: int
    hits: float
    saved: Mapping[str, float]
    evicted: int


def simulate(
    spec: ModelSpec,
    heads: tuple[int, int] | None,
    phases: Mapping[str, Sequence[Forward]],
    seconds: float,
    capacities: Sequence[int] = CAPACITIES,
) -> list[CacheSize]:
    """Run a stream's keys through caches of several sizes, which all start empty; phases share them, in order.

    seconds: for all of it; each phase gets its share of them, and goes no further. The sizes that follow one which lost
    nothing are left out. Gives nothing for a stream without keys (ids that no hash gives).
    """
    layout = Layout(spec, None if heads is None else slice(*heads))
    ways_bytes = 8 * (layout.entry_bytes + 16)
    sizes = [nbytes for nbytes in capacities if nbytes >= ways_bytes]
    form = form_of("auto")  # the doctor's clients': which entries a full set keeps depends on the order they come in
    # As many sets, but entries of one byte: it is only asked what it has.
    caches = [HotRows(nbytes // ways_bytes * 8 * (1 + 16), 1, form) for nbytes in sizes]
    asked = dict.fromkeys(phases, 0)
    saved = {name: [0] * len(sizes) for name in phases}
    distinct, hits = 0, [0] * len(sizes)
    for name, forwards in phases.items():
        until = time.monotonic() + seconds / len(phases)
        for forward in forwards:
            entries = _entries(spec, layout, forward, form)
            asked[name] += sum(one.nbytes for one in entries)
            distinct += sum(len(one.keys) for one in entries)
            for at, cache in enumerate(caches):
                nbytes, count = _ask(cache, entries)
                saved[name][at] += nbytes
                hits[at] += count
            if time.monotonic() > until:
                break
    results: list[CacheSize] = []
    for at, (size, cache) in enumerate(zip(sizes, caches, strict=True)):
        if not distinct or (results and not results[-1].evicted):
            break
        shares = {name: saved[name][at] / asked[name] for name in phases if asked[name]}
        results.append(CacheSize(size, hits[at] / distinct, shares, cache.evicted))
    return results


def best_size(sizes: Sequence[CacheSize], phase: str) -> int | None:
    """Bytes of the smallest cache that does nearly what the largest does for a phase; None if none is worth it."""
    most = max((size.saved.get(phase, 0.0) for size in sizes), default=0.0)
    if most < WORTH:
        return None
    return next(size.nbytes for size in sizes if size.saved.get(phase, 0.0) >= _NEARLY * most)


@dataclass(frozen=True, eq=False)
class _Entries:
    """Those of one part in one lookup.

    every: keys [T, groups]. keys, groups: of the distinct ones, [N]. at: where one of each is in `every`.
    """

    part: Part
    every: Ids
    keys: Ids
    groups: Ids
    at: Ids

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct entries' rows."""
        return len(self.keys) * self.part.entry_bytes


def _entries(spec: ModelSpec, layout: Layout, forward: Forward, form: Form) -> list[_Entries]:
    """By part. Nothing for ids that have no keys."""
    entries = []
    for part, keys in keys_by_part(spec, layout, forward):
        distinct, counts, inverse = form.distinct(keys, None)
        groups = np.repeat(np.arange(part.number, part.number + len(keys), dtype=np.uint8), counts)
        at = np.empty(len(distinct), np.int64)
        at[inverse] = np.arange(keys.size)
        entries.append(_Entries(part, keys.T, distinct, groups, at))
    return entries


def _ask(cache: HotRows, entries: Sequence[_Entries]) -> tuple[int, int]:
    """Ask as a lookup does: for every token's, then put what was missing. Gives bytes and number of what it had."""
    if not entries:
        return 0, 0
    of_all = [
        (one.every.reshape(-1), np.tile(np.arange(one.part.number, one.part.number + n, dtype=np.uint8), tokens))
        for one in entries
        for tokens, n in (one.every.shape,)
    ]
    found = cache.find(np.concatenate([keys for keys, _ in of_all]), np.concatenate([of for _, of in of_all])) >= 0
    nbytes = count = start = 0
    for one in entries:
        had = found[start : start + one.every.size][one.at]
        start += one.every.size
        nbytes += int(had.sum()) * one.part.entry_bytes
        count += int(had.sum())
        missing = one.keys[~had]
        cache.put(missing, one.groups[~had], np.zeros((len(missing), 1), np.uint8))
    return nbytes, count


def keys_by_part(spec: ModelSpec, layout: Layout, forward: Forward) -> list[tuple[Part, Keys]]:
    """The keys of each part of each layer, int64 [groups, T]; nothing for ids that no hash gives."""
    asked = forward.asked
    query = TokenQuery(spec, asked, spec.layers) if isinstance(asked, TokenBatch) else RowQuery(spec, asked)
    keys = query.keys(layout, NUMPY.hashing(spec)) or {}
    return [pair for layer, found in keys.items() for pair in zip(layout.parts[layer], found, strict=True)]
