"""An event that Ctrl-C cannot leave half set, with a lock that nobody lets go of any more."""

import threading
from collections.abc import Callable


class Event(threading.Event):
    """As `threading.Event`, whose lock Ctrl-C can leave taken: it takes it by lines of Python, which end anywhere.

    It can be set in whatever the thread is doing, as garbage collection does that, too.
    """

    def __init__(self) -> None:
        super().__init__()
        # The lock itself, and not the condition, is what `with` takes.
        self._taken = threading.RLock()
        self._changed = threading.Condition(self._taken)
        self._is_set = False

    def is_set(self) -> bool:
        """Whether it is."""
        return self._is_set

    def set(self) -> None:
        """For good; whoever waits is woken. Once more wakes those whom a call did not that was interrupted."""
        self._is_set = True
        with self._taken:
            self._changed.notify_all()

    def clear(self) -> None:
        """It is not set any more."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set, within so many seconds."""
        return self._is_set or wait_for(self._changed, self._taken, lambda: self._is_set, timeout)


def wait_for(
    changed: threading.Condition, lock: threading.RLock, condition: Callable[[], bool], timeout: float | None
) -> bool:
    """Whether `condition` came true within so many seconds. lock: that of `changed`. Ctrl-C is raised as such."""
    try:
        with lock:
            return changed.wait_for(condition, timeout)
    except RuntimeError as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        # It came while the condition had let go of the lock, so that `with` found it free.
        raise error.__context__ from None
