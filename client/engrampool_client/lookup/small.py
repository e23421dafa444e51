"""A small lookup by row ids, laid out as it is sent, and where its rows go."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.lookup.delivery import Rows
from engrampool_client.lookup.landing import Out, read_only
from engrampool_client.lookup.query import Query, Sizes
from engrampool_proto import frames
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
