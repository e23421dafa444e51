"""The client, for engines that run their steps in threads; aio.py has the same for asyncio."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.cache import HotRows
from engrampool_client.compute.forms import choose
from engrampool_client.compute.layout import Layout
from engrampool_client.compute.served import ServedModel
from engrampool_client.config import ClientConfig, ClientSettings, bounded_s, from_environment
from engrampool_client.doctor.record import Recorder
from engrampool_client.engine_checks import check_fingerprint, check_layout, check_row_ids
from engrampool_client.errors import BatchError, PoolError, StepCancelledError
from engrampool_client.event import Event
from engrampool_client.lookup.delivery import Delivery, Rows, Valid
from engrampool_client.lookup.landing import Out, by_layer, check_outs, zeros
from engrampool_client.lookup.query import IntArray, Ready, RowQuery, TokenQuery, token_batch
from engrampool_client.lookup.run import Lookups
from engrampool_client.lookup.step import Step
from engrampool_client.pool.discovery import Servers
from engrampool_client.pool.follower import VersionFollower
from engrampool_client.pool.shards import Shards
from engrampool_client.stats import Stats
from engrampool_client.status import ClientStatus, brief, client_status
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.malloc import pin_malloc


class Client:
    """Connections to the servers of one model. Thread-safe; close it, or use it in `with`.

    target: "host:port" or any gRPC name, or several of them: shards, which hold every row together, and replicas of
        them, which take turns and stand in for each other. "dns:///name:port" stands for every address that the name
        has, "ray:///name" for a placement's servers, "etcd://host:port[,...][/prefix]" for those of a registry. Servers
        that are away, and new ones of these, are looked for in the background.
    model, version: None for the only model, and for its only version or, by a registry, whichever is active: that is
        followed. Every lookup is of one version. If servers change to another one that is not followed, lookups fail
        with UnknownVersionError rather than mix the two.
    settings: the fields of `ClientConfig`, which says what they mean.

    Raises on construction UnavailableError, UnknownModelError, UnknownVersionError, FingerprintError, SpecError,
    ProtocolError, CacheFileError, RecordError, RegistryError; ValueError for settings that cannot be.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        model: str | None = None,
        version: str | None = None,
        **settings: Unpack[ClientSettings],
    ) -> None:
        self._config = config = ClientConfig.of(settings)
        if config.keep_memory:
            pin_malloc()
        servers = Servers(list(target) if isinstance(target, Iterable) and not isinstance(target, str) else [target])
        self.target = servers.text
        self._closing = Event()
        self._versions = VersionFollower(servers, servers.named(config))
        self._lookups = Lookups(config, self._versions, self._closing)
        self._recorder: Recorder | None = None
        self._begin_connecting(partial(self._connect, model, version))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None, **settings: Unpack[ClientSettings]) -> Self:
        """One whose target, model, version and settings are variables, such as ENGRAMPOOL_CLIENT_TARGET.

        environ: None for the process's own. settings: these win. Raises ValueError that names the variable, and
        otherwise as construction does. docs/CLIENT.md says how values are written.
        """
        return cls(**{**from_environment(os.environ if environ is None else environ), **settings})

    def _begin_connecting(self, connect: Callable[[], None]) -> None:
        """Here and now; the client of asyncio does it later, and elsewhere."""
        connect()

    def _connect(self, model: str | None, version: str | None) -> None:
        """Find out what is served, and be ready for lookups. `close`, in any thread, ends it by a PoolError."""
        try:
            settings = self._config
            self._form = choose(settings.compiled)
            config, tokenizer, warm, record = (
                None if path is None else Path(path)
                for path in (settings.config, settings.tokenizer, settings.warm, settings.record)
            )
            # Of every version that is followed: hashing and layout must not change under a model that runs.
            self.spec = self._versions.connect(model, version, bounded_s(settings.connect_timeout_s)).spec
            check_fingerprint(self.spec, config, tokenizer)
            self.stats = Stats(self.spec.layers, self._config.slow_lookup_s)
            self._versions.open(self.stats, self._form, warm)
            if record is not None:
                self._recorder = Recorder(record, self.spec, self.version)
            self._lookups.open(self.spec, self.stats, self._recorder)
            if self._closing.is_set():
                raise PoolError("the client was closed")
        except BaseException as error:
            closed = self._closing.is_set()
            self.close()
            if closed and isinstance(error, Exception):  # gRPC has its own ways to say that a channel is closed
                raise PoolError("the client was closed while it connected") from error
            raise

    @property
    def served(self) -> ServedModel:
        """What the servers said of the version that lookups go by now, and their limits."""
        return self._versions.current.served

    @property
    def version(self) -> str:
        """The version that lookups go by now."""
        return self.served.version

    @property
    def trouble(self) -> str | None:
        """Why the version that is active in the registry is not followed, as of now; None if it is."""
        return self._versions.trouble

    @property
    def version_changes(self) -> Mapping[str, int]:
        """How often another version was "followed", "failed" to be there yet, or was "refused" for its layout."""
        return self._versions.changes

    @property
    def registry_age_s(self) -> float | None:
        """Seconds since the registry was last known to answer, inf if it never did; None without one."""
        return self._versions.servers.age_s

    @property
    def cache(self) -> HotRows | None:
        """Rows of the version that lookups go by now; None without `cache_bytes`."""
        return self._versions.current.cache

    @property
    def compiled(self) -> bool:
        """Whether lookups are hashed, deduplicated and cached by compiled kernels; `status` says why not."""
        return self._form.compiled

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
        workers, form = self._lookups.workers, self._form
        return client_status(self._versions, self.stats, workers, self._config, form, self._why_unusable())

    def _why_unusable(self) -> str | None:
        if self._lookups.forked is not None:
            return str(self._lookups.forked)
        return "the client is closed" if self._closing.is_set() else None

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a client has connections and threads, and cannot be copied or saved: make another")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {brief(self.status())}>"

    @property
    def _shards(self) -> Shards:
        return self._versions.current.shards

    @property
    def _layout(self) -> Layout:
        return self._versions.current.layout

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
        valid: Mapping[int, Valid] | None = None,
        ahead: bool = False,
        ready: Ready | None = None,
    ) -> Step:
        """Start the lookup of a batch's rows for `layers` (all by default) and return at once.

        tokens: int32 [T]; query_start_loc: int32 [R + 1], by default one request; lookback: int32 [R, <= n - 1], column
        0 the token just before the chunk, -1 before the start, by default all -1; dead: bool [T] and lookback_dead:
        bool [R, <= n - 1]: tokens outside any n-gram. The arrays are copied; integers of any type that fit are taken,
        as flags 0 and 1.

        out: layer -> uint8 [T, heads, row_bytes], writable (pinned memory, say): the layer's rows are written there, as
        they come, until the step is done; where it is not C-contiguous they are copied there, once they came. Or
        layer -> {segment: uint8 [T, heads, its bytes]}: these segments of the rows (of V4.1 "values" and "scales") are
        copied apart. Layers without any get arrays of the client's.

        valid: layer -> bool [T], where it is written which tokens have their rows, before the layer is handed over.

        timeout_s: the step's deadline, from now on. ahead: the step is for later, as chunks of a prompt that has just
        arrived are: steps without it overtake it.

        ready: for tokens that are not there yet, as they are copied from a device: a thread of the client calls it, and
        what was given is read when it returns (event.synchronize, say). It has to be int32 arrays, without flags, and
        to stay until the step is done. What `ready` raises is raised by `Step.rows`; meanwhile it holds a thread.

        Raises BatchError for arrays that do not fit together, SpecError for an unknown layer, OverloadedError for more
        than `max_pending_bytes`. What takes longer to find out (a token id out of range, a batch over the server's
        limits, a failed call) is raised by `Step.rows`.
        """
        given = tokens, query_start_loc, lookback, dead, lookback_dead
        query = TokenQuery(self.spec, given, self._layers(layers), ready)
        return self._lookups.begin(query, out, timeout_s, ahead, valid=valid)

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
    ) -> Step:
        """Start the lookup of rows by id: layer -> integer array of any shape; `Step.rows` gives [*shape, row_bytes].

        For engines that hash themselves. Ids [..., heads], as hashing gives them, are deduplicated and cached.
        absent: -1 stands for no row, and has zeros; else it is refused.
        out, timeout_s, valid, ahead, ready: as for `prefetch`; out of these shapes, valid of the leading ones.
        Raises as `prefetch` does; bad row ids are raised by `Step.rows`.
        """
        ids = dict(by_layer("rows", rows))
        if ready is None:
            ids = {layer: one.copy() if hasattr(one, "copy") else one for layer, one in ids.items()}
        return self._lookups.begin(RowQuery(self.spec, ids, ready, absent), out, timeout_s, ahead, valid=valid)

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
        valid: Mapping[int, Valid] | None = None,
    ) -> dict[int, Rows]:
        """`prefetch` and wait, in the caller's own thread: layer -> uint8 [T, heads, row_bytes]."""
        given = tokens, query_start_loc, lookback, dead, lookback_dead
        return self._lookups.run(TokenQuery(self.spec, given, self._layers(layers)), out, timeout_s, valid)

    def lookup_rows(
        self,
        rows: Mapping[int, npt.NDArray[Any]],
        *,
        out: Out | None = None,
        timeout_s: float | None = None,
        valid: Mapping[int, Valid] | None = None,
        absent: bool = False,
    ) -> dict[int, Rows]:
        """`prefetch_rows` and wait, in the caller's own thread: layer -> uint8 [*ids.shape, row_bytes]."""
        return self._lookups.run(RowQuery(self.spec, by_layer("rows", rows), absent=absent), out, timeout_s, valid)

    def hint(
        self,
        tokens: IntArray,
        query_start_loc: IntArray | None = None,
        lookback: IntArray | None = None,
        dead: npt.ArrayLike | None = None,
        lookback_dead: npt.ArrayLike | None = None,
    ) -> bool:
        """Have a batch's rows come into the cache and nowhere else, for steps that are not put together yet.

        As a prompt's later chunks are, when it arrives. Arguments are those of `prefetch`. Returns at once: False if
        nothing is asked for, as hints have `hint_bytes` on their way already, or the client is attached. What fails is
        counted. Raises ValueError for a client without a cache, BatchError.
        """
        if self._config.cache_bytes == 0:
            raise ValueError("a hint needs a client with cache_bytes")
        batch = token_batch(tokens, query_start_loc, lookback, dead, lookback_dead)
        batch.check_tokens(self.spec.vocab_size, self.spec.lookback)
        return self._lookups.hint(TokenQuery(self.spec, batch, self.spec.layers))

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
        valid: Mapping[int, Valid] | None = None,
    ) -> Step:
        """Start a step in place of `step`, whose tokens turned out to be others, as when drafts are rejected.

        With a cache, rows of the old step that are on their way are let in first, so that only what changed is asked
        for. Without one the old step is cancelled. Either way it is not to be used any more, nor are its `out` arrays
        until the new step is done. Arguments and errors are those of `prefetch`, which has more of them.
        """
        given = tokens, query_start_loc, lookback, dead, lookback_dead
        query = TokenQuery(self.spec, given, self._layers(layers))
        query.own()  # what is wrong with it is said first
        if self.cache is None or step.delivery.working is None:
            step.cancel()
        return self._lookups.begin(query, out, timeout_s, instead_of=step, valid=valid)

    def dummy(self, num_tokens: int, *, layers: Sequence[int] | None = None, out: Out | None = None) -> Step:
        """A step of `num_tokens` whose rows are zero and whose tokens are not valid; no server is asked.

        For an engine's warm-up, profiling and padding runs. Raises BatchError, SpecError.
        """
        wanted = self._layers(layers)
        query = TokenQuery(self.spec, TokenBatch.of(np.zeros(num_tokens, np.int32)), wanted)
        shapes = query.shapes(self._layout)
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
        self,
        head_sizes: Mapping[int, Sequence[int]],
        row_bytes: int,
        token_map: npt.ArrayLike | None = None,
        multipliers: Mapping[int, Sequence[int]] | None = None,
        fill: int | None = None,
        stop: int | None = None,
    ) -> None:
        """Refuse a server whose tables are not laid out as the engine's are, before the first lookup.

        head_sizes: layer -> rows of each head, in the order of columns. token_map: int32 [vocabulary], the id that each
        token is hashed as, None for a model without one. multipliers: layer -> one a look-back distance; if given they,
        `fill` (the id that stands for what cannot be read) and `stop` (the token that ends a look-back, None for none)
        are compared, too, of models that hash so. Raises FingerprintError listing what differs.
        """
        check_layout(self.spec, head_sizes, row_bytes, token_map, multipliers, fill, stop)

    def save_cache(self, path: str | Path, max_bytes: int | None = None) -> None:
        """Write the hottest rows of the cache to a file for `warm`, at most `max_bytes` of it.

        Raises ValueError without a cache, OSError, ForkedError.
        """
        self._lookups.check_process()
        now = self._versions.current
        if now.cache is None:
            raise ValueError("this client has no cache to save; make it with cache_bytes")
        now.cache.save(Path(path), now.served.version, now.layout.to_json(), max_bytes)

    # --- from batches to lookups

    def _layers(self, layers: Sequence[int] | None) -> Sequence[int]:
        if layers is None:
            return self.spec.layers
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise BatchError(f"layers must be a sequence of layers; it is {layers!r}")
        return sorted({self.spec.table(layer).layer for layer in layers})

    # --- the end, and another process

    def close(self) -> None:
        """End the connections; steps under way fail with StepCancelledError. Nothing is written once this returns.

        In a callback of a step it does not wait for the client's threads, which end a little later.
        In a child of the process that the client was made in it does nothing: there is nothing that is the child's.
        """
        if self._lookups.forked is not None:
            return
        self._closing.set()
        self._lookups.give_up_all(StepCancelledError("the client was closed"))
        self._versions.close()
        self._lookups.close()
        if self._recorder is not None:
            self._recorder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["Client", "Step"]
