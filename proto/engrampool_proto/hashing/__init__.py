"""From token ids to row ids: one file a hash family, behind one small interface.

A family is a frozen dataclass of *resolved* constants (nothing is derived from a seed here), with::

    FAMILY            its name in a manifest
    lookback          tokens before the current one that it reads (n - 1)
    head_rows()       distinct row ids each head can give, one entry a head
    rows(windows, head_offsets, out)   fills `out` [T, heads] with row ids
    to_json() / from_json(document)

`ModelSpec.hash` runs a model's tables over one batch and builds the windows once.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import SpecError
from engrampool_proto.hashing.batch import TokenBatch, Windows
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

    def rows(self, windows: Windows, head_offsets: npt.NDArray[np.uint64], out: npt.NDArray[Any]) -> None:
        """Write row ids of every token and head into `out` (uint32 or uint64 [T, heads])."""

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


__all__ = ["HashFamily", "Identity", "Polynomial", "TokenBatch", "Windows", "XorMix", "family_from_json"]
