"""A value that files say, made again when they change. As long as they are damaged, the last good one stays."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

# What was written so short a time ago may be written to once more without another time of change.
_YOUNG_S = 0.1

_T = TypeVar("_T")
_Mark = tuple[tuple[int, int, int] | None, ...]


class Reread(Generic[_T]):
    """The last good value of some files. Thread-safe.

    read: makes it; raises for files that are damaged. damaged: told of that, once for each text.
    every_s: how often files are looked at, at most.

    value: as of the last look that found them good. Raises what `read` does, as long as there is none.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], _T],
        damaged: Callable[[Exception], None] = lambda error: None,
        every_s: float = 0.0,
    ) -> None:
        self._paths, self._read, self._damaged, self._every_s = tuple(paths), read, damaged, every_s
        self._lock = threading.Lock()
        self._seen, self._said = _mark(self._paths), ""
        self.value = read()
        self._again_s = time.monotonic() + every_s
        if _is_young(self._seen):
            self._seen = ()

    @property
    def is_damaged(self) -> bool:
        """Whether the files were of no use at the last look, so that the value is an older one."""
        return bool(self._said)

    def forked(self) -> None:
        """In the child of a fork: whoever looked at that moment is the parent's, and lets go of nothing here."""
        self._lock = threading.Lock()

    def look(self) -> bool:
        """Read the files again if they changed. Whether there is another value since the last look."""
        lock = self._lock
        if time.monotonic() < self._again_s or not lock.acquire(blocking=False):
            return False
        try:
            self._again_s = time.monotonic() + self._every_s
            mark = _mark(self._paths)
            if mark == self._seen:
                return False
            before = self.value
            try:
                value = self._read()
            except Exception as error:  # of whatever kind: nobody else looks again
                if mark == _mark(self._paths):
                    self._seen = () if _is_young(mark) else mark
                    text = str(error) or repr(error)
                    if text != self._said:
                        self._said = text
                        self._damaged(error)
                return False
            # Of one that changed meanwhile, who knows which half was read: it is read again.
            if mark != _mark(self._paths):
                return False
            self.value, self._said = value, ""
            self._seen = () if _is_young(mark) else mark
            return value != before
        finally:
            lock.release()


def _mark(paths: Sequence[Path]) -> _Mark:
    """Another when a file was replaced or written to."""
    marks: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            status = path.stat()
            marks.append((status.st_mtime_ns, status.st_ino, status.st_size))
        except OSError:
            marks.append(None)
    return tuple(marks)


def _is_young(mark: _Mark) -> bool:
    now = time.time()
    return any(one is not None and abs(now - one[0] / 1e9) < _YOUNG_S for one in mark)
