"""What connects a child process to the supervisor: a child says how it is, one line on a pipe each time.

Neither side ever waits for the other, and neither believes the other to be well: a child may end, or be stopped, in the
midst of a line, and the supervisor may be stopped while the pipe fills up.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field

from engrampool_proto.errors import EngrampoolError
from engrampool_server.processes.pool_view import PoolView
from engrampool_server.telemetry import log

# What is published is the longest line: some hundred bytes for each version.
LONGEST_BYTES = 8 << 20
_READ_BYTES = 65536
_SHOWN_BYTES = 200
# Of tables.
_MOST_BYTES = (1 << 63) - 1


@dataclass(eq=False)
class Reporter:
    """A child's side of the pipe to the supervisor.

    life: a pipe's end that reads as closed once the supervisor is gone, however it ended.
    report: a pipe's end that does not block, for lines that say how the child is: empty for a sign of life, else a JSON
    object.
    beat_s: how often to give a sign of life.
    """

    life: int
    report: int
    beat_s: float
    # What the pipe did not take yet: the end of one line, and by kind the last line to come.
    _rest: bytes = field(default=b"", init=False)
    _to_come: dict[str, bytes] = field(default_factory=dict, init=False)

    @property
    def behind_bytes(self) -> int:
        """Bytes that were said and that the pipe did not take. The next sign of life tries again."""
        return len(self._rest) + sum(map(len, self._to_come.values()))

    def beat(self) -> None:
        """Give a sign of life."""
        self._say("beat", b"")
        log.tend()

    def ready(self) -> None:
        """Say that this process does its work now."""
        self._say("ready", b'{"ready": true}')

    def failed(self, why: str) -> None:
        """Say why this process ends."""
        self._say("failed", json.dumps({"failed": why[:2000]}).encode())

    def loaded(self, nbytes: int, of_bytes: int) -> None:
        """Say how many bytes of tables are in memory, of those that are to be."""
        self._say("loaded", json.dumps({"loaded": nbytes, "of": of_bytes}).encode())

    def known(self, known: PoolView) -> None:
        """Say what is known of the pool."""
        self._say("known", json.dumps({"known": known.to_json()}).encode())

    def _say(self, kind: str, line: bytes) -> None:
        # Of a kind only the last is worth saying, and so there is never much to keep.
        self._to_come.pop(kind, None)
        self._to_come[kind] = line + b"\n"
        # A full pipe is one that nobody reads, as while the supervisor is held by a debugger.
        with suppress(BlockingIOError):
            while self._rest or self._to_come:
                if not self._rest:
                    self._rest = self._to_come.pop(next(iter(self._to_come)))
                self._rest = self._rest[os.write(self.report, self._rest) :]


class GarbledError(Exception):
    """A line that no child says; the text is why."""


@dataclass(frozen=True)
class Report:
    """What one line says: that the child is ready, why it failed, how much is loaded of how much, what is known."""

    ready: bool = False
    failed: str = ""
    loaded: tuple[int, int] | None = None
    known: PoolView | None = None

    @staticmethod
    def of(line: bytes) -> "Report":
        """What a line says, which is empty for a sign of life. Raises GarbledError."""
        if not line:
            return Report()
        try:
            match json.loads(line.decode()):
                case {"ready": True, **rest} if not rest:
                    return Report(ready=True)
                case {"failed": str(why), **rest} if not rest:
                    return Report(failed=why)
                case {"loaded": int(nbytes), "of": int(of_bytes), **rest} if not rest:
                    if 0 <= nbytes <= _MOST_BYTES and 0 <= of_bytes <= _MOST_BYTES:
                        return Report(loaded=(nbytes, of_bytes))
                case {"known": dict(known), **rest} if not rest:
                    return Report(known=PoolView.from_json(known))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, EngrampoolError) as error:
            raise GarbledError(str(error)) from error
        raise GarbledError("it says nothing that is known")


class ReportReader:
    """The lines of one child, as its pipe gives them.

    report: the pipe's end to read, which does not block.
    unread: the beginning of a line whose end has not come.
    """

    def __init__(self, report: int) -> None:
        self._report = report
        self.unread = b""

    def read(self) -> list[bytes] | None:
        """The lines that ended in what one reading gave; None at the pipe's end. Raises BlockingIOError for nothing."""
        said = os.read(self._report, _READ_BYTES)
        if not said:
            return None
        *lines, self.unread = (self.unread + said).split(b"\n")
        if len(self.unread) > LONGEST_BYTES:
            # Nobody says that, nor may its end, when it comes, make a line of it that somebody says.
            self.unread = b"\xff" + self.unread[:_SHOWN_BYTES]
        return lines


def shown(line: bytes) -> str:
    """A line that nobody understands, for the log."""
    return repr(line[:_SHOWN_BYTES])
