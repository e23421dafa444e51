"""xor_mix: multiplicative hashing of n-grams, XOR-mixed, one prime modulus a head.

Used by DeepSeek's Engram (github.com/deepseek-ai/Engram, engram_demo_v1.py; DeepSeek-V4.1) and by Qwen's n-gram
per-layer embedding. They differ in token map, multipliers and boundary rule, all of which are constants here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
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
    def _moduli(self) -> tuple[npt.NDArray[np.int64], ...]:
        """The primes of each order as an array: all heads of an order are reduced in one call."""
        return tuple(np.array(heads, np.int64) for heads in self.primes)

    @property
    def lookback(self) -> int:
        """One less than the longest n-gram."""
        return len(self.multipliers) - 1

    def head_rows(self) -> tuple[int, ...]:
        """The primes, in column order."""
        return tuple(p for heads in self.primes for p in heads)

    def rows(self, windows: Windows, head_offsets: npt.NDArray[np.uint64], out: npt.NDArray[Any]) -> None:
        """See `HashFamily`."""
        blocked = windows.blocked_from(self.stop)[: self.lookback + 1]
        ids = np.where(blocked, np.int64(self.fill), windows.mapped[: self.lookback + 1])
        mix = ids[0] * np.int64(self.multipliers[0])
        column = 0
        for shift, primes in enumerate(self._moduli, start=1):
            mix ^= ids[shift] * np.int64(self.multipliers[shift])
            heads = slice(column, column + len(primes))
            out[:, heads] = np.mod(mix[:, None], primes).view(np.uint64) + head_offsets[heads]
            column = heads.stop

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
