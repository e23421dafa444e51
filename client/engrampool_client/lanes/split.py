"""Parts of one lookup at once: one in the caller's thread, the others in threads beside it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from engrampool_client.errors import StepCancelledError
from engrampool_client.lookup.delivery import Delivery

# A part that is claimed begins at once, however busy the machine is.
_BEGIN_S = 5.0


class SideBySide:
    """To be used in `with`, whose end waits for every part, however it came, so that nothing is written after it.

    Raises there what the first part that failed did, unless the block raised. A part that has not begun by then does
    not begin. Ctrl-C gives the lookup up, and is raised once all parts have ended. Locks of the system's own are
    waited for, and no future: Ctrl-C leaves those half way.
    """

    def __init__(self, threads: ThreadPoolExecutor, delivery: Delivery) -> None:
        self._threads, self._delivery = threads, delivery
        self._parts: list[_Part] = []

    def begin(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have `call` run in another thread."""
        part = _Part(call, arguments)
        self._parts.append(part)
        self._threads.submit(part.run)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupt = None if isinstance(error, Exception) else error
        failed = error is not None
        waiting = list(self._parts)
        while waiting:
            try:
                if interrupt is not None:
                    self._delivery.give_up(StepCancelledError("the lookup was interrupted"), wait=False)
                while waiting:
                    waiting[-1].end(drop=failed)
                    waiting.pop()
            except KeyboardInterrupt as another:
                interrupt, failed = another, True
        if interrupt is not None and interrupt is not error:
            raise interrupt
        if error is None:
            for part in self._parts:
                if part.error is not None:
                    raise part.error


class _Part:
    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._call, self._arguments = call, arguments
        self.error: BaseException | None = None
        self._begun = self._ended = False
        self._claimed, self._running = threading.Lock(), threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """In the other thread."""
        if not self._claimed.acquire(blocking=False):
            return
        self._begun = True
        try:
            self._call(*self._arguments)
        except BaseException as error:
            self.error = error
        finally:
            self._ended = True
            self._running.release()

    def end(self, drop: bool) -> None:
        """Wait for its end. drop: unless it has not begun; then it never will. May be called again if interrupted."""
        if drop and self._claimed.acquire(blocking=False):
            return
        while not self._ended and not self._running.acquire(timeout=_BEGIN_S):
            if drop and not self._begun:  # it was dropped before
                return
