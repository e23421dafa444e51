"""polynomial: the n-gram as a number in base |vocabulary|, reduced by one modulus a head (LongCat, over-encoding).

Source of the rule: SGLang's `n_gram_embedding.py` and its kernel `ComputeNGramIdsKernel`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import SpecError
from engrampool_proto.hashing.batch import Windows, is_token_id, keys_from_rows, one_each, rows_from_keys


@dataclass(frozen=True)
class Polynomial:
    """Row in a head of order n: (sum over d < n of token[t-d] * weights[d] mod modulus) mod modulus.

    moduli: [orders][heads], orders 2 .. n; the modulus, and so the number of rows, of each head.
    weights: [orders][heads][n]: the factor of the token d back; entries at and beyond the order are not used.
    stop: a token id that ends a look-back when met at a distance of one or more; None for none. What cannot be read
        (before the start, dead, from a `stop` on) adds nothing.

    Raises SpecError for constants that do not fit together or their types.
    """

    FAMILY: ClassVar[str] = "polynomial"
    moduli: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[tuple[int, ...], ...], ...]
    stop: int | None = None

    def __post_init__(self) -> None:
        if not self.moduli or not all(heads and all(0 < m < 2**32 for m in heads) for heads in self.moduli):
            raise SpecError("every order needs at least one head, each with a positive modulus below 2**32")
        if len(self.weights) != len(self.moduli):
            raise SpecError(f"{len(self.moduli)} orders of moduli, but {len(self.weights)} of weights")
        for order, (heads, factors) in enumerate(zip(self.moduli, self.weights, strict=True), start=2):
            if len(factors) != len(heads) or not all(len(f) >= order for f in factors):
                raise SpecError(f"order {order} needs {len(heads)} heads of at least {order} weights")
            if not all(0 <= w < 2**32 for f in factors for w in f):
                raise SpecError("a weight is not in 0 .. 2**32 - 1")
        if self.stop is not None and not is_token_id(self.stop):
            raise SpecError(f"stop must be a token id or None, it is {self.stop!r}")

    @property
    def lookback(self) -> int:
        """One less than the longest n-gram."""
        return len(self.moduli)

    def head_rows(self) -> tuple[int, ...]:
        """The moduli, in column order."""
        return tuple(m for heads in self.moduli for m in heads)

    def groups(self) -> tuple[slice, ...]:
        """One a column: no two heads share a modulus."""
        return one_each(len(self.head_rows()))

    def keys(self, windows: Windows) -> npt.NDArray[np.int64]:
        """See `HashFamily`. The keys are the rows within the head."""
        blocked = windows.blocked_from(self.stop)[: self.lookback + 1]
        # A token is below 2**31 and a weight below 2**32, so a product fits uint64.
        ids = np.where(blocked, 0, windows.ids[: self.lookback + 1]).astype(np.uint64)
        keys = np.empty((len(self.head_rows()), ids.shape[1]), np.uint64)
        column = 0
        for order, (heads, factors) in enumerate(zip(self.moduli, self.weights, strict=True), start=2):
            for modulus, weights in zip(heads, factors, strict=True):
                m = np.uint64(modulus)
                total = np.zeros(ids.shape[1], np.uint64)
                for back in range(order):
                    total += ids[back] * np.uint64(weights[back]) % m
                keys[column] = total % m
                column += 1
        return keys.view(np.int64)

    rows_of = staticmethod(rows_from_keys)
    keys_of = staticmethod(keys_from_rows)

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "family": self.FAMILY,
            "moduli": [list(heads) for heads in self.moduli],
            "weights": [[list(w) for w in heads] for heads in self.weights],
            "stop": self.stop,
        }

    @classmethod
    def from_json(cls, constants: Mapping[str, Any]) -> "Polynomial":
        """Inverse of `to_json`, without the family's name."""
        moduli = tuple(tuple(int(m) for m in heads) for heads in constants["moduli"])
        weights = tuple(tuple(tuple(int(w) for w in f) for f in heads) for heads in constants["weights"])
        return cls(**{**constants, "moduli": moduli, "weights": weights})
