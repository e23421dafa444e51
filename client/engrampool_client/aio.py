"""The asyncio client: `Client`'s calls, awaited. Its lookups run in the threads of a `Client`, which are a few."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from engrampool_client.client import Client
from engrampool_client.errors import DeadlineError
from engrampool_client.exchange import IntArray, Out, Rows, Valid
from engrampool_client.served import ServedModel
from engrampool_client.step import Step
from engrampool_proto.spec import ModelSpec
from engrampool_proto.wire import ServerTimes

_MAX_STEPS = 16


class AsyncStep:
    """The rows of one batch on their way, as `Step` is, for the event loop that started it.

    step: what it stands for, which any thread may use.
    """

    def __init__(self, step: Step) -> None:
        self.step, self.layers = step, step.layers
        self.wait_s = step.wait_s
        loop = asyncio.get_running_loop()
        self._settled: dict[int, asyncio.Future[None]] = {layer: loop.create_future() for layer in self.layers}
        # It refers to neither step: one that nobody else refers to is cancelled.
        step.delivery.add_callback(partial(_tell, loop, self._settled))

    @property
    def times(self) -> ServerTimes | None:
        """The server's own times once all rows are there, else None."""
        return self.step.times

    @property
    def elapsed_s(self) -> float | None:
        """Seconds from `prefetch` to the last row, once all rows are there, else None."""
        return self.step.elapsed_s

    async def rows(self, layer: int, timeout_s: float | None = None) -> Rows:
        """Wait for one layer only: uint8 [T, heads, row_bytes], read-only. Raises as `Step.rows` does."""
        self.step.check_layer(layer)
        begin = time.perf_counter()
        remaining_s = self.step.deadline - time.monotonic()
        limit_s = remaining_s if timeout_s is None else min(timeout_s, remaining_s)
        try:
            # Shielded: a caller that stops waiting takes nothing from the others.
            await asyncio.wait_for(asyncio.shield(self._settled[layer]), max(0.0, limit_s))
        except TimeoutError as error:
            if limit_s == timeout_s:
                raise DeadlineError(f"the rows of layer {layer} were not there within {timeout_s} s") from error
        finally:
            self.step.waited(layer, time.perf_counter() - begin)
        # Settled, or at its deadline, where this settles it.
        return self.step.take(layer)

    async def valid(self, layer: int, timeout_s: float | None = None) -> Valid:
        """Which tokens have their rows of a layer, as `Step.valid` says."""
        return self.step.valid_of(layer, await self.rows(layer, timeout_s))

    def hint(self, candidates: npt.ArrayLike, *, chain: bool = False) -> bool:
        """As `Step.hint`."""
        return self.step.hint(candidates, chain=chain)

    def done(self) -> bool:
        """Whether all rows are there, or none more will come."""
        return self.step.done()

    def cancel(self) -> None:
        """Give the step up, as `Step.cancel` does."""
        self.step.cancel()


class AsyncClient:
    """`Client` for asyncio. Make one with `await AsyncClient.connect(target, ...)`.

    client: what it stands for, with all that need not be awaited.
    """

    def __init__(self, client: Client) -> None:
        self.client = client

    @classmethod
    async def connect(
        cls, target: str | Sequence[str], model: str | None = None, version: str | None = None, **settings: Any
    ) -> Self:
        """Connect and read what is served. Settings and errors are those of `Client`; max_steps is 16 by default."""
        settings = {"max_steps": _MAX_STEPS, **settings}
        return cls(await asyncio.to_thread(Client, target, model, version, **settings))

    @property
    def served(self) -> ServedModel:
        """What the server said of the model, and its limits."""
        return self.client.served

    @property
    def spec(self) -> ModelSpec:
        """The served model's specification."""
        return self.client.spec

    @property
    def version(self) -> str:
        """The version that lookups go by now."""
        return self.client.version

    def prefetch(
        self,
        tokens: IntArray,
        query_start_loc: IntArray | None = None,
        lookback: IntArray | None = None,
        dead: npt.ArrayLike | None = None,
        lookback_dead: npt.ArrayLike | None = None,
        **how: Any,
    ) -> AsyncStep:
        """Start a lookup and return at once; arguments and errors are those of `Client.prefetch`."""
        return AsyncStep(self.client.prefetch(tokens, query_start_loc, lookback, dead, lookback_dead, **how))

    def prefetch_rows(self, rows: Mapping[int, npt.NDArray[Any]], **how: Any) -> AsyncStep:
        """Start a lookup by row ids; arguments and errors are those of `Client.prefetch_rows`."""
        return AsyncStep(self.client.prefetch_rows(rows, **how))

    def amend(self, step: AsyncStep, tokens: IntArray, *batch: Any, **how: Any) -> AsyncStep:
        """As `Client.amend`."""
        return AsyncStep(self.client.amend(step.step, tokens, *batch, **how))

    async def lookup(
        self,
        tokens: IntArray,
        query_start_loc: IntArray | None = None,
        lookback: IntArray | None = None,
        dead: npt.ArrayLike | None = None,
        lookback_dead: npt.ArrayLike | None = None,
        **how: Any,
    ) -> dict[int, Rows]:
        """`prefetch` and wait: layer -> uint8 [T, heads, row_bytes]."""
        return await _all_rows(self.prefetch(tokens, query_start_loc, lookback, dead, lookback_dead, **how))

    async def lookup_rows(
        self, rows: Mapping[int, npt.NDArray[Any]], *, out: Out | None = None, timeout_s: float | None = None
    ) -> dict[int, Rows]:
        """`prefetch_rows` and wait: layer -> uint8 [*ids.shape, row_bytes]."""
        return await _all_rows(self.prefetch_rows(rows, out=out, timeout_s=timeout_s))

    async def close(self) -> None:
        """End the connections; steps under way fail with StepCancelledError."""
        await asyncio.to_thread(self.client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _tell(loop: asyncio.AbstractEventLoop, settled: Mapping[int, asyncio.Future[None]], layer: int) -> None:
    """In whichever thread the layer was settled."""
    with suppress(RuntimeError):  # the loop is closed, and nobody waits on it
        loop.call_soon_threadsafe(_settle, settled[layer])


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _all_rows(step: AsyncStep) -> dict[int, Rows]:
    try:
        return {layer: await step.rows(layer) for layer in step.layers}
    finally:
        step.cancel()  # of effect if this was: the caller has its arrays back by now
