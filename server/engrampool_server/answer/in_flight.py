"""The bound on bytes of requests and answers that a server holds at one time, and each peer's share of it."""

import mmap
from dataclasses import dataclass

import numpy as np

from engrampool_proto.kernels.serve import release, reserve

# Peers are told apart by a hash, which nobody outside can know: two that meet in one of these have one share.
_BUCKETS = 512


# Places beside them, each of one caller that is known by name; see accounts.py.
NAMED = 1024


@dataclass(frozen=True)
class Account:
    """What is counted for a caller that is known by name, and what it may have. place: of NAMED, its own.

    most_bytes: in flight. rate: nanoseconds of its time that a thousand rows take, and meter: the address where that is
    counted. most_connections: of the direct lane. 0 is no bound of its own.
    """

    name: str
    place: int
    most_bytes: int = 0
    rate: int = 0
    meter: int = 0
    most_connections: int = 0

    def __str__(self) -> str:
        return self.name


# Whom something is counted for: a host (peers.py), or a caller that is known by name.
Peer = str | Account


class InFlight:
    """Bytes in flight in all processes of a server, and their bound. A peer may have no more of it than it leaves free.

    So one peer alone has half of it at most, and there is room for one more always.

    Each process writes its own slots only and reads all of them, so none can leave a sum wrong for the others, or keep
    them waiting: the slots of a process that died are cleared by whoever started it.

    processes: how many there may be; all are forked from the one that made this. slot: this process's number.
    share_bytes: what one peer may have while there is no other. arrays: int64 [processes], bytes of each, and
    int64 [buckets * processes], those of peers: the memory itself, for compiled loops.
    """

    def __init__(self, limit_bytes: int, processes: int = 1, slot: int = 0) -> None:
        self.limit_bytes, self.share_bytes = limit_bytes, limit_bytes // 2
        self.slot = slot
        self.processes = processes
        self._slots = int64s(processes)
        self._of_peers = int64s(processes * (_BUCKETS + NAMED))  # those of one peer lie side by side
        self.arrays = np.frombuffer(self._slots, np.int64), np.frombuffer(self._of_peers, np.int64)

    @property
    def own(self) -> int:
        """Bytes in flight in this process."""
        return int(self._slots[self.slot])

    @property
    def total(self) -> int:
        """Bytes in flight in all processes."""
        return sum(self._slots)

    def of(self, peer: Peer) -> int:
        """Bytes that are in flight for a peer, in all processes."""
        at = self.place_of(peer)
        return sum(self._of_peers[at : at + self.processes])

    def reserve(self, nbytes: int, peer: Peer) -> bool:
        """Count `nbytes` as in flight for `peer`, unless that would exceed the bound, its share, or its own bound."""
        slots, of_peers = self.arrays
        at, most = self.place_of(peer), most_bytes(peer)
        return reserve(slots, of_peers, self.slot, at, self.processes, nbytes, self.limit_bytes, self.share_bytes, most)

    def most_of(self, peer: Peer) -> int:
        """Bytes that a peer may have while there is no other."""
        return min(self.share_bytes, most_bytes(peer) or self.share_bytes)

    def release(self, nbytes: int, peer: Peer) -> None:
        """Count `nbytes` as in flight no more."""
        release(*self.arrays, self.slot, self.place_of(peer), nbytes)

    def clear(self, slot: int) -> None:
        """Forget what a process that died had in flight."""
        self._slots[slot] = 0
        for at in range(slot, len(self._of_peers), self.processes):
            self._of_peers[at] = 0

    def place_of(self, peer: Peer) -> int:
        """Where the slots of a peer begin, in all processes of this server and in no other server."""
        place = _BUCKETS + peer.place if isinstance(peer, Account) else hash(peer) % _BUCKETS
        return place * self.processes


def most_bytes(peer: Peer) -> int:
    """What it may have in flight at most, 0 for no bound of its own."""
    return peer.most_bytes if isinstance(peer, Account) else 0


def int64s(count: int) -> memoryview:
    """Int64 [count], zeroed, in memory that forks share. One process writes an item, any reads it."""
    return memoryview(mmap.mmap(-1, count * 8)).cast("q")
