"""The blocking client, for engines that run their steps in threads."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy.typing as npt

from engrampool_client.direct import Direct, DirectLane
from engrampool_client.errors import EngrampoolError, PoolError, StepCancelledError
from engrampool_client.exchange import Exchange, Hashing, IntArray, Out, Rows, token_batch
from engrampool_client.grpc_lane import GrpcLane
from engrampool_client.served import check_fingerprint, choose
from engrampool_client.settings import SPLIT_ABOVE_BYTES, Retries, check_settings
from engrampool_client.step import Step
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.malloc import pin_malloc
from engrampool_proto.spec import ModelSpec
from engrampool_proto.wire import ServerTimes


class Client:
    """Connections to one server for one version of one model. Thread-safe; close it, or use it in `with`.

    target: "host:port" or any gRPC name ("dns:///...", "unix:...").
    model, version: None for the only one that the server holds. The version stays pinned: if the server changes to
        another, lookups fail with UnknownVersionError rather than mix the two.
    hashing: "local" sends row ids, "server" sends tokens.
    config, tokenizer: this side's config.json and tokenizer.json; if given, the served tables must fit them.
    timeout_s: bound on each lookup. connect_timeout_s: bound on connecting, a server that is still loading included.
    retry_s: how long, from the moment a connection broke, lookups go on asking; later ones fail at once until one is
        answered again. 0 never asks twice.
    max_steps: prefetches worked on at once; further ones wait for a place, not their callers.
    connections: to the server; large lookups by local hashing or by row ids are split over them.
    direct: "auto" looks up over plain sockets where the server has a direct lane, and over gRPC where it has none or
        its port cannot be reached; "off" always over gRPC.
    spin_s: over the direct lane, how long `lookup` and `lookup_rows` look for the answer without sleeping, where
        answers come as soon as that: what waking up takes is saved, and a processor is busy meanwhile. 0 never.
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
        retry_s: float = 1.0,
        max_steps: int = 4,
        connections: int = 1,
        direct: Direct = "auto",
        spin_s: float = 300e-6,
        keep_memory: bool = True,
    ) -> None:
        check_settings(hashing, timeout_s, connect_timeout_s, max_steps, retry_s, connections)
        if direct not in ("auto", "off"):
            raise ValueError(f"direct must be 'auto' or 'off', not {direct!r}")
        if not 0 <= spin_s <= 1:
            raise ValueError(f"spin_s must be 0 to 1; it is {spin_s}")
        if keep_memory:
            pin_malloc()
        self.target, self._hashing, self._timeout_s = target, hashing, timeout_s
        self._retries = Retries(retry_s)
        self._spin_s = spin_s
        self._closing = threading.Event()
        self._lanes = [GrpcLane(target) for _ in range(connections)]
        self._direct: DirectLane | None = None
        try:
            self.served = choose(self._lanes[0].describe(connect_timeout_s), model, version)
            check_fingerprint(self.served.spec, config, tokenizer)
            if direct == "auto" and self.served.direct:
                self._direct = DirectLane(self._lanes[0].open_direct, target, max_steps * connections)
        except BaseException:
            self._close_lanes()
            raise
        self._threads = ThreadPoolExecutor(max_steps, "engrampool")
        # Of its own: a part of a lookup must never wait for a place behind the lookup that waits for it.
        self._parts = ThreadPoolExecutor(max(1, max_steps * (connections - 1)), "engrampool-part")

    @property
    def spec(self) -> ModelSpec:
        """The served model's specification: layers, row formats, hash constants."""
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
    ) -> Step:
        """Start the lookup of a batch's rows for `layers` (all by default) and return at once.

        tokens: int32 [T]; query_start_loc: int32 [R + 1], by default one request; lookback: int32 [R, <= n - 1], column
        0 the token just before the chunk, -1 before the start, by default all -1; dead: bool [T] and lookback_dead:
        bool [R, <= n - 1]: tokens outside any n-gram. The arrays are copied.

        out: layer -> uint8 [T, heads, row_bytes], C-contiguous and writable (pinned memory, say): the layer's rows are
        written there, as they come, until the step is done. Layers without one get arrays of the client's.

        Raises BatchError for arrays that do not fit together and SpecError for an unknown layer. What takes longer to
        find out (a token id out of range, a batch over the server's limits, a failed call) is raised by `Step.rows`.
        """
        batch = token_batch(tokens, query_start_loc, lookback, dead, lookback_dead)
        return self._submit(*self._by_tokens(batch, layers, out), timeout_s)

    def prefetch_rows(
        self, rows: Mapping[int, npt.NDArray[Any]], *, out: Out | None = None, timeout_s: float | None = None
    ) -> Step:
        """Start the lookup of rows by id: layer -> integer array of any shape; `Step.rows` gives [*shape, row_bytes].

        For engines that hash themselves. out: as for `prefetch`, of these shapes.
        Raises as `prefetch` does; bad row ids are raised by `Step.rows`.
        """
        owned = {layer: ids.copy() if hasattr(ids, "copy") else ids for layer, ids in rows.items()}
        return self._submit(*self._by_rows(owned, out), timeout_s)

    def lookup(
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
        """`prefetch` and wait, in the caller's own thread: layer -> uint8 [T, heads, row_bytes]."""
        batch = token_batch(tokens, query_start_loc, lookback, dead, lookback_dead)
        return self._wait_for(*self._by_tokens(batch, layers, out), timeout_s)

    def lookup_rows(
        self, rows: Mapping[int, npt.NDArray[Any]], *, out: Out | None = None, timeout_s: float | None = None
    ) -> dict[int, Rows]:
        """`prefetch_rows` and wait, in the caller's own thread: layer -> uint8 [*ids.shape, row_bytes]."""
        return self._wait_for(*self._by_rows(rows, out), timeout_s)

    def _by_tokens(
        self, batch: TokenBatch, layers: Sequence[int] | None, out: Out | None
    ) -> tuple[Step, Callable[[], Exchange]]:
        wanted = self.spec.layers if layers is None else layers
        step = Step(sorted({self.spec.table(layer).layer for layer in wanted}))
        return step, lambda: Exchange.of_tokens(self.served, batch, step.layers, self._hashing, out)

    def _by_rows(self, rows: Mapping[int, npt.NDArray[Any]], out: Out | None) -> tuple[Step, Callable[[], Exchange]]:
        step = Step(sorted(self.spec.table(layer).layer for layer in rows))
        return step, lambda: Exchange.of_rows(self.served, rows, out)

    def _submit(self, step: Step, build: Callable[[], Exchange], timeout_s: float | None) -> Step:
        try:
            self._threads.submit(self._run, step, build, self._deadline(timeout_s), 0.0)
        except RuntimeError as error:
            raise PoolError("the client is closed") from error
        return step

    def _wait_for(self, step: Step, build: Callable[[], Exchange], timeout_s: float | None) -> dict[int, Rows]:
        if self._closing.is_set():
            raise PoolError("the client is closed")
        self._run(step, build, self._deadline(timeout_s), self._spin_s)
        return {layer: step.rows(layer) for layer in step.layers}

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)

    def _run(self, step: Step, build: Callable[[], Exchange], deadline: float, spin_s: float) -> None:
        """Hash, send, take the answer in: in a thread of the pool, or in that of a caller who waits."""
        try:
            if self._closing.is_set():
                step.cancel()
            if step.done():  # cancelled while it waited for a place
                return
            exchange = build()
            step._arrived(exchange.whole(exchange.empty_layers()))
            split = exchange.answer_bytes > SPLIT_ABOVE_BYTES
            parts = exchange.split(len(self._lanes)) if split else [exchange]
            others = [
                self._parts.submit(self._fetch, lane, part, deadline, step, 0.0)
                for lane, part in zip(self._lanes[1:], parts[1:], strict=False)
            ]
            try:
                self._fetch(self._lanes[0], parts[0], deadline, step, spin_s)
            finally:  # whatever became of the first, nothing is written once the step has ended
                for other in others:
                    other.exception()
            for other in others:
                other.result()
            step._end(None, _slowest([part.times for part in parts if part.times is not None]))
        except EngrampoolError as error:
            closed = StepCancelledError("the client was closed")
            step._end(closed if self._closing.is_set() and isinstance(error, PoolError) else error)
        except Exception as error:  # a step must never be left without an end
            if self._closing.is_set():  # gRPC has its own ways to say that a channel is closed
                step._end(StepCancelledError("the client was closed"))
                return
            step._end(PoolError(f"unexpected failure in the client: {error!r}"))
            raise

    def _fetch(self, lane: GrpcLane, exchange: Exchange, deadline: float, step: Step, spin_s: float) -> None:
        """Ask until the answer is whole, the error is one that asking again does not mend, or time is up."""
        for attempt in count():
            try:
                if self._direct is None or not self._direct.fetch(exchange, deadline, step, spin_s):
                    lane.fetch(exchange, max(0.0, deadline - time.monotonic()), step)
                self._retries.succeeded()
                return
            except PoolError as error:
                pause_s = self._retries.pause_s(error, attempt)
                if pause_s is None or time.monotonic() + pause_s >= deadline or step.given_up():
                    raise
                if self._closing.wait(pause_s):
                    raise
                exchange.restart()
                if exchange.complete:  # only the end of the answer was lost
                    return

    def close(self) -> None:
        """End the connections; steps under way fail with StepCancelledError or UnavailableError."""
        self._closing.set()
        self._close_lanes()
        self._threads.shutdown(wait=True)
        self._parts.shutdown(wait=True)

    def _close_lanes(self) -> None:
        if self._direct is not None:
            self._direct.close()
        for lane in self._lanes:
            lane.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _slowest(times: Sequence[ServerTimes]) -> ServerTimes | None:
    """The server's times of a lookup in parts that ran side by side."""
    if not times:
        return None
    return ServerTimes(*(max(getattr(one, name) for one in times) for name in ("queue_us", "gather_us", "total_us")))


__all__ = ["Client", "Step"]
