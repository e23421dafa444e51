"""A small lookup by row ids, laid out as it is sent, and where its rows go."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.forms import Hashing
from engrampool_client.lookup.delivery import Rows
from engrampool_client.lookup.landing import Out, read_only
from engrampool_client.lookup.layout import Layout
from engrampool_client.lookup.query import Query
from engrampool_client.lookup.served import ServedModel
from engrampool_proto import frames

# Ids of so many bytes are sent without waiting, on a connection that has nothing else to send; and no more rows than
# this are left in the system's hands until somebody comes for them.
_MOST_ID_BYTES, _MOST_BYTES = 48 << 10, 2 << 20


@dataclass(frozen=True)
class Small:
    """what: model, version, layers, ascending. counts: ids of each layer. ids: as the frame has them, little-endian.

    rows: layer -> where its rows belong, uint8 [N, row_bytes], C-contiguous. given: layer and what its caller gets of
    it. nbytes: of all rows that are asked for. places: layer -> int64 [count], where each of them belongs among its
    `rows`; a layer without any has all of its rows come, in order.
    """

    what: tuple[str, str, tuple[int, ...]]
    counts: list[int]
    ids: memoryview
    rows: dict[int, Rows]
    given: Sequence[tuple[int, Rows]]
    nbytes: int
    places: Mapping[int, npt.NDArray[np.int64]] = field(default_factory=dict)

    @classmethod
    def of(cls, query: Query, out: Out | None, served: ServedModel, layout: Layout, hashing: Hashing) -> "Small | None":
        """None for a lookup that is not small, or whose rows are written apart. Raises BatchError."""
        shapes, spec = query.shapes(layout), served.spec
        at = nbytes = 0
        places, counts = [], []
        for layer in query.layers:
            shape, table = shapes[layer], spec.table(layer)
            count = math.prod(shape[:-1])
            places.append((layer, table, at, count))
            counts.append(count)
            at += frames.padded(count * np.dtype(table.id_dtype).itemsize)
            nbytes += count * table.row_bytes
        if not all(counts) or at > _MOST_ID_BYTES or nbytes > min(_MOST_BYTES, served.max_answer_bytes):
            return None
        if sum(counts) > served.max_rows:
            return None
        memory, ids, rows, given = np.zeros(at, np.uint8), {}, {}, []
        for layer, table, begin, count in places:
            shape, own = shapes[layer], None if out is None else out.get(layer)
            if own is None:
                own = np.empty(shape, np.uint8)
                given.append((layer, read_only(own)))
            elif isinstance(own, np.ndarray):
                given.append((layer, own))
            else:
                return None
            rows[layer] = own.reshape(count, table.row_bytes)
            place = memory[begin : begin + count * np.dtype(table.id_dtype).itemsize]
            ids[layer] = place.view(table.id_dtype).reshape(shape[:-1])
        query.put_ids(layout, hashing, ids)
        return cls((spec.name, served.version, tuple(query.layers)), counts, memory.data, rows, given, nbytes)
