"""From token ids to row ids: one file a hash family, behind one small interface.

A family is a frozen dataclass of *resolved* constants (nothing is derived from a seed here), with::

    FAMILY            its name in a manifest
    lookback          tokens before the current one that it reads (n - 1)
    head_rows()       distinct row ids each head can give, one entry a head
    groups()          runs of columns that one key decides
    keys(windows)     the keys: equal ones of a group read equal rows, whichever n-grams they came from
    rows_of(columns, keys, head_offsets, out)   from keys to row ids
    keys_of(columns, rows, head_offsets)        and back
    to_json() / from_json(document)

`ModelSpec.hash` runs a model's tables over one batch and builds the windows once. Keys are what rows are deduplicated
and cached by: there are fewer of them than rows, and they cost no modulus.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import SpecError
from engrampool_proto.hashing.batch import TokenBatch, Windows, exactly
from engrampool_proto.hashing.identity import Identity
from engrampool_proto.hashing.polynomial import Polynomial
from engrampool_proto.hashing.xor_mix import XorMix


class HashFamily(Protocol):
    """What every hash family offers; see the module's text."""

    FAMILY: ClassVar[str]

    @property
    def lookback(self) -> int:
        """Tokens before the current one that the family reads."""

    def head_rows(self) -> tuple[int, ...]:
        """Rows that each head addresses."""

    def groups(self) -> tuple[slice, ...]:
        """Runs of columns, in order, that together are all columns."""

    def keys(self, windows: Windows) -> npt.NDArray[np.int64]:
        """Int64 [groups, T]: what decides the rows of each group's columns at each token."""

    def rows_of(
        self,
        columns: slice,
        keys: npt.NDArray[np.int64],
        head_offsets: npt.NDArray[np.uint64],
        out: npt.NDArray[Any],
    ) -> None:
        """Write row ids in the table into `out` (uint32 or uint64 [N, columns]). columns: all within one group.

        keys: int64 [N], C-contiguous. head_offsets: of all columns.
        """

    def keys_of(
        self, columns: slice, rows: npt.NDArray[Any], head_offsets: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.int64] | None:
        """Keys that `rows_of` makes `rows` [N, columns] of: int64 [N]; None if there are none for any of them.

        Where the columns suffice to tell, they are those that `keys` gave.
        """

    def to_json(self) -> dict[str, Any]:
        """The constants as JSON types; `family_from_json` reads them back."""


_FAMILIES: dict[str, type[XorMix] | type[Polynomial] | type[Identity]] = {
    family.FAMILY: family for family in (XorMix, Polynomial, Identity)
}


def family_from_json(document: Mapping[str, Any]) -> HashFamily:
    """Read a family's constants, as `to_json` wrote them. Raises SpecError for an unknown family or bad constants."""
    constants = dict(document)
    name = constants.pop("family", None)
    if name not in _FAMILIES:
        raise SpecError(f"unknown hash family {name!r}; this version knows {', '.join(sorted(_FAMILIES))}")
    try:
        return _FAMILIES[name].from_json(constants)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise SpecError(f"bad constants of hash family {name!r}: {error}") from error


__all__ = ["HashFamily", "Identity", "Polynomial", "TokenBatch", "Windows", "XorMix", "exactly", "family_from_json"]
