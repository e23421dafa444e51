"""Which of many events alike the log tells of: one a second from each process, and how many others there were."""

import threading
import time

EVERY_S = 1.0


class Told:
    """Of one kind of event, in one process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_s, self._untold = 0.0, 0

    def due(self) -> int | None:
        """Count one; how many went untold since the last that was told of, if this one is to be, else None."""
        now = time.monotonic()
        with self._lock:
            if now < self._next_s:
                self._untold += 1
                return None
            self._next_s, untold, self._untold = now + EVERY_S, self._untold, 0
            return untold
