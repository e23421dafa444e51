"""Answers the calls of engrampool.v1.Pool. docs/PROTOCOL.md is what callers may rely on."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import grpc

from engrampool_proto import __version__, wire
from engrampool_proto.errors import BatchError, WireError
from engrampool_proto.spec import RowIds, canonical_json
from engrampool_proto.v1 import pool_pb2
from engrampool_server.metrics import Metrics
from engrampool_server.shared import InFlight
from engrampool_server.tables import HeldModel, HeldTable

# Requests with their answers up to this size are worked on by the event loop: no hand-over to a thread.
_INLINE_BYTES = 2 << 20
# Ids of streams up to this size are hashed and checked by the event loop, if it gathers too: some milliseconds.
_INLINE_RESOLVE_BYTES = 64 << 20
# Protobuf reads messages of less than 2 GiB, and gRPC's frames hold less than 4 GiB; 1 MiB is left for headers.
_MAX_MESSAGE_BYTES = (2 << 30) - (1 << 20)


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; see `Limits` in pool.proto. stream_chunk_bytes: rows in one message of a stream, about."""

    max_rows_per_request: int
    max_answer_bytes: int
    stream_chunk_bytes: int


class _RefusedError(Exception):
    """A call to be ended with `code`; `reason` is its stable name, the text is for people."""

    def __init__(self, code: grpc.StatusCode, reason: str, text: str) -> None:
        super().__init__(text)
        self.code, self.reason = code, reason


@dataclass(frozen=True, eq=False)
class _Job:
    """A request that was found good: what to read, in the order of the answer.

    Either `ids` is there, or `request.tokens` is to be hashed for `tables`.
    """

    request: wire.LookupRequest
    model: HeldModel
    tables: Sequence[HeldTable]
    answer_bytes: int

    def resolve(self) -> list[tuple[HeldTable, RowIds]]:
        """The ids of every table, hashed if need be, each checked against what is held."""
        if self.request.tokens is None:
            ids: Iterable[RowIds] = [ids for _, ids in self.request.tables]
        else:
            hashed = self.model.hasher.rows(self.request.tokens, [table.spec.layer for table in self.tables])
            ids = [rows.reshape(-1) for rows in hashed.values()]
        resolved = list(zip(self.tables, ids, strict=True))
        for table, rows in resolved:
            table.check(rows)
        return resolved


class PoolService:
    """The handlers. Holds models by name and version; until `ready` is set every lookup is UNAVAILABLE."""

    def __init__(self, limits: Limits, in_flight: InFlight, metrics: Metrics, gather_threads: int) -> None:
        self._limits, self._in_flight, self._metrics = limits, in_flight, metrics
        self._models: dict[str, dict[str, HeldModel]] = {}
        # One there is always, for large answers that are asked for as one message.
        self._threads = ThreadPoolExecutor(max(1, gather_threads), "gather")
        self._inline = gather_threads == 0
        self.ready = False
        metrics.in_flight_limit.set(in_flight.limit_bytes)

    def add(self, model: HeldModel) -> None:
        """Hold `model` from now on."""
        self._models.setdefault(model.spec.name, {})[model.version] = model

    def close(self) -> None:
        """Let the gather threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """By method name. The hot methods pass raw bytes, which wire.py reads and writes."""
        return {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self._describe,
                request_deserializer=pool_pb2.DescribeRequest.FromString,
                response_serializer=pool_pb2.DescribeResponse.SerializeToString,
            ),
            "Lookup": grpc.unary_unary_rpc_method_handler(self._lookup),
            "LookupStream": grpc.unary_stream_rpc_method_handler(self._lookup_stream),
        }

    async def _describe(
        self, request: pool_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> pool_pb2.DescribeResponse:
        try:
            if not self.ready:
                raise _RefusedError(grpc.StatusCode.UNAVAILABLE, "loading", "tables are still loading")
            models = self._models
            if request.model:
                models = {request.model: self._versions(request.model)}
        except _RefusedError as error:
            await self._refuse(context, error)
        limits = pool_pb2.Limits(
            max_rows_per_request=self._limits.max_rows_per_request,
            max_answer_bytes=self._limits.max_answer_bytes,
            max_in_flight_bytes=self._in_flight.limit_bytes,
        )
        described = [
            _describe(held, request.include_spec) for versions in models.values() for held in versions.values()
        ]
        return pool_pb2.DescribeResponse(models=described, limits=limits, server_version=__version__)

    async def _lookup(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        arrived = time.perf_counter()
        try:
            job = self._admit(message, context)
            if job.answer_bytes > _MAX_MESSAGE_BYTES:
                text = f"the answer would be {job.answer_bytes} bytes, more than one message holds; ask by LookupStream"
                raise _invalid(text, "too-many-rows")
            if job.answer_bytes + len(message) <= _INLINE_BYTES:
                answer, times = self._answer(job, context, arrived)
            else:
                loop = asyncio.get_running_loop()
                answer, times = await loop.run_in_executor(self._threads, self._answer, job, context, arrived)
        except (_RefusedError, WireError, BatchError) as error:
            await self._refuse(context, error)
        # Once the answer is on its way: the caller need not wait for our book-keeping.
        context.add_done_callback(lambda _: self._count("Lookup", job, times))
        return answer

    def _answer(self, job: _Job, context: grpc.aio.ServicerContext, arrived: float) -> tuple[bytes, wire.ServerTimes]:
        """Hash, gather and encode. Runs on the loop or in a gather thread."""
        begin = time.perf_counter()
        _check_deadline(context)
        resolved = job.resolve()
        writer = wire.ResponseWriter(
            [(table.spec.layer, 0, len(ids) * table.spec.row_bytes) for table, ids in resolved], with_times=True
        )
        for (table, ids), out in zip(resolved, writer.rows, strict=True):
            table.gather(ids, out)
        end = time.perf_counter()
        times = wire.ServerTimes(_us(begin - arrived), _us(end - begin), _us(end - arrived))
        writer.set_times(times)
        return writer.message, times

    async def _lookup_stream(self, message: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        arrived = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            job = self._admit(message, context)
            if self._inline and job.answer_bytes <= _INLINE_RESOLVE_BYTES:
                begin, resolved = self._begin(job, context)
            else:
                begin, resolved = await loop.run_in_executor(self._threads, self._begin, job, context)
            # The layers that the model needs first go first, whatever the order asked for.
            resolved.sort(key=lambda pair: pair[0].spec.layer)
            pieces = [piece for table, ids in resolved for piece in self._pieces(table, ids)]
            gathered = time.perf_counter() - begin
            last = len(pieces) - 1

            def gather(at: int) -> asyncio.Future[tuple[wire.ResponseWriter, float]]:
                return loop.run_in_executor(self._threads, _gather_piece, pieces[at], at == last)

            coming = None if self._inline else gather(0)
            for at in range(len(pieces)):
                writer, seconds = await coming if coming else _gather_piece(pieces[at], at == last)
                gathered += seconds
                if at < last:
                    coming = coming and gather(at + 1)  # while this piece is sent
                else:
                    total = time.perf_counter() - arrived
                    times = wire.ServerTimes(_us(begin - arrived), _us(gathered), _us(total))
                    writer.set_times(times)
                yield writer.message
        except (_RefusedError, WireError, BatchError) as error:
            await self._refuse(context, error)
        self._count("LookupStream", job, times)

    def _begin(self, job: _Job, context: grpc.aio.ServicerContext) -> tuple[float, list[tuple[HeldTable, RowIds]]]:
        begin = time.perf_counter()
        _check_deadline(context)
        return begin, job.resolve()

    def _pieces(self, table: HeldTable, ids: RowIds) -> list[tuple[HeldTable, int, RowIds]]:
        """Cut a table's ids into runs of about a chunk; a table without ids is one empty run."""
        step = max(1, self._limits.stream_chunk_bytes // table.spec.row_bytes)
        return [(table, first, ids[first : first + step]) for first in range(0, max(1, len(ids)), step)]

    def _admit(self, message: bytes, context: grpc.aio.ServicerContext) -> _Job:
        """Read the request, check it, and reserve the bytes of its answer until the call is over."""
        if not self.ready:
            raise _RefusedError(grpc.StatusCode.UNAVAILABLE, "loading", "tables are still loading")
        job = self._check(wire.parse_request(message))
        if not self._in_flight.reserve(job.answer_bytes):
            text = f"{self._in_flight.total} bytes are in flight, of {self._in_flight.limit_bytes}; try again later"
            raise _RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded", text)
        self._metrics.in_flight.set(self._in_flight.own)
        context.add_done_callback(lambda _: self._release(job.answer_bytes))
        return job

    def _release(self, nbytes: int) -> None:
        self._in_flight.release(nbytes)
        self._metrics.in_flight.set(self._in_flight.own)

    def _check(self, request: wire.LookupRequest) -> _Job:
        model = self._held(request.model, request.version)
        if request.tokens is not None:
            if request.tables:
                raise _invalid("a lookup names rows by 'tables' or by 'tokens', not by both")
            layers = request.layers or model.spec.layers
            if any(a >= b for a, b in pairwise(layers)):
                raise _invalid(f"layers must ascend without repeats; they are {_brief(layers)}")
            counts = [request.tokens.num_tokens * self._table(model, layer).spec.heads for layer in layers]
        else:
            if request.layers:
                raise _invalid("'layers' goes with 'tokens'; 'tables' names its own")
            layers = tuple(layer for layer, _ in request.tables)
            if not layers:
                raise _invalid("a lookup names rows by 'tables' or by 'tokens'; this has neither")
            if len(set(layers)) != len(layers):
                raise _invalid(f"a layer is asked for twice: {_brief(layers)}")
            counts = [len(ids) for _, ids in request.tables]
        tables = [self._table(model, layer) for layer in layers]
        if sum(counts) > self._limits.max_rows_per_request:
            text = f"{sum(counts)} rows asked for, at most {self._limits.max_rows_per_request} in one request; split it"
            raise _invalid(text, "too-many-rows")
        answer_bytes = sum(count * table.spec.row_bytes for count, table in zip(counts, tables, strict=True))
        if answer_bytes > self._limits.max_answer_bytes:
            text = (
                f"the answer would be {answer_bytes} bytes, at most {self._limits.max_answer_bytes}; split the request"
            )
            raise _invalid(text, "too-many-rows")
        return _Job(request, model, tables, answer_bytes)

    def _versions(self, name: str) -> dict[str, HeldModel]:
        if name not in self._models:
            held = ", ".join(sorted(self._models)) or "none"
            text = f"no model {name[:200]!r} here; held: {held}"
            raise _RefusedError(grpc.StatusCode.NOT_FOUND, "unknown-model", text)
        return self._models[name]

    def _held(self, name: str, version: str) -> HeldModel:
        versions = self._versions(name)
        if version not in versions:
            text = f"version {version[:64]!r} of {name} is not here; held: {', '.join(versions)}"
            raise _RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "unknown-version", text)
        return versions[version]

    def _table(self, model: HeldModel, layer: int) -> HeldTable:
        if layer not in model.tables:
            text = f"model {model.spec.name} has no layer {layer}; it has {', '.join(map(str, model.tables))}"
            raise _invalid(text, "unknown-layer")
        return model.tables[layer]

    def _count(self, method: str, job: _Job, times: wire.ServerTimes) -> None:
        given = {layer: len(ids) for layer, ids in job.request.tables}
        rows = []
        for table in job.tables:
            layer = table.spec.layer
            count = given[layer] if job.request.tokens is None else job.request.tokens.num_tokens * table.spec.heads
            rows.append((layer, count, count * table.spec.row_bytes))
        seconds = (times.queue_us / 1e6, times.gather_us / 1e6, times.total_us / 1e6)
        self._metrics.answered(job.model.spec.name, method, rows, *seconds)

    async def _refuse(self, context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
        if isinstance(error, _RefusedError):
            code, reason = error.code, error.reason
        elif isinstance(error, WireError):
            code, reason = grpc.StatusCode.INVALID_ARGUMENT, "malformed-message"
        else:
            code, reason = grpc.StatusCode.INVALID_ARGUMENT, "bad-batch"
        self._metrics.refused.labels(reason).inc()
        await context.abort(code, str(error), ((wire.REASON_KEY, reason),))
        raise AssertionError("abort always raises")


def _gather_piece(piece: tuple[HeldTable, int, RowIds], last: bool) -> tuple[wire.ResponseWriter, float]:
    begin = time.perf_counter()
    table, first, ids = piece
    writer = wire.ResponseWriter([(table.spec.layer, first, len(ids) * table.spec.row_bytes)], with_times=last)
    table.gather(ids, writer.rows[0])
    return writer, time.perf_counter() - begin


def _describe(held: HeldModel, include_spec: bool) -> pool_pb2.Model:
    tables = []
    for table in held.tables.values():
        segments = [
            pool_pb2.Segment(name=s.name, dtype=s.dtype, length=s.length) for s in table.spec.row_format.segments
        ]
        tables.append(
            pool_pb2.Table(
                layer=table.spec.layer,
                num_rows=table.spec.num_rows,
                row_bytes=table.spec.row_bytes,
                heads=table.spec.heads,
                segments=segments,
                row_start=table.row_start,
                row_stop=table.row_stop,
            )
        )
    return pool_pb2.Model(
        name=held.spec.name,
        version=held.version,
        spec_digest=held.spec.digest,
        tables=tables,
        spec_json=canonical_json(held.spec.to_json()) if include_spec else b"",
    )


def _invalid(text: str, reason: str = "bad-batch") -> _RefusedError:
    return _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, reason, text)


def _check_deadline(context: grpc.aio.ServicerContext) -> None:
    """Work for a caller who has stopped waiting is work for nobody."""
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        text = "the deadline passed before work began"
        raise _RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline", text)


def _brief(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
