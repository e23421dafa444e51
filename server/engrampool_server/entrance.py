"""The way into the direct lane, which all processes of a server share: one listening socket, and tickets for it.

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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from engrampool_server.ports import ListenError, listen_on
from engrampool_server.setting_kinds import split_address

_ANY_HOST = ("0.0.0.0", "[::]")  # noqa: S104
_NEXT = struct.Struct("<q")
# Secret, and until when it is good, in nanoseconds of the monotonic clock; 0 for a slot that is free.
_SLOT = struct.Struct("<32sq")
_SLOTS = 1024
_INDEX = struct.Struct("<I")


class Tickets:
    """One-time tickets, in memory that forks share. A ticket is the number of its slot and 32 random bytes."""

    def __init__(self) -> None:
        size = _NEXT.size + _SLOTS * _SLOT.size
        self._file = os.memfd_create("engrampool-tickets")
        os.ftruncate(self._file, size)
        self._memory = mmap.mmap(self._file, size)

    def issue(self, valid_s: float) -> bytes | None:
        """A fresh ticket; None if too many that are still good were never used."""
        now = time.monotonic_ns()
        with self._locked():
            (index,) = _NEXT.unpack_from(self._memory)
            # All are good for the same time, so the one after the newest is the oldest.
            if _SLOT.unpack_from(self._memory, self._at(index))[1] > now:
                return None
            secret = secrets.token_bytes(32)
            _SLOT.pack_into(self._memory, self._at(index), secret, now + int(valid_s * 1e9))
            _NEXT.pack_into(self._memory, 0, (index + 1) % _SLOTS)
        return _INDEX.pack(index) + secret

    def take(self, ticket: bytes) -> bool:
        """Whether the ticket is good; it is so once."""
        if len(ticket) != _INDEX.size + 32:
            return False
        (index,) = _INDEX.unpack_from(ticket)
        if index >= _SLOTS:
            return False
        with self._locked():
            secret, expires = _SLOT.unpack_from(self._memory, self._at(index))
            good = hmac.compare_digest(secret, ticket[_INDEX.size :]) and expires > time.monotonic_ns()
            if good:
                _SLOT.pack_into(self._memory, self._at(index), bytes(32), 0)
            return good

    def close(self) -> None:
        """Give the memory back, in this process."""
        self._memory.close()
        os.close(self._file)

    @staticmethod
    def _at(index: int) -> int:
        return _NEXT.size + index * _SLOT.size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among processes. The kernel lets go for one that dies."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


class Entrance:
    """Where the direct lane is entered.

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
        if direct.startswith("unix:"):
            path = Path(direct.removeprefix("unix:")).absolute()
            return cls(_listen_unix(path), "", 0, str(path))
        called, _ = split_address(listen)
        host, port = (called, 0) if direct == "auto" else split_address(direct)
        listener = listen_on(f"{host}:{port}", "the direct lane")
        return cls(listener, "" if host in (called, *_ANY_HOST) else host, listener.getsockname()[1], "")

    @property
    def address(self) -> str:
        """For people."""
        return f"unix:{self.unix_path}" if self.unix_path else f"port {self.port}"

    def close(self) -> None:
        """Listen no more in this process; in the one that made it, the path of a Unix socket goes, too."""
        self.listener.close()
        self.tickets.close()
        if self.unix_path and os.getpid() == self._owner:
            Path(self.unix_path).unlink(missing_ok=True)


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
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
