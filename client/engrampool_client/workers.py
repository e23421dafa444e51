"""The client's threads: steps wait here for a place, those needed now before those asked for ahead."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("engrampool")
_Job = Callable[[], Any]


class Workers:
    """Up to `most` threads, started as they are needed.

    One of them never works on jobs asked for ahead, unless it is the only one: what is needed now finds a place.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._most_ahead, self._name = most, max(1, most - 1), name
        self._changed = threading.Condition()
        self._now: deque[_Job] = deque()
        self._ahead: deque[_Job] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = self._busy_ahead = 0
        self._closed = False

    def submit(self, job: _Job, ahead: bool = False) -> bool:
        """Have `job` run in its turn. False if the workers are closed."""
        with self._changed:
            if self._closed:
                return False
            (self._ahead if ahead else self._now).append(job)
            if self._idle < len(self._now) + len(self._ahead) and len(self._threads) < self._most:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            else:
                self._changed.notify()
            return True

    def close(self) -> None:
        """Run what was submitted, take nothing more, and wait for the threads to end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _may_run_ahead(self) -> bool:
        return bool(self._ahead) and self._busy_ahead < self._most_ahead

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._now or self._may_run_ahead() or self._closed)
                self._idle -= 1
                ahead = not self._now
                if not ahead:
                    job = self._now.popleft()
                elif self._may_run_ahead():
                    job = self._ahead.popleft()
                    self._busy_ahead += 1
                else:  # closing; if there is more, others are at it
                    return
            try:
                job()
            except Exception:
                _log.exception("unexpected failure in a thread of the client")
            if ahead:
                with self._changed:
                    self._busy_ahead -= 1
                    self._changed.notify()
