"""The client, for engines that run their steps in threads; aio.py has the same for asyncio."""

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from engrampool_client.doctor.record import Recorder
from engrampool_client.engine_checks import check_fingerprint, check_layout, check_row_ids
from engrampool_client.errors import (
    BatchError,
    ForkedError,
    OverloadedError,
    PoolError,
    StepCancelledError,
)
from engrampool_client.lanes.native import Direct
from engrampool_client.lookup.cache import HotRows
from engrampool_client.lookup.deadlines import Deadlines
from engrampool_client.lookup.delivery import Delivery, in_callback
from engrampool_client.lookup.exchange import (
    Exchange,
    Hashing,
    IntArray,
    Out,
    Rows,
    by_layer,
    check_outs,
    token_batch,
    zeros,
)
from engrampool_client.lookup.hints import candidates_batch
from engrampool_client.lookup.plan import Layout, Plan
from engrampool_client.lookup.run import Lookup, MakePlan
from engrampool_client.lookup.served import ServedModel
from engrampool_client.lookup.step import Step
from engrampool_client.lookup.workers import Job, Workers
from engrampool_client.pool.discovery import Servers
from engrampool_client.pool.endpoint import Attach, Ways
from engrampool_client.pool.following import Following
from engrampool_client.pool.shards import Shards
from engrampool_client.pool.version import Generation, How, columns
from engrampool_client.settings import bounded_s, check_positive, check_settings
from engrampool_client.stats import Stats
from engrampool_client.status import ClientStatus, brief, client_status
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.malloc import pin_malloc

OnFailure = Literal["raise", "mask"]


# Those of this process, which a child of it must not use.
_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


class Client:
    """Connections to the servers of one model. Thread-safe; close it, or use it in `with`.

    target: "host:port" or any gRPC name, or several of them: shards, which hold every row together, and replicas of
        them, which take turns and stand in for each other. "dns:///name:port" stands for every address that the name
        has, "ray:///name" for a placement's servers, "etcd://host:port[,...][/prefix]" for those of a registry. Servers
        that are away, and new ones of these, are looked for in the background.
    model, version: None for the only model, and for its only version or, by a registry, whichever is active: that is
        followed. Every lookup is of one version. If servers change to another one that is not followed, lookups fail
        with UnknownVersionError rather than mix the two.
    config, tokenizer: this side's config.json and tokenizer.json; if given, the served tables must fit them.

    What is asked for:

    hashing: "local" sends row ids, "server" sends tokens, of which nothing is deduplicated or cached.
    heads: (start, stop): only these columns of every table, as a tensor-parallel rank needs; rows then have
        stop - start heads. None for all.
    dedupe: ask for the rows of an n-gram once a lookup, however many tokens have it. With a cache that is always so.
    cache_bytes: keep rows of so many bytes, index included, for later lookups; 0 keeps none. A version that is followed
        begins with an empty cache of its own, and for a moment there are two.
    warm: a file that `save_cache` wrote, mapped read-only and shared by all processes of a host that name it; of use
        until another version is followed.
    hint_bytes: rows that hints may ask for at once, in bytes; a hint beyond that is dropped.

    When:

    timeout_s: a step's deadline, from `prefetch` on, unless it is given another; 1e6 s, some 11 days, at most.
    on_failure: "raise" what a lookup failed with where its rows are wanted; or "mask": give zeros for tokens whose rows
        are missing, and say by `Step.valid` which have theirs.
    breaker_failures: after so many lookups in a row that found the server unreachable or silent, lookups fail at once
        until a probe in the background is answered; 0 never.
    retry_s: how long, from the moment a connection broke, lookups go on asking. 0 never asks twice.
    connect_timeout_s: how long servers are waited for, those that still load included. A registry, and an active
        version there, is waited for as long before; a silent one adds up to 2 s for each of its endpoints.
    max_steps: prefetches worked on at once; further ones wait for a place, not their callers.
    max_pending_bytes: rows of prefetches that have not ended; `prefetch` raises OverloadedError beyond.

    How:

    connections: to the server; large lookups by row ids are split over them.
    attach: "auto" reads the server's memory where it is this host's and the server allows it; "off" never.
    direct: "auto" looks up over plain sockets where the server has a direct lane, and over gRPC where it has none or
        its port cannot be reached; "off" always over gRPC.
    spin_s: over the direct lane, how long `lookup` and `lookup_rows` look for the answer without sleeping, where
        answers come as soon as that: what waking up takes is saved, and a processor is busy meanwhile. 0 never.
    keep_memory: have the C library keep freed memory for the next answer. It is a setting of the whole process, which
        stays as large as it was at its peak, and whose threads all allocate from one arena from then on, for good: for
        large answers over gRPC, in a process whose other threads allocate little (see `engrampool_proto.malloc`).
    record: a file to write the row ids of every lookup to, for `engrampool doctor`; made anew, mode 0600. N-grams can
        be worked out from them: treat it as you would the text.

    Raises on construction UnavailableError, UnknownModelError, UnknownVersionError, FingerprintError, SpecError,
    ProtocolError, CacheFileError, RecordError, RegistryError.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        model: str | None = None,
        version: str | None = None,
        *,
        config: str | Path | None = None,
        tokenizer: str | Path | None = None,
        hashing: Hashing = "local",
        heads: tuple[int, int] | None = None,
        dedupe: bool = True,
        cache_bytes: int = 0,
        warm: str | Path | None = None,
        hint_bytes: int = 8 << 20,
        timeout_s: float = 10.0,
        on_failure: OnFailure = "raise",
        breaker_failures: int = 3,
        retry_s: float = 1.0,
        connect_timeout_s: float = 10.0,
        max_steps: int = 4,
        max_pending_bytes: int = 2 << 30,
        connections: int = 1,
        attach: Attach = "auto",
        direct: Direct = "auto",
        spin_s: float = 300e-6,
        keep_memory: bool = False,
        record: str | Path | None = None,
    ) -> None:
        plain = hashing == "server"
        check_settings(
            one_of={
                "hashing": (hashing, ("local", "server")),
                "on_failure": (on_failure, ("raise", "mask")),
                "attach": (attach, ("auto", "off")),
                "direct": (direct, ("auto", "off")),
            },
            whole={
                "max_steps": max_steps,
                "connections": connections,
                "cache_bytes": cache_bytes,
                "breaker_failures": breaker_failures,
            },
            positive={
                "timeout_s": timeout_s,
                "connect_timeout_s": connect_timeout_s,
                "max_steps": max_steps,
                "max_pending_bytes": max_pending_bytes,
                "connections": connections,
            },
            not_negative={
                "retry_s": retry_s,
                "spin_s": spin_s,
                "cache_bytes": cache_bytes,
                "hint_bytes": hint_bytes,
                "breaker_failures": breaker_failures,
            },
            local_only={"heads": heads, "cache_bytes": cache_bytes, "warm": warm} if plain else {},
        )
        heads = columns(heads)
        if keep_memory:
            pin_malloc()
        servers = Servers(list(target) if isinstance(target, Iterable) and not isinstance(target, str) else [target])
        self.target, self._hashing, self._spin_s = servers.text, hashing, spin_s
        self._timeout_s = bounded_s(timeout_s)
        self._masks = on_failure == "mask"
        self._hint_limit_bytes, self._max_pending_bytes = hint_bytes, max_pending_bytes
        self._closing = threading.Event()
        ways = Ways(connections, attach, direct, retry_s, breaker_failures, max_steps)
        self._following = Following(servers, How(ways, hashing, heads, dedupe, cache_bytes))
        self._recorder: Recorder | None = None
        self._workers = Workers(max_steps, "engrampool")
        self._deadlines = Deadlines()
        self._forked: ForkedError | None = None
        self._made_by = os.getpid()
        files = [None if path is None else Path(path) for path in (config, tokenizer, warm, record)]
        self._begin_connecting(partial(self._connect, model, version, bounded_s(connect_timeout_s), *files))

    def _begin_connecting(self, connect: Callable[[], None]) -> None:
        """Here and now; the client of asyncio does it later, and elsewhere."""
        connect()

    def _connect(
        self,
        model: str | None,
        version: str | None,
        timeout_s: float,
        config: Path | None,
        tokenizer: Path | None,
        warm: Path | None,
        record: Path | None,
    ) -> None:
        """Find out what is served, and be ready for lookups. `close`, in any thread, ends it by a PoolError."""
        try:
            # Of every version that is followed: hashing and layout must not change under a model that runs.
            self.spec = self._following.connect(model, version, timeout_s).spec
            check_fingerprint(self.spec, config, tokenizer)
            self.stats = Stats(self.spec.layers)
            self._following.open(self.stats, warm)
            if record is not None:
                self._recorder = Recorder(record, self.spec, self.version)
            if self._closing.is_set():
                raise PoolError("the client was closed")
            _clients.add(self)
        except BaseException as error:
            closed = self._closing.is_set()
            self.close()
            if closed and isinstance(error, Exception):  # gRPC has its own ways to say that a channel is closed
                raise PoolError("the client was closed while it connected") from error
            raise

    @property
    def served(self) -> ServedModel:
        """What the servers said of the version that lookups go by now, and their limits."""
        return self._following.current.served

    @property
    def version(self) -> str:
        """The version that lookups go by now."""
        return self.served.version

    @property
    def trouble(self) -> str | None:
        """Why the version that is active in the registry is not followed, as of now; None if it is."""
        return self._following.trouble

    @property
    def version_changes(self) -> Mapping[str, int]:
        """How often another version was "followed", "failed" to be there yet, or was "refused" for its layout."""
        return self._following.changes

    @property
    def registry_age_s(self) -> float | None:
        """Seconds since the registry was last known to answer, inf if it never did; None without one."""
        return self._following.servers.age_s

    @property
    def cache(self) -> HotRows | None:
        """Rows of the version that lookups go by now; None without `cache_bytes`."""
        return self._following.current.cache

    @property
    def attached(self) -> bool:
        """Whether lookups read the server's memory, now."""
        return self._shards.attached

    @property
    def direct(self) -> bool:
        """Whether the next lookup that is not read from attached memory finds a connection of the direct lane."""
        return self._shards.direct

    @property
    def servers_in_trouble(self) -> Mapping[str, str]:
        """Address -> why, of the servers that do not answer, or hold something else than they should, for people."""
        return self._shards.in_trouble

    @property
    def breaker_open(self) -> bool:
        """Whether lookups fail at once, as a server that they need is away."""
        return self._shards.breaker_open

    def status(self) -> ClientStatus:
        """What there is to know of the client now, as JSON types: its servers, and why one is not used or not attached.

        docs/CLIENT.md lists the keys. No server is asked, and no lock is waited for. Never fails: of a client that is
        closed, or another process's, "why_unusable" says so.
        """
        on_failure: OnFailure = "mask" if self._masks else "raise"
        return client_status(
            self._following, self.stats, self._workers, self._hashing, on_failure, self._why_unusable()
        )

    def _why_unusable(self) -> str | None:
        if self._forked is not None:
            return str(self._forked)
        return "the client is closed" if self._closing.is_set() else None

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a client has connections and threads, and cannot be copied or saved: make another")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {brief(self.status())}>"

    @property
    def _shards(self) -> Shards:
        return self._following.current.shards

    @property
    def _layout(self) -> Layout:
        return self._following.current.layout

    # --- lookups

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
        ahead: bool = False,
    ) -> Step:
        """Start the lookup of a batch's rows for `layers` (all by default) and return at once.

        tokens: int32 [T]; query_start_loc: int32 [R + 1], by default one request; lookback: int32 [R, <= n - 1], column
        0 the token just before the chunk, -1 before the start, by default all -1; dead: bool [T] and lookback_dead:
        bool [R, <= n - 1]: tokens outside any n-gram. The arrays are copied; integers of any type that fit are taken,
        as flags 0 and 1.

        out: layer -> uint8 [T, heads, row_bytes], C-contiguous and writable (pinned memory, say): the layer's rows are
        written there, as they come, until the step is done. Or layer -> {segment: uint8 [T, heads, its bytes]}: these
        segments of the rows (of V4.1 "values" and "scales") are written apart. Layers without any get arrays of the
        client's.

        timeout_s: the step's deadline, from now on. ahead: the step is for later, as chunks of a prompt that has just
        arrived are: steps without it overtake it.

        Raises BatchError for arrays that do not fit together, SpecError for an unknown layer, OverloadedError for more
        than `max_pending_bytes`. What takes longer to find out (a token id out of range, a batch over the server's
        limits, a failed call) is raised by `Step.rows`.
        """
        batch = token_batch(tokens, query_start_loc, lookback, dead, lookback_dead)
        return self._submit(*self._by_tokens(batch, layers, out, timeout_s, bounded=True), ahead)

    def prefetch_rows(
        self,
        rows: Mapping[int, npt.NDArray[Any]],
        *,
        out: Out | None = None,
        timeout_s: float | None = None,
        ahead: bool = False,
    ) -> Step:
        """Start the lookup of rows by id: layer -> integer array of any shape; `Step.rows` gives [*shape, row_bytes].

        For engines that hash themselves. Ids [..., heads], as hashing gives them, are deduplicated and cached.
        out, timeout_s, ahead: as for `prefetch`; out of these shapes.
        Raises as `prefetch` does; bad row ids are raised by `Step.rows`.
        """
        owned = {layer: ids.copy() if hasattr(ids, "copy") else ids for layer, ids in by_layer("rows", rows).items()}
        return self._submit(*self._by_rows(owned, out, timeout_s, bounded=True), ahead)

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
        return self._wait_for(*self._by_tokens(batch, layers, out, timeout_s))

    def lookup_rows(
        self, rows: Mapping[int, npt.NDArray[Any]], *, out: Out | None = None, timeout_s: float | None = None
    ) -> dict[int, Rows]:
        """`prefetch_rows` and wait, in the caller's own thread: layer -> uint8 [*ids.shape, row_bytes]."""
        return self._wait_for(*self._by_rows(by_layer("rows", rows), out, timeout_s))

    def amend(
        self,
        step: Step,
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
        """Start a step in place of `step`, whose tokens turned out to be others, as when drafts are rejected.

        With a cache, rows of the old step that are on their way are let in first, so that only what changed is asked
        for. Without one the old step is cancelled. Either way it is not to be used any more, nor are its `out` arrays
        until the new step is done. Arguments and errors are those of `prefetch`.
        """
        batch = token_batch(tokens, query_start_loc, lookback, dead, lookback_dead)
        if self.cache is None or step.delivery.working is None:
            step.cancel()
        amended, plan = self._by_tokens(batch, layers, out, timeout_s, bounded=True)
        # Once the new step is done, nothing is written into the old one's arrays either.
        amended.delivery.on_cancel(step.cancel)
        after = None if step.delivery.given_up else step  # what was given up brings nothing more
        return self._submit(amended, plan, after=after)

    def dummy(self, num_tokens: int, *, layers: Sequence[int] | None = None, out: Out | None = None) -> Step:
        """A step of `num_tokens` whose rows are zero and whose tokens are not valid; no server is asked.

        For an engine's warm-up, profiling and padding runs. Raises BatchError, SpecError.
        """
        wanted = self._layers(layers)
        shapes = self._shapes(num_tokens, wanted)
        check_outs(self.spec, out, shapes)
        delivery, blank = Delivery(wanted), zeros(shapes, out)
        rows = {layer: blank(layer) for layer in wanted}
        for layer, (_, valid) in rows.items():
            valid.flags.writeable = False
            delivery.valid[layer] = valid
        delivery.arrived({layer: given for layer, (given, _) in rows.items()})
        delivery.end(None)
        return Step(delivery)

    # --- checks for engines that hash themselves

    def verify(
        self,
        rows: Mapping[int, npt.NDArray[Any]],
        tokens: IntArray,
        query_start_loc: IntArray | None = None,
        lookback: IntArray | None = None,
        dead: npt.ArrayLike | None = None,
        lookback_dead: npt.ArrayLike | None = None,
    ) -> None:
        """Compare an engine's row ids, [T, heads] a layer, with those that are hashed here of the same batch.

        Raises FingerprintError naming the first that differs in each layer, BatchError, SpecError.
        """
        batch = token_batch(tokens, query_start_loc, lookback, dead, lookback_dead)
        check_row_ids(self.spec, self._layout, rows, batch)

    def check_layout(
        self, head_sizes: Mapping[int, Sequence[int]], row_bytes: int, token_map: npt.ArrayLike | None = None
    ) -> None:
        """Refuse a server whose tables are not laid out as the engine's are, before the first lookup.

        head_sizes: layer -> rows of each head, in the order of columns. token_map: int32 [vocabulary], the id that each
        token is hashed as, None for a model without one. Raises FingerprintError listing what differs.
        """
        check_layout(self.spec, head_sizes, row_bytes, token_map)

    def save_cache(self, path: str | Path, max_bytes: int | None = None) -> None:
        """Write the hottest rows of the cache to a file for `warm`, at most `max_bytes` of it.

        Raises ValueError without a cache, OSError, ForkedError.
        """
        self._check_process()
        now = self._following.current
        if now.cache is None:
            raise ValueError("this client has no cache to save; make it with cache_bytes")
        now.cache.save(Path(path), now.served.version, now.layout.to_json(), max_bytes)

    # --- from batches to lookups

    def _layers(self, layers: Sequence[int] | None) -> list[int]:
        if layers is None:
            return list(self.spec.layers)
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise BatchError(f"layers must be a sequence of layers; it is {layers!r}")
        return sorted({self.spec.table(layer).layer for layer in layers})

    def _shapes(self, num_tokens: int, layers: Sequence[int]) -> dict[int, tuple[int, ...]]:
        heads = self._following.current.layout.heads
        shapes: dict[int, tuple[int, ...]] = {}
        for layer in layers:
            table = self.spec.table(layer)
            shapes[layer] = (num_tokens, table.heads if heads is None else heads.stop - heads.start, table.row_bytes)
        return shapes

    def _step(
        self,
        layers: Sequence[int],
        shapes: Mapping[int, tuple[int, ...]],
        out: Out | None,
        timeout_s: float | None,
        bounded: bool,
        hint: Callable[[npt.ArrayLike, bool], bool] | None = None,
    ) -> Step:
        """One that counts. bounded: it counts among those that `max_pending_bytes` is for."""
        if self._forked is not None:
            raise self._forked
        deadline = time.monotonic() + self._seconds(timeout_s)
        nbytes = sum(map(math.prod, shapes.values()))
        delivery = Delivery(layers, deadline, zeros(shapes, out) if self._masks else None, self._ended)
        # Before it counts: whatever happens from there on, a step that is lost ends by itself.
        step = Step(delivery, self.stats, hint)
        if not self.stats.began(delivery, nbytes, self._max_pending_bytes if bounded else None):
            raise OverloadedError(
                f"{self.stats.pending_bytes} bytes of rows are pending in this client, of max_pending_bytes "
                f"{self._max_pending_bytes}; wait for steps to end, or cancel some",
                "client-full",
            )
        try:
            self._deadlines.watch(delivery, wake=bounded)
        except RuntimeError as failure:
            error = PoolError(f"the system gives the client no thread: {failure}")
            delivery.end(error)
            raise error from failure
        return step

    def _seconds(self, timeout_s: float | None) -> float:
        """Until a step's deadline. Raises ValueError for what is no time to wait."""
        if timeout_s is None:
            return self._timeout_s
        check_positive("timeout_s", timeout_s)
        return bounded_s(timeout_s)

    def _ended(self, delivery: Delivery) -> None:
        masked = None
        if delivery.error is not None:
            valids = list(delivery.valid.items())
            masked = {layer: int(valid.size - np.count_nonzero(valid)) for layer, valid in valids}
        complete = len(delivery.rows) == len(delivery.layers)
        self.stats.ended(delivery, delivery.error, complete, masked)
        self._deadlines.forget(delivery)

    def _by_tokens(
        self,
        batch: TokenBatch,
        layers: Sequence[int] | None,
        out: Out | None,
        timeout_s: float | None,
        bounded: bool = False,
    ) -> tuple[Step, MakePlan]:
        wanted = self._layers(layers)
        shapes = self._shapes(batch.num_tokens, wanted)
        check_outs(self.spec, out, shapes)
        hint = None if self.cache is None else partial(self._hint, batch)
        step = self._step(wanted, shapes, out, timeout_s, bounded, hint)
        delivery = step.delivery
        if self._recorder is not None:
            self._recorder.tokens(batch, wanted)

        def plan(by: Generation) -> tuple[Exchange | None, Plan | None]:
            if (planner := by.planner_for(batch.num_tokens)) is not None:
                planned = planner.of_tokens(delivery, batch, wanted, out)
                return planned.exchange, planned
            heads = by.layout.heads
            return Exchange.of_tokens(by.served, batch, wanted, self._hashing, out, heads, delivery.writing), None

        return step, plan

    def _by_rows(
        self, rows: Mapping[int, npt.NDArray[Any]], out: Out | None, timeout_s: float | None, bounded: bool = False
    ) -> tuple[Step, MakePlan]:
        wanted = sorted(self.spec.table(layer).layer for layer in rows)
        # What is no array is refused where the ids are looked at.
        arrays = {layer: ids for layer, ids in rows.items() if isinstance(ids, np.ndarray)}
        shapes = {
            layer: (*(arrays[layer].shape if layer in arrays else ()), self.spec.table(layer).row_bytes)
            for layer in wanted
        }
        check_outs(self.spec, out, shapes)
        step = self._step(wanted, shapes, out, timeout_s, bounded)
        delivery = step.delivery
        if self._recorder is not None:
            self._recorder.rows(rows)

        def plan(by: Generation) -> tuple[Exchange | None, Plan | None]:
            num_tokens = max((len(ids) for ids in arrays.values() if ids.ndim), default=0)
            planner = by.planner_for(num_tokens)
            planned = None if planner is None else planner.of_rows(delivery, rows, out)
            if planned is not None:
                return planned.exchange, planned
            return Exchange.of_rows(by.served, rows, out, delivery.writing), None

        return step, plan

    # --- running them

    def _lookup(self, delivery: Delivery, plan: MakePlan, *, hinted: bool = False, spin_s: float = 0.0) -> Lookup:
        return Lookup(delivery, plan, self._following, self.stats, self._closing, hinted=hinted, spin_s=spin_s)

    def _submit(self, step: Step, plan: MakePlan, ahead: bool = False, after: Step | None = None) -> Step:
        """after: a step whose rows are let in before this one is planned."""
        lookup = self._lookup(step.delivery, plan)
        job = Job(step.delivery, lookup.plan, lookup.ask, ahead)
        if after is None:
            self._begin(job)
        else:
            # It is referred to until then, or it would be cancelled.
            after.delivery.on_idle(partial(self._begin_late, job, after))
        return step

    def _begin(self, job: Job) -> None:
        try:
            if self._workers.submit(job):
                return
            error = PoolError("the client is closed")
        except RuntimeError as failure:
            error = PoolError(f"the system gives the client no thread: {failure}")
        job.delivery.end(error)
        raise error

    def _begin_late(self, job: Job, _: Step) -> None:
        with suppress(PoolError):  # the step has ended by it
            self._begin(job)

    def _wait_for(self, step: Step, plan: MakePlan) -> dict[int, Rows]:
        try:
            if self._closing.is_set():
                raise PoolError("the client is closed")
            self._lookup(step.delivery, plan, spin_s=self._spin_s).run()
        except BaseException as error:
            interrupted = StepCancelledError("the lookup was interrupted")
            step.delivery.end(error if isinstance(error, PoolError) else interrupted)
            step.delivery.give_up(interrupted)  # nothing is written any more, whoever was at it
            raise
        rows = {}
        for layer in step.layers:
            rows[layer] = step.rows(layer)
        return rows

    # --- speculation

    def _hint(self, batch: TokenBatch, candidates: npt.ArrayLike, chain: bool) -> bool:
        """As `Step.hint`."""
        self._check_process()
        guessed = candidates_batch(batch, candidates, chain, self.spec)
        if self.attached or not guessed.num_tokens:
            return False
        layers = list(self.spec.layers)
        nbytes = sum(map(math.prod, self._shapes(guessed.num_tokens, layers).values()))

        def plan(by: Generation) -> tuple[Exchange | None, Plan | None]:
            assert by.planner is not None
            planned = by.planner.of_tokens(delivery, guessed, layers, wanted=False)
            return planned.exchange, planned

        def ended(delivery: Delivery) -> None:
            self.stats.hint_ended(delivery, lookup.asked_bytes, delivery.error is None)
            self._deadlines.forget(delivery)

        delivery = Delivery(layers, time.monotonic() + self._seconds(None), on_end=ended)
        if not self.stats.hint_began(delivery, nbytes, self._hint_limit_bytes):
            return False
        lookup = self._lookup(delivery, plan, hinted=True)
        try:
            self._deadlines.watch(delivery)
            self._begin(Job(delivery, lookup.plan, lookup.ask, ahead=True, hint=True))
        except PoolError:
            return False
        except RuntimeError:  # the system gives no thread
            delivery.end(None)
            return False
        return True

    # --- the end, and another process

    def _check_process(self) -> None:
        """Raise ForkedError in a child of the process that the client was made in."""
        if self._forked is not None:
            raise self._forked

    def _leave_to_parent(self) -> None:
        """In the child of a fork: connections, threads and locks are the parent's. Nothing is said on any of them."""
        self._forked = ForkedError(
            f"this client was made in process {self._made_by}, and this is a child of it ({os.getpid()}): its "
            "connections are the parent's. Make a client in each process, after the fork",
            "forked",
        )
        self.stats.forked()
        self._deadlines.forked(self._forked)
        self._following.forked()
        if self._recorder is not None:
            self._recorder.forked()

    def close(self) -> None:
        """End the connections; steps under way fail with StepCancelledError. Nothing is written once this returns.

        In a callback of a step it does not wait for the client's threads, which end a little later.
        In a child of the process that the client was made in it does nothing: there is nothing that is the child's.
        """
        if self._forked is not None:
            return
        self._closing.set()
        self._deadlines.give_up_all(StepCancelledError("the client was closed"))
        self._following.close()
        wait = not in_callback()  # some of these threads may wait for the callback, or be in one that closes, too
        self._workers.close(wait)
        self._deadlines.close(wait)
        if self._recorder is not None:
            self._recorder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _leave_all_to_parent() -> None:
    for client in list(_clients):
        client._leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)

__all__ = ["Client", "Step"]
