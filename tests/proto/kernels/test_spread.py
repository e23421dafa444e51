"""Small lookups cut by who holds their rows: each shard's ids as a LOOKUP has them, and where its rows belong."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto import frames
from engrampool_proto.kernels import spread


@st.composite
def tables(draw, shards: int):
    """Rows where ranges begin, who holds each, and ids of one layer."""
    most = draw(st.sampled_from([1, 60, 2**31, 2**40]))
    starts = [0, *sorted(draw(st.sets(st.integers(1, most), max_size=6)))]
    holders = draw(st.lists(st.integers(0, shards - 1), min_size=len(starts), max_size=len(starts)))
    edges = [row for start in starts for row in (start - 1, start, start + 1) if 0 <= row <= most]
    ids = draw(st.lists(st.sampled_from(edges) | st.integers(0, most), max_size=40))
    return starts, holders, np.array(ids, np.uint64 if most >= 2**32 else np.uint32)


@given(st.data(), st.integers(1, 5), st.integers(1, 3))
def test_every_id_goes_to_its_holder_and_its_row_back_to_its_place(data, shards, count):
    layers = [data.draw(tables(shards)) for _ in range(count)]
    entries, ids, at, first = [], b"", 0, 0
    for starts, _, rows in layers:
        entries.append((at, len(rows), rows.itemsize, first, len(starts)))
        ids += rows.tobytes().ljust(frames.padded(rows.nbytes), b"\0")
        at, first = len(ids), first + len(starts)
    starts, holders = (np.concatenate([np.array(layer[which]) for layer in layers]) for which in (0, 1))
    out = np.zeros(len(ids) + frames.ALIGNMENT * shards * count, np.uint8)
    places = np.full(sum(len(layer[2]) for layer in layers), -1, np.int64)
    parts = np.zeros((shards, count, spread.PART_WORDS), np.int64)
    frozen = np.frombuffer(ids, np.uint8)
    spread.spread(frozen, np.array(entries, np.int64), starts.astype(np.uint64), holders, out, places, parts)
    end = 0
    for shard in range(shards):
        for layer, (begins, held_by, rows) in enumerate(layers):
            number, ids_at, places_at = parts[shard, layer].tolist()
            owner = np.array(held_by)[np.searchsorted(np.array(begins, np.uint64), rows, side="right") - 1]
            wanted = np.flatnonzero(owner == shard)
            assert places[places_at : places_at + number].tolist() == wanted.tolist()
            nbytes = number * rows.itemsize
            assert out[ids_at : ids_at + nbytes].tobytes() == rows[wanted].tobytes()
            # As they follow each other in one shard's LOOKUP, each layer's padded with zeros.
            assert ids_at == end
            end += frames.padded(nbytes)
            assert not out[ids_at + nbytes : end].any()
