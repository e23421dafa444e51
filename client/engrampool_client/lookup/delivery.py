"""What lanes hold of a lookup: where its rows go, whether they may still be written, and how each layer is settled."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from engrampool_client.errors import DeadlineError, EngrampoolError, PoolError, RejectedError, StepCancelledError
from engrampool_client.event import wait_for
from engrampool_client.tracing.record import Trace
from engrampool_proto.errors import BatchError
from engrampool_proto.wire import ServerTimes

Rows = npt.NDArray[np.uint8]
Valid = npt.NDArray[np.bool_]
# Rows and which tokens have theirs, of a layer that did not come.
Blank = Callable[[int], tuple[Rows, Valid]]
_log = logging.getLogger("engrampool")
_telling = threading.local()


def in_callback() -> bool:
    """Whether this thread runs a callback now: then others may wait for it, and it must not wait for them."""
    return getattr(_telling, "depth", 0) > 0


class Receiver(Protocol):
    """Whoever has rows come in the threads that wait for them."""

    attend_at: float

    def open_to(self, until: float) -> bool:
        """Whether nobody receives, and one who waits until then may."""

    def receive(self, enough: Callable[[], bool], until: float) -> None:
        """Receive in this thread until `enough`, or `until` (time.monotonic), unless another one does."""

    def hand_over(self) -> None:
        """Have a thread of the client wait for the rows, as nobody else may."""

    def end(self) -> None:
        """The lookup has ended, and nobody is writing. Once more does no harm."""

    def forked(self) -> None:
        """In the child of a fork: let go without a word, and wait for nobody."""


class Finisher(Protocol):
    """Whoever brings rows into the form that the caller wants. It writes into the caller's arrays, at times twice."""

    def finish(self, layer: int, rows: Rows, valid: Valid | None) -> Rows:
        """What the caller gets of a layer. valid: which tokens have their rows; None for all."""

    def failed(self, layer: int) -> None:
        """A layer has no rows, and never will."""


class Delivery:
    """The rows of one lookup on their way to the caller. Thread-safe.

    A layer is settled once: its rows are there, or it has failed for good. The first of `end` and `give_up` decides
    what became of those that are missing. From then on `writing` lets nobody in, and once the last writer has left
    every layer is settled. Nobody can stop that half way: what fails on the way is logged, and whoever is interrupted
    (KeyboardInterrupt) leaves a state that the next call of `end` or `give_up`, from any thread, brings to its end.

    layers: ascending. deadline: by time.monotonic. begun: by time.perf_counter. error: why rows are missing.
    rows, valid: of the layers that are settled with rows, masked ones included. arrived_s: layer -> seconds from the
    beginning until its rows were there. times: the server's own, once all rows are there.
    elapsed_s: seconds from the beginning to the last row, once all rows are there.
    receiver: who has rows come in the threads that wait for them; None where they come by themselves.
    whole: whether nobody takes a layer before all are there.
    finisher: has the last word on rows; None where they are as they come. trace: what it does; None to note nothing.
    """

    def __init__(
        self,
        layers: Sequence[int],
        deadline: float = inf,
        blank: Blank | None = None,
        on_end: "Callable[[Delivery], Any] | None" = None,
        whole: bool = False,
    ) -> None:
        """blank: gives what stands in for rows that do not come; None leaves them missing.

        on_end: called once every layer is settled, at least once, in the thread that settled the last.
        """
        if not layers:
            raise BatchError("a lookup needs at least one layer")
        self.layers = tuple(layers)
        self.deadline, self.whole = deadline, whole
        self.begun = time.perf_counter()
        self.error: EngrampoolError | None = None
        self.rows: dict[int, Rows] = {}
        self.valid: dict[int, Valid] = {}
        self.arrived_s: dict[int, float] = {}
        self.times: ServerTimes | None = None
        self.elapsed_s: float | None = None
        self.blank, self._on_end = blank, on_end
        self.receiver: Receiver | None = None
        self.trace: Trace | None = None
        self.finisher: Finisher | None = None
        # The lock itself, and not the condition, is what `with` takes: Ctrl-C can come between any two lines of Python,
        # and a condition's own line between having the lock and saying so would leave it taken for ever.
        self._lock = threading.RLock()
        self._changed: threading.Condition | None = None  # made for the first that waits
        self._waiting = 0  # threads; to notify nobody is not free
        self._done = self._closing = self._telling = False
        self._working: bool | None = None
        self._writers: list[int] = []  # threads
        self._cancels: list[Callable[[], Any]] = []
        self._callbacks: list[Callable[[int], Any]] = []
        self._idle_callbacks: list[Callable[[], Any]] = []
        self._calls: deque[tuple[Callable[[int], Any], int]] = deque()

    # --- for those who wait

    @property
    def done(self) -> bool:
        """Whether every layer is settled. From then on nothing is written."""
        return self._done or len(self.rows) == len(self.layers)

    @property
    def ended(self) -> bool:
        """Whether nobody is at work on it any more, too."""
        return self._done

    def settled(self, layer: int) -> bool:
        """Whether the layer has its rows, or never will."""
        return layer in self.rows or self._done

    def wait_for(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Whether `condition` came true within `timeout_s`. At the deadline everything is settled, which must do."""
        if condition():
            return True
        remaining_s = self.deadline - time.monotonic()
        limit_s = remaining_s if timeout_s is None else min(timeout_s, remaining_s)
        if self._come(condition, limit_s):
            return True
        if limit_s == timeout_s:
            return condition()
        self.expire()
        return True

    def _come(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Wait, and have the rows come in this thread as far as nobody else does that."""
        until = time.monotonic() + limit_s
        while True:
            receiver, left_s = self.receiver, limit_s
            if receiver is not None:
                receiver.receive(condition, until)
                if condition():
                    return True
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return False
            self._wait(partial(self._may_come, condition, receiver, until), left_s)
            if condition():
                return True
            limit_s = until - time.monotonic()
            if limit_s <= 0:
                return False

    def _may_come(self, condition: Callable[[], bool], receiver: Receiver | None, until: float) -> bool:
        """Whether one that waits while `receiver` is another's, or there is none, is to look again."""
        if condition() or self.receiver is not receiver:
            return True
        return receiver is not None and receiver.open_to(until)

    def receiver_came(self) -> None:
        """Have the threads that wait already look at `receiver`, which came later than they did."""
        self.rouse()
        if self._callbacks:
            self.attend()

    def rouse(self) -> None:
        """Have those who wait look again."""
        with self._lock:
            if self._waiting and self._changed is not None:
                self._changed.notify_all()

    def add_callback(self, callback: Callable[[int], Any]) -> None:
        """Have `callback(layer)` called once for each layer when it is settled, or at once for those that are.

        In the thread that settles it; what it raises is logged.
        """
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
            self._calls.extend((callback, layer) for layer in self.layers if self.settled(layer))
        self._tell()
        self.attend()

    def attend(self) -> None:
        """Have the rows come though nobody may wait for them."""
        if (receiver := self.receiver) is not None and not self._done:
            receiver.hand_over()

    # --- for those who bring rows

    @property
    def given_up(self) -> bool:
        """Whether it was cancelled, or failed."""
        return self.error is not None

    def writing(self) -> Self:
        """For `with`: rows may be written where they belong within it. Entering it raises what it was given up with.

        Nobody is settled while somebody is within; so wait for nothing there that `on_cancel` does not end.
        """
        return self

    def __enter__(self) -> None:
        with self._lock:
            if self._closing:
                raise self.error or StepCancelledError("the step has all its rows")
            self._writers.append(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        self.written()

    def written(self) -> None:
        """This thread is not writing any more, even if it was interrupted before it could say so."""
        thread = threading.get_ident()
        with self._lock:
            if thread in self._writers:
                self._writers.remove(thread)
            last = self._closing and not self._writers
        if last:
            self._settle()

    def arrived(self, rows: Mapping[int, Rows]) -> None:
        """Hand over the rows of layers that are complete; of no effect once it was given up."""
        if not rows:
            return
        if self.finisher is not None:
            try:
                with self.writing():
                    rows = {layer: self.finisher.finish(layer, one, None) for layer, one in rows.items()}
            except EngrampoolError:  # it was given up
                return
        with self._lock:
            if self._closing:
                return
            now_s = time.perf_counter() - self.begun
            self.arrived_s.update(dict.fromkeys(rows, now_s))
            self.rows.update(rows)
            for callback in self._callbacks:
                self._calls.extend((callback, layer) for layer in rows)
            if self._waiting and self._changed is not None:
                self._changed.notify_all()
        if self._calls:
            self._tell()

    def end(self, error: EngrampoolError | None, times: ServerTimes | None = None) -> None:
        """Settle what is not yet: those who brought rows bring no more, of an error or as all are there.

        This thread is not writing any more, even if it was interrupted before it could say so.
        """
        with self._lock:
            if self._writers:
                thread = threading.get_ident()
                self._writers = [writer for writer in self._writers if writer != thread]
            if not self._done:
                self._close(error)
                self.times = times
        self._settle()

    def give_up(self, error: EngrampoolError, wait: bool = True) -> None:
        """End it while others may be at work: they are told, and once those who are writing have left, it is settled.

        wait: until then, unless this thread is writing itself.
        """
        with self._lock:
            if not self._done:
                self._close(error)
                self._telling = True
        self._cancel()
        self._settle()
        if wait and threading.get_ident() not in self._writers:
            self._wait(lambda: self._done, inf)
            self._settle()  # whoever settled it may not have told of its end yet: what it took is free after this

    def expire(self, wait: bool = True) -> None:
        """Give it up as its deadline has passed. wait: until those who are writing have left."""
        self.give_up(DeadlineError("the step's rows were not there by its deadline (DEADLINE_EXCEEDED)"), wait)

    def on_cancel(self, cancel: Callable[[], Any]) -> None:
        """Have `cancel` called when it is given up, or at once if it was. It must not wait for anybody who writes."""
        with self._lock:
            self._cancels.append(cancel)
            given_up = self._closing
        if given_up:
            self._cancel()

    def pause(self, seconds: float) -> bool:
        """Wait, unless it is given up; whether it was."""
        return self._wait(lambda: self._closing, seconds)

    def stand_in(self, blank: Blank) -> None:
        """Have `blank` make what stands in for rows that do not come, if anything was to."""
        with self._lock:
            if self.blank is not None and not self._done:
                self.blank = blank

    @property
    def working(self) -> bool | None:
        """Whether somebody works on it; None before anybody did."""
        return self._working

    def begin_work(self) -> None:
        """Somebody works on it, until `end_work`."""
        with self._lock:
            self._working = True

    def end_work(self) -> None:
        """Nobody works on it any more."""
        with self._lock:
            self._working = False
            waiting, self._idle_callbacks = self._idle_callbacks, []
        for callback in waiting:
            callback()

    def on_idle(self, callback: Callable[[], Any]) -> None:
        """Have `callback` called once nobody works on it, or at once if nobody does."""
        with self._lock:
            if self._working:
                self._idle_callbacks.append(callback)
                return
        callback()

    def forked(self, error: EngrampoolError) -> None:
        """In the child of a fork, where nobody else is: settle it without a word to those of the parent."""
        self._lock, self._changed = threading.RLock(), None  # the old one may be another thread's for ever
        if self.receiver is not None:
            self.receiver.forked()
            self.receiver = None
        if self._done:
            return
        if len(self.rows) == len(self.layers):
            self._closing = self._done = True
            return
        # Settled before anything is let go of: the last reference to a step may be among that.
        self.error, self._closing, self._done = error, True, True
        self.blank = self.finisher = self._on_end = None
        self._cancels, self._callbacks, self._idle_callbacks, self._writers = [], [], [], []
        self._calls.clear()

    # --- how it ends

    def _close(self, error: EngrampoolError | None) -> None:
        """With the lock: let nobody write from now on. No error takes anything from rows that are all there."""
        if len(self.rows) < len(self.layers):
            self.error = self.error or error
        self._closing = True
        if self._waiting and self._changed is not None:  # `pause` waits for it
            self._changed.notify_all()

    def _cancel(self) -> None:
        """Tell those who are at work, each once."""
        while self._cancels:
            try:
                cancel = self._cancels.pop()
            except IndexError:  # another thread took it
                return
            try:
                cancel()
            except Exception:
                _log.exception("a lookup that was given up could not be told so")

    def _settle(self) -> None:
        """Settle every layer, unless somebody is writing: whoever leaves last does it then."""
        with self._lock:
            if not self._closing or self._writers:
                return
            if not self._done:
                whole = len(self.rows) == len(self.layers)
                missing = [] if whole else [layer for layer in self.layers if layer not in self.rows]
                for layer in missing:
                    self._mask(layer)
                if self.error is None:
                    self.elapsed_s = max(self.arrived_s.values(), default=0.0)
                self._done = True
                if self._waiting and self._changed is not None:
                    self._changed.notify_all()
                for layer in missing:
                    self._calls.extend((callback, layer) for callback in self._callbacks)
                # They hold on to what they were made from.
                self.blank, self.finisher, self._callbacks = None, None, []
                if not self._telling:  # else they are about to be called
                    self._cancels.clear()
        if (on_end := self._on_end) is not None:
            on_end(self)
            self._on_end = None
        if self._calls:
            self._tell()

    def _mask(self, layer: int) -> None:
        finisher = self.finisher
        if self.blank is not None and _may_be_masked(self.error):
            try:
                rows, valid = self.blank(layer)
                if finisher is not None:
                    rows = finisher.finish(layer, rows, valid)
                valid.flags.writeable = False
                self.valid[layer], self.rows[layer] = valid, rows
                return
            except Exception:  # the layer is settled all the same, by the error
                _log.exception("the rows of layer %s could not be masked", layer)
        if finisher is not None:
            finisher.failed(layer)

    def _tell(self) -> None:
        while self._calls:
            try:
                callback, layer = self._calls.popleft()
            except IndexError:  # another thread took it
                return
            _telling.depth = getattr(_telling, "depth", 0) + 1
            try:
                callback(layer)
            except Exception:
                _log.exception("a callback of a step failed for layer %s", layer)
            finally:
                _telling.depth -= 1

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        with self._lock:
            self._waiting += 1
            if self._changed is None:
                self._changed = threading.Condition(self._lock)
        try:
            # Beyond what the system can count, a wait has no end.
            limit_s = seconds if seconds < threading.TIMEOUT_MAX else None
            return wait_for(self._changed, self._lock, condition, limit_s)
        finally:
            self._waiting -= 1


def _may_be_masked(error: EngrampoolError | None) -> bool:
    """Whether it is the pool that failed, and not the caller."""
    return isinstance(error, PoolError) and not isinstance(error, RejectedError | StepCancelledError)
