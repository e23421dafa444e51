"""Reading a file of credentials: all of it, without waiting for a writer, and never more than such a file has."""

import errno
import os
import stat
from pathlib import Path

# Far more than certificates, keys, tokens or callers take: whatever is larger is another file.
MOST_BYTES = 4 << 20


def read_small(path: Path) -> bytes:
    """The bytes of a regular file. Raises OSError, also for a pipe or a device, and for more than MOST_BYTES."""
    # To open a pipe would wait for who writes to it, and to read a device may never end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file, which could be read again when it changes")
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MOST_BYTES} bytes; is it the right file?")
    return raw
