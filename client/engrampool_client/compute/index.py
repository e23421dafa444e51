"""The index of a cache: which row holds which key, in sets of slots, and whose place a new key takes.

This is the specification of engrampool_proto.kernels.hot_rows.
"""

from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.int64]
Groups = npt.NDArray[np.uint8]
Bytes = npt.NDArray[np.uint8]

# Eight keys are 64 bytes: looking through a set costs a line of memory or two.
WAYS = 8
_WAY_BITS = 3
# Being found halves an entry's age. What needs room takes the place of the oldest of its set, and ages the others until
# that one would have been _OLDEST. New entries come in one below, so that those that nobody asks for twice, most of a
# text's n-grams, drive out each other and not what was found before. Chosen by measurement; see bench/cache.py.
_OLDEST, _NEW, _EMPTY = 31, 30, 127
NOBODY = -1  # the group of an empty slot: no caller's, so that emptiness needs no key of its own
_SALTS = np.arange(1, 257, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


class Index:
    """Sets of WAYS slots; a key can be in the slots of one set only. Whoever has it holds a lock over every call.

    keys: int64 [slots]. groups: int16 [slots], NOBODY where empty. rows: int32 [slots], unspecified where empty.
    ages: int8 [slots], 0 .. _OLDEST, or _EMPTY. unused: bool [slots], hinted and not found so far. Of an index that is
    only read these two are empty.
    """

    SLOT_BYTES: ClassVar[int] = 8 + 2 + 4
    AGE_BYTES: ClassVar[int] = 1 + 1

    def __init__(
        self,
        keys: Keys,
        groups: npt.NDArray[np.int16],
        rows: npt.NDArray[np.int32],
        ages: npt.NDArray[np.int8],
        unused: npt.NDArray[np.bool_],
    ) -> None:
        self.keys, self.groups, self.rows, self.ages, self.unused = keys, groups, rows, ages, unused

    @classmethod
    def empty(cls, sets: int) -> Self:
        """One to be filled."""
        slots = sets * WAYS
        return cls(
            np.zeros(slots, np.int64),
            np.full(slots, NOBODY, np.int16),
            np.arange(slots, dtype=np.int32),
            np.full(slots, _EMPTY, np.int8),
            np.zeros(slots, np.bool_),
        )

    @classmethod
    def of(cls, buffer: Bytes) -> Self:
        """Views of `buffer`, which `bytes` made, to be read."""
        slots = len(buffer) // cls.SLOT_BYTES
        keys, rest = buffer[: 8 * slots], buffer[8 * slots :]
        rows, groups = rest[: 4 * slots].view("<i4"), rest[4 * slots :].view("<i2")
        return cls(keys.view("<i8"), groups, rows, np.empty(0, np.int8), np.empty(0, np.bool_))

    def copy(self) -> Self:
        """As it is now."""
        return type(self)(self.keys.copy(), self.groups.copy(), self.rows.copy(), self.ages.copy(), self.unused.copy())

    def bytes(self) -> bytes:
        """Keys, rows, groups; little-endian."""
        return b"".join(
            (self.keys.astype("<i8").tobytes(), self.rows.astype("<i4").tobytes(), self.groups.astype("<i2").tobytes())
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return len(self.keys) * self.SLOT_BYTES + len(self.ages) * self.AGE_BYTES

    def find(self, keys: Keys, groups: Groups) -> tuple[Keys, int, int]:
        """The rows of keys, int64 [N], -1 for what is not there; how many are; and of how many the hint was taken."""
        found = np.full(len(keys), -1, np.int64)
        at, slots = self._find(keys, groups, self._sets(keys, groups))
        found[at] = self.rows.take(slots)
        if not len(self.ages):
            return found, len(at), 0
        self.ages[slots] >>= 1
        return found, len(at), self._use(slots)

    def put(self, keys: Keys, groups: Groups, entries: Bytes, memory: Bytes, hinted: bool) -> tuple[int, int, int]:
        """Keep these entries in the rows of `memory`; arguments as of `HotRows.put`.

        Gives how many slots were empty, how many entries had to go, and of how many nobody ever took the hint.
        """
        slots = self._make_room(keys, groups)
        placed = slots >= 0
        if not placed.all():
            keys, groups, entries, slots = keys[placed], groups[placed], entries[placed], slots[placed]
        full = self.groups.take(slots) != NOBODY
        wasted = self._use(slots)
        if hinted:
            wasted += len(placed) - len(slots)
            self.unused[slots] = True
        came = len(slots) - int(np.count_nonzero(full))
        # In this order: Ctrl-C may come between any two lines, and no key may be found with another's row.
        self.groups[slots] = NOBODY
        memory[self.rows.take(slots)] = entries
        self.keys[slots] = keys
        self.groups[slots] = groups
        return came, len(slots) - came, wasted

    @cached_property
    def _by_set(self) -> Keys:
        """Int64 [sets, ways]: a view of `keys`."""
        return self.keys.reshape(-1, WAYS)

    def _sets(self, keys: Keys, groups: Groups) -> Keys:
        """The set of each key: int64 [N]. Group and key are mixed, for keys of families differ in their best bits."""
        mixed = keys.view(np.uint64) ^ _SALTS.take(groups)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed >>= np.uint64(32)
        # Evenly onto any number of sets: the upper half of a product of 32 and 32 bits.
        mixed *= np.uint64(len(self._by_set))
        mixed >>= np.uint64(32)
        return mixed.view(np.int64)

    def _find(self, keys: Keys, groups: Groups, sets: Keys) -> tuple[Keys, Keys]:
        """(position in `keys`, slot) of every key that is there, in ascending position."""
        equal = np.flatnonzero(self._by_set.take(sets, axis=0) == keys[:, None])
        at = equal >> _WAY_BITS
        slots = (sets.take(at) << _WAY_BITS) + (equal & (WAYS - 1))
        right = self.groups.take(slots) == groups.take(at)
        if not right.all():
            # Another group's key of the same number, or the zero of an empty slot.
            at, slots = at[right], slots[right]
        return at, slots

    def _use(self, slots: Keys) -> int:
        """Take the hint from these slots, given any number of times; how many had one."""
        unused = slots[self.unused.take(slots)]
        if not len(unused):
            return 0
        unused = np.unique(unused)
        self.unused[unused] = False
        return len(unused)

    def _make_room(self, keys: Keys, groups: Groups) -> Keys:
        """A slot for each key, no two the same: int64 [M]; -1 for a key that is there, or that its set has no room for.

        Ages the sets, and gives the slots the age of new entries.
        """
        sets = self._sets(keys, groups)
        slots = np.full(len(keys), -1, np.int64)
        new = np.ones(len(keys), np.bool_)
        new[self._find(keys, groups, sets)[0]] = False
        # Keys of one set next to each other, in the order given: the k-th of them takes the k-th oldest.
        order = np.flatnonzero(new)
        order = order[np.argsort(sets[order], kind="stable")]
        if not len(order):
            return slots
        sets = sets[order]
        begins = np.flatnonzero(np.r_[True, sets[1:] != sets[:-1]])
        counts = np.diff(np.r_[begins, len(sets)])
        rank = np.arange(len(sets)) - np.repeat(begins, counts)
        ages = self.ages.reshape(-1, WAYS)
        touched = sets[begins]
        old = ages[touched]
        by_age = np.argsort(-old, axis=1)
        last = by_age[np.arange(len(old)), np.minimum(counts, WAYS) - 1]
        # As if they had come one after the other: the last that had to go was the oldest by then.
        ageing = np.maximum(0, _OLDEST - old[np.arange(len(old)), last])
        ages[touched] = np.where(old == _EMPTY, _EMPTY, old + ageing[:, None])
        kept = rank < WAYS
        way = by_age[np.repeat(np.arange(len(old)), counts)[kept], rank[kept]]
        slots[order[kept]] = (sets[kept] << _WAY_BITS) + way
        self.ages[slots[order[kept]]] = _NEW
        return slots
