"""Files that n-grams can be worked out from: they are for their owner alone, from the first byte on."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def create(path: Path, buffering: int = -1) -> BinaryIO:
    """A fresh file to write to, of mode 0600 at most, whatever the umask is and whatever was there.

    A file of that name is removed first: who has it open, or has another name for it, reads nothing of the new one. A
    symbolic link is not followed, as it may be somebody else's. A character device, such as /dev/null, is written to as
    it is. buffering: as for `open`. Raises OSError, also for a pipe, whose reader could hold the writer up for ever.
    """
    try:
        descriptor = _fresh(path)
    except FileExistsError:
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            path.unlink()
            descriptor = _fresh(path)
        elif stat.S_ISCHR(mode) or stat.S_ISDIR(mode):  # of which the system refuses the second
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        else:
            raise _no_file(path) from None
    return os.fdopen(descriptor, "wb", buffering)


def check_replaceable(path: Path) -> None:
    """Raise OSError if a file renamed to `path` would take the place of something else than a regular file."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _no_file(path)


def _no_file(path: Path) -> OSError:
    return OSError(errno.EINVAL, "there is something that is no regular file; name another", str(path))


def _fresh(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
