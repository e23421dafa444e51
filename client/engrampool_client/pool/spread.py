"""Cutting a small lookup by who holds its rows, in one compiled call. Only a client with kernels imports it."""

from collections.abc import Mapping

import numpy as np

from engrampool_client.lookup.exchange import Route
from engrampool_client.lookup.small import Small
from engrampool_proto import frames
from engrampool_proto.kernels import spread as kernel
from engrampool_proto.spec import ModelSpec


class Spread:
    """Cuts small lookups by who holds their rows. routes: by layer. shards: how many there are. Thread-safe."""

    def __init__(self, spec: ModelSpec, routes: Mapping[int, Route], shards: int) -> None:
        self._shards = shards
        self._starts = np.concatenate([route.starts for route in routes.values()])
        self._holders = np.concatenate([route.shards for route in routes.values()])
        self._ranges: dict[int, tuple[int, int, int]] = {}  # layer -> bytes of an id; its ranges, and how many
        at = 0
        for layer, route in routes.items():
            self._ranges[layer] = np.dtype(spec.table(layer).id_dtype).itemsize, at, len(route.starts)
            at += len(route.starts)

    def of(self, small: Small) -> dict[int, Small]:
        """One lookup a shard that has some of its rows, by the shard's number, for the layers that it has rows of."""
        model, version, layers = small.what
        entries = np.empty((len(layers), kernel.ENTRY_WORDS), np.int64)
        at = 0
        for place, (layer, count) in enumerate(zip(layers, small.counts.tolist(), strict=True)):
            id_bytes, ranges_at, ranges = self._ranges[layer]
            entries[place] = at, count, id_bytes, ranges_at, ranges
            at += frames.padded(count * id_bytes)
        out = np.zeros(at + frames.ALIGNMENT * self._shards * len(layers), np.uint8)
        places = np.empty(sum(small.counts.tolist()), np.int64)
        parts = np.zeros((self._shards, len(layers), kernel.PART_WORDS), np.int64)
        kernel.spread(small.ids, entries, self._starts, self._holders, out, places, parts)
        found = {}
        for shard, part in enumerate(parts.tolist()):
            counts, rows, theirs, nbytes, begin, end = [], {}, {}, 0, part[0][kernel.IDS_AT], 0
            for layer, whole, (count, ids_at, places_at) in zip(layers, small.counts.tolist(), part, strict=True):
                if not count:
                    continue
                counts.append(count)
                rows[layer] = small.rows[layer]
                if count < whole:  # else all of them come, in order
                    theirs[layer] = places[places_at : places_at + count]
                nbytes += count * rows[layer].shape[1]
                end = ids_at + frames.padded(count * self._ranges[layer][0])
            if counts:
                what = model, version, tuple(rows)
                found[shard] = Small(what, np.array(counts), out[begin:end], rows, (), nbytes, theirs)
                found[shard].trace = small.trace
        return found
