"""Who may come to the direct lane: bounds on its connections, in all and by peer, and on those without a ticket."""

import resource
import time
from collections import Counter
from collections.abc import Iterator
from typing import Generic, TypeVar

import grpc

from engrampool_server.answer.lookups import RefusedError

# In one process. Each takes a thread, 224 KiB, the buffers of TLS where it is inside that, and a descriptor, and others
# need descriptors, too.
MOST = 1024
# Without a ticket as yet, of one peer in one process.
STRANGERS = 64
# For so long no stranger has to go for another: who means it says hello at once.
GRACE_S = 1.0

_Connection = TypeVar("_Connection")


class ConnectionLimits(Generic[_Connection]):
    """The connections of one process, each with its peer. Nobody shuts out anybody but those of its own peer.

    A peer may have no more connections than it leaves free, and few strangers among them. most: of all peers.
    """

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = MOST if soft == resource.RLIM_INFINITY else min(MOST, soft // 2)
        self._peers: dict[_Connection, str] = {}
        self._counts: Counter[str] = Counter()
        # By peer, in the order of their arrival, and when that was.
        self._strangers: dict[str, dict[_Connection, float]] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[_Connection]:
        return iter(list(self._peers))

    def add(self, connection: _Connection, peer: str) -> _Connection | None:
        """Take note of a connection, a stranger as yet. Gives the one that has to go for it. Raises RefusedError."""
        if self._counts[peer] + 1 > self.most - (len(self._peers) + 1):
            text = f"{self._counts[peer]} connections are open from {peer}, and {len(self._peers)} in all"
            raise _too_many(f"{text}, of {self.most}; a peer may have no more than are free")
        strangers = self._strangers.get(peer, {})
        oldest = None
        if len(strangers) >= STRANGERS:
            oldest, since = next(iter(strangers.items()))
            if time.monotonic() - since < GRACE_S:
                raise _too_many(f"{len(strangers)} connections from {peer} came just now, and none has said hello")
            self.remove(oldest)
        self._peers[connection] = peer
        self._counts[peer] += 1
        self._strangers.setdefault(peer, {})[connection] = time.monotonic()
        return oldest

    def admit(self, connection: _Connection) -> bool:
        """It is no stranger any more; False if it was removed before."""
        peer = self._peers.get(connection)
        if peer is None:
            return False
        strangers = self._strangers.get(peer, {})
        strangers.pop(connection, None)
        if not strangers:
            self._strangers.pop(peer, None)
        return True

    def remove(self, connection: _Connection) -> None:
        """Forget a connection, if that was not done before."""
        if connection in self._peers:
            self.admit(connection)
            peer = self._peers.pop(connection)
            self._counts[peer] -= 1
            if not self._counts[peer]:
                del self._counts[peer]


def _too_many(text: str) -> RefusedError:
    return RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too-many-connections", f"{text}; try again later")
