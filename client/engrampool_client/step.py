"""One batch's rows on their way to the layers that read them."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.errors import (
    BatchError,
    DeadlineError,
    EngrampoolError,
    PoolError,
    RejectedError,
    StepCancelledError,
)
from engrampool_client.exchange import Out, Rows
from engrampool_client.stats import Stats
from engrampool_proto.wire import ServerTimes

Valid = npt.NDArray[np.bool_]
# Rows and which tokens have theirs, of a layer that did not come.
Blank = Callable[[int], tuple[Rows, Valid]]
_log = logging.getLogger("engrampool")


class Step:
    """The rows of one batch on their way. Returned by `Client.prefetch`; safe to use from any thread.

    A layer is settled once: its rows are there, or it has failed for good. Whatever comes later changes neither what
    `rows` and `valid` give nor a byte of `out`. By the step's deadline every layer is settled.

    layers: the layers asked for, ascending. times: the server's own times once all rows are there, else None.
    elapsed_s: seconds from `prefetch` to the last row, once all rows are there, else None.
    arrived_s: layer -> seconds from `prefetch` until its rows were there, for those that are.
    wait_s: layer -> seconds that `rows` has blocked for it so far, which is what the model lost by waiting.
    error: why rows are missing, once they are known to be; None as long as they are not.
    deadline: by time.monotonic.
    """

    def __init__(
        self,
        layers: Sequence[int],
        deadline: float = inf,
        blank: Blank | None = None,
        stats: Stats | None = None,
        nbytes: int = 0,
    ) -> None:
        """blank: what stands in for rows that do not come; None raises the error. nbytes: of all rows, for `stats`."""
        if not layers:
            raise BatchError("a lookup needs at least one layer")
        self.layers = tuple(layers)
        self.wait_s = dict.fromkeys(self.layers, 0.0)
        self.arrived_s: dict[int, float] = {}
        self.times: ServerTimes | None = None
        self.elapsed_s: float | None = None
        self.error: EngrampoolError | None = None
        self.deadline = deadline
        self._blank, self._stats, self._nbytes = blank, stats, nbytes
        self._hint: Callable[[npt.ArrayLike, bool], bool] | None = None
        self._working: bool | None = None  # whether somebody works on it; None before anybody did
        self._begin = time.perf_counter()
        self._changed = threading.Condition()
        self._rows: dict[int, Rows] = {}
        self._valid: dict[int, Valid] = {}
        self._done = False
        self._writers = 0
        self._cancels: list[Callable[[], Any]] = []
        self._callbacks: list[Callable[[Step, int], Any]] = []

    def rows(self, layer: int, timeout_s: float | None = None) -> Rows:
        """Wait for one layer only: uint8 [T, heads, row_bytes] in the order of the tokens.

        It is the array that `out` gave for the layer, or else a read-only one. Of a client that masks failures
        (`on_failure`), rows of tokens that `valid` does not have are zero.
        timeout_s: wait no longer than this, without settling anything; None waits until the step's deadline.
        Raises DeadlineError, what the lookup failed with, or BatchError for a layer that was not asked for.
        """
        if layer not in self.wait_s:
            raise BatchError(f"layer {layer} was not asked for in this step; {list(self.layers)} were")
        begin = time.perf_counter()
        try:
            return self._get(layer, timeout_s)
        finally:
            self._waited(layer, time.perf_counter() - begin)

    def _get(self, layer: int, timeout_s: float | None = None) -> Rows:
        """As `rows`, uncounted."""
        settled = self._wait_for(lambda: layer in self._rows or self._done, timeout_s)
        rows = self._rows.get(layer)
        if rows is not None:
            return rows
        if not settled:
            raise DeadlineError(f"the rows of layer {layer} were not there within {timeout_s} s")
        assert self.error is not None
        raise self.error

    def _waited(self, layer: int, seconds: float) -> None:
        with self._changed:
            self.wait_s[layer] += seconds
        if self._stats is not None:
            self._stats.waited(layer, seconds)

    def valid(self, layer: int, timeout_s: float | None = None) -> Valid:
        """Which tokens have their rows of a layer: bool [T], read-only; waits and raises as `rows` does.

        All of them, except where failures are masked: a gate that is shut for the others passes them through untouched.
        """
        return self._valid_of(layer, self.rows(layer, timeout_s))

    def _valid_of(self, layer: int, rows: Rows) -> Valid:
        with self._changed:
            if layer not in self._valid:
                valid = np.ones(rows.shape[:-2] if rows.ndim > 2 else rows.shape[:1], np.bool_)
                valid.flags.writeable = False
                self._valid[layer] = valid
            return self._valid[layer]

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for every layer. Raises as `rows` does."""
        if not self._wait_for(lambda: self._done, timeout_s):
            raise DeadlineError(f"the step was not complete within {timeout_s} s")
        if self.error is not None and len(self._rows) < len(self.layers):
            raise self.error

    def done(self) -> bool:
        """Whether every layer is settled. From then on nothing is written into `out`."""
        return self._done or len(self._rows) == len(self.layers)

    def add_callback(self, callback: "Callable[[Step, int], Any]") -> None:
        """Have `callback(step, layer)` called once for each layer when it is settled, or at once for those that are.

        In the thread that settles it, so it should be short; what it raises is logged.
        """
        with self._changed:
            settled = self.layers if self._done else tuple(self._rows)
            self._callbacks.append(callback)
        self._call([callback], settled)

    def cancel(self) -> None:
        """Give the step up: the call ends, rows that are not there yet never come. Rows that are stay readable.

        Nothing is written into `out` any more once this returns.
        """
        self._give_up(StepCancelledError("the step was cancelled"))

    def hint(self, candidates: npt.ArrayLike, *, chain: bool = False) -> bool:
        """Have rows of tokens that may follow this step's come into the cache, so that the next step finds them there.

        candidates: int32 [R, K]: for each request of the step's batch, K tokens of which one may be the next; or with
        `chain` K draft tokens, one after the other. -1 stands for none; in a chain it ends it.
        Returns at once: False if nothing is asked for, as hints have `hint_bytes` on their way already, or the client
        is attached. What fails is counted, and no error of the step's.
        Raises ValueError for a client without a cache or a step by row ids, BatchError for candidates that do not fit.
        """
        if self._hint is None:
            raise ValueError("a hint needs a client with cache_bytes, and a step of tokens")
        return self._hint(candidates, chain)

    def given_up(self) -> bool:
        """Whether it was cancelled, or failed."""
        return self.error is not None

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Whether it came to that within `timeout_s`; at the step's deadline it is brought about."""
        if condition():
            return True
        remaining_s = self.deadline - time.monotonic()
        limit_s = remaining_s if timeout_s is None else min(timeout_s, remaining_s)
        with self._changed:
            # Beyond what the system can count, a wait has no end.
            if self._changed.wait_for(condition, limit_s if limit_s < threading.TIMEOUT_MAX else None):
                return True
        if limit_s == timeout_s:
            return False
        self._give_up(DeadlineError("the step's rows were not there by its deadline (DEADLINE_EXCEEDED)"))
        return True

    def _set_working(self, working: bool | None) -> None:
        with self._changed:
            self._working = working
            self._changed.notify_all()

    def _await_worker(self, deadline: float) -> None:
        """Wait until nobody works on it any more, or until `deadline`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._working, deadline - time.monotonic())

    def _give_up(self, error: EngrampoolError) -> None:
        with self._changed:
            if self._done:
                return
            # Not done before the last writer left; `_writing` lets no other in.
            self.error = self.error or error
            cancels = list(self._cancels)
        for cancel in cancels:
            cancel()
        with self._changed:
            self._changed.wait_for(lambda: not self._writers)
        self._end(self.error)

    def _on_cancel(self, cancel: Callable[[], Any]) -> None:
        """Have `cancel` called when the step is given up, or at once if it was."""
        with self._changed:
            self._cancels.append(cancel)
            given_up = self.error is not None
        if given_up:
            cancel()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Rows may be written where they belong within this. Raises StepCancelledError if the step was given up."""
        with self._changed:
            if self.error is not None:
                raise self.error
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
            if self.error is not None:
                return
            self._rows.update(rows)
            now_s = time.perf_counter() - self._begin
            self.arrived_s.update(dict.fromkeys(rows, now_s))
            callbacks = list(self._callbacks)
            self._changed.notify_all()
        self._call(callbacks, rows)

    def _end(self, error: EngrampoolError | None, times: ServerTimes | None = None) -> None:
        with self._changed:
            if self._done:
                return
            self.error, self.times = self.error or error, times
            missing = [layer for layer in self.layers if layer not in self._rows]
            if missing and self._blank is not None and _may_be_masked(self.error):
                # Nobody writes any more: what failed has ended, or was given up.
                for layer in missing:
                    self._rows[layer], valid = self._blank(layer)
                    valid.flags.writeable = False
                    self._valid[layer] = valid
                    if self._stats is not None:
                        self._stats.masked(layer, valid.size - int(np.count_nonzero(valid)))
            self._done, self._blank = True, None  # which holds on to what it was made from
            if self.error is None:
                self.elapsed_s = max(self.arrived_s.values(), default=0.0)
            callbacks = list(self._callbacks)
            self._changed.notify_all()
        if self._stats is not None:
            self._stats.ended(self.error, len(self._rows) == len(self.layers), self._nbytes)
        self._call(callbacks, missing)

    def _call(self, callbacks: "Sequence[Callable[[Step, int], Any]]", layers: Iterable[int]) -> None:
        for callback in callbacks:
            for layer in layers:
                try:
                    callback(self, layer)
                except Exception:
                    _log.exception("a callback of a step failed for layer %s", layer)


def _may_be_masked(error: EngrampoolError | None) -> bool:
    """Whether it is the pool that failed, and not the caller."""
    return isinstance(error, PoolError) and not isinstance(error, RejectedError | StepCancelledError)


def zeros(shapes: Mapping[int, tuple[int, ...]], out: Out | None) -> Blank:
    """Zero rows of no token, in the caller's arrays where there are some. shapes: of each layer's rows."""

    def blank(layer: int) -> tuple[Rows, Valid]:
        shape, given = shapes[layer], (out or {}).get(layer)
        if isinstance(given, Mapping):
            for array in given.values():
                array[:] = 0
        elif given is not None:
            given[:] = 0
        rows = given if isinstance(given, np.ndarray) else np.zeros(shape, np.uint8)
        if rows is not given:
            rows.flags.writeable = False
        return rows, np.zeros(shape[:-2] if len(shape) > 2 else shape[:1], np.bool_)

    return blank
