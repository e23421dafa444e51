"""Answers the calls of engrampool.v1.Pool over gRPC. docs/PROTOCOL.md is what callers may rely on."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import NoReturn

import grpc

from engrampool_proto import __version__, wire
from engrampool_proto.segment import boot_id
from engrampool_proto.spec import canonical_json
from engrampool_proto.v1 import pool_pb2
from engrampool_server.answer import gate, peers
from engrampool_server.answer.accounts import Accounts
from engrampool_server.answer.emulation import Alarms, Reading
from engrampool_server.answer.in_flight import Peer
from engrampool_server.answer.lane.direct import DirectLane
from engrampool_server.answer.lookups import (
    SMALL_REQUEST_BYTES,
    Job,
    Limits,
    Lookups,
    Piece,
    Refusals,
    RefusedError,
    invalid,
    server_times,
)
from engrampool_server.answer.statistics import Statistics
from engrampool_server.memory.segments import Place
from engrampool_server.memory.tables import LoadedModel, LoadedTable

# Protobuf reads messages of less than 2 GiB, and gRPC's frames hold less than 4 GiB; 1 MiB is left for headers.
_MAX_MESSAGE_BYTES = (2 << 30) - (1 << 20)
# How long a client may go on reading tables that it has mapped once nobody answers it any more: longer than a worker's
# restart takes, and short enough that memory of a server that is gone does not stay for long.
_ATTACH_VALID_S = 5.0
# How long a caller may take to read one message of a stream.
PATIENCE_S = 10.0
# What an answer of Describe is made of: what is held, which of it is active, whether it can be mapped, the limits.
_MadeOf = tuple[list[LoadedModel], tuple[bool, ...], bool, Limits]


class PoolService:
    """The handlers.

    direct: the lane that OpenDirect lets callers into, None if there is none.
    attach: whether callers may map tables, where these lie in memory that others can map. accounts: of named callers.
    statistics: what Stats answers.
    is_active: whether clients read a version of a model, as the registry had it last.
    alarms: where memory is emulated, what to sleep by.
    """

    def __init__(
        self,
        lookups: Lookups,
        direct: DirectLane | None,
        attach: bool,
        statistics: Statistics,
        is_active: Callable[[str, str], bool] = lambda *_: False,
        accounts: Accounts | None = None,
        alarms: Alarms | None = None,
    ) -> None:
        self._alarms = alarms
        self._lookups, self._direct, self._may_attach, self._is_active = lookups, direct, attach, is_active
        self._statistics = statistics
        self._accounts = accounts or Accounts(1)
        # By model and include_spec: what the answer was made of; and the answer, which takes milliseconds to make with
        # the specification.
        self._described: dict[tuple[str, bool], tuple[_MadeOf, bytes]] = {}
        self._given_up: set[asyncio.Task[NoReturn]] = set()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """By method name. The hot methods pass raw bytes, which wire.py reads and writes, and Describe what it kept."""
        return {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self._describe,
                request_deserializer=pool_pb2.DescribeRequest.FromString,
            ),
            "Lookup": grpc.unary_unary_rpc_method_handler(self._lookup),
            "LookupStream": grpc.unary_stream_rpc_method_handler(self._lookup_stream),
            "OpenDirect": grpc.unary_unary_rpc_method_handler(
                self._open_direct,
                request_deserializer=pool_pb2.OpenDirectRequest.FromString,
                response_serializer=pool_pb2.OpenDirectResponse.SerializeToString,
            ),
            "Attach": grpc.unary_unary_rpc_method_handler(
                self._attach,
                request_deserializer=pool_pb2.AttachRequest.FromString,
                response_serializer=pool_pb2.AttachResponse.SerializeToString,
            ),
            "Stats": grpc.unary_unary_rpc_method_handler(self._stats),
        }

    async def _describe(self, request: pool_pb2.DescribeRequest, context: grpc.aio.ServicerContext) -> bytes:
        try:
            self._lookups.check_ready()
            models = self._lookups.held(request.model)
        except RefusedError as error:
            await self._refuse(context, error)
        active = tuple(self._is_active(held.spec.name, held.version) for held in models)
        made_of = (models, active, any(self._places(held) for held in models), self._lookups.limits)
        key = (request.model, request.include_spec)  # callers may invent names, but only of what is held it comes here
        described = self._described.get(key)
        if described is None or described[0] != made_of:
            described = (made_of, self._description(*made_of, request.include_spec))
            self._described[key] = described
        if len(described[1]) > SMALL_REQUEST_BYTES:  # a copy of which is in memory until it is read
            try:
                self._hold(
                    min(len(described[1]), self._lookups.in_flight.most_of(self._payer(context))), 0, b"", context
                )
            except RefusedError as error:
                await self._refuse(context, error)
        return described[1]

    def _description(
        self, models: list[LoadedModel], active: tuple[bool, ...], attach: bool, bounds: Limits, include_spec: bool
    ) -> bytes:
        """A DescribeResponse."""
        limits = pool_pb2.Limits(
            max_rows_per_request=bounds.max_rows_per_request,
            max_answer_bytes=bounds.max_answer_bytes,
            max_in_flight_bytes=self._lookups.in_flight.limit_bytes,
        )
        answer = pool_pb2.DescribeResponse(
            models=[_describe(held, one, include_spec) for held, one in zip(models, active, strict=True)],
            limits=limits,
            server_version=__version__,
            direct=self._direct is not None,
            attach=attach,
        )
        return answer.SerializeToString()

    async def _open_direct(
        self, request: pool_pb2.OpenDirectRequest, context: grpc.aio.ServicerContext
    ) -> pool_pb2.OpenDirectResponse:
        try:
            self._lookups.check_ready()
            if self._direct is None:
                text = "this server has no direct lane; look up over gRPC"
                raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "no-direct-lane", text)
            if self._direct.tls and not request.tls:
                text = "its direct lane speaks TLS, and the caller does not say that it can; look up over gRPC"
                raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "lane-tls", text)
            who = gate.caller()
            return self._direct.admit_one(str(self._payer(context)), b"" if who is None else who.key)
        except RefusedError as error:
            await self._refuse(context, error)

    async def _attach(
        self, request: pool_pb2.AttachRequest, context: grpc.aio.ServicerContext
    ) -> pool_pb2.AttachResponse:
        try:
            self._lookups.check_ready()
            if gate.caller() is not None and request.boot_id != boot_id():
                text = "its tables are given to callers on its own machine only; look rows up"
                raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "other-machine", text)
            places = self._places(self._lookups.find(request.model, request.version))
            if not places:
                text = "this server's tables cannot be mapped (see its settings memory, attach, emulate); look rows up"
                raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "no-attach", text)
        except RefusedError as error:
            await self._refuse(context, error)
        tables = [_mapped(table, place) for table, place in places]
        return pool_pb2.AttachResponse(tables=tables, valid_ms=round(_ATTACH_VALID_S * 1e3), boot_id=boot_id())

    async def _stats(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return await self._statistics.answer()

    def _places(self, held: LoadedModel) -> list[tuple[LoadedTable, Place]]:
        """Where a model's tables can be mapped; none unless all of them can, and callers may."""
        places = [(table, table.place) for table in held.tables.values() if table.place is not None]
        return places if self._may_attach and len(places) == len(held.tables) and boot_id() else []

    async def _lookup(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        arrived = time.perf_counter()
        try:
            job = self._lookups.check(message)
            if job.answer_bytes > _MAX_MESSAGE_BYTES:
                text = f"the answer would be {job.answer_bytes} bytes, more than one message holds; ask by LookupStream"
                raise invalid(text, "too-many-rows")
            self._hold(job.answer_bytes, job.rows, message, context)
            if job.answer_bytes + len(message) <= self._lookups.inline_bytes:
                writer, begin, gathered = self._gather(job, context)
            else:
                loop = asyncio.get_running_loop()
                writer, begin, gathered = await loop.run_in_executor(self._lookups.threads, self._gather, job, context)
            if self._alarms is not None:
                gathered += await self._emulate(self._reading(job, gathered), job.answer_bytes, gathered)
            times = server_times(arrived, begin, gathered)
            writer.set_times(times)
        except Refusals as error:
            await self._refuse(context, error)
        if self._lookups.slow.over(times):
            self._note_slow("Lookup", job, times, context)
        # Once the answer is on its way: the caller need not wait for our book-keeping.
        context.add_done_callback(lambda _: self._lookups.count("Lookup", job, times))
        return writer.message

    def _gather(self, job: Job, context: grpc.aio.ServicerContext) -> tuple[wire.ResponseWriter, float, float]:
        """Hash, gather and encode; gives when that began, and how long it took. On the loop or in a gather thread."""
        begin = time.perf_counter()
        pieces = job.resolve(context.time_remaining())
        writer = wire.ResponseWriter([(piece.table.spec.layer, 0, piece.nbytes) for piece in pieces], with_times=True)
        for piece, out in zip(pieces, writer.rows, strict=True):
            piece.table.gather(piece.ids, out)
        return writer, begin, time.perf_counter() - begin

    def _reading(self, job: Job, ago_s: float = 0.0) -> Reading | None:
        """Of a request that began so long ago, where memory is emulated."""
        emulation = self._lookups.emulation
        return None if emulation is None else emulation.read(job.answer_bytes, time.monotonic_ns() - round(ago_s * 1e9))

    async def _emulate(self, reading: Reading | None, nbytes: int, gathered_s: float) -> float:
        """Sleep until bytes are there that were just gathered, in so long; gives for how long, in seconds."""
        if reading is None or self._alarms is None:
            return 0.0
        now_ns = time.monotonic_ns()
        await self._alarms.until(reading.due_ns(nbytes, now_ns - round(gathered_s * 1e9)))
        return (time.monotonic_ns() - now_ns) / 1e9

    async def _lookup_stream(self, message: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        arrived = time.perf_counter()
        loop, call = asyncio.get_running_loop(), asyncio.current_task()
        assert call is not None
        try:
            job = self._lookups.check(message)
            hold = self._hold(self._lookups.bytes_in_pieces(job), job.rows, message, context)
            remaining_s = context.time_remaining()
            deadline = None if remaining_s is None else time.perf_counter() + remaining_s
            begin, pieces = await self._lookups.resolve_pieces(job, deadline, self._lookups.chunk_bytes)
            gathered = time.perf_counter() - begin
            reading = self._reading(job)
            last = len(pieces) - 1

            def gather(at: int) -> asyncio.Future[tuple[wire.ResponseWriter, float]]:
                return loop.run_in_executor(self._lookups.threads, _gather_piece, pieces[at], at == last)

            coming = None if self._lookups.inline(job) else gather(0)
            for at in range(len(pieces)):
                writer, seconds = await coming if coming else _gather_piece(pieces[at], at == last)
                gathered += seconds + await self._emulate(reading, pieces[at].nbytes, seconds)
                if at < last:
                    coming = coming and gather(at + 1)  # while this piece is sent
                else:
                    times = server_times(arrived, begin, gathered)
                    writer.set_times(times)
                timer = loop.call_later(PATIENCE_S, self._give_up, call, context, hold, len(writer.message))
                try:
                    yield writer.message  # which returns once gRPC has room for another one
                finally:
                    timer.cancel()
        except Refusals as error:
            await self._refuse(context, error)
        self._lookups.count("LookupStream", job, times)
        if self._lookups.slow.over(times):
            self._note_slow("LookupStream", job, times, context)

    def _note_slow(self, method: str, job: Job, times: wire.ServerTimes, context: grpc.aio.ServicerContext) -> None:
        self._lookups.slow.note(method, job.request.number, peers.of_call(context.peer()), job.rows, times)

    def _give_up(
        self, call: asyncio.Task[None], context: grpc.aio.ServicerContext, hold: "_Hold", unread_bytes: int
    ) -> None:
        """End a stream whose caller does not read. What gRPC has of it stays until the caller reads on, or is gone."""
        hold.kept_bytes = unread_bytes
        call.cancel()
        text = f"nothing of the answer was read for {PATIENCE_S:g} s"
        error = RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "unread-answer", text)
        task = asyncio.create_task(self._refuse(context, error))
        self._given_up.add(task)

        def over(ended: asyncio.Task[NoReturn]) -> None:
            if not ended.cancelled():
                ended.exception()  # there always is one; see `_refuse`
            self._given_up.discard(ended)
            hold.shrink(0)

        task.add_done_callback(over)

    def _payer(self, context: grpc.aio.ServicerContext) -> Peer:
        """Whom a call is counted for: the caller, or the host that it comes from."""
        who = gate.caller()
        return peers.of_call(context.peer()) if who is None else self._accounts.of(who)

    def _hold(self, nbytes: int, rows: int, message: bytes, context: grpc.aio.ServicerContext) -> "_Hold":
        """Reserve the bytes of an answer, and of a large request, until the call is over. Raises RefusedError."""
        if len(message) > SMALL_REQUEST_BYTES:
            nbytes += len(message)
        hold = _Hold(self._lookups, nbytes, rows, self._payer(context))
        context.add_done_callback(lambda _: hold.shrink(hold.kept_bytes))
        return hold

    async def _refuse(self, context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
        code, reason = self._lookups.refused(error)
        await context.abort(code, str(error), ((wire.REASON_KEY, reason),))
        raise AssertionError("abort always raises")


class _Hold:
    """Bytes in flight of one call. kept_bytes: of them, those that outlast its handler. Raises RefusedError."""

    def __init__(self, lookups: Lookups, nbytes: int, rows: int, peer: Peer) -> None:
        lookups.reserve(nbytes, peer, rows)
        self._lookups, self._nbytes, self._peer = lookups, nbytes, peer
        self.kept_bytes = 0

    def shrink(self, nbytes: int) -> None:
        """Give back all but `nbytes`."""
        self._lookups.release(self._nbytes - nbytes, self._peer)
        self._nbytes = nbytes


def _gather_piece(piece: Piece, last: bool) -> tuple[wire.ResponseWriter, float]:
    begin = time.perf_counter()
    writer = wire.ResponseWriter([(piece.table.spec.layer, piece.first, piece.nbytes)], with_times=last)
    piece.table.gather(piece.ids, writer.rows[0])
    return writer, time.perf_counter() - begin


def _mapped(table: LoadedTable, place: Place) -> pool_pb2.MappedTable:
    return pool_pb2.MappedTable(
        layer=table.spec.layer,
        path=str(place.path),
        device=place.device,
        inode=place.inode,
        size=place.nbytes,
        row_start=table.row_start,
        row_stop=table.row_stop,
        in_memory=place.in_memory,
    )


def _describe(held: LoadedModel, active: bool, include_spec: bool) -> pool_pb2.Model:
    tables = []
    for spec in held.spec.tables:
        segments = [pool_pb2.Segment(name=s.name, dtype=s.dtype, length=s.length) for s in spec.row_format.segments]
        table = held.tables.get(spec.layer)
        tables.append(
            pool_pb2.Table(
                layer=spec.layer,
                num_rows=spec.num_rows,
                row_bytes=spec.row_bytes,
                heads=spec.heads,
                segments=segments,
                row_start=0 if table is None else table.row_start,
                row_stop=0 if table is None else table.row_stop,
            )
        )
    return pool_pb2.Model(
        name=held.spec.name,
        version=held.version,
        spec_digest=held.spec.digest,
        tables=tables,
        spec_json=canonical_json(held.spec.to_json()) if include_spec else b"",
        active=active,
    )
