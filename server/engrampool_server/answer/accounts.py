"""What callers that are known by name take of a server, in all its processes, and what each may have."""

import ctypes
import hashlib
import mmap

import grpc

from engrampool_proto.kernels.serve import claim
from engrampool_server.access.callers import Caller
from engrampool_server.answer.in_flight import NAMED, Account, int64s
from engrampool_server.answer.lookups import RefusedError

_NS = 1_000_000_000


class Accounts:
    """Made before the first fork; whichever process first has to do with a caller gives it its place.

    processes: how many there may be. A place is a caller's for as long as the server lives. Where all are given, which
    takes as many callers one after the other, the next ones share some.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._memory = mmap.mmap(-1, 2 * NAMED * 8)
        # Int64 [NAMED] each: whose a place is, and its meter.
        self._owners = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._meters = self._owners + NAMED * 8
        # Of the direct lane; each process writes its own.
        self._connections = int64s(NAMED * processes)
        self._known: dict[str, tuple[Caller, Account]] = {}

    def of(self, caller: Caller) -> Account:
        """The account of a caller."""
        known = self._known.get(caller.name)
        if known is not None and known[0] is caller:
            return known[1]
        place = self._place_of(caller.name)
        rate = 0 if caller.max_rows_per_s == 0 else max(1, 1000 * _NS // caller.max_rows_per_s)
        meter = self._meters + 8 * place
        if known is not None and known[1].rate != rate:
            # Its time was counted by another measure, by which its turn may be a day away.
            ctypes.c_int64.from_address(meter).value = 0
        account = Account(caller.name, place, caller.max_in_flight_bytes, rate, meter, caller.max_connections)
        if len(self._known) >= 2 * NAMED:
            self._known.clear()
        self._known[caller.name] = caller, account
        return account

    def connected(self, account: Account, slot: int, more: int) -> None:
        """Count connections of the direct lane in a process. Raises RefusedError, and then counts none."""
        at = account.place * self._processes
        self._connections[at + slot] += more
        count = sum(self._connections[at : at + self._processes])
        if more > 0 and 0 < account.most_connections < count:
            self._connections[at + slot] -= more
            text = f"{account.name} may have {account.most_connections} connections of the direct lane, and has them"
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too-many-connections", f"{text}; look up over gRPC")

    def clear(self, slot: int) -> None:
        """Forget the connections of a process that died."""
        for at in range(slot, len(self._connections), self._processes):
            self._connections[at] = 0

    def _place_of(self, name: str) -> int:
        """Its own, or the next one that is free, or else one that it must share."""
        owner = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True) | 1
        start = owner % NAMED
        for step in range(NAMED):
            place = (start + step) % NAMED
            if claim(self._owners + 8 * place, owner):
                return place
        return start
