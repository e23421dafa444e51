"""The asyncio client: the same calls, awaited. Blocking work (hashing) runs in a thread."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy.typing as npt

from engrampool_client.errors import (
    BatchError,
    DeadlineError,
    EngrampoolError,
    PoolError,
    StepCancelledError,
    UnavailableError,
    from_rpc,
)
from engrampool_client.exchange import Exchange, Hashing, IntArray, Out, Rows, token_batch
from engrampool_client.served import DESCRIBE, ServedModel, check_fingerprint, choose
from engrampool_client.settings import (
    CHANNEL_OPTIONS,
    METHOD,
    RETRY_LOADING_S,
    STREAM_ABOVE_BYTES,
    Retries,
    check_settings,
)
from engrampool_proto.malloc import pin_malloc
from engrampool_proto.spec import ModelSpec
from engrampool_proto.wire import ServerTimes


class AsyncStep:
    """The rows of one batch on their way, as `Step` is, for the event loop that started it."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.wait_s = dict.fromkeys(self.layers, 0.0)
        self.times: ServerTimes | None = None
        self.elapsed_s: float | None = None
        self._begin = time.perf_counter()
        self._ready: dict[int, asyncio.Future[Rows]] = {
            layer: asyncio.get_running_loop().create_future() for layer in self.layers
        }
        self._task: asyncio.Task[None] | None = None

    async def rows(self, layer: int, timeout_s: float | None = None) -> Rows:
        """Wait for one layer only: uint8 [T, heads, row_bytes], read-only. Raises as `Step.rows` does."""
        if layer not in self._ready:
            raise BatchError(f"layer {layer} was not asked for in this step; {list(self.layers)} were")
        begin = time.perf_counter()
        try:
            # Shielded: a caller that stops waiting takes nothing from the others.
            return await asyncio.wait_for(asyncio.shield(self._ready[layer]), timeout_s)
        except TimeoutError as error:
            if isinstance(error, EngrampoolError):
                raise
            raise DeadlineError(f"the rows of layer {layer} were not there within {timeout_s} s") from error
        finally:
            self.wait_s[layer] += time.perf_counter() - begin

    def done(self) -> bool:
        """Whether all rows are there, or none more will come."""
        return all(future.done() for future in self._ready.values())

    def cancel(self) -> None:
        """Give the step up, as `Step.cancel` does."""
        self._end(StepCancelledError("the step was cancelled"))
        if self._task is not None:
            self._task.cancel()

    def _arrived(self, rows: Mapping[int, Rows]) -> None:
        for layer, array in rows.items():
            if not self._ready[layer].done():
                self._ready[layer].set_result(array)

    def _end(self, error: EngrampoolError) -> None:
        for future in self._ready.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody need ask for every layer of a failed step


class AsyncClient:
    """`Client` for asyncio. Make one with `await AsyncClient.connect(target, ...)`, whose arguments are `Client`'s.

    It has one connection: a single event loop reads no faster from several.
    """

    def __init__(
        self,
        target: str,
        channel: grpc.aio.Channel,
        served: ServedModel,
        hashing: Hashing,
        timeout_s: float,
        retry_s: float,
        max_steps: int,
    ) -> None:
        self.target, self.served = target, served
        self._retries = Retries(retry_s)
        self._channel, self._hashing, self._timeout_s = channel, hashing, timeout_s
        self._lookup_unary = channel.unary_unary(METHOD + "Lookup")
        self._lookup_stream = channel.unary_stream(METHOD + "LookupStream")
        self._places = asyncio.Semaphore(max_steps)
        self._steps: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    async def connect(
        cls,
        target: str,
        model: str | None = None,
        version: str | None = None,
        *,
        hashing: Hashing = "local",
        config: str | Path | None = None,
        tokenizer: str | Path | None = None,
        timeout_s: float = 10.0,
        connect_timeout_s: float = 10.0,
        retry_s: float = 1.0,
        max_steps: int = 64,
        keep_memory: bool = True,
    ) -> Self:
        """Connect and read what is served. Arguments and errors are those of `Client`."""
        check_settings(hashing, timeout_s, connect_timeout_s, max_steps, retry_s)
        if keep_memory:
            pin_malloc()
        channel = grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
        try:
            served = choose(await _describe(channel, target, connect_timeout_s), model, version)
            await asyncio.to_thread(check_fingerprint, served.spec, config, tokenizer)
        except BaseException:
            await channel.close()
            raise
        return cls(target, channel, served, hashing, timeout_s, retry_s, max_steps)

    @property
    def spec(self) -> ModelSpec:
        """The served model's specification."""
        return self.served.spec

    @property
    def version(self) -> str:
        """The pinned version."""
        return self.served.version

    def prefetch(
        self,
        tokens: IntArray,
        query_start_loc: IntArray | None = None,
        lookback: IntArray | None = None,
        dead: npt.ArrayLike | None = None,
        lookback_dead: npt.ArrayLike | None = None,
        *,
        layers: Sequence[int] | None = None,
        out: Out | None = None,
        timeout_s: float | None = None,
    ) -> AsyncStep:
        """Start a lookup and return at once; arguments and errors are those of `Client.prefetch`."""
        batch = token_batch(tokens, query_start_loc, lookback, dead, lookback_dead)
        wanted = sorted({self.spec.table(layer).layer for layer in (self.spec.layers if layers is None else layers)})
        return self._submit(
            wanted, lambda: Exchange.of_tokens(self.served, batch, wanted, self._hashing, out), timeout_s
        )

    def prefetch_rows(
        self, rows: Mapping[int, npt.NDArray[Any]], *, out: Out | None = None, timeout_s: float | None = None
    ) -> AsyncStep:
        """Start a lookup by row ids; arguments and errors are those of `Client.prefetch_rows`."""
        wanted = sorted(self.spec.table(layer).layer for layer in rows)
        owned = {layer: ids.copy() if hasattr(ids, "copy") else ids for layer, ids in rows.items()}
        return self._submit(wanted, lambda: Exchange.of_rows(self.served, owned, out), timeout_s)

    async def lookup(
        self,
        tokens: IntArray,
        query_start_loc: IntArray | None = None,
        lookback: IntArray | None = None,
        dead: npt.ArrayLike | None = None,
        lookback_dead: npt.ArrayLike | None = None,
        *,
        layers: Sequence[int] | None = None,
        out: Out | None = None,
        timeout_s: float | None = None,
    ) -> dict[int, Rows]:
        """`prefetch` and wait: layer -> uint8 [T, heads, row_bytes]."""
        arrays = (tokens, query_start_loc, lookback, dead, lookback_dead)
        return await _all_rows(self.prefetch(*arrays, layers=layers, out=out, timeout_s=timeout_s))

    async def lookup_rows(
        self, rows: Mapping[int, npt.NDArray[Any]], *, out: Out | None = None, timeout_s: float | None = None
    ) -> dict[int, Rows]:
        """`prefetch_rows` and wait: layer -> uint8 [*ids.shape, row_bytes]."""
        return await _all_rows(self.prefetch_rows(rows, out=out, timeout_s=timeout_s))

    def _submit(self, layers: Sequence[int], build: Callable[[], Exchange], timeout_s: float | None) -> AsyncStep:
        if self._closed:
            raise PoolError("the client is closed")
        if not layers:
            raise BatchError("a lookup needs at least one layer")
        step = AsyncStep(layers)
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        task = asyncio.create_task(self._run(step, build, deadline))
        step._task = task
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)
        # A task that is cancelled before its first turn never runs; its step must end all the same.
        task.add_done_callback(lambda _: step._end(StepCancelledError("the step was cancelled")))
        return step

    async def _run(self, step: AsyncStep, build: Callable[[], Exchange], deadline: float) -> None:
        try:
            async with self._places:
                exchange = await asyncio.to_thread(build)
                step._arrived(exchange.whole(exchange.empty_layers()))
                await self._fetch(exchange, deadline, step)
                step.times, step.elapsed_s = exchange.times, time.perf_counter() - step._begin
        except EngrampoolError as error:
            step._end(error)
        except Exception as error:  # a step must never be left without an end
            step._end(PoolError(f"unexpected failure in the client: {error!r}"))
            raise

    async def _fetch(self, exchange: Exchange, deadline: float, step: AsyncStep) -> None:
        """As `Client._fetch`."""
        for attempt in count():
            timeout_s = max(0.0, deadline - time.monotonic())
            try:
                if exchange.answer_bytes <= STREAM_ABOVE_BYTES:
                    _take(step, exchange, await self._lookup_unary(exchange.request, timeout=timeout_s))
                else:
                    async for message in self._lookup_stream(exchange.request, timeout=timeout_s):
                        _take(step, exchange, message)
                exchange.finish()
                self._retries.succeeded()
                return
            except grpc.RpcError as rpc_error:
                error = from_rpc(rpc_error, self.target)
                pause_s = self._retries.pause_s(error, attempt)
                if pause_s is None or time.monotonic() + pause_s >= deadline:
                    raise error from rpc_error
            await asyncio.sleep(pause_s)
            exchange.restart()
            if exchange.complete:  # only the end of the answer was lost
                return

    async def close(self) -> None:
        """End the connection; steps under way fail with StepCancelledError."""
        self._closed = True
        steps = list(self._steps)
        for task in steps:
            task.cancel()
        await asyncio.gather(*steps, return_exceptions=True)
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _describe(channel: grpc.aio.Channel, target: str, timeout_s: float) -> bytes:
    """As `Client._describe`: wait for a server that does not listen yet, or is still loading."""
    describe = channel.unary_unary(METHOD + "Describe")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer: bytes = await describe(DESCRIBE, timeout=max(0.0, deadline - time.monotonic()), wait_for_ready=True)
            return answer
        except grpc.RpcError as rpc_error:
            error = from_rpc(rpc_error, target)
            loading = isinstance(error, UnavailableError) and error.reason == "loading"
            if not loading and not isinstance(error, DeadlineError):
                raise error from rpc_error
            if deadline - time.monotonic() <= RETRY_LOADING_S:
                text = f"no server at {target} was ready within {timeout_s} s: {error}"
                raise UnavailableError(text, error.reason) from rpc_error
        await asyncio.sleep(RETRY_LOADING_S)


async def _all_rows(step: AsyncStep) -> dict[int, Rows]:
    return {layer: await step.rows(layer) for layer in step.layers}


def _take(step: AsyncStep, exchange: Exchange, message: bytes) -> None:
    if step.done():  # given up: its arrays are the caller's again
        raise StepCancelledError("the step was cancelled")
    step._arrived(exchange.whole(exchange.add(message)))
