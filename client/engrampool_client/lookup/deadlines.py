"""Every lookup of a client that has not ended, and a thread that settles those whose deadline has passed."""

import logging
import threading
import time
from math import inf

from engrampool_client.errors import EngrampoolError
from engrampool_client.lookup.delivery import Delivery

# Once lookups are attended to, the thread looks so often, for so long: to be woken by each of them costs it more.
_LOOKS_EACH_S, _LOOKS_ON_S = 0.04, 1.0
_log = logging.getLogger("engrampool")


class Deadlines:
    """Settles lookups by their deadlines, whether somebody waits for them or not. Thread-safe.

    The thread is started with the first lookup that needs it. It sleeps until the earliest deadline that it knows of,
    and is woken for an earlier one only: lookups that all have the same time wake it about once in that time.
    """

    def __init__(self) -> None:
        # Changed without the lock, by operations that are one step for other threads. True: its deadline has passed,
        # and whoever is still writing settles it.
        self._open: dict[Delivery, bool] = {}
        # Taken by itself: see delivery.py.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._wakes_at, self._looks_until = inf, -inf
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, delivery: Delivery, wake: bool = True) -> None:
        """Settle it by its deadline, until `forget`. wake: False where the caller's own thread sees to that.

        Rows that nobody has come for when their receiver says so are attended to.
        Raises RuntimeError if the system gives no thread for it.
        """
        self._open[delivery] = False
        if wake and delivery.deadline < self._wakes_at:
            with self._lock:
                if (self._thread is None or not self._thread.is_alive()) and not self._closed:
                    thread = threading.Thread(target=self._run, name="engrampool-deadlines", daemon=True)
                    thread.start()
                    self._thread = thread
                # All of one: where Ctrl-C comes into a `notify`, the next one may be for nobody.
                self._changed.notify_all()

    def look_by(self, when: float) -> None:
        """Look then at what is watched, by time.monotonic."""
        self._looks_until = when + _LOOKS_ON_S
        if when < self._wakes_at:
            with self._lock:
                self._changed.notify_all()

    def forget(self, delivery: Delivery) -> None:
        """It has ended."""
        self._open.pop(delivery, None)

    def give_up_all(self, error: EngrampoolError) -> None:
        """Give up everything that has not ended, and wait for those who are writing."""
        for delivery in list(self._open):
            delivery.give_up(error)

    def forked(self, error: EngrampoolError) -> None:
        """In the child of a fork, which has no thread but its own: settle everything there."""
        self._lock, self._closed, self._thread = threading.RLock(), True, None
        self._changed = threading.Condition(self._lock)
        for delivery in list(self._open):
            delivery.forked(error)
        self._open.clear()

    def close(self, wait: bool = True) -> None:
        """Watch no more, and wait for the thread to end."""
        with self._lock:
            self._closed = True
            self._changed.notify()
        if wait and self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                # Before it is looked at what there is: what comes meanwhile is seen, or sees this and notifies.
                self._wakes_at = inf
                known = list(self._open.items())
                now = time.monotonic()
                due = [delivery for delivery, passed in known if not passed and delivery.deadline <= now]
                alone = [delivery for delivery, passed in known if not passed and _attend_at(delivery) <= now]
                if not due and not alone:
                    self._wakes_at = min(
                        (min(one.deadline, _attend_at(one)) for one, passed in known if not passed), default=inf
                    )
                    if now < self._looks_until:
                        self._wakes_at = min(self._wakes_at, now + _LOOKS_EACH_S)
                    limit_s = self._wakes_at - now
                    del known, due, alone  # they hold on to whole lookups
                    self._changed.wait(limit_s if limit_s < threading.TIMEOUT_MAX else None)
                    continue
            del known
            while due:
                self._expire(due.pop())
            while alone:
                self._attend(alone.pop())

    def _attend(self, delivery: Delivery) -> None:
        try:
            delivery.attend()
        except Exception:  # it has its deadline
            _log.exception("a lookup that nobody waits for could not be attended to")

    def _expire(self, delivery: Delivery) -> None:
        if delivery in self._open:
            self._open[delivery] = True
        try:
            delivery.expire(wait=False)
        except Exception:  # the next ones have deadlines, too
            _log.exception("a lookup could not be settled at its deadline")
        if delivery.ended:
            self.forget(delivery)


def _attend_at(delivery: Delivery) -> float:
    receiver = delivery.receiver
    return inf if receiver is None or delivery.ended else receiver.attend_at
