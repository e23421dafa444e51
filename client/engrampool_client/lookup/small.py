"""A small lookup by row ids, laid out as it is sent, and where its rows go."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engrampool_client.lookup.delivery import Rows
from engrampool_client.lookup.landing import Out, read_only
from engrampool_client.lookup.query import Query, RowQuery, Sizes
from engrampool_proto.spec import ModelSpec


class Small:
    """what, counts, nbytes: as of its sizes. ids: as the frame has them, little-endian, uint8.

    rows: layer -> where its rows belong, uint8 [N, row_bytes]. given: layer and what its caller gets of it.
    """

    __slots__ = ("_sizes", "counts", "given", "ids", "nbytes", "rows", "what")

    def __init__(
        self, sizes: Sizes, ids: npt.NDArray[np.uint8], rows: dict[int, Rows], given: Sequence[tuple[int, Rows]]
    ) -> None:
        self._sizes, self.what, self.counts, self.nbytes = sizes, sizes.what, sizes.counts, sizes.nbytes
        self.ids, self.rows, self.given = ids, rows, given

    @classmethod
    def of(cls, query: Query, out: Out | None, sizes: Sizes) -> "Small | None":
        """None where rows are written apart, or for a batch that cannot be. Raises BatchError for such row ids."""
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
        return cls(sizes, ids, rows, given) if query.put_ids(sizes, ids) else None

    def query(self, spec: ModelSpec, layers: Sequence[int]) -> RowQuery:
        """What some of its layers ask for."""
        ids = self._sizes.ids(self.ids)
        return RowQuery(spec, {layer: ids[layer] for layer in layers})
