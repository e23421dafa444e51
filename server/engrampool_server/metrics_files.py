"""Metrics of several processes: each keeps its values in files of one directory, and exporter.py adds them up.

This is prometheus_client's multiprocess mode, except that its files are named by slots instead of process ids: a
process goes on counting where the one before it in the slot ended, so sums never go back and files do not pile up.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from prometheus_client import values
from prometheus_client.multiprocess import mark_process_dead

from engrampool_proto.errors import EngrampoolError

_PREFIX = "engrampool-metrics-"
_SHM = Path("/dev/shm")  # noqa: S108
_writer = [""]


class MetricsDirectory:
    """A directory of this server alone, in memory where possible, gone with `close`.

    What servers that were killed have left is removed at the next start: a directory belongs to whoever holds its lock.
    Raises EngrampoolError if there is nowhere to make it.
    """

    def __init__(self) -> None:
        self.path, self._lock = _create()

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.leave()

    def leave(self) -> None:
        """Let go of it, in a process that inherited it and is not its owner."""
        os.close(self._lock)

    def use(self, writer: str) -> None:
        """Keep the metrics that are made from now on here; this process is `writer`."""
        # Read by prometheus_client each time it opens a file.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.path)
        values.ValueClass = values.MultiProcessValue(lambda: _writer[0])  # type: ignore[no-untyped-call]
        become(writer)

    def forget(self, writer: str) -> None:
        """Drop the gauges of a writer that ended; what it counted stays."""
        mark_process_dead(writer, str(self.path))  # type: ignore[no-untyped-call]


def become(writer: str) -> None:
    """Write the files of `writer` from now on, after a fork. No two processes at one time are the same writer."""
    _writer[0] = writer


def _create() -> tuple[Path, int]:
    problems = []
    for directory in (lambda: _SHM, tempfile.gettempdir):  # which looks for one, and there may be none
        try:
            parent = Path(directory())
            _remove_stale(parent)
            while True:
                path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.exists():
                    return path, lock
                os.close(lock)  # another server's start took it for left behind, before it was locked
        except OSError as error:
            problems.append(f"{error.filename or 'TMPDIR'}: {error.strerror}")
    raise EngrampoolError(f"no directory for metrics can be made ({'; '.join(problems)}); set TMPDIR")


def _remove_stale(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # somebody else's, or gone
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:  # in use
            pass
        finally:
            os.close(lock)
