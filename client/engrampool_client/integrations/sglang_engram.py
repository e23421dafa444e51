"""What stands in SGLang's Engram layers: tables without rows, and hooks that have rows come from the pool.

For graphs that run Python between their pieces, or none. Imported by `sglang.py` alone.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pkgutil import resolve_name
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers import engram, engram_staging
from sglang.srt.layers.dp_attention import attn_tp_all_reduce
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph import eager_on_graph
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.context import is_in_breakable_cuda_graph
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_disagg, get_exec, get_flags, get_parallel, get_spec

from engrampool_client.client import Client
from engrampool_client.errors import PoolError
from engrampool_client.integrations import engine
from engrampool_client.integrations.forwards.agreement import Agree, over, settle
from engrampool_client.integrations.forwards.checkpoint import CheckpointTable
from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.history import Flags, Ids
from engrampool_client.integrations.forwards.settings import EngineSettings
from engrampool_client.integrations.forwards.verify import RowCheck
from engrampool_client.integrations.sglang_prompts import Chunk, Prompts, chunks_of
from engrampool_client.integrations.staging import Staging

_log = logging.getLogger("engrampool")


class _Worker:
    """What this process has. client: from the first table on. layers, counts: once all tables are made, and checked.

    metrics: what answers Prometheus. agree: how the ranks that have the same tokens come to one outcome.
    begun: how many forwards there were. dummy: whether the last of them asks nobody. quiet: while it is not 0, those
    that begin are of that kind. prompts: once there was a batch of them; it has the rows of forwards that were staged,
    and `Staging` those of the others.
    """

    client: Client | None = None
    layers: tuple[int, ...] = ()
    metrics: Any = None
    agree: Agree | None = None
    begun = 0
    dummy = False
    quiet = 0
    prompts: Prompts | None = None
    _staged = False
    _table: CheckpointTable | None = None
    # Qwen4's, which hash its row ids, in the order of layers.
    embeddings: Sequence[Any] = ()
    _staging: Staging | None = None
    _most = 512
    # Of the last forward, if it could not be asked for: its tokens, and why.
    _failed: tuple[int, Exception] | None = None

    def __init__(self) -> None:
        self.counts = EngineCounts(())

    def connect(self, heads: int) -> tuple[int, slice]:
        """Make the client, once. Gives how many ranks have the same tokens, and which columns are this one's."""
        parallel = get_parallel()
        ranks = parallel.attn_tp_size
        columns = engine.columns_of(heads, parallel.attn_tp_rank, ranks)
        if self.client is None:
            own = None if ranks == 1 else (columns.start, columns.stop)
            self.client = Client.from_environment(os.environ, heads=own)
        return ranks, columns

    def ready(self, layers: list[int], columns: slice, device: torch.device) -> None:
        """The model is made. layers: of its tables, in the order of hashes. columns: of the row ids, this rank's."""
        self.layers, self._columns, self._device = tuple(layers), columns, device
        self._settings = EngineSettings.of(os.environ)
        if self._settings.verify and self._settings.verify_checkpoint is not None:
            self._table = CheckpointTable(self._settings.verify_checkpoint, self.layers)
        self.counts, parallel = EngineCounts(layers), get_parallel()
        if parallel.attn_tp_size > 1:
            self.agree = over(parallel.attn_tp_group.cpu_group)
        port = self._settings.metrics_port
        if port is not None:
            from engrampool_client.integrations.forwards import metrics

            # With data-parallel attention all of a replica's ranks are counted together, and there is but one replica.
            replica = 0 if parallel.attn_dp_enabled else parallel.dp_rank or 0
            at = port + replica * parallel.launch_world_size + parallel.launch_world_rank
            assert self.client is not None
            self.metrics = metrics.serve(at, self.client, self.counts)

    def start(self, ids: Sequence[torch.Tensor]) -> None:
        """Begin the lookup of a forward's rows; `rows` raises what stops it. ids: of each layer, [tokens, heads]."""
        self._next_forward()
        if self.dummy:
            return
        try:
            staging = self._staging_of(len(ids[0]))
            for layer, own in zip(self.layers, ids, strict=True):
                staging.start(layer, own[:, self._columns])
        except Exception as error:
            self._failed = len(ids[0]), error  # not raised here, where no other rank would learn of it

    def failed(self, tokens: int, error: Exception) -> None:
        """In the place of `start`: so many tokens were to be asked for, and cannot be. `rows` raises it."""
        self._next_forward()
        self._failed = tokens, error

    def stage(self, batch: Any, chunks: list[Chunk], engines: Callable[[], dict[int, Ids]], hasher: Any) -> bool:
        """In the place of `start`: begin the lookup of a batch's chunks. False if there is no memory for so many.

        engines: gives the row ids that the engine hashes itself. hasher: the engine's, for what it hashes by.
        """
        try:
            if self.prompts is None:
                assert self.client is not None
                own = (self.client, self.layers, self._columns, self._device)
                self.prompts = Prompts(*own, batch, hasher, self.agree, self.counts, self._table)
            if not self.prompts.fits(chunks):
                return False
            self._next_forward()
            self._staged = True
            if not self.dummy:
                self.prompts.start(chunks, engines)
        except Exception as error:
            self.failed(sum(stop - start for _, start, stop in chunks), error)
        return True

    def _next_forward(self) -> None:
        self.begun += 1
        self.dummy, self._failed, self._staged = self.quiet > 0, None, False
        self.counts.dummies += self.dummy

    def rows(self, layer: int) -> torch.Tensor | None:
        """As `Staging.rows`, of the last forward that began; of a GPU there, or on their way on the current stream."""
        if self.dummy:
            return None
        if self._failed is not None:
            tokens, error = self._failed

            def find(_: Flags) -> None:
                raise error

            self.counts.failed += 1
            settle(1, tokens, find, self.agree)
        if self._staged:
            assert self.prompts is not None
            return self.prompts.rows(layer)
        if self._staging is None:
            raise PoolError(f"no row ids of layer {layer} were given")
        rows = self._staging.rows(layer)
        if rows is not None and self._device.type == "cuda":
            rows = rows.to(self._device, non_blocking=True)
            self._staging.copied()
        return rows

    def _staging_of(self, tokens: int) -> Staging:
        """One whose memory does for so many tokens: SGLang sets no bound on them that holds for all forwards.

        What was begun in a smaller one is over: its rows were read, or its model failed.
        """
        if self._staging is None or tokens > self._most:
            most = max(self._most, 1 << (tokens - 1).bit_length())
            assert self.client is not None
            columns = self._columns.stop - self._columns.start
            self._staging = Staging(
                self.client,
                self.layers,
                columns,
                most,
                self._device,
                agree=self.agree,
                counts=self.counts,
                check=None if self._table is None else RowCheck(self._table, self.counts),
            )
            self._most = most
        return self._staging

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.shutdown()
            self.metrics.server_close()
        if self.prompts is not None:
            self.prompts.release()
        if self._staging is not None:
            self._staging.close()
        elif self.client is not None:
            self.client.close()


_worker = _Worker()


def worker() -> _Worker:
    """What this process has now; another once its scheduler has ended."""
    return _worker


class PooledTable(engram.EngramEmbedding):
    """In the place of a layer's table: its parameters, of no rows, which the engine's own loader fills with none.

    columns: of the row ids, those that this rank asks for. Ranks that have the same tokens add up what they have, as
    they do with the engine's own tables.
    """

    def __init__(self, num_embeddings: int, dim: int, layer_id: int, column_bounds: tuple[int, ...]) -> None:
        check_settings()
        super().__init__(0, dim, layer_id, (0,) * len(column_bounds))
        self.layer = layer_id
        # The layer then looks up between the pieces of a prefill's graph.
        self.staged_by_scheduler = True
        self.ranks, self.columns = _worker.connect(len(column_bounds) - 1)

    def forward(self, indices: torch.Tensor, forward_batch: Any = None, *, cp_all_tokens: bool = False) -> torch.Tensor:
        """The numbers of a forward's rows, whose lookup began when they were hashed."""
        values = self.new_rows(indices)
        if indices.shape[0] == 0 or (forward_batch is not None and forward_batch.forward_mode.is_idle()):
            return values.zero_()
        fill = _fill.run_eager if _between_pieces(forward_batch) else _fill
        fill(self, values, False)
        return self._of_all_ranks(values)

    def dequant_staged(self, begun: int, hash_shape: torch.Size) -> torch.Tensor:
        """The numbers of rows whose lookup the stager began. hash_shape: [tokens, heads], with a graph's padding."""
        if begun != _worker.begun:
            raise PoolError("the rows of another forward were asked for since this one's")
        values = torch.empty(*hash_shape, self.dim, dtype=torch.bfloat16, device=self.weight.device)
        _fill.run_eager(self, values, True)
        return self._of_all_ranks(values)

    def _of_all_ranks(self, values: torch.Tensor) -> torch.Tensor:
        # Each rank has zeros where another one has numbers.
        return attn_tp_all_reduce(values) if self.ranks > 1 else values


def check_settings(more: Sequence[tuple[bool, str]] = ()) -> None:
    """Raise RuntimeError for a SGLang that was started in a way that this cannot serve.

    more: of a model, what is wrong with how it was started, and how to start it instead.
    """
    decode, prefill = (check_cuda_graph_backend(phase, Backend.FULL) for phase in (Phase.DECODE, Phase.PREFILL))
    speculative = get_spec().speculative_algorithm and not check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED)
    unfit = [
        (speculative, "with --cuda-graph-backend-decode disabled, as there is a --speculative-algorithm"),
        (decode and not speculative, "with --cuda-graph-backend-decode breakable (or disabled)"),
        (prefill, "with --cuda-graph-backend-prefill breakable (or disabled)"),
        (get_parallel().attn_cp_size > 1, "without context parallelism"),
        (get_exec().overlap.enable_two_batch_overlap, "without --enable-two-batch-overlap"),
        (get_disagg().enable_pdmux, "without --enable-pdmux"),
        (get_flags().capture.enable_torch_compile, "without --enable-torch-compile"),
        (envs.SGLANG_ENABLE_DSV41_ENGRAM_HOST_TABLE.get(), "without SGLANG_ENABLE_DSV41_ENGRAM_HOST_TABLE"),
        (envs.SGLANG_OPT_DSV41_ENGRAM_PEER_SHARDS.get(), "without SGLANG_OPT_DSV41_ENGRAM_PEER_SHARDS"),
        *more,
    ]
    instead = [text for wrong, text in unfit if wrong]
    if instead:
        raise RuntimeError(
            "rows come from the pool between the pieces of a graph, or without graphs, one forward at a time: start "
            f"SGLang {'; '.join(instead)}"
        )


def _between_pieces(forward_batch: Any) -> bool:
    """Whether the engine itself made the break in a prefill's graph that this runs in: there may be none within it."""
    return (
        forward_batch is not None
        and forward_batch.forward_mode.is_extend_without_speculative()
        and is_in_breakable_cuda_graph()
    )


@eager_on_graph
def _start(ids: torch.Tensor) -> None:
    refuse_capture(ids)
    # As the host's memory has them: where types differ, PyTorch waits for the copy.
    _worker.start((ids.int() if ids.is_cuda else ids).unbind(1))


@eager_on_graph
def _fill(table: PooledTable, values: torch.Tensor, padded: bool) -> None:
    """Wait for a layer's rows, and write their numbers. padded: there may be more values than rows, which are zero."""
    refuse_capture(values)
    rows = _worker.rows(table.layer)
    if rows is None:
        values.zero_()
        return
    tokens = len(rows)
    if tokens != len(values) and not (padded and tokens < len(values)):
        raise PoolError(f"rows of {tokens} tokens were asked for, and of {len(values)} are wanted")
    if table.ranks == 1:
        numbers(rows, table.dim, values[:tokens])
        values[tokens:].zero_()
    else:
        values.zero_()
        values[:tokens, table.columns] = numbers(rows, table.dim, values.new_empty(*rows.shape[:2], table.dim))


def refuse_capture(where: torch.Tensor) -> None:
    """Raise RuntimeError in a graph that would have no break here. where: a tensor where it would be captured."""
    if where.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a graph of a whole forward is captured: it would never take rows from the pool")


def numbers(rows: torch.Tensor, dim: int, out: torch.Tensor) -> torch.Tensor:
    """Rows as the engine has them. rows: uint8 [tokens, columns, row_bytes]. out: bfloat16 [tokens, columns, dim]."""
    values, scales = rows[..., :dim].contiguous(), rows[..., dim:].contiguous()
    if out.is_cuda:
        places = torch.arange(out.numel() // dim, dtype=torch.int32, device=out.device)
        flat = out.view(-1, dim)
        engram.engram_gather(values.data_ptr(), scales.data_ptr(), places, flat, dim, engine.BLOCK)
    else:
        blocks = values.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, engine.BLOCK))
        scaled = blocks * scales.view(torch.float8_e8m0fnu).float().unsqueeze(-1)
        out.copy_(scaled.flatten(-2))
    return out


class Stager(engram_staging.EngramRowStager):
    """In the place of the engine's: a prompt's lookup begins when its batch is made, and the layers wait for it.

    hasher: the engine's, by whose depth `_windows` goes, and which verifying compares with.
    """

    def __init__(self, hasher: Any) -> None:
        self.hasher = hasher

    def stage(self, batch: Any) -> list[tuple[int]] | None:
        """Begin the lookup of an extend batch's rows; None leaves it to the forward."""
        if not batch.forward_mode.is_extend_without_speculative():
            return None
        chunks = chunks_of(batch)
        if chunks is None or not _worker.stage(batch, chunks, lambda: self._hashed(batch), self.hasher):
            return None
        return [(_worker.begun,)] * len(_worker.layers)

    def _hashed(self, batch: Any) -> dict[int, Ids]:
        """The row ids that the engine itself makes of a batch on the host."""
        found = self.hasher.hash_windows(*vars(engram_staging.EngramRowStager)["_windows"](self, batch))[0].numpy()
        return {layer: found[:, at] for at, layer in enumerate(_worker.layers)}


def _from_model(_: type, model: torch.nn.Module, hasher: Any, device: torch.device) -> Stager:
    """The model is made, and what it hashes by: compare that with what is served."""
    layers = [one for one in model.modules() if isinstance(one, engram.Engram)]
    tables = [layer.embed for layer in sorted(layers, key=lambda layer: layer.layer_hash_index)]
    if not all(isinstance(table, PooledTable) for table in tables) or _worker.client is None:
        raise RuntimeError("this model's tables are not in the pool: they were made before SGLang loaded its plugins")
    made = [table.layer for table in tables]
    heads = {layer: hasher.primes[at].flatten().tolist() for at, layer in enumerate(made)}
    multipliers = {layer: hasher.multipliers[at].tolist() for at, layer in enumerate(made)}
    engine.check_served(
        _worker.client, heads, tables[0].dim, hasher.token_map.cpu().numpy(), multipliers, hasher.pad_id
    )
    _worker.ready(made, tables[0].columns, torch.device(device))
    return Stager(hasher)


def _hashed(hash_ids: torch.Tensor, hasher: Any, input_ids: torch.Tensor, forward_batch: Any) -> None:
    """A forward was hashed: begin the lookup of its rows, but for those that the stager asks for."""
    mode = forward_batch.forward_mode
    if forward_batch.engram_staged_rows is not None or input_ids.shape[0] == 0 or mode.is_idle():
        return
    if mode.is_decode() and forward_batch.out_cache_loc is not None:
        # What pads a graph has no row. Its place in the cache is 0, by which the hasher itself knows it.
        hash_ids = hash_ids.masked_fill((forward_batch.out_cache_loc == 0)[:, None, None], -1)
    (_start.run_eager if _between_pieces(forward_batch) else _start)(hash_ids)


def _ran(_: Any, scheduler: Any, *__: Any, **___: Any) -> None:
    """A batch was launched, and its rows are there: ask for those of what comes next."""
    if _worker.prompts is None:
        return
    # Where decoding is disaggregated, those that wait have been through their prompts elsewhere.
    waiting = () if scheduler.disaggregation_mode.value == "decode" else scheduler.waiting_queue
    try:
        _worker.prompts.look_ahead(scheduler.chunked_req, waiting, scheduler.disable_radix_cache)
    except Exception as error:  # the forward asks itself
        _log.warning("rows of prompts are not asked for early: %s", error)


def _quietly(run: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Forwards within this are for warming up, tuning and capturing: nobody is asked, and rows are zeros."""
    worker = _worker
    worker.quiet += 1
    try:
        return run(*arguments, **named)
    finally:
        worker.quiet -= 1


def _closed(*_: Any) -> None:
    """The scheduler ends: give up what is under way, and let go of the client."""
    global _worker
    worker, _worker = _worker, _Worker()
    worker.close()


_GRAPHS = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup"
_HOOKS: dict[str, tuple[Callable[..., Any], HookType]] = {
    "sglang.srt.layers.engram.EngramEmbedding": (PooledTable, HookType.REPLACE),
    "sglang.srt.layers.engram.EngramHasher.forward": (_hashed, HookType.AFTER),
    "sglang.srt.layers.engram_staging.EngramRowStager.from_model": (_from_model, HookType.REPLACE),
    f"{_GRAPHS}.capture_cuda_graphs": (_quietly, HookType.AROUND),
    f"{_GRAPHS}.capture_prefill_graph": (_quietly, HookType.AROUND),
    f"{_GRAPHS}.capture_decode_graph": (_quietly, HookType.AROUND),
    "sglang.srt.model_executor.runner.base_runner.BaseRunner._dummy_run": (_quietly, HookType.AROUND),
    "sglang.srt.managers.scheduler.Scheduler.run_batch": (_ran, HookType.AFTER),
    "sglang.srt.managers.scheduler.Scheduler.release_host_resources": (_closed, HookType.AFTER),
}


def install(more: Mapping[str, tuple[Any, HookType]] | None = None) -> None:
    """Have all this, and more of other models, put into the engine when it applies its plugins' hooks.

    The engine logs what it cannot apply, and goes on. So its own function raises RuntimeError then.
    """
    hooks = {**_HOOKS, **(more or {})}
    before = {target: _found(target) for target in hooks}
    for target, (hook, kind) in hooks.items():
        HookRegistry.register(target, hook, kind)
    apply = HookRegistry.apply_hooks

    @wraps(apply)
    def apply_hooks() -> None:
        HookRegistry.apply_hooks = apply
        apply()
        missing = [target for target, function in before.items() if _found(target) is function]
        if missing:
            raise RuntimeError(
                f"engrampool did not come to stand in SGLang's {', '.join(missing)}: its log says why. Take away a "
                "plugin that is in the way, by SGLANG_PLUGINS=engrampool say, or unset ENGRAMPOOL_CLIENT_TARGET"
            )

    HookRegistry.apply_hooks = apply_hooks


def _found(target: str) -> Any:
    """What stands at a hook's target now."""
    place, _, name = target.rpartition(".")
    return vars(resolve_name(place))[name]
