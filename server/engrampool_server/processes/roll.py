"""A rolling restart: every worker is replaced by a successor, one after the other, and answers go on meanwhile."""

import time
from collections import deque
from collections.abc import Callable

from engrampool_server.processes.children import Child, Children
from engrampool_server.telemetry import log


class Roll:
    """One at a time; another one that is asked for meanwhile begins at its end.

    workers: by number, whoever the process is at the time.

    The others are called. hindered: why none may begin now, "" if one may. fork: starts the worker of a number; raises
    OSError. stop: has one drain and end. replace: starts one again that ended.
    """

    def __init__(
        self,
        workers: dict[int, Child],
        children: Children,
        *,
        hindered: Callable[[], str],
        fork: Callable[[int], Child],
        stop: Callable[[Child], None],
        replace: Callable[[Child], None],
    ) -> None:
        self._workers, self._children = workers, children
        self._hindered, self._fork, self._stop, self._replace = hindered, fork, stop, replace
        # Those still to be replaced, the one that is to take over next, the one that leaves.
        self._left: deque[int] = deque()
        self._successor: Child | None = None
        self._leaving: Child | None = None
        self._under_way = self._again = False
        self._begun_s = 0.0

    @property
    def under_way(self) -> bool:
        """Whether one is going on."""
        return self._under_way

    def request(self) -> None:
        """Begin one, or note that another is to follow."""
        if why := self._hindered():
            log.event("roll-ignored", reason=why)
        elif self._under_way or self._children.has_thread:  # nobody forks beside a thread
            self._again = True
            log.event("roll-queued")
        else:
            self._under_way, self._begun_s = True, time.monotonic()
            self._left.extend(sorted(self._workers))
            log.event("rolling", workers=len(self._left))
            self._next()

    def begin_queued(self) -> None:
        """Begin the one that was noted, if any."""
        if self._again:
            self._again = False
            self.request()

    def cancel(self) -> None:
        """Replace none of those that are left."""
        self._left.clear()

    def is_coming(self, index: int) -> bool:
        """Whether a successor of this worker is on its way."""
        return self._successor is not None and self._successor.index == index

    def ready(self, child: Child) -> None:
        """A worker is ready: if it is the successor, the one before it goes."""
        if child is not self._successor:
            return
        self._successor = None
        self._leaving = self._workers.get(child.index)
        self._workers[child.index] = child
        if self._leaving is not None:
            self._stop(self._leaving)
        else:
            self._next()

    def ended(self, child: Child) -> bool:
        """Whether the child that ended was part of this; then whatever follows from it was done."""
        if child is self._leaving:
            self._leaving = None
            self._next()
            return True
        if child is self._successor:
            self._failed(child)
            return True
        return False

    def _next(self) -> None:
        """Start the successor of the next worker; see `ready` for what becomes of the two."""
        while self._left:
            index = self._left.popleft()
            if index in self._workers:  # else it ended meanwhile, and is replaced anyway
                try:
                    self._successor = self._fork(index)
                except OSError as error:
                    log.event("fork-failed", level="error", error=error.strerror)
                    break
                return
        else:
            log.event("rolled", seconds=round(time.monotonic() - self._begun_s, 3))
        self._end()

    def _failed(self, successor: Child) -> None:
        """The successor ended before it was ready: whoever is left of the old ones goes on."""
        log.event("roll-failed", level="error", worker=successor.index)
        if successor.index not in self._workers:
            self._replace(successor)
        self._end()

    def _end(self) -> None:
        self._left.clear()
        self._successor, self._under_way = None, False
        self.begin_queued()
