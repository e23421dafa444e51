"""Admission to the direct lane, which all processes of a server share: one listening socket, and tickets for it.

Made before the first fork: whichever worker is idle takes a connection, with a ticket that any of them issued.
"""

import errno
import fcntl
import hmac
import mmap
import os
import secrets
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import numpy as np

from engrampool_server.ports import ListenError, is_taken, listen_on
from engrampool_server.setting_kinds import split_address

_ANY_HOST = ("0.0.0.0", "[::]")  # noqa: S104
_SLOTS = 1024
# Of these, the most that one peer may have unused; the next one takes the place of its oldest.
_OF_PEER = 64
# How many slots to try that others are busy with, each of which takes microseconds.
_TRIES = 16
_SECRET_BYTES = 32
# Of whoever asked for it, a credential; all 0 where everybody may ask.
KEY_BYTES = 32
# expires: in nanoseconds of the monotonic clock; 0 for a slot that is free.
_SLOT = np.dtype([("expires", "i8"), ("peer", "i8"), ("secret", "u1", _SECRET_BYTES), ("key", "u1", KEY_BYTES)])
_INDEX = struct.Struct("<I")


class Tickets:
    """One-time tickets, in memory that forks share. A ticket is the number of its slot and 32 random bytes.

    Whoever changes a slot locks it, and no process waits for another's lock: one that is stopped while it has one keeps
    this one slot, and the ticket in it, from the others. Such a lock is all of a process's, so its threads take turns.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._file = os.memfd_create("engrampool-tickets")
        os.posix_fallocate(self._file, 0, _SLOTS * _SLOT.itemsize)  # else who writes where none is left is killed
        self._memory = mmap.mmap(self._file, _SLOTS * _SLOT.itemsize)
        self._slots = np.frombuffer(self._memory, _SLOT)

    def issue(self, valid_s: float, peer: str, key: bytes = b"") -> bytes | None:
        """A fresh ticket, bound to a credential's key; None if every slot that was tried was in use that very moment.

        It takes the place of one that is no good any more. Else the oldest has to go: the peer's own if it has many, or
        that of whichever peer has most of them.
        """
        now = time.monotonic_ns()
        owner = hash(peer)  # the same in all processes of a server
        secret = secrets.token_bytes(_SECRET_BYTES)
        for index, seen in self._candidates(owner, now):
            with self._locked(index) as alone:
                if alone and self._slots["expires"][index] == seen:
                    bound = np.frombuffer(key.ljust(KEY_BYTES, b"\0"), np.uint8)
                    self._slots[index] = (now + int(valid_s * 1e9), owner, np.frombuffer(secret, np.uint8), bound)
                    return _INDEX.pack(index) + secret
        return None

    def take(self, ticket: bytes) -> bytes | None:
        """The key that the ticket is bound to, as 32 bytes, if it is good; it is so once."""
        if len(ticket) != _INDEX.size + _SECRET_BYTES:
            return None
        (index,) = _INDEX.unpack_from(ticket)
        if index >= _SLOTS:
            return None
        with self._locked(index) as alone:
            if not alone:  # another process is taking it, or has just given its place to another one
                return None
            slot = self._slots[index]
            secret, expires, key = slot["secret"].tobytes(), int(slot["expires"]), bytes(slot["key"].tobytes())
            good = hmac.compare_digest(secret, ticket[_INDEX.size :]) and expires > time.monotonic_ns()
            if good:
                self._slots["expires"][index] = 0
            return key if good else None

    def close(self) -> None:
        """Give the memory back, in this process."""
        del self._slots
        self._memory.close()
        os.close(self._file)

    def _candidates(self, owner: int, now: int) -> list[tuple[int, int]]:
        """Slots that a new ticket of `owner` may have, best first, and until when what is in them is good."""
        expires, owners = self._slots["expires"].copy(), self._slots["peer"].copy()
        good = expires > now
        (own,) = np.nonzero(good & (owners == owner))
        if len(own) >= _OF_PEER:
            found = own
        elif not good.all():
            (found,) = np.nonzero(~good)
            # Processes that look at one time are not to choose the same.
            found = np.roll(found, -secrets.randbelow(len(found)))
            return [(int(index), int(expires[index])) for index in found[:_TRIES]]
        else:
            peers, counts = np.unique(owners, return_counts=True)
            (found,) = np.nonzero(owners == peers[counts.argmax()])
        oldest = found[np.argsort(expires[found], kind="stable")][:_TRIES]
        return [(int(index), int(expires[index])) for index in oldest]

    @contextmanager
    def _locked(self, index: int) -> Iterator[bool]:
        """Whether this process has the slot to itself meanwhile. The kernel lets go for one that dies."""
        with self._turn:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
            except OSError:
                yield False
                return
            try:
                yield True
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, index)


class Admission:
    """The listener of the direct lane, and the tickets that let a caller in.

    listener: bound and listening, not blocking. host, port, unix_path: as OpenDirectResponse has them.
    """

    def __init__(self, listener: socket.socket, host: str, port: int, unix_path: str) -> None:
        listener.setblocking(False)
        self.listener, self.host, self.port, self.unix_path = listener, host, port, unix_path
        self.tickets = Tickets()
        self._owner = os.getpid()

    @classmethod
    def open(cls, direct: str, listen: str) -> Self | None:
        """Listen as the setting `direct` says, for a server whose `listen` is this. Raises ListenError."""
        if direct == "off":
            return None
        if direct == "auto" and listen.startswith("unix:"):
            direct = f"{listen}.direct"
        if direct.startswith("unix:"):
            path = Path(direct.removeprefix("unix:")).absolute()
            return cls(_listen_unix(path), "", 0, str(path))
        # Who reaches this server by a Unix socket is on this machine.
        called = "localhost" if listen.startswith("unix:") else split_address(listen)[0]
        host, port = (called, 0) if direct == "auto" else split_address(direct)
        listener = listen_on(f"{host}:{port}", "the direct lane")
        told = "" if host in (called, *_ANY_HOST) else host
        return cls(listener, told or ("localhost" if listen.startswith("unix:") else ""), listener.getsockname()[1], "")

    @property
    def address(self) -> str:
        """For people."""
        return f"unix:{self.unix_path}" if self.unix_path else f"port {self.port}"

    def close(self) -> None:
        """Listen no more in this process; in the one that made it, the path of a Unix socket goes, too."""
        self.listener.close()
        self.tickets.close()
        if self.unix_path and os.getpid() == self._owner:
            with suppress(OSError):  # its directory may be gone
                Path(self.unix_path).unlink()


def _listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(str(path))
        listener.listen()
    except OSError as error:
        listener.close()
        what = "in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ListenError(f"cannot listen on unix:{path} for the direct lane: {what}") from error
    return listener


def _remove_stale(path: Path) -> None:
    """Remove what a server that was killed left behind. Anything else stays, and is in the way of `bind`."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return
    except FileNotFoundError:
        return
    if not is_taken(path):
        path.unlink(missing_ok=True)
