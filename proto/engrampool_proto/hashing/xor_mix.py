"""xor_mix: multiplicative hashing of n-grams, XOR-mixed, one prime modulus a head.

Used by DeepSeek's Engram (github.com/deepseek-ai/Engram, engram_demo_v1.py; DeepSeek-V4.1) and by Qwen's n-gram
per-layer embedding. They differ in token map, multipliers and boundary rule, all of which are constants here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import SpecError
from engrampool_proto.hashing.batch import Windows, is_token_id


@dataclass(frozen=True)
class XorMix:
    """Hash of the n-gram that ends at t: x[t]*m[0] ^ x[t-1]*m[1] ^ ... in wrapping int64, modulo the head's prime.

    multipliers: one a look-back distance, int64; orders 2 .. len(multipliers) are hashed.
    primes: [orders][heads]: the modulus, and so the number of rows, of each head.
    fill: the hashed id that stands for what cannot be read: everything from the first gap on (the sequence start, a
        dead token, a `stop`). It is an id after the token map.
    stop: a raw token id that ends a look-back when met at a distance of one or more; None for none.

    Columns: n ascending, then head. The remainder is never negative (a product may wrap).
    Raises SpecError for constants that do not fit together or their types.
    """

    FAMILY: ClassVar[str] = "xor_mix"
    multipliers: tuple[int, ...]
    primes: tuple[tuple[int, ...], ...]
    fill: int
    stop: int | None = None

    def __post_init__(self) -> None:
        if len(self.multipliers) < 2 or len(self.primes) != len(self.multipliers) - 1:
            raise SpecError(
                f"{len(self.multipliers)} multipliers need {len(self.multipliers) - 1} orders of primes, at least one; "
                f"there are {len(self.primes)}"
            )
        if not all(-(2**63) <= m < 2**63 for m in self.multipliers):
            raise SpecError("a multiplier does not fit int64")
        if not all(heads and all(0 < p < 2**63 for p in heads) for heads in self.primes):
            raise SpecError("every order needs at least one head, each with a positive modulus below 2**63")
        if not is_token_id(self.fill):
            raise SpecError(f"fill must be a token id, it is {self.fill!r}")
        if self.stop is not None and not is_token_id(self.stop):
            raise SpecError(f"stop must be a token id or None, it is {self.stop!r}")

    @cached_property
    def _moduli(self) -> npt.NDArray[np.int64]:
        """Int64 [heads]: the primes, in column order."""
        return np.array(self.head_rows(), np.int64)

    @cached_property
    def _groups(self) -> tuple[slice, ...]:
        ends = np.cumsum([0, *map(len, self.primes)]).tolist()
        return tuple(slice(start, stop) for start, stop in pairwise(ends))

    @cached_property
    def _factors(self) -> npt.NDArray[np.int64]:
        """Int64 [n, 1]: the multipliers."""
        return np.array(self.multipliers, np.int64)[:, None]

    @property
    def lookback(self) -> int:
        """One less than the longest n-gram."""
        return len(self.multipliers) - 1

    def head_rows(self) -> tuple[int, ...]:
        """The primes, in column order."""
        return tuple(p for heads in self.primes for p in heads)

    def groups(self) -> tuple[slice, ...]:
        """One an order: its hash before the modulus decides all its rows."""
        return self._groups

    def keys(self, windows: Windows) -> npt.NDArray[np.int64]:
        """See `HashFamily`. The keys are the hashes before the modulus."""
        ids = windows.filled(self.fill, self.stop)[: len(self.multipliers)]
        return np.bitwise_xor.accumulate(ids * self._factors, axis=0)[1:]

    def rows_of(
        self,
        columns: slice,
        keys: npt.NDArray[np.int64],
        head_offsets: npt.NDArray[np.uint64],
        out: npt.NDArray[Any],
    ) -> None:
        """See `HashFamily`."""
        out[:] = np.mod(keys[:, None], self._moduli[columns]).view(np.uint64) + head_offsets[columns]

    def keys_of(
        self, columns: slice, rows: npt.NDArray[Any], head_offsets: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.int64] | None:
        """See `HashFamily`. By the Chinese remainder theorem, in Garner's form (Knuth, TAOCP 2, 4.3.2).

        At full size three primes exceed 2**64 together, so that the hash itself comes out. Where the primes are too few
        or too small for that, some other number with the same remainders does, which is as good a key.
        """
        moduli = [int(prime) for prime in self._moduli[columns]]
        remainders = rows.astype(np.int64) - head_offsets[columns].astype(np.int64)
        digits: list[npt.NDArray[np.int64]] = []
        key, product = np.zeros(len(rows), np.uint64), 1
        for at, modulus in enumerate(moduli):
            if product >= 2**64 or modulus >= 2**31:  # beyond, the products below would not fit
                break
            if math.gcd(product, modulus) != 1:
                return None
            known = np.zeros(len(rows), np.int64)
            for digit, earlier in zip(reversed(digits), reversed(moduli[:at]), strict=True):
                known = (known * earlier + digit) % modulus
            digits.append((remainders[:, at] - known) * pow(product, -1, modulus) % modulus)
            key += digits[-1].view(np.uint64) * np.uint64(product % 2**64)
            product *= modulus

        def right(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
            agree: npt.NDArray[np.bool_] = (np.mod(keys[:, None], self._moduli[columns]) == remainders).all(axis=1)
            return agree

        found = key.view(np.int64)
        if not (good := right(found)).all():
            # A negative hash has come out as itself plus the product.
            found = np.where(good, found, (key - np.uint64(product % 2**64)).view(np.int64))
            if not right(found).all():
                return None
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON types only; integers beyond 2**53 are written in full, as Python reads and writes them."""
        return {
            "family": self.FAMILY,
            "multipliers": list(self.multipliers),
            "primes": [list(heads) for heads in self.primes],
            "fill": self.fill,
            "stop": self.stop,
        }

    @classmethod
    def from_json(cls, constants: Mapping[str, Any]) -> "XorMix":
        """Inverse of `to_json`, without the family's name."""
        primes = tuple(tuple(int(p) for p in heads) for heads in constants["primes"])
        return cls(**{**constants, "multipliers": tuple(int(m) for m in constants["multipliers"]), "primes": primes})
