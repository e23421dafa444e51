"""A Unix socket that all processes of a server answer on, one after the other.

gRPC takes the place of whatever socket lies at a path, and removes it at its end. So each process listens at a path of
its own beside the one that callers know, which is a link to one of them.
"""

import errno
import fcntl
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from engrampool_server.ports import ListenError

# Of sockaddr_un, and what the paths of processes are longer than the one that callers know.
_LONGEST_BYTES = 107
_SUFFIX_BYTES = 7


class UnixGate:
    """The path `path`, of this server alone until `close`. What a server that was killed has left there is replaced.

    Raises ListenError: it is in use, something else lies there, it is too long, or its directory cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._owner = os.getpid()
        self._pointed = -1
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
        """Have callers that come from now on reach the process of this slot, which listens."""
        if slot != self._pointed:
            new = self._beside("new")
            new.unlink(missing_ok=True)
            new.symlink_to(self._beside(str(slot)).name)
            new.rename(self._path)
            self._pointed = slot

    def close(self) -> None:
        """Remove it, in the process that made it."""
        if os.getpid() == self._owner:
            with suppress(OSError):
                self._clear()
                self._beside("lock").unlink()
        os.close(self._lock)

    def _clear(self) -> None:
        """Remove what is ours. Raises OSError if something else lies at the path."""
        if self._path.is_symlink():
            self._path.unlink()
        elif self._path.exists():
            if not stat.S_ISSOCK(self._path.stat().st_mode):
                raise FileExistsError(errno.EEXIST, "something else than a socket lies there")
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(self._path)) == 0:
                    raise OSError(errno.EADDRINUSE, "in use")
            self._path.unlink()
        for left in self._path.parent.glob(f"{self._path.name}.[0-9]*"):
            if stat.S_ISSOCK(left.lstat().st_mode):
                left.unlink()

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
