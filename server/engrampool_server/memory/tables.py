"""Tables that are held in memory: checking ids, and copying rows out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import BatchError
from engrampool_proto.kernels.gather import first_outside, gather
from engrampool_proto.kernels.hasher import Hasher
from engrampool_proto.registry.records import VersionKey
from engrampool_proto.spec import ModelSpec, RowIds, TableSpec
from engrampool_server.memory.overlay import Overlay
from engrampool_server.memory.segments import Place


class NotHeldError(BatchError):
    """Rows of the table that this server does not hold; another one may."""


@dataclass(frozen=True, eq=False)
class LoadedTable:
    """Rows [row_start, row_start + len(rows)) of a table. rows: uint8 [n, row_bytes], read-only.

    place: where others can map them, None where they cannot.
    overlay: rows that a patch gives in the place of some of `rows`, which then are not the table's.
    """

    spec: TableSpec
    rows: npt.NDArray[np.uint8]
    row_start: int = 0
    place: Place | None = None
    overlay: Overlay | None = None

    @property
    def row_stop(self) -> int:
        """One past the last row held."""
        return self.row_start + len(self.rows)

    @property
    def is_plain(self) -> bool:
        """Whether rows are as they lie in `rows`, so that a loop without Python may copy them."""
        return self.overlay is None

    @property
    def is_whole(self) -> bool:
        """Whether every row of the table is held."""
        return len(self.rows) == self.spec.num_rows

    def check(self, ids: RowIds) -> None:
        """Raise BatchError naming the first id that is not held, NotHeldError if the table has it."""
        self._refuse(ids, first_outside(ids, self.row_start, self.row_stop))

    def gather(self, ids: RowIds, out: npt.NDArray[np.uint8]) -> None:
        """Copy the rows `ids` [N] into `out`, uint8 [N * row_bytes], both contiguous. Ids must have been checked.

        One that was not is still an error, BatchError, and never a read beyond the table.
        """
        if out.size != len(ids) * self.spec.row_bytes:
            raise ValueError(f"{len(ids)} rows of {self.spec.row_bytes} bytes do not fill {out.size} bytes exactly")
        self._refuse(ids, gather(self.rows, ids, self.row_start, out))
        if self.overlay is not None:
            self.overlay.copy(ids, self.row_start, out)

    def _refuse(self, ids: RowIds, at: int) -> None:
        if at >= 0:
            kind = NotHeldError if ids[at] < self.spec.num_rows else BatchError
            raise kind(
                f"row id {ids[at]} at position {at} of layer {self.spec.layer} is out of range; "
                f"this server holds rows {self.row_start} .. {self.row_stop - 1}"
            )


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """One version of a model, in memory.

    tables: those of which rows are held, by layer, ascending. hasher: from its tokens to its rows.
    """

    spec: ModelSpec
    version: str
    tables: Mapping[int, LoadedTable]
    hasher: Hasher = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hasher", Hasher(self.spec))

    @property
    def key(self) -> VersionKey:
        """The names of model and version."""
        return self.spec.name, self.version
