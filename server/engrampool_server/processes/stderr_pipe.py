"""What libraries write to the standard error of a child process, gRPC above all: read by its parent, for the log."""

import os
import re

from engrampool_server.telemetry import log

# As abseil writes: level, date, time, thread, source, and what there is to say.
_ABSEIL = re.compile(r"([IWEF])[0-9]{4} [0-9:.]+ +[0-9]+ (\S+:[0-9]+)\] (.*)")
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "error"}
_READ_BYTES = 65536
_LONGEST_BYTES = 4096
# Of one that ended, what a process that it left behind may still say is not waited for.
_LAST_READS = 16


class StderrPipe:
    """A pipe in the place of a child's standard error. To be made before the fork; neither side waits for the other.

    reader: the descriptor to read, -1 once closed. Raises OSError.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        for end in (self.reader, self._writer):
            os.set_blocking(end, False)
        self._name: int | str = ""
        self._pid = 0
        self._unread = b""

    def take_over(self) -> None:
        """In the child: have all that is written to standard error go here."""
        os.dup2(self._writer, 2)
        self.leave()

    def listen(self, name: int | str, pid: int) -> None:
        """In the parent: hear this child."""
        self._name, self._pid = name, pid
        os.close(self._writer)
        self._writer = -1

    def read(self) -> bool:
        """Log the lines that there are. Whether there may be more, now or later."""
        try:
            said = os.read(self.reader, _READ_BYTES)
        except BlockingIOError:
            return True
        *lines, self._unread = (self._unread + said).split(b"\n")
        if not said or len(self._unread) > _LONGEST_BYTES:
            lines.append(self._unread)
            self._unread = b""
        for line in lines:
            self._log(line[:_LONGEST_BYTES].decode(errors="replace").rstrip())
        return bool(said)

    def close(self) -> None:
        """Log what a child that ended said last, and hear no more of it. Twice is once."""
        if self.reader >= 0:
            for _ in range(_LAST_READS):
                if not self.read():
                    break
            self.leave()

    def leave(self) -> None:
        """Close what is open here. Twice is once."""
        for end in (self.reader, self._writer):
            if end >= 0:
                os.close(end)
        self.reader = self._writer = -1

    def _log(self, line: str) -> None:
        found = _ABSEIL.fullmatch(line)
        if found:
            level, where, message = found.groups()
            log.event("grpc", _LEVELS[level], worker=self._name, pid=self._pid, where=where, message=message)
        elif line:
            log.event("stderr", "warning", worker=self._name, pid=self._pid, message=line)
