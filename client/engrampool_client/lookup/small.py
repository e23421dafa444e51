"""A small lookup by row ids, laid out as it is sent, and where its rows go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    tables: layer -> its ids, each a part of `ids`. rows: layer -> where its rows belong, uint8 [N, row_bytes]. given:
    layer and what its caller gets of it. nbytes: of all rows.
    """

    what: tuple[str, str, tuple[int, ...]]
    counts: list[int]
    ids: memoryview
    tables: dict[int, npt.NDArray[Any]]
    rows: dict[int, Rows]
    given: Sequence[tuple[int, Rows]]
    nbytes: int

    @classmethod
    def of(
        cls, query: Query, out: Out | None, served: ServedModel, layout: Layout, hashing: Hashing, above: int
    ) -> "Small | None":
        """None for a lookup that is not small, or of no more than `above` bytes, or whose rows are written apart.

        Raises BatchError.
        """
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
        if sum(counts) > served.max_rows or nbytes <= above:
            return None
        memory, rows, given = np.zeros(at, np.uint8), {}, []
        ids: dict[int, npt.NDArray[Any]] = {}
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
        return cls((spec.name, served.version, tuple(query.layers)), counts, memory.data, ids, rows, given, nbytes)
