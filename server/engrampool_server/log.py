"""One JSON object a line on standard error, for each event in the server's life."""

import json
import logging
import sys
import time
from typing import Any

_LOGGER = logging.getLogger("engrampool")
# Which process of the server speaks.
_PROCESS: dict[str, int] = {}


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage(), **_PROCESS}
        # What the contract's package says, which is of registries, is no event of ours.
        line.update(getattr(record, "fields", {"event": "registry", "message": record.getMessage()}))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Send events of at least `level` (debug, info, warning, error) to standard error."""
    handler = logging.StreamHandler(sys.stderr)
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
