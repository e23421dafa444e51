"""A small lookup by row ids, laid out as it is sent, and where its rows go."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from engrampool_client.lookup.delivery import Rows
from engrampool_client.lookup.landing import Out, read_only
from engrampool_client.lookup.query import Query, Sizes

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
        if not query.put_ids(sizes, ids):
            return None
        return cls(sizes.what, sizes.counts, ids, rows, given, sizes.nbytes)
