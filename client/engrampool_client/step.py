"""One batch's rows on their way to a blocking caller."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from engrampool_client.errors import BatchError, DeadlineError, EngrampoolError, StepCancelledError
from engrampool_client.exchange import Rows
from engrampool_proto.wire import ServerTimes


class Step:
    """The rows of one batch on their way. Returned by `Client.prefetch`; safe to use from any thread.

    layers: the layers asked for, ascending. times: the server's own times once all rows are there, else None.
    elapsed_s: seconds from `prefetch` to the last row, once all rows are there, else None.
    wait_s: layer -> seconds that `rows` has blocked for it so far, which is what the model lost by waiting.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        if not layers:
            raise BatchError("a lookup needs at least one layer")
        self.layers = tuple(layers)
        self.wait_s = dict.fromkeys(self.layers, 0.0)
        self.times: ServerTimes | None = None
        self.elapsed_s: float | None = None
        self._begin = time.perf_counter()
        self._changed = threading.Condition()
        self._rows: dict[int, Rows] = {}
        self._error: EngrampoolError | None = None
        self._done = False
        self._writers = 0
        self._cancels: list[Callable[[], Any]] = []

    def rows(self, layer: int, timeout_s: float | None = None) -> Rows:
        """Wait for one layer only: uint8 [T, heads, row_bytes] in the order of the tokens.

        It is the array that `out` gave for the layer, or else a read-only one.
        timeout_s: wait no longer than this; None waits as long as the lookup itself may take.
        Raises DeadlineError, what the lookup failed with, or BatchError for a layer that was not asked for.
        """
        if layer not in self.wait_s:
            raise BatchError(f"layer {layer} was not asked for in this step; {list(self.layers)} were")
        begin = time.perf_counter()
        with self._changed:
            arrived = self._changed.wait_for(lambda: layer in self._rows or self._done, timeout_s)
            self.wait_s[layer] += time.perf_counter() - begin
            if layer in self._rows:
                return self._rows[layer]
            if not arrived:
                raise DeadlineError(f"the rows of layer {layer} were not there within {timeout_s} s")
            assert self._error is not None
            raise self._error

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for every layer. Raises as `rows` does."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout_s):
                raise DeadlineError(f"the step was not complete within {timeout_s} s")
            if self._error is not None:
                raise self._error

    def done(self) -> bool:
        """Whether all rows are there, or none more will come. From then on nothing is written into `out`."""
        return self._done

    def cancel(self) -> None:
        """Give the step up: the call ends, rows that are not there yet never come. Rows that are stay readable.

        Nothing is written into `out` any more once this returns.
        """
        with self._changed:
            if self._done:
                return
            # Not done before the last writer left; `_writing` lets no other in.
            self._error = StepCancelledError("the step was cancelled")
            cancels = list(self._cancels)
        for cancel in cancels:
            cancel()
        with self._changed:
            self._changed.wait_for(lambda: not self._writers)
        self._end(self._error)

    def given_up(self) -> bool:
        """Whether it was cancelled, or failed."""
        return self._error is not None

    def _on_cancel(self, cancel: Callable[[], Any]) -> None:
        """Have `cancel` called when the step is given up, or at once if it was."""
        with self._changed:
            self._cancels.append(cancel)
            given_up = self._error is not None
        if given_up:
            cancel()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Rows may be written where they belong within this. Raises StepCancelledError if the step was given up."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._writers += 1
        try:
            yield
        finally:
            with self._changed:
                self._writers -= 1
                if not self._writers:
                    self._changed.notify_all()

    def _arrived(self, rows: Mapping[int, Rows]) -> None:
        if not rows:
            return
        with self._changed:
            if self._error is None:
                self._rows.update(rows)
                self._changed.notify_all()

    def _end(self, error: EngrampoolError | None, times: ServerTimes | None = None) -> None:
        with self._changed:
            if self._done:
                return
            self._error, self.times, self._done = self._error or error, times, True
            if self._error is None:
                self.elapsed_s = time.perf_counter() - self._begin
            self._changed.notify_all()
