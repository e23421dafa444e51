"""The asyncio client: `Client`'s calls, awaited. Its lookups run in the threads of a `Client`, which are a few."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

import numpy.typing as npt

from engrampool_client.client import Client
from engrampool_client.compute.served import ServedModel
from engrampool_client.config import ClientSettings, wait_limit_s
from engrampool_client.errors import DeadlineError, EngrampoolError, PoolError
from engrampool_client.lookup.delivery import Rows, Valid
from engrampool_client.lookup.landing import Out
from engrampool_client.lookup.query import IntArray, Ready
from engrampool_client.lookup.step import Step
from engrampool_client.stats import Stats
from engrampool_client.status import ClientStatus, brief
from engrampool_proto.spec import ModelSpec
from engrampool_proto.wire import ServerTimes

_MAX_STEPS = 16


class AsyncStep:
    """The rows of one batch on their way, as `Step` is, for the event loop that started it.

    To stop waiting for a layer, by a cancelled task or a timeout, takes nothing from others who wait, and leaves the
    step as it is. `async with` cancels it at the end, however that is reached.

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
    def deadline(self) -> float:
        """When every layer is settled at the latest, by time.monotonic."""
        return self.step.deadline

    @property
    def error(self) -> EngrampoolError | None:
        """Why rows are missing, once they are known to be; None as long as they are not."""
        return self.step.error

    @property
    def arrived_s(self) -> dict[int, float]:
        """Layer -> seconds from `prefetch` until its rows were there, for those that are."""
        return self.step.arrived_s

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
        timeout_s = wait_limit_s(timeout_s)
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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """`Client` for asyncio: made in one of two ways, which take the arguments of `Client`.

    async with AsyncClient("memory-node:50051") as pool:
        rows = await pool.lookup(tokens)

    pool = await AsyncClient.connect("memory-node:50051")
    ...
    await pool.close()

    target: as `Client` takes it; or a `Client` that is connected, which is closed with this one.

    To cancel a task that connects ends the connecting, and to cancel one that looks up cancels the step: its place and
    its memory are free at once.
    """

    def __init__(
        self,
        target: str | Sequence[str] | Client,
        model: str | None = None,
        version: str | None = None,
        **settings: Unpack[ClientSettings],
    ) -> None:
        """Raises ValueError for settings out of their range, TypeError for one that there is not."""
        self._connecting = False
        if not isinstance(target, Client):
            settings.setdefault("max_steps", _MAX_STEPS)
            self._client: Client = _Later(target, model, version, **settings)
        elif settings or model is not None or version is not None:
            raise TypeError("AsyncClient takes no settings beside a Client, which has its own")
        else:
            self._client = target

    @classmethod
    async def connect(
        cls,
        target: str | Sequence[str],
        model: str | None = None,
        version: str | None = None,
        **settings: Unpack[ClientSettings],
    ) -> Self:
        """Connect and read what is served. Arguments and errors are those of `Client`."""
        return await cls(target, model, version, **settings)._connected_one()

    async def _connected_one(self) -> Self:
        """Itself, once it is connected. Raises what `Client` does."""
        client = self._client
        if not isinstance(client, _Later) or client.connected:
            return self
        if self._connecting:
            raise PoolError("this client was connected before, or is about to be: make another")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        # A thread of its own: a loop that ends waits for those of its executor.
        thread = threading.Thread(target=_connect, args=(client, loop, done), name="engrampool-connect", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise PoolError(f"the system gives no thread to connect in: {error}") from error
        self._connecting = True
        try:
            await done
        except asyncio.CancelledError:  # nobody gets it, whatever comes of it
            client.close_soon()
            raise
        return self

    @property
    def client(self) -> Client:
        """The client that this one stands for, with all that need not be awaited. Raises PoolError until connected."""
        if isinstance(self._client, _Later) and not self._client.connected:
            raise PoolError(
                "this client is not connected: use it in `async with`, or make it by `await AsyncClient.connect(...)`"
            )
        return self._client

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

    @property
    def compiled(self) -> bool:
        """As `Client.compiled`."""
        return self.client.compiled

    @property
    def stats(self) -> Stats:
        """What the client counts."""
        return self.client.stats

    def status(self) -> ClientStatus:
        """As `Client.status`."""
        return self.client.status()

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
        valid: Mapping[int, Valid] | None = None,
        ahead: bool = False,
        ready: Ready | None = None,
    ) -> AsyncStep:
        """Start a lookup and return at once; arguments and errors are those of `Client.prefetch`."""
        step = self.client.prefetch(
            tokens,
            query_start_loc,
            lookback,
            dead,
            lookback_dead,
            layers=layers,
            out=out,
            timeout_s=timeout_s,
            valid=valid,
            ahead=ahead,
            ready=ready,
        )
        return AsyncStep(step)

    def prefetch_rows(
        self,
        rows: Mapping[int, npt.NDArray[Any]],
        *,
        out: Out | None = None,
        timeout_s: float | None = None,
        valid: Mapping[int, Valid] | None = None,
        ahead: bool = False,
        ready: Ready | None = None,
        absent: bool = False,
    ) -> AsyncStep:
        """Start a lookup by row ids; arguments and errors are those of `Client.prefetch_rows`."""
        step = self.client.prefetch_rows(
            rows, out=out, timeout_s=timeout_s, valid=valid, ahead=ahead, ready=ready, absent=absent
        )
        return AsyncStep(step)

    def amend(
        self,
        step: AsyncStep,
        tokens: IntArray,
        query_start_loc: IntArray | None = None,
        lookback: IntArray | None = None,
        dead: npt.ArrayLike | None = None,
        lookback_dead: npt.ArrayLike | None = None,
        *,
        layers: Sequence[int] | None = None,
        out: Out | None = None,
        timeout_s: float | None = None,
        valid: Mapping[int, Valid] | None = None,
    ) -> AsyncStep:
        """Start a step in place of `step`; arguments and errors are those of `Client.amend`."""
        amended = self.client.amend(
            step.step,
            tokens,
            query_start_loc,
            lookback,
            dead,
            lookback_dead,
            layers=layers,
            out=out,
            timeout_s=timeout_s,
            valid=valid,
        )
        return AsyncStep(amended)

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
        valid: Mapping[int, Valid] | None = None,
    ) -> dict[int, Rows]:
        """`prefetch` and wait: layer -> uint8 [T, heads, row_bytes]. Whoever cancels it cancels the step."""
        step = self.prefetch(
            tokens,
            query_start_loc,
            lookback,
            dead,
            lookback_dead,
            layers=layers,
            out=out,
            timeout_s=timeout_s,
            valid=valid,
        )
        return await _all_rows(step)

    async def lookup_rows(
        self,
        rows: Mapping[int, npt.NDArray[Any]],
        *,
        out: Out | None = None,
        timeout_s: float | None = None,
        valid: Mapping[int, Valid] | None = None,
        absent: bool = False,
    ) -> dict[int, Rows]:
        """`prefetch_rows` and wait: layer -> uint8 [*ids.shape, row_bytes]. Whoever cancels it cancels the step."""
        return await _all_rows(self.prefetch_rows(rows, out=out, timeout_s=timeout_s, valid=valid, absent=absent))

    def hint(
        self,
        tokens: IntArray,
        query_start_loc: IntArray | None = None,
        lookback: IntArray | None = None,
        dead: npt.ArrayLike | None = None,
        lookback_dead: npt.ArrayLike | None = None,
    ) -> bool:
        """As `Client.hint`."""
        return self.client.hint(tokens, query_start_loc, lookback, dead, lookback_dead)

    async def close(self) -> None:
        """End the connections; steps under way fail with StepCancelledError."""
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        return await self._connected_one()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        client = self._client
        if isinstance(client, _Later) and not client.connected:
            return f"<AsyncClient on {client.target}, not connected>"
        return f"<AsyncClient {brief(client.status())}>"


class _Later(Client):
    """One that connects when it is told to. connected: whether it has."""

    connected = False

    def _begin_connecting(self, connect: Callable[[], None]) -> None:
        self._connect_now: Callable[[], None] | None = connect

    def connect_now(self) -> None:
        """Connect, in this thread, once. Raises as `Client` does."""
        connect, self._connect_now = self._connect_now, None  # it refers to this client
        assert connect is not None
        connect()
        self.connected = True

    def close_soon(self) -> None:
        """Close it without waiting for that."""
        threading.Thread(target=self.close, name="engrampool-close", daemon=True).start()


def _connect(client: _Later, loop: asyncio.AbstractEventLoop, done: "asyncio.Future[None]") -> None:
    """In a thread."""
    failure: BaseException | None = None
    try:
        client.connect_now()
    except BaseException as error:
        failure = error
    try:
        loop.call_soon_threadsafe(_settle, done, failure)
    except RuntimeError:  # the loop is closed, and nobody waits on it
        client.close()


def _tell(loop: asyncio.AbstractEventLoop, settled: Mapping[int, asyncio.Future[None]], layer: int) -> None:
    """In whichever thread the layer was settled."""
    with suppress(RuntimeError):  # the loop is closed, and nobody waits on it
        loop.call_soon_threadsafe(_settle, settled[layer])


def _settle(future: "asyncio.Future[None]", failure: BaseException | None = None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(None)
    else:
        future.set_exception(failure)


async def _all_rows(step: AsyncStep) -> dict[int, Rows]:
    try:
        return {layer: await step.rows(layer) for layer in step.layers}
    finally:
        step.cancel()  # of effect if this was: the caller has its arrays back by now
