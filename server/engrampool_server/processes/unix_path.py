"""A Unix socket that all processes of a server answer on, one after the other.

gRPC takes the place of whatever socket lies at a path, and removes it at its end. So each process listens at a path of
its own beside the one that callers know, which is a link to one of them.
"""

import errno
import fcntl
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from engrampool_server.ports import ListenError, is_taken

# Of sockaddr_un, and what the paths of processes are longer than the one that callers know.
_LONGEST_BYTES = 107
_SUFFIX_BYTES = 7


class UnixPath:
    """A path that leads to one process at a time, and is this server's alone until `close`.

    A path that a server left behind when it was killed is replaced.

    slots: how many there are.

    Raises ListenError: it is in use, something else lies there or where the process of a slot is to listen, it is too
    long, or its directory cannot be written.
    """

    def __init__(self, path: Path, slots: int) -> None:
        self._path = path.absolute()
        self._owner = os.getpid()
        self._slots = slots
        self._own_name = re.compile(re.escape(self._path.name) + r"\.[0-9]+")
        if len(os.fsencode(self._path)) + _SUFFIX_BYTES > _LONGEST_BYTES:
            raise self._refused(f"the path is longer than {_LONGEST_BYTES - _SUFFIX_BYTES} bytes")
        try:
            self._lock = _locked(self._beside("lock"))
        except BlockingIOError as error:
            raise self._refused("in use") from error
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from error
        try:
            self._clear()
        except OSError as error:
            os.close(self._lock)
            raise self._refused("in use" if error.errno == errno.EADDRINUSE else error.strerror) from error

    @property
    def address(self) -> str:
        """That callers are told."""
        return f"unix:{self._path}"

    def own(self, slot: int) -> str:
        """The address at which the process of a slot listens."""
        return f"unix:{self._beside(str(slot))}"

    def point(self, slot: int) -> None:
        """Have callers that come from now on reach the process of this slot, which listens.

        Puts back what somebody removed. Raises OSError: its directory is gone or full, or the path is somebody else's.
        """
        self._hold_lock()
        name = self._beside(str(slot)).name
        if self._leads_to() != name:
            new = self._beside("new")
            new.unlink(missing_ok=True)
            new.symlink_to(name)
            new.rename(self._path)

    def close(self) -> None:
        """Remove it, in the process that made it."""
        if os.getpid() == self._owner:
            with suppress(OSError):
                self._hold_lock()
                self._clear()
                self._beside("lock").unlink()
        os.close(self._lock)

    def _clear(self) -> None:
        """Remove what is ours. Raises OSError if somebody listens there, or if something else lies there."""
        if self._path.is_symlink():
            self._leads_to()
        elif self._path.exists() and not self._path.is_socket():
            raise FileExistsError(errno.EEXIST, "something else than a socket lies there")
        own = [path for path in self._path.parent.iterdir() if self._own_name.fullmatch(path.name)]
        sockets = [path for path in own if stat.S_ISSOCK(path.lstat().st_mode)]
        mine = {self._beside(str(slot)) for slot in range(self._slots)}
        for path in mine.intersection(own).difference(sockets):
            raise FileExistsError(errno.EEXIST, f"something else than a socket lies at {path}")
        if any(is_taken(path) for path in (self._path, *sockets)):
            raise OSError(errno.EADDRINUSE, "in use")
        for path in (self._path, *sockets):
            path.unlink(missing_ok=True)

    def _leads_to(self) -> str | None:
        """The name that the path is a link to; None if nothing lies there. Raises OSError if that is not ours."""
        try:
            name = str(self._path.readlink())
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise FileExistsError(errno.EEXIST, "something else lies there") from error
        if not self._own_name.fullmatch(name):
            raise FileExistsError(errno.EEXIST, f"a link to {name} lies there")
        return name

    def _hold_lock(self) -> None:
        """Have the lock that lies there, if somebody removed ours. Raises BlockingIOError if another server has it."""
        lock = self._beside("lock")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._lock), lock.lstat()):
                return
        held = _locked(lock)
        os.close(self._lock)
        self._lock = held

    def _beside(self, suffix: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{suffix}")

    def _refused(self, why: str | None) -> ListenError:
        return ListenError(f"cannot listen on unix:{self._path}: {why}")


def _locked(path: Path) -> int:
    """A descriptor with the lock that whoever has the path holds. Raises BlockingIOError if it is in use, OSError."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        except FileNotFoundError:  # another server ended just now
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
