"""Rows that a patch lays over a table's: how a changed row is told from another, and where it lies."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engrampool_proto.kernels.gather import index_changed, lay_over
from engrampool_proto.spec import RowIds
from engrampool_server.memory.memory import allocate, protect

_BITS = 64


@dataclass(frozen=True, eq=False)
class Overlay:
    """Changed rows over a table's, in read-only memory of this process and its forks.

    rows: uint8 [n, row_bytes], in order of their ids.
    words: uint64 [held rows / 64, rounded up]; bit r % 64 of word r // 64 is set where the r-th row held is changed.
    ranks: uint32, as many: how many rows before a word's first one are changed. With the bits below its own in its
        word, a changed row finds its place in `rows`: O(1), for 1.5 bits a row held.
    """

    rows: npt.NDArray[np.uint8]
    words: npt.NDArray[np.uint64]
    ranks: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, ids: npt.NDArray[np.uint64], rows: npt.NDArray[np.uint8], held: range) -> "Overlay":
        """The overlay of `rows` with these ids, uint64 [n], ascending, all of them in `held`; 0 < n < 2**32.

        Raises OutOfMemoryError.
        """
        count = -(-len(held) // _BITS)
        memory = allocate(count * 12, "anon")
        words, ranks = memory[: count * 8].view(np.uint64), memory[count * 8 :].view(np.uint32)
        index_changed(ids, held.start, words, ranks)
        protect(memory)
        words.flags.writeable = ranks.flags.writeable = False
        return cls(rows, words, ranks)

    def copy(self, ids: RowIds, row_start: int, out: npt.NDArray[np.uint8]) -> None:
        """Copy those of the rows `ids` [N] that are changed into their places of `out`, uint8 [N * row_bytes].

        Ids must be held, from `row_start` on, and both arrays be contiguous.
        """
        lay_over(self.rows, self.words, self.ranks, ids, row_start, out)
