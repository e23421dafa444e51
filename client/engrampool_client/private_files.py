"""Files that n-grams can be worked out from: they are for their owner alone, from the first byte on."""

import os
import stat
from pathlib import Path
from typing import BinaryIO


def create(path: Path, buffering: int = -1) -> BinaryIO:
    """A fresh file to write to, of mode 0600 at most, whatever the umask is and whatever was there.

    A file of that name is removed first: who has it open, or has another name for it, reads nothing of the new one. A
    symbolic link is not followed, as it may be somebody else's. What is no file, such as /dev/null, is written to as
    it is. buffering: as for `open`. Raises OSError.
    """
    try:
        descriptor = _fresh(path)
    except FileExistsError:
        if stat.S_ISREG(path.lstat().st_mode):
            path.unlink()
            descriptor = _fresh(path)
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    return os.fdopen(descriptor, "wb", buffering)


def _fresh(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
