"""The blocking client, for engines that run their steps in threads."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from engrampool_client.exchange import Exchange, Hashing, IntArray, Rows, token_batch
from engrampool_client.served import DESCRIBE, check_fingerprint, choose
from engrampool_client.settings import (
    CHANNEL_OPTIONS,
    METHOD,
    RETRY_LOADING_S,
    STREAM_ABOVE_BYTES,
    check_settings,
)
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.malloc import pin_malloc
from engrampool_proto.spec import ModelSpec
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
        self._cancel_call: Callable[[], Any] | None = None

    def rows(self, layer: int, timeout_s: float | None = None) -> Rows:
        """Wait for one layer only: uint8 [T, heads, row_bytes], read-only, in the order of the tokens.

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
        """Whether all rows are there, or none more will come."""
        return self._done

    def cancel(self) -> None:
        """Give the step up: the call ends, rows that are not there yet never come. Rows that are stay readable."""
        self._end(StepCancelledError("the step was cancelled"))
        with self._changed:
            cancel = self._cancel_call
        if cancel is not None:
            cancel()

    def _started(self, cancel: Callable[[], Any]) -> None:
        with self._changed:
            self._cancel_call = cancel
            already_done = self._done
        if already_done:
            cancel()

    def _arrived(self, rows: Mapping[int, Rows]) -> None:
        with self._changed:
            if not self._done:
                self._rows.update(rows)
                self._changed.notify_all()

    def _end(self, error: EngrampoolError | None, times: ServerTimes | None = None) -> None:
        with self._changed:
            if self._done:
                return
            self._error, self.times, self._done = error, times, True
            if error is None:
                self.elapsed_s = time.perf_counter() - self._begin
            self._changed.notify_all()


class Client:
    """A connection to one server for one version of one model. Thread-safe; close it, or use it in `with`.

    target: "host:port" or any gRPC name ("dns:///...", "unix:...").
    model, version: None for the only one that the server holds. The version stays pinned: if the server changes to
        another, lookups fail with UnknownVersionError rather than mix the two.
    hashing: "local" sends row ids, "server" sends tokens.
    config, tokenizer: this side's config.json and tokenizer.json; if given, the served tables must fit them.
    timeout_s: bound on each lookup. connect_timeout_s: bound on connecting, a server that is still loading included.
    max_steps: prefetches worked on at once; further ones wait for a place, not their callers.
    keep_memory: have the C library keep freed memory for the next answer, for this whole process (see
        `engrampool_proto.malloc`); the process stays as large as it was at its peak.

    Raises on construction UnavailableError, UnknownModelError, UnknownVersionError, FingerprintError, SpecError,
    ProtocolError.
    """

    def __init__(
        self,
        target: str,
        model: str | None = None,
        version: str | None = None,
        *,
        hashing: Hashing = "local",
        config: str | Path | None = None,
        tokenizer: str | Path | None = None,
        timeout_s: float = 10.0,
        connect_timeout_s: float = 10.0,
        max_steps: int = 4,
        keep_memory: bool = True,
    ) -> None:
        check_settings(hashing, timeout_s, connect_timeout_s, max_steps)
        if keep_memory:
            pin_malloc()
        self.target, self._hashing, self._timeout_s = target, hashing, timeout_s
        self._channel = grpc.insecure_channel(target, CHANNEL_OPTIONS)
        self._lookup_unary = self._channel.unary_unary(METHOD + "Lookup")
        self._lookup_stream = self._channel.unary_stream(METHOD + "LookupStream")
        try:
            self.served = choose(self._describe(connect_timeout_s), model, version)
            check_fingerprint(self.served.spec, config, tokenizer)
        except BaseException:
            self._channel.close()
            raise
        self._threads = ThreadPoolExecutor(max_steps, "engrampool")
        self._closed = False

    @property
    def spec(self) -> ModelSpec:
        """The served model's specification: layers, row formats, hash constants."""
        return self.served.spec

    @property
    def version(self) -> str:
        """The pinned version."""
        return self.served.version

    def _describe(self, timeout_s: float) -> bytes:
        describe = self._channel.unary_unary(METHOD + "Describe")
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while True:
            remaining = deadline - time.monotonic()
            try:
                # wait_for_ready also waits for a server that is not listening yet.
                answer: bytes = describe(DESCRIBE, timeout=max(0.0, remaining), wait_for_ready=True)
                return answer
            except grpc.RpcError as rpc_error:
                error = from_rpc(rpc_error, self.target)
                loading = isinstance(error, UnavailableError) and error.reason == "loading"
                if not loading and not isinstance(error, DeadlineError):
                    raise error from rpc_error
                if deadline - time.monotonic() <= RETRY_LOADING_S:
                    text = f"no server at {self.target} was ready within {timeout_s} s: {error}"
                    raise UnavailableError(text, error.reason) from rpc_error
            pause.wait(RETRY_LOADING_S)

    def prefetch(
        self,
        tokens: IntArray,
        query_start_loc: IntArray | None = None,
        lookback: IntArray | None = None,
        dead: npt.ArrayLike | None = None,
        lookback_dead: npt.ArrayLike | None = None,
        *,
        layers: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> Step:
        """Start the lookup of a batch's rows for `layers` (all by default) and return at once.

        tokens: int32 [T]; query_start_loc: int32 [R + 1], by default one request; lookback: int32 [R, <= n - 1], column
        0 the token just before the chunk, -1 before the start, by default all -1; dead: bool [T] and lookback_dead:
        bool [R, <= n - 1]: tokens outside any n-gram. The arrays are copied.

        Raises BatchError for arrays that do not fit together and SpecError for an unknown layer. What takes longer to
        find out (a token id out of range, a batch over the server's limits, a failed call) is raised by `Step.rows`.
        """
        batch = token_batch(tokens, query_start_loc, lookback, dead, lookback_dead)
        return self._submit(*self._by_tokens(batch, layers), timeout_s)

    def prefetch_rows(self, rows: Mapping[int, npt.NDArray[Any]], *, timeout_s: float | None = None) -> Step:
        """Start the lookup of rows by id: layer -> integer array of any shape; `Step.rows` gives [*shape, row_bytes].

        For engines that hash themselves. Raises as `prefetch` does; bad row ids are raised by `Step.rows`.
        """
        owned = {layer: ids.copy() if hasattr(ids, "copy") else ids for layer, ids in rows.items()}
        return self._submit(*self._by_rows(owned), timeout_s)

    def lookup(
        self,
        tokens: IntArray,
        query_start_loc: IntArray | None = None,
        lookback: IntArray | None = None,
        dead: npt.ArrayLike | None = None,
        lookback_dead: npt.ArrayLike | None = None,
        *,
        layers: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> dict[int, Rows]:
        """`prefetch` and wait, in the caller's own thread: layer -> uint8 [T, heads, row_bytes]."""
        batch = token_batch(tokens, query_start_loc, lookback, dead, lookback_dead)
        return self._wait_for(*self._by_tokens(batch, layers), timeout_s)

    def lookup_rows(self, rows: Mapping[int, npt.NDArray[Any]], *, timeout_s: float | None = None) -> dict[int, Rows]:
        """`prefetch_rows` and wait, in the caller's own thread: layer -> uint8 [*ids.shape, row_bytes]."""
        return self._wait_for(*self._by_rows(rows), timeout_s)

    def _by_tokens(self, batch: TokenBatch, layers: Sequence[int] | None) -> tuple[Step, Callable[[], Exchange]]:
        wanted = self.spec.layers if layers is None else layers
        step = Step(sorted({self.spec.table(layer).layer for layer in wanted}))
        return step, lambda: Exchange.of_tokens(self.served, batch, step.layers, self._hashing)

    def _by_rows(self, rows: Mapping[int, npt.NDArray[Any]]) -> tuple[Step, Callable[[], Exchange]]:
        step = Step(sorted(self.spec.table(layer).layer for layer in rows))
        return step, lambda: Exchange.of_rows(self.served, rows)

    def _submit(self, step: Step, build: Callable[[], Exchange], timeout_s: float | None) -> Step:
        try:
            self._threads.submit(self._run, step, build, self._deadline(timeout_s))
        except RuntimeError as error:
            raise PoolError("the client is closed") from error
        return step

    def _wait_for(self, step: Step, build: Callable[[], Exchange], timeout_s: float | None) -> dict[int, Rows]:
        if self._closed:
            raise PoolError("the client is closed")
        self._run(step, build, self._deadline(timeout_s))
        return {layer: step.rows(layer) for layer in step.layers}

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)

    def _run(self, step: Step, build: Callable[[], Exchange], deadline: float) -> None:
        """Hash, send, take the answer in: in a thread of the pool, or in that of a caller who waits."""
        try:
            if self._closed:
                step.cancel()
            if step.done():  # cancelled while it waited for a place
                return
            exchange = build()
            step._arrived({layer: exchange.rows(layer) for layer in exchange.empty_layers()})
            timeout_s = max(0.0, deadline - time.monotonic())
            if exchange.answer_bytes <= STREAM_ABOVE_BYTES:
                call = self._lookup_unary.future(exchange.request, timeout=timeout_s)
                step._started(call.cancel)
                self._take(step, exchange, call.result())
            else:
                stream = self._lookup_stream(exchange.request, timeout=timeout_s)
                step._started(stream.cancel)
                for message in stream:
                    self._take(step, exchange, message)
            exchange.finish()
            step._end(None, exchange.times)
        except grpc.FutureCancelledError:
            step._end(StepCancelledError("the step was cancelled"))
        except grpc.RpcError as error:
            closed = StepCancelledError("the client was closed")
            step._end(closed if self._closed else from_rpc(error, self.target))
        except EngrampoolError as error:
            step._end(error)
        except Exception as error:  # a step must never be left without an end
            if self._closed:  # gRPC has its own ways to say that a channel is closed
                step._end(StepCancelledError("the client was closed"))
                return
            step._end(PoolError(f"unexpected failure in the client: {error!r}"))
            raise

    @staticmethod
    def _take(step: Step, exchange: Exchange, message: bytes) -> None:
        step._arrived({layer: exchange.rows(layer) for layer in exchange.add(message)})

    def close(self) -> None:
        """End the connection; steps under way fail with StepCancelledError or UnavailableError."""
        self._closed = True
        self._channel.close()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["Client", "Step"]
