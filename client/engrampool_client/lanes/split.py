"""Parts of one lookup at once: one in the caller's thread, the others in threads beside it."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from engrampool_client.errors import DeadlineError, StepCancelledError
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.workers import HELD_S, Job, Workers


class SideBySide:
    """To be used in `with`, whose end waits for every part, however it came, so that nothing is written after it.

    Raises there what the first part that failed did, unless the block raised. A part that has not begun by then does
    not begin. Ctrl-C gives the lookup up, and is raised once all parts have ended. Locks of the system's own are
    waited for, and no future: Ctrl-C leaves those half way.

    No part is waited for beyond the lookup's deadline, nor for long once the lookup was given up, as it may stand at a
    lock that nobody lets go of any more: then the lookup has ended, and that part can write nothing.
    """

    def __init__(self, threads: Workers, delivery: Delivery) -> None:
        self._threads, self._delivery = threads, delivery
        self._parts: list[_Part] = []

    def begin(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have `call` run in another thread. Raises RuntimeError if there is none."""
        part = _Part(call, arguments)
        self._parts.append(part)
        if not self._threads.submit(Job(self._delivery, _unplanned, part.run)):
            raise RuntimeError("the threads for parts of lookups are closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        delivery, until = self._delivery, self._delivery.deadline
        interrupt = None if isinstance(error, Exception) else error
        failed, late = error is not None, False
        waiting = list(self._parts)
        while waiting:
            try:
                if interrupt is not None:
                    delivery.give_up(StepCancelledError("the lookup was interrupted"), wait=False)
                while waiting:
                    if delivery.given_up:
                        until = min(until, time.monotonic() + HELD_S)
                    # In turns, as it may be given up meanwhile.
                    if not waiting[-1].end(failed, min(until, time.monotonic() + HELD_S)):
                        if time.monotonic() < until:
                            continue
                        late = True
                        delivery.expire()
                    waiting.pop()
            except KeyboardInterrupt as another:
                interrupt, failed = another, True
        if interrupt is not None and interrupt is not error:
            raise interrupt
        if error is None:
            for part in self._parts:
                if part.error is not None:
                    raise part.error
            if late:
                raise delivery.error or DeadlineError("a part of the lookup did not end by the deadline")


class _Part:
    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._call, self._arguments = call, arguments
        self.error: BaseException | None = None
        self._ended = False
        # Who came first, "run" or "end". Kept by the call that finds out, which Ctrl-C cannot come into.
        self._first: dict[str, str] = {}
        self._running = threading.Lock()
        self._running.acquire()

    @property
    def begun(self) -> bool:
        """Whether it runs, or did."""
        return self._first.get("who") == "run"

    def run(self) -> None:
        """In the other thread."""
        if self._first.setdefault("who", "run") != "run":
            return
        try:
            self._call(*self._arguments)
        except BaseException as error:
            self.error = error
        finally:
            self._ended = True
            self._running.release()

    def end(self, drop: bool, until: float) -> bool:
        """Wait for its end, whether it came by `until` (time.monotonic). May be called again.

        drop: unless it has not begun; then it never will.
        """
        if drop and self._first.setdefault("who", "end") == "end":
            return True
        if not self._ended:
            self._running.acquire(timeout=min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX))
        return self._ended


def _unplanned() -> bool:
    return True
