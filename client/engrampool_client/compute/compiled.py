"""The compiled form. Only `choose` imports it: numba takes longer to import than a command takes."""

import secrets

import numpy as np

from engrampool_client.compute.forms import Bytes, Flags, Form, Hashing, Keys
from engrampool_proto.kernels import entries
from engrampool_proto.kernels.hasher import Hasher
from engrampool_proto.spec import ModelSpec

# Nobody can choose tokens whose keys lie close to each other in the table.
_FACTOR = np.uint64(secrets.randbits(64) | 1)
_NO_FLAGS = np.empty(0, np.bool_)


class CompiledForm(Form):
    """`Form` by kernels, which run without the GIL."""

    compiled = True

    def hashing(self, spec: ModelSpec) -> Hashing:
        """As of `Form`."""
        return Hasher(spec)

    def distinct(self, keys: Keys, hit: Flags | None) -> tuple[Keys, list[int], Keys]:
        """As of `Form`."""
        first, inverse = np.empty(keys.size, np.int64), np.empty(keys.size, np.int64)
        counts = np.empty(len(keys), np.int64)
        count = entries.distinct(keys, _NO_FLAGS if hit is None else hit, _FACTOR, first, counts, inverse)
        return first[:count], counts.tolist(), inverse

    def place(self, fetched: Bytes, inverse: Keys, hit: Flags | None, to: Bytes) -> None:
        """As of `Form`."""
        done = np.zeros(len(inverse), np.bool_) if hit is None else hit.copy()
        entries.place(fetched, inverse, fetched.shape[1], to, done)

    def copy_found(
        self, rows: Bytes, slots: Keys, nbytes: int, hit: Flags | None, to: Bytes | None
    ) -> tuple[Flags | None, int]:
        """As of `Form`."""
        done = np.zeros(len(slots), np.bool_) if hit is None else hit
        count = entries.place(rows, slots, nbytes, _nowhere(len(slots)) if to is None else to, done)
        return (done, count) if count else (hit, 0)


def _nowhere(tokens: int) -> Bytes:
    return np.empty((tokens, 0), np.uint8)
