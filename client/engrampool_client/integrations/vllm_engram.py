"""What stands in vLLM's Engram layers: a table without rows, and four methods that have rows come from the pool.

Where graphs run Python between their pieces, or there are none (`--enforce-eager`), rows come in a forward (`Staging`).
Where a graph is of a whole forward they are there before it begins (`vllm_state.py`), and layers read them from memory
of a fixed address. Imported by `vllm.py` alone.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.distributed import get_tp_group
from vllm.models.deepseek_v41.common import engram

from engrampool_client.client import Client
from engrampool_client.config import ClientConfig, from_environment
from engrampool_client.errors import PoolError
from engrampool_client.integrations import engine, vllm_state
from engrampool_client.integrations.forwards.agreement import Agree, over
from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.settings import EngineSettings
from engrampool_client.integrations.staging import Staging
from engrampool_client.integrations.vllm import check_parameters

# Rows are made numbers of so many tokens at a time, which bounds what that takes.
_AT_ONCE = 1024


class _Worker:
    """What this process has. client: from the first Engram layer on.

    whole: whether graphs are of whole forwards. Once all layers are made, and checked, there are counts, hashes (the
    engine's own), and staging; or a feeder, once the model's state is made. metrics: what answers Prometheus.
    """

    client: Client | None = None
    staging: Staging | None = None
    feeder: Any = None
    hashes: Any = None
    metrics: Any = None
    counts: EngineCounts | None = None
    whole = False

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def connect(self, columns: slice, heads: int) -> Client:
        """The client; it asks for the given ones of all columns."""
        if self.client is None:
            every = columns == slice(0, heads)
            self.client = Client.from_environment(os.environ, heads=None if every else (columns.start, columns.stop))
        return self.client

    def ready(self, numbers: Sequence[int], columns: slice, max_tokens: int, device: torch.device) -> None:
        """All layers are made, and what is served is theirs. numbers: of the layers. device: where they read rows."""
        assert self.client is not None
        self.counts = EngineCounts(numbers)
        port = EngineSettings.of(os.environ).metrics_port
        if port is not None:
            from engrampool_client.integrations.forwards import metrics

            parallel = engram.get_current_vllm_config().parallel_config
            at = port + parallel.data_parallel_rank * parallel.world_size + parallel.rank
            self.metrics = metrics.serve(at, self.client, self.counts)
        if not self.whole:
            width, agree = columns.stop - columns.start, ranks_agree()
            self.staging = Staging(self.client, numbers, width, max_tokens, device, agree=agree, counts=self.counts)

    @property
    def supply(self) -> Any:
        """Who has forwards that ask nobody; None before all is made."""
        return self.staging if self.feeder is None else self.feeder.supply


_worker = _Worker()


def worker() -> _Worker:
    """What this process has now; another after `close`."""
    return _worker


class PooledTable(engram.ParallelEngramEmbedding):
    """In the place of a layer's table: the same shards and parameters, of no rows.

    columns: of the row ids, those that are this rank's. What the engine has beyond the last head stays zeros.
    A checkpoint's table is loaded into it by the engine's own loader, which takes no rows of it.
    """

    # The pool is not sharded over data-parallel ranks; the engine asks its tables whether they are.
    dp_size = property(lambda self: 1, lambda self, value: None)

    def __init__(self, layout: Any, layer_hash_index: int) -> None:
        heads = tuple(size for order in layout.primes[layer_hash_index] for size in order)
        super().__init__(layout.num_embeddings[layer_hash_index], layout.head_dim, heads)
        self.layer = layout.layer_ids[layer_hash_index]
        self.columns = slice(self.head_start, min(self.head_start + self.part_n_hash_cols, self.n_hash_cols))

    def _allocate_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.empty(0, self.dim, dtype=torch.float8_e4m3fn)
        return values, torch.empty(0, self.dim // self.block_size, dtype=torch.uint8)

    def _storage(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise PoolError("this table's rows are in the pool: Engram.prepare_embeddings asks for them")


def check_mode(vllm_config: Any) -> bool:
    """Whether graphs of whole forwards may run. Raises RuntimeError for what rows cannot come to."""
    compilation = vllm_config.compilation_config
    whole: bool = compilation.cudagraph_mode.has_mode(CUDAGraphMode.FULL)
    refused = None
    if compilation.mode != CompilationMode.NONE:
        refused = f"compiled models ({compilation.mode}): start vLLM without VLLM_USE_BREAKABLE_CUDAGRAPH=0"
    elif whole and not vllm_config.use_v2_model_runner:
        refused = (
            f"{compilation.cudagraph_mode} with the V1 model runner: start vLLM without VLLM_USE_V2_MODEL_RUNNER=0"
        )
    elif whole and vllm_config.parallel_config.prefill_context_parallel_size > 1:
        refused = f"{compilation.cudagraph_mode} with prefill context parallelism: start vLLM without"
    if refused is not None:
        raise RuntimeError(
            f"rows cannot come from the pool to {refused}, or with --compilation-config "
            '\'{"cudagraph_mode": "PIECEWISE"}\', or with --enforce-eager'
        )
    return whole


def _create_embedding(self: Any, layout: Any, layer_hash_index: int) -> PooledTable:
    _worker.whole = check_mode(engram.get_current_vllm_config())
    table = PooledTable(layout, layer_hash_index)
    _worker.connect(table.columns, table.n_hash_cols)
    _worker.layers.append(self)
    return table


def _init_staging(self: Any, max_tokens: int, head_dim: int) -> None:
    table = self.embed_tokens
    # Of fixed addresses, as graphs read it. Columns beyond the last head are never written, and stay zeros.
    self.staged_rows = torch.zeros(max_tokens, table.part_n_hash_cols, head_dim, dtype=torch.bfloat16)
    self._prefetch_stream = None


def prepare_embeddings(self: Any, hash_ids: torch.Tensor) -> None:
    """Start the lookup of a forward's rows. hash_ids: of all columns, -1 for tokens without rows."""
    assert hash_ids.shape[0] <= self.staged_rows.shape[0], "engram staging buffer too small"
    if not _worker.whole:
        _start(self, hash_ids)


@eager_break_during_capture
def _start(layer: Any, hash_ids: torch.Tensor) -> None:
    table = layer.embed_tokens
    assert _worker.staging is not None
    _worker.staging.start(table.layer, hash_ids[:, table.columns])


def _ready_rows(self: Any, num_tokens: int) -> torch.Tensor:
    rows = self.staged_rows[:num_tokens]
    if not _worker.whole:
        _finish(self, rows)
    elif _worker.feeder is not None:  # part of the graph, which reads this memory in every forward
        table = self.embed_tokens
        landed = _worker.feeder.supply.landed(table.layer)[:num_tokens]
        _numbers_of(landed, table, rows[:, : table.columns.stop - table.columns.start])
    return rows


@eager_break_during_capture
def _finish(layer: Any, staged: torch.Tensor) -> None:
    """Wait for the layer's rows, and write their numbers where the layer reads them."""
    table = layer.embed_tokens
    assert _worker.staging is not None
    rows = _worker.staging.rows(table.layer)
    staged = staged[:, : table.columns.stop - table.columns.start]
    if rows is None:
        staged.zero_()
        return
    if len(rows) != len(staged):
        raise PoolError(f"rows of {len(rows)} tokens were asked for, and of {len(staged)} are wanted")
    if staged.is_cuda:
        rows = rows.to(staged.device, non_blocking=True)
        _worker.staging.copied()
    _numbers_of(rows, table, staged)


def _numbers_of(rows: torch.Tensor, table: Any, staged: torch.Tensor) -> None:
    for at in range(0, len(rows), _AT_ONCE):
        numbers(rows[at : at + _AT_ONCE], table.dim, table.block_size, staged[at : at + _AT_ONCE])


def numbers(rows: torch.Tensor, dim: int, block: int, out: torch.Tensor) -> None:
    """Rows as the engine's kernel has them: a scale's byte is a float's exponent, so 0 is zero, and 255 infinity."""
    values = rows[..., :dim].view(torch.float8_e4m3fn).to(torch.float32)
    scales = (rows[..., dim:].to(torch.int32) << 23).view(torch.float32)
    out.copy_((values.unflatten(-1, (-1, block)) * scales.unsqueeze(-1)).flatten(-2))


def check_served(client: Client, state: Any) -> None:
    """Refuse a server that does not serve what this engine's hashes are of. Raises FingerprintError."""
    layout = state.layout
    heads = {
        layer: [size for order in orders for size in order]
        for layer, orders in zip(layout.layer_ids, layout.primes, strict=True)
    }
    multipliers = {layer: state.multipliers[at].tolist() for at, layer in enumerate(layout.layer_ids)}
    engine.check_served(client, heads, layout.head_dim, state.token_map.cpu().numpy(), multipliers, state.pad_id)


def _made(state: Any) -> None:
    """All of this process's Engram layers are made, and what they hash by."""
    if _worker.client is None:
        return
    check_served(_worker.client, state)
    _worker.hashes, staged = state, _worker.layers[0].staged_rows
    tables = [layer.embed_tokens for layer in _worker.layers]
    _worker.ready([table.layer for table in tables], tables[0].columns, len(staged), staged.device)


def ranks_agree() -> Agree | None:
    """How the ranks of this one's tensor-parallel group come to one outcome; None if there is but this one."""
    group = get_tp_group()
    return None if group.world_size == 1 else over(group.cpu_group)


def _feeder_of(vllm_config: Any, device: torch.device) -> Any:
    """What has the rows of each forward of this worker be there before it begins."""
    given = from_environment(os.environ)
    tables = [layer.embed_tokens for layer in _worker.layers]
    assert _worker.client is not None
    assert _worker.counts is not None
    _worker.feeder = vllm_state.Feeder(
        vllm_config,
        _worker.client,
        tables,
        _worker.hashes,
        device,
        timeout_s=given.get("timeout_s", ClientConfig.timeout_s),
        agree=ranks_agree(),
        counts=_worker.counts,
        settings=EngineSettings.of(os.environ),
    )
    return _worker.feeder


def install() -> None:
    """Put all this into the engine, once. Raises RuntimeError if its functions are others than expected."""
    if engram.Engram.prepare_embeddings is prepare_embeddings:
        return
    check_parameters()
    from vllm.v1.worker.gpu import model_states
    from vllm.v1.worker.gpu.async_utils import AsyncOutput
    from vllm.v1.worker.gpu_worker import Worker

    for function in (_create_embedding, _init_staging, prepare_embeddings, _ready_rows):
        setattr(engram.Engram, function.__name__, function)
    made = engram.NgramHashState.__init__

    @wraps(made)
    def make_and_check(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        _made(self)

    engram.NgramHashState.__init__ = make_and_check
    resolve = model_states.resolve_model_state_cls

    @wraps(resolve)
    def resolve_with_rows(vllm_config: Any, model: Any) -> Any:
        found = resolve(vllm_config, model)
        return vllm_state.with_rows(found, _feeder_of) if _worker.whole and _worker.hashes is not None else found

    model_states.resolve_model_state_cls = resolve_with_rows
    copied = AsyncOutput.__init__

    @wraps(copied)
    def copy_and_tell(self: Any, *arguments: Any, **named: Any) -> None:
        copied(self, *arguments, **named)
        if _worker.feeder is not None:
            _worker.feeder.sampled(self)

    AsyncOutput.__init__ = copy_and_tell
    for name in ("determine_available_memory", "compile_or_warm_up_model", "execute_dummy_batch"):
        setattr(Worker, name, _quietly(getattr(Worker, name)))
    Worker.shutdown = _closing(Worker.shutdown)


def _quietly(run: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the worker whose forwards are for warming up, profiling or capturing, or another rank's company."""

    @wraps(run)
    def quietly(self: Any, *arguments: Any, **named: Any) -> Any:
        with _worker.supply.quiet() if _worker.supply is not None else nullcontext():
            return run(self, *arguments, **named)

    return quietly


def _closing(shutdown: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(shutdown)
    def close_after(self: Any) -> Any:
        try:
            return shutdown(self)
        finally:
            close()

    return close_after


def close() -> None:
    """Give up what is under way, and let go of the client."""
    global _worker
    worker, _worker = _worker, _Worker()
    if worker.metrics is not None:
        worker.metrics.shutdown()
        worker.metrics.server_close()
    if worker.supply is not None:
        worker.supply.close()
    elif worker.client is not None:
        worker.client.close()
