"""What the processes of one server have in common: made before the first of them is forked."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

from engrampool_server.entrance import Entrance
from engrampool_server.metrics import Metrics
from engrampool_server.tables import HeldModel


class InFlight:
    """Bytes of answers in flight in all processes of a server, and their bound.

    Each process writes its own slot only and reads all of them, so none can leave the sum wrong for the others: the
    slot of a process that died is cleared by whoever started it.

    slots: int64 [any], in memory that forks share. slot: this process's.
    """

    def __init__(self, limit_bytes: int, slots: memoryview | None = None, slot: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self.slot = slot
        self._slots = int64s(1) if slots is None else slots

    @property
    def own(self) -> int:
        """Bytes in flight in this process."""
        return int(self._slots[self.slot])

    @property
    def total(self) -> int:
        """Bytes in flight in all processes."""
        return sum(self._slots)

    def reserve(self, nbytes: int) -> bool:
        """Count `nbytes` as in flight, unless that would exceed the bound."""
        # Counted first and asked for afterwards: of two processes at once, neither may miss the other.
        self._slots[self.slot] += nbytes
        if sum(self._slots) <= self.limit_bytes:
            return True
        self._slots[self.slot] -= nbytes
        return False

    def release(self, nbytes: int) -> None:
        """Count `nbytes` as in flight no more."""
        self._slots[self.slot] -= nbytes

    def clear(self, slot: int) -> None:
        """Forget what a process that died had in flight."""
        self._slots[slot] = 0


@dataclass
class Shared:
    """What every process of a server inherits when it is forked.

    models: those loaded before the fork; their rows are the one copy that all processes read.
    entrance: of the direct lane, None for no such lane.
    """

    metrics: Metrics
    in_flight: InFlight
    models: list[HeldModel] = field(default_factory=list)
    entrance: Entrance | None = None


def int64s(count: int) -> memoryview:
    """Int64 [count], zeroed, in memory that forks share. One process writes an item, any reads it."""
    return memoryview(mmap.mmap(-1, count * 8)).cast("q")


def free_slot(taken: Sequence[int]) -> int:
    """The lowest slot that is not taken."""
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)
