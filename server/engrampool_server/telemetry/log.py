"""One JSON object a line on standard error, for each event in the server's life.

Whoever reads them may stand still; no process of the server does so for that: a bounded number of lines is kept for
them, and what comes beyond is dropped and counted.
"""

import json
import logging
import math
import os
import select
import socket
import stat
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

_LOGGER = logging.getLogger("engrampool")
# Which process of the server speaks.
_PROCESS: dict[str, int] = {}
# What a process keeps of lines that nobody takes.
KEPT_BYTES = 256 << 10
_PAUSE_MS = 10
# Of a field in a line that is too long: as much of each as lets the line be short enough.
_ROOMS = (2048, 1024, 512, 256, 128, 64, 32)


class _JsonLines(logging.Formatter):
    """longest: the most bytes of a line, without its end."""

    def __init__(self, longest: float) -> None:
        super().__init__()
        self._longest = longest

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage(), **_PROCESS}
        # What the contract's package says is of registries; what others say is no event of ours.
        ours = record.name.partition(".")[0] == _LOGGER.name
        said = {"event": "registry"} if ours else {"event": "library", "logger": record.name}
        line.update(getattr(record, "fields", {**said, "message": record.getMessage()}))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        text = json.dumps(line, default=str)  # all ASCII
        return text if len(text) <= self._longest else self._cut(line)

    def _cut(self, line: dict[str, Any]) -> str:
        """The line without the middle of long texts and the rest of long lists; `cut` names them, "*" for all."""
        for room in _ROOMS:
            short = {name: _shortened(value, room) for name, value in line.items()}
            cut = [name for name, value in line.items() if short[name] is not value]
            text = json.dumps({**short, "cut": cut}, default=str)
            if len(text) <= self._longest:
                return text
        event = str(line["event"])[: _ROOMS[-1]]
        return json.dumps({"time": line["time"], "level": line["level"], "event": event, "cut": ["*"]})


def _shortened(value: Any, room: int) -> Any:
    """The value itself if its JSON has at most `room` bytes, else some of it."""
    if len(json.dumps(value, default=str)) <= room:
        return value
    if isinstance(value, list | tuple):
        kept: list[Any] = []
        for one in value:
            if len(json.dumps([*kept, one], default=str)) > room:
                break
            kept.append(one)
        return kept
    text = str(value)
    return f"{text[: room // 2]} ... {text[len(text) - room // 2 :]}"


class _Lines(logging.Handler):
    """Writes lines to a descriptor, as fast as somebody takes them, and never waits for that.

    descriptor: it, or our own for the same file. counted: called with how many lines were dropped, by `tend`.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor, self._send = _unblocked(descriptor)
        mode = os.fstat(descriptor).st_mode
        # So much is taken at once or not at all, so that lines of several processes do not get into each other.
        shared = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
        self.setFormatter(_JsonLines(select.PIPE_BUF - 1 if shared else math.inf))
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        # Since a line last said so, and since they were last counted.
        self._dropped = self._uncounted = 0
        self.counted: Callable[[int], object] = lambda lines: None
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        """What is kept is the parent's to write, and to count."""
        self._kept.clear()
        self._kept_bytes = self._dropped = self._uncounted = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or keep it until somebody takes it, or drop it."""
        try:
            self._write()
            line = self.format(record).encode() + b"\n"
            if self._kept and self._kept_bytes + len(line) > KEPT_BYTES:
                self._drop(1)
                return
            if self._dropped:
                lines, self._dropped = self._dropped, 0
                event("lines-dropped", level="warning", lines=lines)  # which comes here again
            self._keep(line)
            self._write()
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Drop a line that cannot be written as JSON: to say more, as logging does, may wait for who reads."""
        self._drop(1)

    def tend(self, within_s: float) -> None:
        """Write what is kept, for up to so long, and count what was dropped."""
        until_s = time.monotonic() + within_s
        self.acquire()
        try:
            self._write()
            while self._kept and time.monotonic() < until_s:
                poll = select.poll()
                poll.register(self.descriptor, select.POLLOUT)
                poll.poll(_PAUSE_MS)
                self._write()
            lines, self._uncounted = self._uncounted, 0
        finally:
            self.release()
        if lines:  # without the lock: who counts may log
            self.counted(lines)

    def _keep(self, line: bytes) -> None:
        self._kept.append(line)
        self._kept_bytes += len(line)

    def _drop(self, lines: int) -> None:
        self._dropped += lines
        self._uncounted += lines

    def _write(self) -> None:
        """Write as much of what is kept as is taken now."""
        while self._kept:
            try:
                written = self._send(self._kept[0])
            except BlockingIOError:
                return
            except OSError:  # nobody reads it ever again, or the disk is full
                self._drop(len(self._kept))
                self._kept.clear()
                self._kept_bytes = 0
                return
            self._kept_bytes -= written
            if written == len(self._kept[0]):
                self._kept.popleft()
            else:
                self._kept[0] = self._kept[0][written:]


def _unblocked(descriptor: int) -> tuple[int, Callable[[bytes], int]]:
    """A descriptor of our own for the same file, and what writes to it without waiting; raises BlockingIOError.

    That a file does not block is said of an open file, which we share with who started us, and with a whole terminal.
    So a pipe or a terminal is opened once more, and a socket is told so with each call.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        peer = socket.socket(fileno=os.dup(descriptor))
        return peer.fileno(), lambda line: peer.send(line, socket.MSG_DONTWAIT)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        try:
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:  # another user's
            pass
        else:
            return own, lambda line: os.write(own, line)
    same = os.dup(descriptor)
    poll = select.poll()
    poll.register(same, select.POLLOUT)

    def write(line: bytes) -> int:
        if not poll.poll(0):
            raise BlockingIOError
        # A pipe that takes anything takes so much, unless somebody else is faster.
        return os.write(same, line[: select.PIPE_BUF])

    return same, write


def configure(level: str, to: int | None = None) -> None:
    """Send events of at least `level` (debug, info, warning, error) to standard error; of libraries, warnings.

    to: a descriptor to send them to instead.
    """
    handler = _Lines(sys.stderr.fileno() if to is None else to)
    _LOGGER.handlers[:] = [handler]
    _LOGGER.setLevel(level.upper())
    _LOGGER.propagate = False
    logging.getLogger().handlers[:] = [handler]
    logging.captureWarnings(True)


def descriptor() -> int:
    """Where the log goes, for a program that is to log there, too; 2 before `configure`."""
    return next((handler.descriptor for handler in _LOGGER.handlers if isinstance(handler, _Lines)), 2)


def tend(within_s: float = 0.0) -> None:
    """Write what nobody took before, for up to so long. To be called from time to time, and before a process ends."""
    for handler in _LOGGER.handlers:
        if isinstance(handler, _Lines):
            handler.tend(within_s)


def count_dropped(counted: Callable[[int], object]) -> None:
    """Have `tend` call this with how many lines were dropped since."""
    for handler in _LOGGER.handlers:
        if isinstance(handler, _Lines):
            handler.counted = counted


def of_worker(index: int) -> None:
    """Have every later event of this process carry the worker's number."""
    _PROCESS["worker"] = index


def event(name: str, level: str = "info", **fields: Any) -> None:
    """Log the event `name` with its fields; values are JSON types or have a `str`."""
    _LOGGER.log(getattr(logging, level.upper()), name, extra={"fields": fields})
