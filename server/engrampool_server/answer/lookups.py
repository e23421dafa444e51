"""What a lookup is, whichever way it came: checked, bounded, resolved to rows, refused, counted.

pool_service.py answers over gRPC, direct.py over plain sockets; what they answer is decided here.
"""

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import grpc

from engrampool_proto import wire
from engrampool_proto.errors import BatchError, EngrampoolError, WireError
from engrampool_proto.kernels.serve import meter
from engrampool_proto.spec import RowIds
from engrampool_server.answer.emulation import Emulation
from engrampool_server.answer.in_flight import Account, InFlight, Peer, most_bytes
from engrampool_server.memory.tables import LoadedModel, LoadedTable, NotHeldError
from engrampool_server.telemetry.metrics import Metrics
from engrampool_server.telemetry.slow import SlowLookups

# Ids of answers in pieces up to this size are hashed and checked by the event loop, if it gathers too: some
# milliseconds.
_INLINE_RESOLVE_BYTES = 64 << 20
# Of an answer in pieces, what is in memory at one time: a stream has a message on its way, one that gRPC holds and the
# next one; the direct lane two pieces of two chunks.
_CHUNKS_HELD = 4
_ID_BYTES = 8
# Requests up to this size are not counted as in flight.
SMALL_REQUEST_BYTES = 64 << 10


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; see `Limits` in pool.proto. stream_chunk_bytes: rows in one message of a stream, about."""

    max_rows_per_request: int
    max_answer_bytes: int
    stream_chunk_bytes: int


class RefusedError(EngrampoolError):
    """A call to be ended with `code`; `reason` is its stable name, the text is for people."""

    def __init__(self, code: grpc.StatusCode, reason: str, text: str) -> None:
        super().__init__(text)
        self.code, self.reason = code, reason


# What admitting and resolving a request may raise, and `Lookups.refused` takes.
Refusals = (RefusedError, WireError, BatchError)


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of rows of one table: `ids`, which begin at position `first` of what was asked for."""

    table: LoadedTable
    first: int
    ids: RowIds

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return len(self.ids) * self.table.spec.row_bytes


@dataclass(frozen=True, eq=False)
class Job:
    """A request that was found good: what to read, in the order of the answer.

    Either its ids are there, or `request.tokens` is to be hashed for `tables`.
    answer_bytes: of rows.
    """

    request: wire.LookupRequest
    model: LoadedModel
    tables: Sequence[LoadedTable]
    answer_bytes: int

    @cached_property
    def counts(self) -> list[tuple[int, int, int]]:
        """(layer, rows, bytes) of each table."""
        given = {layer: len(ids) for layer, ids in self.request.tables}
        counts = []
        for table in self.tables:
            layer = table.spec.layer
            count = given[layer] if self.request.tokens is None else self.request.tokens.num_tokens * table.spec.heads
            counts.append((layer, count, count * table.spec.row_bytes))
        return counts

    @property
    def rows(self) -> int:
        """How many."""
        return sum(count for _, count, _ in self.counts)

    def resolve(self, remaining_s: float | None) -> list[Piece]:
        """Every table's rows as one piece: ids hashed if need be, each checked against what is held.

        remaining_s: until the caller stops waiting, None for never.
        Raises RefusedError if that was in the past, BatchError.
        """
        check_deadline(remaining_s)
        if self.request.tokens is None:
            ids: Iterable[RowIds] = [ids for _, ids in self.request.tables]
        else:
            hashed = self.model.hasher.rows(self.request.tokens, [table.spec.layer for table in self.tables])
            ids = [rows.reshape(-1) for rows in hashed.values()]
        resolved = [Piece(table, 0, rows) for table, rows in zip(self.tables, ids, strict=True)]
        for piece in resolved:
            piece.table.check(piece.ids)
        return resolved


class Lookups:
    """Models by name and version, and the way into them. Until `ready` is set every lookup is UNAVAILABLE.

    threads: for large answers. gathers_inline: all the same the event loop gathers what is sent in pieces.
    inline_bytes: requests with their answers up to this size are worked on by the event loop, with no hand-over.
    chunk_bytes: rows in one message of a stream, about. slow: told of lookups that took longer than slow_s; 0 for none.
    emulation: of memory that rows do not come sooner from.
    """

    inline_bytes = 2 << 20

    def __init__(
        self,
        limits: Limits,
        in_flight: InFlight,
        metrics: Metrics,
        gather_threads: int,
        slow_s: float = 0.0,
        emulation: Emulation | None = None,
    ) -> None:
        self.emulation = emulation
        self.limits, self.in_flight, self._metrics = limits, in_flight, metrics
        self.slow = SlowLookups(metrics, slow_s)
        if in_flight.share_bytes < self.inline_bytes:
            self.inline_bytes = in_flight.share_bytes
        # What is sent in pieces must fit into the share of one peer, however small that is.
        self.chunk_bytes = min(limits.stream_chunk_bytes, max(1, in_flight.share_bytes // _CHUNKS_HELD))
        self._models: dict[str, dict[str, LoadedModel]] = {}
        # One there is always, for large answers that are asked for as one message.
        self.threads = ThreadPoolExecutor(max(1, gather_threads), "gather")
        self.gathers_inline = gather_threads == 0
        self.ready = False
        metrics.in_flight_limit.set(in_flight.limit_bytes)
        metrics.in_flight.follow(lambda: in_flight.own)
        self._refusing = threading.Lock()

    def add(self, model: LoadedModel) -> None:
        """Hold `model` from now on."""
        self._models.setdefault(model.spec.name, {})[model.version] = model

    def close(self) -> None:
        """Let the gather threads end."""
        self.threads.shutdown(wait=False, cancel_futures=True)

    def check_ready(self) -> None:
        """Raise RefusedError while tables are loading."""
        if not self.ready:
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, "loading", "tables are still loading")

    def held(self, name: str = "") -> list[LoadedModel]:
        """All versions of one model, or of all of them. Raises RefusedError for one that is not here."""
        models = [self._versions(name)] if name else self._models.values()
        return [held for versions in models for held in versions.values()]

    def find(self, name: str, version: str) -> LoadedModel:
        """The one version of the model. Raises RefusedError for what is not here."""
        versions = self._versions(name)
        if version not in versions:
            text = f"version {version[:64]!r} of {name} is not here; held: {', '.join(versions)}"
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "unknown-version", text)
        return versions[version]

    def check(self, message: bytes | memoryview) -> Job:
        """Read the request, and check it. Raises one of Refusals."""
        self.check_ready()
        return self.check_request(wire.parse_request(message))

    def reserve(self, nbytes: int, peer: Peer, rows: int = 0) -> None:
        """Count `nbytes` as in flight for `peer`, until `release`. Raises RefusedError if they are too many.

        rows: that it will be given, which may be too many as well. To be called before the memory is taken.
        """
        if self.in_flight.reserve(nbytes, peer):
            if rows and isinstance(peer, Account) and peer.rate:
                wait_ns = meter(peer.meter, rows, peer.rate, time.monotonic_ns())
                if wait_ns:
                    self.in_flight.release(nbytes, peer)
                    raise _too_fast(peer, wait_ns)
            return
        bound, most = self.in_flight, most_bytes(peer)
        share_bytes = bound.most_of(peer)
        if nbytes > share_bytes:
            text = f"this takes {nbytes} bytes at once, and one caller may have {share_bytes} at most"
            raise invalid(f"{text}; split the request, or ask for a large answer by LookupStream", "too-many-rows")
        text = f"{bound.total} bytes are in flight, of {bound.limit_bytes}"
        if bound.total + nbytes <= bound.limit_bytes:
            text += f"; {bound.of(peer)} of them are for {peer}, who may have no more than is free"
            text += f", and {most} at most" if most else ""
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "peer-share", f"{text}; try again later")
        raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded", f"{text}; try again later")

    def release(self, nbytes: int, peer: Peer) -> None:
        """Bytes are on their way, or will never be."""
        self.in_flight.release(nbytes, peer)

    @property
    def held_in_pieces(self) -> int:
        """The most of an answer in pieces that is in memory at one time."""
        return _CHUNKS_HELD * self.chunk_bytes

    def bytes_in_pieces(self, job: Job) -> int:
        """Memory that an answer in pieces takes at one time, ids that are hashed here with it.

        No more than in one message, of which these are not counted.
        """
        hashed = 0 if job.request.tokens is None else _ID_BYTES * sum(count for _, count, _ in job.counts)
        return min(job.answer_bytes, self.held_in_pieces + hashed)

    def inline(self, job: Job) -> bool:
        """Whether the event loop gathers an answer in pieces itself, as it does one that is small anyway."""
        return self.gathers_inline or job.answer_bytes <= self.inline_bytes

    async def resolve_pieces(self, job: Job, deadline: float | None, nbytes: int) -> tuple[float, list[Piece]]:
        """When work on the job began, and its pieces of about `nbytes`, from the event loop or a thread.

        The times are those of time.perf_counter. Raises RefusedError if the deadline has passed then, BatchError.
        """
        if self.inline(job) and job.answer_bytes <= _INLINE_RESOLVE_BYTES:
            return _resolve_pieces(job, deadline, nbytes)
        return await asyncio.get_running_loop().run_in_executor(self.threads, _resolve_pieces, job, deadline, nbytes)

    def count(self, method: str, job: Job, times: wire.ServerTimes) -> None:
        """Count a lookup that was answered."""
        seconds = (times.queue_us / 1e6, times.gather_us / 1e6, times.total_us / 1e6)
        self._metrics.answered(job.model.spec.name, method, job.counts, *seconds)

    def refused(self, error: Exception) -> tuple[grpc.StatusCode, str]:
        """Count one of Refusals; gives its status and reason."""
        if isinstance(error, RefusedError):
            code, reason = error.code, error.reason
        elif isinstance(error, WireError):
            code, reason = grpc.StatusCode.INVALID_ARGUMENT, "malformed-message"
        else:
            reason = "not-held" if isinstance(error, NotHeldError) else "bad-batch"
            code = grpc.StatusCode.INVALID_ARGUMENT
        with self._refusing:  # from any thread
            self._metrics.refused.labels(reason).inc()
        return code, reason

    def check_request(self, request: wire.LookupRequest) -> Job:
        """Check a request that was read. Raises one of Refusals."""
        model = self.find(request.model, request.version)
        if request.tokens is not None:
            if request.tables:
                raise invalid("a lookup names rows by 'tables' or by 'tokens', not by both")
            layers = request.layers or model.spec.layers
            if any(a >= b for a, b in pairwise(layers)):
                raise invalid(f"layers must ascend without repeats; they are {_brief(layers)}")
            tables = [self._whole(model, layer) for layer in layers]
            counts = [request.tokens.num_tokens * table.spec.heads for table in tables]
        else:
            if request.layers:
                raise invalid("'layers' goes with 'tokens'; 'tables' names its own")
            layers = tuple(layer for layer, _ in request.tables)
            if not layers:
                raise invalid("a lookup names rows by 'tables' or by 'tokens'; this has neither")
            if len(set(layers)) != len(layers):
                raise invalid(f"a layer is asked for twice: {_brief(layers)}")
            tables = [self.table(model, layer) for layer in layers]
            counts = [len(ids) for _, ids in request.tables]
        if sum(counts) > self.limits.max_rows_per_request:
            text = f"{sum(counts)} rows asked for, at most {self.limits.max_rows_per_request} in one request; split it"
            raise invalid(text, "too-many-rows")
        answer_bytes = sum(count * table.spec.row_bytes for count, table in zip(counts, tables, strict=True))
        if answer_bytes > self.limits.max_answer_bytes:
            text = (
                f"the answer would be {answer_bytes} bytes, at most {self.limits.max_answer_bytes}; split the request"
            )
            raise invalid(text, "too-many-rows")
        return Job(request, model, tables, answer_bytes)

    def _versions(self, name: str) -> dict[str, LoadedModel]:
        if name not in self._models:
            held = ", ".join(sorted(self._models)) or "none"
            text = f"no model {name[:200]!r} here; held: {held}"
            raise RefusedError(grpc.StatusCode.NOT_FOUND, "unknown-model", text)
        return self._models[name]

    def table(self, model: LoadedModel, layer: int) -> LoadedTable:
        """The table of a layer, as far as it is held here. Raises RefusedError."""
        if layer not in model.tables:
            layers = model.spec.layers
            text = f"model {model.spec.name} has no layer {layer}; it has {', '.join(map(str, layers))}"
            if layer in layers:
                text = f"this server holds no rows of layer {layer} of {model.spec.name}; it holds {_held(model)}"
            raise invalid(text, "unknown-layer")
        return model.tables[layer]

    def _whole(self, model: LoadedModel, layer: int) -> LoadedTable:
        """The table of a layer, for rows that nobody knows yet."""
        table = model.tables.get(layer)
        if table is not None and table.is_whole:
            return table
        if layer not in model.spec.layers:
            return self.table(model, layer)
        text = (
            f"this server holds a part of {model.spec.name} only ({_held(model)}), and rows of tokens may be any of "
            f"layer {layer}: hash the tokens and ask for rows by id where they are held, as our client does, or name "
            "only layers that are whole here"
        )
        raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "partial-model", text)


def _too_fast(account: Account, wait_ns: int) -> RefusedError:
    text = f"{account.name} asks for more than the {1000 * 10**9 // account.rate} rows a second that it may have"
    text = f"{text}; try again in {wait_ns / 1e6:.1f} ms"
    return RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "caller-rate", text)


def cut(resolved: Iterable[Piece], nbytes: int) -> list[Piece]:
    """Cut into runs of about `nbytes`, earlier layers first, as the model needs them; no ids are one empty run."""
    runs = []
    for whole in sorted(resolved, key=lambda piece: piece.table.spec.layer):
        step = max(1, nbytes // whole.table.spec.row_bytes)
        for first in range(0, max(1, len(whole.ids)), step):
            runs.append(Piece(whole.table, first, whole.ids[first : first + step]))
    return runs


def _resolve_pieces(job: Job, deadline: float | None, nbytes: int) -> tuple[float, list[Piece]]:
    begin = time.perf_counter()
    return begin, cut(job.resolve(None if deadline is None else deadline - begin), nbytes)


def check_deadline(remaining_s: float | None) -> None:
    """Raise RefusedError if nothing remains: work for a caller who has left is work for nobody."""
    if remaining_s is not None and remaining_s <= 0:
        text = "the deadline passed before work began"
        raise RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline", text)


def invalid(text: str, reason: str = "bad-batch") -> RefusedError:
    """A refusal of a request that must be changed."""
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, reason, text)


def server_times(arrived: float, begin: float, gathered_s: float) -> wire.ServerTimes:
    """arrived, begin: of the request and of work on it, by time.perf_counter. gathered_s: spent on hashing and rows."""
    total_s = time.perf_counter() - arrived
    return wire.ServerTimes(round((begin - arrived) * 1e6), round(gathered_s * 1e6), round(total_s * 1e6))


def _held(model: LoadedModel) -> str:
    rows = [
        f"{'all' if table.is_whole else f'rows {table.row_start} .. {table.row_stop - 1}'} of layer {layer}"
        for layer, table in model.tables.items()
    ]
    return ", ".join(rows[:8]) + (", ..." if len(rows) > 8 else "")


def _brief(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
