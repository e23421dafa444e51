"""What a caller holds of a lookup: one batch's rows on their way to the layers that read them."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.cache import holds_a_cache
from engrampool_client.config import wait_limit_s
from engrampool_client.errors import BatchError, DeadlineError, EngrampoolError, StepCancelledError
from engrampool_client.lookup.delivery import Delivery, Rows, Valid
from engrampool_client.stats import Stats
from engrampool_proto.wire import ServerTimes


class Step:
    """The rows of one batch on their way. Returned by `Client.prefetch`; safe to use from any thread.

    A layer is settled once: its rows are there, or it has failed for good. Whatever comes later changes neither what
    `rows` and `valid` give nor a byte of `out`. By the step's deadline every layer is settled, waited for or not. A
    step that nobody refers to any more, and that nobody gave a callback, is cancelled.

    delivery: what lanes hold of it; not for callers.
    layers: the layers asked for, ascending. deadline: by time.monotonic.
    wait_s: layer -> seconds that `rows` has blocked for it so far, which is what the model lost by waiting.
    """

    def __init__(
        self,
        delivery: Delivery,
        stats: Stats | None = None,
        hint: Callable[[npt.ArrayLike, bool], bool] | None = None,
    ) -> None:
        """hint: as `hint` has it; None for a step that takes none."""
        self.delivery = delivery
        self.layers = delivery.layers
        self.wait_s = dict.fromkeys(self.layers, 0.0)
        self._stats, self._hint = stats, hint

    @property
    def deadline(self) -> float:
        """When every layer is settled at the latest, by time.monotonic."""
        return self.delivery.deadline

    @property
    def error(self) -> EngrampoolError | None:
        """Why rows are missing, once they are known to be; None as long as they are not."""
        return self.delivery.error

    @property
    def times(self) -> ServerTimes | None:
        """The server's own times once all rows are there, else None."""
        return self.delivery.times

    @property
    def elapsed_s(self) -> float | None:
        """Seconds from `prefetch` to the last row, once all rows are there, else None."""
        return self.delivery.elapsed_s

    @property
    def arrived_s(self) -> dict[int, float]:
        """Layer -> seconds from `prefetch` until its rows were there, for those that are."""
        return self.delivery.arrived_s

    def rows(self, layer: int, timeout_s: float | None = None) -> Rows:
        """Wait for one layer only: uint8 [T, heads, row_bytes] in the order of the tokens.

        It is the array that `out` gave for the layer, or else a read-only one. Of a client that masks failures
        (`on_failure`), rows of tokens that `valid` does not have are zero.
        timeout_s: wait no longer than this, without settling anything; None waits until the step's deadline.
        Raises DeadlineError, what the lookup failed with, or BatchError for a layer that was not asked for.
        """
        begin = time.perf_counter()
        rows = self.delivery.rows.get(layer)
        try:
            return self.take(layer, timeout_s) if rows is None else rows
        finally:
            if layer in self.wait_s:
                seconds = time.perf_counter() - begin
                self.wait_s[layer] += seconds
                if self._stats is not None:
                    self._stats.waited(layer, seconds)

    def check_layer(self, layer: int) -> None:
        """Raise BatchError for a layer that was not asked for."""
        if layer not in self.wait_s:
            raise BatchError(f"layer {layer} was not asked for in this step; {list(self.layers)} were")

    def take(self, layer: int, timeout_s: float | None = None) -> Rows:
        """As `rows`, uncounted."""
        delivery = self.delivery
        rows = delivery.rows.get(layer)
        if rows is not None:
            return rows
        self.check_layer(layer)
        if not delivery.wait_for(lambda: delivery.settled(layer), wait_limit_s(timeout_s)):
            raise DeadlineError(f"the rows of layer {layer} were not there within {timeout_s} s")
        rows = delivery.rows.get(layer)
        if rows is not None:
            return rows
        assert delivery.error is not None
        raise delivery.error

    def waited(self, layer: int, seconds: float) -> None:
        """Count a wait for a layer."""
        self.wait_s[layer] += seconds
        if self._stats is not None:
            self._stats.waited(layer, seconds)

    def valid(self, layer: int, timeout_s: float | None = None) -> Valid:
        """Which tokens have their rows of a layer: bool [T], read-only; waits and raises as `rows` does.

        All of them, except where failures are masked: a gate that is shut for the others passes them through untouched.
        """
        return self.valid_of(layer, self.rows(layer, timeout_s))

    def valid_of(self, layer: int, rows: Rows) -> Valid:
        """As `valid`, of a layer whose rows were taken."""
        known = self.delivery.valid
        if layer not in known:
            valid = np.ones(rows.shape[:-2] if rows.ndim > 2 else rows.shape[:1], np.bool_)
            valid.flags.writeable = False
            return known.setdefault(layer, valid)
        return known[layer]

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for every layer. Raises as `rows` does."""
        delivery = self.delivery
        if not delivery.wait_for(lambda: delivery.ended, wait_limit_s(timeout_s)):
            raise DeadlineError(f"the step was not complete within {timeout_s} s")
        if delivery.error is not None and len(delivery.rows) < len(self.layers):
            raise delivery.error

    def done(self) -> bool:
        """Whether every layer is settled. From then on nothing is written into `out`."""
        delivery = self.delivery
        if not delivery.done:
            delivery.attend()  # whoever asks again and again may never wait
        return delivery.done

    def add_callback(self, callback: "Callable[[Step, int], Any]") -> None:
        """Have `callback(step, layer)` called once for each layer when it is settled, or at once for those that are.

        In the thread that settles it, so it should be short; what it raises is logged.
        """
        self.delivery.add_callback(lambda layer: callback(self, layer))

    def cancel(self) -> None:
        """Give the step up: the call ends, rows that are not there yet never come. Rows that are stay readable.

        Nothing is written into `out` any more once this returns.
        """
        if not self.delivery.done:
            self.delivery.give_up(StepCancelledError("the step was cancelled"))

    def hint(self, candidates: npt.ArrayLike, *, chain: bool = False) -> bool:
        """Have rows of tokens that may follow this step's come into the cache, so that the next step finds them there.

        candidates: int32 [R, K]: for each request of the step's batch, K tokens of which one may be the next; or with
        `chain` K draft tokens, one after the other. -1 stands for none; in a chain it ends it.
        Returns at once: False if nothing is asked for, as hints have `hint_bytes` on their way already, or the client
        is attached. What fails is counted, and no error of the step's. A hint gives way to a step that finds no place.
        Raises ValueError for a client without a cache or a step by row ids, BatchError for candidates that do not fit.
        """
        if self._hint is None:
            raise ValueError("a hint needs a client with cache_bytes, and a step of tokens")
        return self._hint(candidates, chain)

    def __del__(self) -> None:
        """Nobody can take the rows any more, and what they would be written into may be used for something else."""
        delivery = getattr(self, "delivery", None)  # it is not there if making one failed
        if delivery is not None and not delivery.done:
            lost = StepCancelledError("nobody refers to the step any more")
            if delivery.trace is not None:
                delivery.trace.lost = True
            # Garbage may be collected in the midst of anything: who writes may wait for what this thread holds.
            delivery.give_up(lost, wait=not holds_a_cache())
