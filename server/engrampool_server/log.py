"""One JSON object a line on standard error, for each event in the server's life.

Whoever reads them may stand still; no process of the server does so for that: what nobody takes is dropped.
"""

import json
import logging
import os
import select
import sys
import time
from typing import Any

_LOGGER = logging.getLogger("engrampool")
# Which process of the server speaks.
_PROCESS: dict[str, int] = {}
# How long a reader may take to take something, the first time that it does not.
_PATIENCE_MS = 200


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage(), **_PROCESS}
        # What the contract's package says, which is of registries, is no event of ours.
        line.update(getattr(record, "fields", {"event": "registry", "message": record.getMessage()}))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Lines(logging.Handler):
    """Writes lines to a descriptor, for as long as somebody takes them."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._is_stuck = False
        self._left = b""  # to be written before all else
        self._dropped = 0
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        """What is left is the parent's to write."""
        self._left, self._dropped = b"", 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or drop it."""
        try:
            if not self._write():
                self._dropped += 1
                return
            if self._dropped:
                lines, self._dropped = self._dropped, 0
                event("lines-dropped", level="warning", lines=lines)  # which comes here again
            self._left += self.format(record).encode() + b"\n"
            self._write()
        except Exception:
            self.handleError(record)

    def _write(self) -> bool:
        """Write what is left. Whether all of it was taken."""
        while self._left:
            if not self._poll.poll(0 if self._is_stuck else _PATIENCE_MS):
                self._is_stuck = True
                return False
            self._is_stuck = False
            try:
                # A pipe that takes anything takes so much.
                written = os.write(self._descriptor, self._left[: select.PIPE_BUF])
            except OSError:  # nobody reads it ever again
                self._left = b""
                return True
            self._left = self._left[written:]
        return True


def configure(level: str) -> None:
    """Send events of at least `level` (debug, info, warning, error) to standard error."""
    handler = _Lines(sys.stderr.fileno())
    handler.setFormatter(_JsonLines())
    _LOGGER.handlers[:] = [handler]
    _LOGGER.setLevel(level.upper())
    _LOGGER.propagate = False


def of_worker(index: int) -> None:
    """Have every later event of this process carry the worker's number."""
    _PROCESS["worker"] = index


def event(name: str, level: str = "info", **fields: Any) -> None:
    """Log the event `name` with its fields; values are JSON types or have a `str`."""
    _LOGGER.log(getattr(logging, level.upper()), name, extra={"fields": fields})
