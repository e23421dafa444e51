"""identity: one row a token id (Gemma 3n / 4 per-layer embeddings)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import SpecError
from engrampool_proto.hashing.batch import Windows, is_token_id, keys_from_rows, one_each, rows_from_keys


@dataclass(frozen=True)
class Identity:
    """Row = token id. Ids at or beyond `num_rows`, and dead tokens, read row 0, as the engines do."""

    FAMILY: ClassVar[str] = "identity"
    num_rows: int

    def __post_init__(self) -> None:
        if not (is_token_id(self.num_rows) and self.num_rows):
            raise SpecError(f"num_rows must be in 1 .. 2**31 - 1, it is {self.num_rows!r}")

    @property
    def lookback(self) -> int:
        """No n-gram: 0."""
        return 0

    def head_rows(self) -> tuple[int, ...]:
        """One head of all rows."""
        return (self.num_rows,)

    def groups(self) -> tuple[slice, ...]:
        """The one column."""
        return one_each(1)

    def keys(self, windows: Windows) -> npt.NDArray[np.int64]:
        """See `HashFamily`. The key is the row."""
        ids = windows.ids[:1]
        return np.where((ids >= 0) & (ids < self.num_rows), ids, 0)

    rows_of = staticmethod(rows_from_keys)
    keys_of = staticmethod(keys_from_rows)

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        return {"family": self.FAMILY, "num_rows": self.num_rows}

    @classmethod
    def from_json(cls, constants: Mapping[str, Any]) -> "Identity":
        """Inverse of `to_json`, without the family's name."""
        return cls(**constants)
